"""Golden files of the family `siglip` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.siglip import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stages of the two towers for `pixels` and `ids`, and the logits."""
  config = convert.config_of(source)
  params = convert.load(source, config)

  def stages(params, pixels, ids):
    model = modules.bind_module(modeling.build, config, params)
    embedded = model.image.embed(pixels)
    return {
      'image_embedded': embedded,
      'image_tokens': model.image.trunk(embedded),
      'image_pooled': model.image(pixels),
      'text_tokens': model.text.tokens(ids),
      'text_pooled': model.text(ids),
      'logits': model.logits(model.embed_images(pixels) @ model.embed_texts(ids).T),
    }

  found = jax.jit(stages)(params, inputs['pixels'], inputs['ids'])
  return {name: np.asarray(value) for name, value in found.items()}
