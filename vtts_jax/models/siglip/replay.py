"""Golden files of the family `siglip` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.siglip import convert


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stages of the two towers for `pixels` and `ids`, and the logits."""
  del config
  graphdef, params = convert.load(source)

  def stages(params, pixels, ids):
    model = modules.merge(graphdef, params)
    embedded = model.image.embed(pixels)
    return {
      'image_embedded': embedded,
      'image_tokens': model.image.trunk(embedded),
      'image_pooled': model.image(pixels),
      'text_tokens': model.text.tokens(ids),
      'text_pooled': model.text(ids),
      'logits': model.logits(model.embed_image(pixels) @ model.embed_text(ids).T),
    }

  found = jax.jit(stages)(params, inputs['pixels'], inputs['ids'])
  return {name: np.asarray(value) for name, value in found.items()}
