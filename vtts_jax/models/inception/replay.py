"""Replays golden files of the family `inception` (tests/golden): grids, features and logits.

The files hold 500 small tensors as one array; `names` in their config tells them apart.
"""

import jax
import numpy as np

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.inception import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the picture under both preprocessings, every grid's means, features and logits."""
  # one array in the file, because the headers of 500 small ones would exceed 50 kB
  source = source_of_arrays(unpack_tensors(source.read_tensor('flat'), config['names']))
  settings = convert.config_of(source, **config['options'])
  params = convert.load_weights(source, settings)
  pictures = inputs['pictures'].astype(np.float32) / 255

  @jax.jit
  def run_model(params, pictures):
    model = modules.bind_module(modeling.build_model, settings, params)
    seen = {how: modeling.preprocess(settings, pictures, how) for how in modeling.PREPROCESSINGS}
    x = seen['pytorch_fid']
    grids = {f'mean_{k}': v.mean((1, 2)) for k, v in model.stage_grids(x).items()}
    features = model(x)
    return {
      # every ninth pixel keeps the file small
      **{f'seen_{k}': v[:, ::9, ::9] for k, v in seen.items()},
      **grids,
      'features': features,
      'logits': model.class_logits(features),
    }

  return {name: np.asarray(value) for name, value in run_model(params, pictures).items()}


def unpack_tensors(flat, names) -> dict[str, np.ndarray]:
  """Cuts `flat` into the tensors `[[name, shape], ...]` that lie in it one after the other."""
  found, start = {}, 0
  for name, shape in names:
    end = start + int(np.prod(shape))
    found[name], start = flat[start:end].reshape(shape), end
  return found
