"""Golden files of the family `clip_flant5` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.clip_flant5 import convert, modeling
from vtts_jax.models.t5 import decoder


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tower's patches, what T5 reads of them, the encoder's states, the decoder's logits, the
  answer's log-probabilities and likelihood."""
  del config
  source = convert.whole(source)
  sizes = convert.config_of(source)
  params = convert.load(source, sizes)

  def stages(params, pixels, before, after, mask, answer):
    model = modules.bind_module(modeling.build, sizes, params)
    embed, image = model.encoder.embed, model.embed_images(pixels)
    words = embed(before), image, embed(after), mask
    states, real = model.read(*words)
    return {
      'patches': model.image(pixels),
      'shown': image,
      'states': states,
      'logits': model.decoder(embed(decoder.shifted(answer)), states, real),
      'log_probs': model.log_probs(states, real, answer),
      'likelihood': model.likelihood(*words, answer),
    }

  found = jax.jit(stages)(params, **inputs)
  return {name: np.asarray(value) for name, value in found.items()}
