"""Replays golden files of the family `owlvit` (tests/golden): stages of pictures and queries."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.owlvit import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the stages of normalised `images [R, S, S, 3]` and queries `ids [R, Q, W]`."""
  settings = convert.config_of(source, **config['params'])
  params = convert.load_weights(source, settings)

  @jax.jit
  def run_model(params, images, ids):
    model = modules.bind_module(modeling.build_model, settings, params)
    features = model.patch_features(images)
    queries = model.text(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:2], -1)
    out = {
      'features': features,
      'queries': queries,
      'logits': model.query_logits(features, queries),
      'boxes': model.predict_boxes(features),
    }
    return out | ({'objectness': model.objectness_logits(features)} if settings.v2 else {})

  return {k: np.asarray(v) for k, v in run_model(params, inputs['images'], inputs['ids']).items()}
