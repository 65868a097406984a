"""Golden files of the family `clip_flant5` (tests/golden): pixels and ids in, every stage out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.clip_flant5 import convert
from vtts_jax.models.t5 import decoder


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tower's patches, what T5 reads of them, the encoder's states, the decoder's logits, the
  answer's log-probabilities and likelihood."""
  del config
  graphdef, params = convert.load(source)

  def stages(params, pixels, before, after, mask, answer):
    model = modules.merge(graphdef, params)
    embed, shown = model.encoder.embed, model.look(pixels)
    words = embed(before), shown, embed(after), mask
    states, real = model.read(*words)
    return {
      'patches': model.image(pixels),
      'shown': shown,
      'states': states,
      'logits': model.decoder(embed(decoder.shifted(answer)), states, real),
      'log_probs': model.log_probs(states, real, answer),
      'likelihood': model.likelihood(*words, answer),
    }

  found = jax.jit(stages)(params, **inputs)
  return {name: np.asarray(value) for name, value in found.items()}
