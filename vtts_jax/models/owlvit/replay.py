"""Golden files of the family `owlvit` (tests/golden): pictures and queries in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.owlvit import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stages of the normalised `images [R, S, S, 3]` under the queries `ids [R, Q, W]`."""
  settings = convert.config_of(source, **config['params'])
  params = convert.load(source, settings)

  @jax.jit
  def run(params, images, ids):
    model = modules.bind_module(modeling.build, settings, params)
    features = model.features(images)
    queries = model.text(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:2], -1)
    out = {
      'features': features,
      'queries': queries,
      'logits': model.logits(features, queries),
      'boxes': model.boxes(features),
    }
    return out | ({'objectness': model.objectness(features)} if settings.v2 else {})

  return {k: np.asarray(v) for k, v in run(params, inputs['images'], inputs['ids']).items()}
