"""Replays golden files of the family `blip` (tests/golden): every stage of pictures and texts."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.blip import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the picture's trunk's input, the tower's output, the text layers and the reward."""
  sizes = convert.config_of(source, **config['options'])
  params = convert.load_weights(source, sizes)

  def run_model(params, inputs):
    model = modules.bind_module(modeling.build_model, sizes, params)
    image = model.vision(inputs['images'])
    text = model.encode_text(inputs['ids'], inputs['mask'])
    first, states = model.fuse_image(text, inputs['mask'], image)
    return {
      'tokens': model.vision.embed_patches(inputs['images']),
      'image': image,
      'embedded': model.embed_tokens(inputs['ids']),
      'states': states,
      'first': first,
      'reward': model.predict_reward(first),
    }

  # numpy's int64 ids are int32 in jax
  inputs = {k: v if v.dtype.kind == 'f' else v.astype(np.int32) for k, v in inputs.items()}
  return {name: np.asarray(value) for name, value in jax.jit(run_model)(params, inputs).items()}
