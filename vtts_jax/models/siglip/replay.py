"""Replays golden files of the family `siglip` (tests/golden): every stage of pixels and ids."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.siglip import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the stages of both towers for `pixels` and `ids`, and the logits."""
  config = convert.config_of(source)
  params = convert.load_weights(source, config)

  def run_stages(params, pixels, ids):
    model = modules.bind_module(modeling.build_model, config, params)
    embedded = model.image.embed_patches(pixels)
    return {
      'image_embedded': embedded,
      'image_tokens': model.image.trunk(embedded),
      'image_pooled': model.image(pixels),
      'text_tokens': model.text.hidden_states(ids),
      'text_pooled': model.text(ids),
      'logits': model.pair_logits(model.embed_images(pixels) @ model.embed_texts(ids).T),
    }

  found = jax.jit(run_stages)(params, inputs['pixels'], inputs['ids'])
  return {name: np.asarray(value) for name, value in found.items()}
