"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505) as FlexTok uses it.

A vector of Q numbers is bounded, each is rounded to one of its few levels, and the Q digits are the
token's id; the first level is the least significant digit. Checked against the golden files.

Letters: Q dimensions.
"""

import math

import jax.numpy as jnp
import numpy as np


def size(levels: tuple[int, ...]) -> int:
  """Number of codes."""
  return math.prod(levels)


def _basis(levels):
  return np.cumprod((1, *levels[:-1]))


def bound(z, levels: tuple[int, ...]):
  """`[..., Q]` -> `[..., Q]`, squashed so that rounding gives exactly the levels."""
  half = np.array([(n - 1) * 1.001 / 2 for n in levels], np.float32)
  offset = np.array([0.0 if n % 2 else 0.5 for n in levels], np.float32)
  return jnp.tanh(z + np.arctanh(offset / half)) * half - offset


def quantize(z, levels: tuple[int, ...]):
  """`[..., Q]` -> codes `[..., Q]` float32 in [-1, 1]; halves round to even."""
  return jnp.round(bound(z.astype(jnp.float32), levels)) / (np.array(levels) // 2)


def ids_of(codes, levels: tuple[int, ...]):
  """codes `[..., Q]` -> ids `[...]` int32 in 0 .. `size(levels)` - 1."""
  half = np.array(levels) // 2
  digits = jnp.round(codes * half).astype(jnp.int32) + half
  return jnp.sum(digits * _basis(levels), -1).astype(jnp.int32)


def codes_of(ids, levels: tuple[int, ...]):
  """ids `[...]` -> codes `[..., Q]` float32."""
  levels, half = np.array(levels), np.array(levels) // 2
  digits = jnp.asarray(ids)[..., None] // _basis(tuple(levels)) % levels
  return (digits - half).astype(jnp.float32) / half
