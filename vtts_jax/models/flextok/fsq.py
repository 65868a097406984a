"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505) as FlexTok uses it.

A vector of Q numbers is bounded, and each number is rounded to one of a few levels. The Q digits
are the token's id; the first one is the least significant. Checked against the golden files.

Letters: Q dimensions.
"""

import math

import jax.numpy as jnp
import numpy as np


def count_codes(levels: tuple[int, ...]) -> int:
  """Returns the number of codes."""
  return math.prod(levels)


def _digit_basis(levels):
  return np.cumprod((1, *levels[:-1]))


def bound_values(z, levels: tuple[int, ...]):
  """Squashes `[..., Q]` so that rounding gives exactly the levels."""
  # a little wider than the levels (1.001): tanh reaches its limits only at infinity
  half = np.array([(n - 1) * 1.001 / 2 for n in levels], np.float32)
  # an even number of levels has none at 0, so the range is shifted by a half
  offset = np.array([0.0 if n % 2 else 0.5 for n in levels], np.float32)
  return jnp.tanh(z + np.arctanh(offset / half)) * half - offset


def quantize_codes(z, levels: tuple[int, ...]):
  """Rounds `[..., Q]` to codes `[..., Q]` float32 in [-1, 1]; halves round to even."""
  return jnp.round(bound_values(z.astype(jnp.float32), levels)) / (np.array(levels) // 2)


def ids_of(codes, levels: tuple[int, ...]):
  """Codes `[..., Q]` -> ids `[...]` int32 in 0 .. `count_codes(levels)` - 1."""
  half = np.array(levels) // 2
  digits = jnp.round(codes * half).astype(jnp.int32) + half
  return jnp.sum(digits * _digit_basis(levels), -1).astype(jnp.int32)


def codes_of(ids, levels: tuple[int, ...]):
  """Ids `[...]` -> codes `[..., Q]` float32."""
  levels, half = np.array(levels), np.array(levels) // 2
  digits = jnp.asarray(ids)[..., None] // _digit_basis(tuple(levels)) % levels
  return (digits - half).astype(jnp.float32) / half
