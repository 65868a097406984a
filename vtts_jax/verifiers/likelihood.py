"""Log-probability per token under the generator itself: a verifier that looks at no picture and
decodes nothing."""

import dataclasses

import jax.numpy as jnp

from vtts_jax import components, core


@dataclasses.dataclass(frozen=True)
class Likelihood(core.Verifier):
  """`log p(tokens | prompt) / number of tokens`, in nats, at temperature 1 and after guidance."""

  uses = frozenset({'log_prob'})

  @property
  def names(self):
    return ('likelihood',)

  def score(self, params, vctx, images, *, log_prob, length):
    return {'likelihood': log_prob / jnp.maximum(length, 1)}

  def cost(self, op):
    return core.Cost(verify=float(op == 'score'))


def build(**given) -> Likelihood:
  return components.build_dataclass(Likelihood, **given)
