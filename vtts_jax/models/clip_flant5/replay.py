"""Replays golden files of the family `clip_flant5` (tests/golden): all stages of pixels and ids."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.clip_flant5 import convert, modeling
from vtts_jax.models.t5 import decoder


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture.

  These are the tower's patches, their embeddings, the encoder's states, the decoder's logits, and
  the answer's log-probabilities and likelihood.
  """
  del config
  source = convert.join_tower(source)
  sizes = convert.config_of(source)
  params = convert.load_weights(source, sizes)

  def run_stages(params, pixels, before, after, mask, answer):
    model = modules.bind_module(modeling.build_model, sizes, params)
    embed, image = model.encoder.embed, model.embed_images(pixels)
    words = embed(before), image, embed(after), mask
    states, real = model.encode_question(*words)
    return {
      'patches': model.image(pixels),
      'shown': image,
      'states': states,
      'logits': model.decoder(embed(decoder.shift_right(answer)), states, real),
      'log_probs': model.answer_log_probs(states, real, answer),
      'likelihood': model.answer_likelihood(*words, answer),
    }

  found = jax.jit(run_stages)(params, **inputs)
  return {name: np.asarray(value) for name, value in found.items()}
