"""Selection on scores: the only place that sorts or calls `top_k`.

Runs under `shard_map` over prompts, so nothing here ever crosses devices. Letters: B prompts, M
scored, N kept.
"""

import jax
import jax.numpy as jnp

from vtts_jax.core import NEG_INF


def top(totals: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
  """Indices and totals `[B, N]` of the n best of `totals [B, M]`, best first, the earlier one on
  ties.

  A total of -inf (NaN or infinite score) is never kept while a finite one exists: where fewer than
  n are finite the finite ones are repeated from the best on.
  """
  values, index = jax.lax.top_k(totals, n)
  usable = jnp.maximum((values > NEG_INF).sum(axis=1, keepdims=True), 1)
  slot = jnp.arange(n)[None] % usable
  return jnp.take_along_axis(index, slot, axis=1), jnp.take_along_axis(values, slot, axis=1)


def ranks(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Ranks `[B, M]` among the valid entries, 0 the lowest, ties sharing their mean rank; float32."""
  low = jnp.where(valid, values, NEG_INF)
  below = (low[:, None, :] < low[:, :, None]) & valid[:, None, :]
  equal = (low[:, None, :] == low[:, :, None]) & valid[:, None, :]
  return below.sum(-1) + (equal.sum(-1) - 1) / 2.0


def min_max(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Values `[B, M]` scaled to [0, 1] over the valid entries of each prompt; 0.5 where these are
  all equal."""
  low = jnp.where(valid, values, jnp.inf).min(axis=1, keepdims=True)
  high = jnp.where(valid, values, -jnp.inf).max(axis=1, keepdims=True)
  span = high - low
  return jnp.where(span > 0, (values - low) / jnp.where(span > 0, span, 1.0), 0.5)
