"""Log-probability per token under the generator itself; the verifier needs no decoded picture."""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core


@dataclasses.dataclass(frozen=True)
class Likelihood(core.Verifier):
  """`log p(tokens | prompt) / number of tokens`, in nats, at temperature 1 and after guidance."""

  needs = frozenset({'log_prob', 'length'})

  @property
  def names(self):
    return ('likelihood',)

  def score(self, params, vctx, observed):
    """Log-probabilities and lengths `[B, M]` -> `{name: [B, M]}`."""
    # per token, so that samples of different lengths compare; an empty sample counts as one token
    return {'likelihood': observed['log_prob'] / jnp.maximum(observed['length'], 1)}
