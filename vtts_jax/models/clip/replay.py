"""Golden files of the family `clip` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.clip import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stages of the two towers for `pixels` and `ids`, the embeddings and the logits."""
  config = convert.config_of(source)
  params = convert.load(source, config)

  def stages(params, pixels, ids):
    model = modules.bind_module(modeling.build, config, params)
    seen, read = model.image.tokens(pixels), model.text.tokens(ids)
    image, text = model.embed_images(pixels), model.embed_texts(ids)
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
