"""Replays golden files of the family `t5` (tests/golden): ids and mask in, hidden states out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.t5 import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns `last_hidden` of `ids` under `mask`, and `last_hidden_unmasked`."""
  settings = convert.config_of(source, options=config['params'])
  params = convert.load_weights(source, settings)
  encode = jax.jit(lambda p, *args: modules.bind_module(modeling.build_model, settings, p)(*args))
  ids, mask = inputs['ids'], inputs['mask']
  return {
    'last_hidden': np.asarray(encode(params, ids, mask)),
    'last_hidden_unmasked': np.asarray(encode(params, ids)),
  }
