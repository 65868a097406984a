"""Golden files of the family `dreamsim` (tests/golden): pictures in [0, 1] in, features and
embeddings out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.dreamsim import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`branch<i>` and `embedding`; the weights of branch i are under `<i>.`, adapters under
  `lora.`."""
  bases = [source.part(f'{i}.') for i in range(3)]
  branches = convert.merged(bases, source.part('lora.'), config['scale'])
  settings = convert.config_of(branches, heads=config['heads'])
  graphdef, params = convert.load(branches, settings)

  @jax.jit
  def run(params, images):
    model = modules.merge(graphdef, params)
    parts = [modeling.feature(branch, images) for branch in model.branches]
    return {'embedding': model(images)} | {f'branch{i}': x for i, x in enumerate(parts)}

  return {k: np.asarray(v) for k, v in run(params, inputs['images']).items()}
