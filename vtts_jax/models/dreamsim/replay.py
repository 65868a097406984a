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
  whole = convert.joined(convert.merged(bases, source.part('lora.'), config['scale']))
  settings = convert.config_of(whole, heads=config['heads'])
  params = convert.load(whole, settings)

  @jax.jit
  def run(params, images):
    model = modules.bind_module(modeling.build, settings, params)
    parts = [modeling.feature(branch, images) for branch in model.branches]
    embedding = model.embed_images(images)
    return {'embedding': embedding} | {f'branch{i}': x for i, x in enumerate(parts)}

  return {k: np.asarray(v) for k, v in run(params, inputs['images']).items()}
