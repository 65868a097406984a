"""Golden files of the family `yolos` (tests/golden): pictures in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.yolos import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The first and last block, logits and boxes of the normalised `images [R, H, W, 3]`."""
  settings = convert.config_of(source, **config['params'])
  params = convert.load(source, settings)

  @jax.jit
  def run(params, images):
    model = modules.bind_module(modeling.build, settings, params)
    last, states = model.states(images, every=True)
    logits, boxes = model(images)
    return {'first': states[0], 'last': last, 'logits': logits, 'boxes': boxes}

  return {k: np.asarray(v) for k, v in run(params, inputs['images']).items()}
