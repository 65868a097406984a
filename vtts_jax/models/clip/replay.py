"""Golden files of the family `clip` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.clip import convert


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stages of the two towers for `pixels` and `ids`, the embeddings and the logits."""
  del config
  graphdef, params = convert.load(source)

  def stages(params, pixels, ids):
    model = modules.merge(graphdef, params)
    seen, read = model.image.tokens(pixels), model.text.tokens(ids)
    image, text = model.embed_image(pixels), model.embed_text(ids)
    return {
      'image_embedded': model.image.embed(pixels),
      'image_tokens': seen,
      'image_pooled': model.image.pool(seen),
      'image_features': model.image(pixels),
      'text_tokens': read,
      'text_pooled': model.text.pool(read, ids),
      'text_features': model.text(ids),
      'logits': model.logits(image @ text.T),
    }

  found = jax.jit(stages)(params, inputs['pixels'], inputs['ids'])
  return {name: np.asarray(value) for name, value in found.items()}
