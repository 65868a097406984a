"""Golden files of the family `inception` (tests/golden): pictures in, grids, features, logits out.

Their 500 small tensors are one array, `names` in the config tells them apart.
"""

import jax
import numpy as np

from vtts_jax.checkpoints import source as source_files
from vtts_jax.models import modules
from vtts_jax.models.inception import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The picture under both preprocessings, the means of every grid, features, logits."""
  source = source_files.arrays(unpack(source.get('flat'), config['names']))
  settings = convert.config_of(source, **config['options'])
  params = convert.load(source, settings)
  pictures = inputs['pictures'].astype(np.float32) / 255

  def run(params, pictures):
    model = modules.bind_module(modeling.build, settings, params)
    seen = {how: modeling.preprocess(settings, pictures, how) for how in modeling.PREPROCESSINGS}
    x = seen['pytorch_fid']
    grids = {f'mean_{k}': v.mean((1, 2)) for k, v in model.grids(x).items()}
    features = model(x)
    return {
      **{f'seen_{k}': v[:, ::9, ::9] for k, v in seen.items()},
      **grids,
      'features': features,
      'logits': model.logits(features),
    }

  return {name: np.asarray(value) for name, value in jax.jit(run)(params, pictures).items()}


def unpack(flat, names) -> dict[str, np.ndarray]:
  """The tensors of `names`, `[[name, shape], ...]`, that lie in `flat` one after the other."""
  found, start = {}, 0
  for name, shape in names:
    end = start + int(np.prod(shape))
    found[name], start = flat[start:end].reshape(shape), end
  return found
