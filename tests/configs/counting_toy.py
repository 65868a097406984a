"""The token toy, which counts the pictures that it decodes while it runs; `decoded` is reset and
read by the test."""

import dataclasses
import math

import jax

from vtts_jax.testing import toys

decoded = []  # candidates, one entry a call


@dataclasses.dataclass(frozen=True)
class CountingTokens(toys.Tokens):
  """As its base."""

  def observe(self, params, ctx, state, stage, names):
    if 'image' in names:
      candidates = math.prod(state.tokens.shape[:2])
      jax.debug.callback(lambda: decoded.append(candidates))
    return super().observe(params, ctx, state, stage, names)
