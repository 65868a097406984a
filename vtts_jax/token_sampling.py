"""Drawing tokens from logits: temperature, top-k, top-p, with and without replacement.

Every draw is an argmax over logits plus Gumbel noise of an explicit key. So a plain draw, a draw
with replacement and the first of K draws without replacement give the same token for the same key.

Letters: R rows of any shape, K draws, V vocabulary.
"""

import jax
import jax.numpy as jnp

from vtts_jax.errors import ConfigError


def check_sampling(
  temperature: float, top_k: int, top_p: float, vocab: int | None = None
) -> None:
  """Raises `ConfigError` on settings outside their range; a known `vocab` bounds top_k."""
  if not temperature > 0:
    raise ConfigError(f'generator.temperature={temperature}: must be above 0')
  if top_k < 0 or (vocab is not None and top_k > vocab):
    most = 'the vocabulary' if vocab is None else vocab
    raise ConfigError(f'generator.top_k={top_k}: must be in 0 (off) .. {most}')
  if not 0 < top_p <= 1:
    raise ConfigError(f'generator.top_p={top_p}: must be in (0, 1]')


def truncate_logits(
  logits: jax.Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
  """Applies temperature, then top-k, then top-p (nucleus) truncation to logits `[..., V]`.

  Removed logits become -inf. Top-p keeps the smallest set of most probable tokens whose mass
  reaches p; the most probable token always stays (Holtzman et al. 2020, arXiv 1904.09751).
  """
  logits = logits / temperature
  if top_k:
    kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
    # tokens that tie with the k-th all stay, so that the result has no order among equals
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    # the mass before a token, not up to it: so the first token stays whatever p is
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    cut = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits < cut, -jnp.inf, logits)
  return logits


def gumbel_noise(keys: jax.Array, vocab: int) -> jax.Array:
  """Gumbel noise `[..., V]`, float32, one row for each key `[...]`."""
  # float32 in any model dtype: bfloat16 noise would tie and favour low indices
  flat = jax.vmap(lambda k: jax.random.gumbel(k, (vocab,), jnp.float32))(keys.reshape(-1))
  return flat.reshape(*keys.shape, vocab)


def draw_tokens(logits: jax.Array, keys: jax.Array) -> jax.Array:
  """Draws one token for each row: logits `[..., V]`, keys `[...]` -> int32 `[...]`."""
  return jnp.argmax(logits + gumbel_noise(keys, logits.shape[-1]), axis=-1).astype(jnp.int32)


def draw_distinct(logits: jax.Array, keys: jax.Array, k: int) -> jax.Array:
  """Draws K different tokens for each row without replacement: int32 `[..., K]` in drawing order.

  This is Gumbel top-k (Kool et al. 2019, arXiv 1903.06059). Where fewer than K tokens have any
  probability, the tokens with the lowest indices fill up the rest.
  """
  return jax.lax.top_k(logits + gumbel_noise(keys, logits.shape[-1]), k)[1].astype(jnp.int32)


def token_log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability `[...]` of tokens `[...]` under logits `[..., V]`, float32."""
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return picked - jax.scipy.special.logsumexp(logits, axis=-1)
