"""Replays golden files of the family `yolos` (tests/golden): pictures in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.yolos import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the first and last block, logits and boxes of normalised `images [R, H, W, 3]`."""
  settings = convert.config_of(source, **config['params'])
  params = convert.load_weights(source, settings)

  @jax.jit
  def run_model(params, images):
    model = modules.bind_module(modeling.build_model, settings, params)
    last, states = model.hidden_states(images, every=True)
    logits, boxes = model(images)
    return {'first': states[0], 'last': last, 'logits': logits, 'boxes': boxes}

  return {k: np.asarray(v) for k, v in run_model(params, inputs['images']).items()}
