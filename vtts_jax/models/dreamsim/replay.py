"""Replays golden files of the family `dreamsim` (tests/golden): features and embeddings."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.dreamsim import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns `branch<i>` and `embedding` of the pictures.

  A fixture has the weights of branch i under `<i>.` and adapters under `lora.`.
  """
  bases = [source.select_prefix(f'{i}.') for i in range(3)]
  branches = convert.merge_adapters(bases, source.select_prefix('lora.'), config['scale'])
  whole = convert.join_branches(branches)
  settings = convert.config_of(whole, heads=config['heads'])
  params = convert.load_weights(whole, settings)

  @jax.jit
  def run_model(params, images):
    model = modules.bind_module(modeling.build_model, settings, params)
    parts = [modeling.branch_features(branch, images) for branch in model.branches]
    embedding = model.embed_images(images)
    return {'embedding': embedding} | {f'branch{i}': x for i, x in enumerate(parts)}

  return {k: np.asarray(v) for k, v in run_model(params, inputs['images']).items()}
