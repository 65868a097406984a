"""Replays golden files of the family `clip` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.clip import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the stages of both towers for `pixels` and `ids`, the embeddings and the logits."""
  config = convert.config_of(source)
  params = convert.load_weights(source, config)

  def run_stages(params, pixels, ids):
    model = modules.bind_module(modeling.build_model, config, params)
    seen, read = model.image.hidden_states(pixels), model.text.hidden_states(ids)
    image, text = model.embed_images(pixels), model.embed_texts(ids)
    return {
      'image_embedded': model.image.embed_patches(pixels),
      'image_tokens': seen,
      'image_pooled': model.image.pool_tokens(seen),
      'image_features': model.image(pixels),
      'text_tokens': read,
      'text_pooled': model.text.pool_tokens(read, ids),
      'text_features': model.text(ids),
      'logits': model.pair_logits(image @ text.T),
    }

  found = jax.jit(run_stages)(params, inputs['pixels'], inputs['ids'])
  return {name: np.asarray(value) for name, value in found.items()}
