"""Golden files of the family `blip` (tests/golden): pictures, ids and mask in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.blip import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What goes into the picture's trunk and comes out of the tower, the text layers, the reward."""
  sizes = convert.config_of(source, **config['options'])
  params = convert.load(source, sizes)

  def run(params, inputs):
    model = modules.bind_module(modeling.build, sizes, params)
    image = model.vision(inputs['images'])
    text = model.text(inputs['ids'], inputs['mask'])
    first, states = model.fuse(text, inputs['mask'], image)
    return {
      'tokens': model.vision.tokens(inputs['images']),
      'image': image,
      'embedded': model.embed(inputs['ids']),
      'states': states,
      'first': first,
      'reward': model.reward(first),
    }

  inputs = {k: v if v.dtype.kind == 'f' else v.astype(np.int32) for k, v in inputs.items()}
  return {name: np.asarray(value) for name, value in jax.jit(run)(params, inputs).items()}
