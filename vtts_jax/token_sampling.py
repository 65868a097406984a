"""Drawing tokens from logits: temperature, top-k, top-p, with and without replacement.

Every draw is an argmax over logits plus Gumbel noise of an explicit key, so that the first of K
draws without replacement, the draw with replacement and a plain draw from the same key are the
same token.
Letters: R rows of any shape, K draws, V vocabulary.
"""

import jax
import jax.numpy as jnp

from vtts_jax.errors import ConfigError


def check(temperature: float, top_k: int, top_p: float, vocab: int) -> None:
  """Raises `ConfigError` on settings outside their range."""
  if not temperature > 0:
    raise ConfigError(f'generator.temperature={temperature}: must be above 0')
  if not 0 <= top_k <= vocab:
    raise ConfigError(f'generator.top_k={top_k}: must be in 0 (off) .. {vocab}')
  if not 0 < top_p <= 1:
    raise ConfigError(f'generator.top_p={top_p}: must be in (0, 1]')


def adjust(
  logits: jax.Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
  """Logits `[..., V]` after temperature, then top-k, then nucleus (top-p) truncation; removed ones
  are -inf.

  Top-p keeps the smallest set of most probable tokens whose mass reaches p, and always the most
  probable one (Holtzman et al. 2020, arXiv 1904.09751).
  """
  logits = logits / temperature
  if top_k:
    kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    cut = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return logits


def gumbel(keys: jax.Array, vocab: int) -> jax.Array:
  """Gumbel noise `[..., V]`, float32, one row for each key."""
  flat = jax.vmap(lambda k: jax.random.gumbel(k, (vocab,), jnp.float32))(keys.reshape(-1))
  return flat.reshape(*keys.shape, vocab)


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
  """One token for each row: logits `[..., V]`, keys `[...]`; returns int32 `[...]`."""
  return jnp.argmax(logits + gumbel(keys, logits.shape[-1]), axis=-1).astype(jnp.int32)


def draw_distinct(logits: jax.Array, keys: jax.Array, k: int) -> jax.Array:
  """K different tokens for each row, in order of drawing without replacement: int32 `[..., K]`.

  Gumbel top-k (Kool et al. 2019, arXiv 1903.06059). Where fewer than K tokens have any probability
  the rest are the next by index, as a truncated distribution has no more to give.
  """
  return jax.lax.top_k(logits + gumbel(keys, logits.shape[-1]), k)[1].astype(jnp.int32)


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability `[...]` of tokens `[...]` under logits `[..., V]`, float32."""
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return picked - jax.scipy.special.logsumexp(logits, axis=-1)
