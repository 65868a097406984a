"""Selection on scores: the only place that sorts or calls `top_k`.

Runs under `shard_map` over prompts, so nothing here ever crosses devices. Letters: B prompts, M
scored, N kept.
"""

import jax
import jax.numpy as jnp

from vtts_jax.core import NEG_INF


def top_candidates(totals: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
  """Indices and totals `[B, N]` of the n best of `totals [B, M]`, best first, the earlier one on
  ties.

  A total of -inf (NaN or infinite score) is never kept while a finite one exists: where fewer than
  n are finite the finite ones are repeated from the best on.
  """
  # where bad scores would have to be kept, the good ones are kept twice
  values, index = jax.lax.top_k(totals, n)
  usable = jnp.maximum((values > NEG_INF).sum(axis=1, keepdims=True), 1)
  slot = jnp.arange(n)[None] % usable
  return jnp.take_along_axis(index, slot, axis=1), jnp.take_along_axis(values, slot, axis=1)


def mean_ranks(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Ranks `[B, M]` among the valid entries, 0 the lowest, ties sharing their mean rank; float32."""
  # all pairs are compared: M is small, and a sort would cost more to compile
  low = jnp.where(valid, values, NEG_INF)
  below = (low[:, None, :] < low[:, :, None]) & valid[:, None, :]
  equal = (low[:, None, :] == low[:, :, None]) & valid[:, None, :]
  return below.sum(-1) + (equal.sum(-1) - 1) / 2.0


def scale_min_max(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Values `[B, M]` scaled to [0, 1] over the valid entries of each prompt; 0.5 where these are
  all equal."""
  low = jnp.where(valid, values, jnp.inf).min(axis=1, keepdims=True)
  high = jnp.where(valid, values, -jnp.inf).max(axis=1, keepdims=True)
  span = high - low
  return jnp.where(span > 0, (values - low) / jnp.where(span > 0, span, 1.0), 0.5)


# --------------------------------------------------------------------------------------- resampling
# Every scheme gives candidate i, of weight w_i, n * w_i copies in expectation; they differ in the
# variance of that number (Hol, Schon and Gustafsson 2006; tested against these expectations).

RESAMPLERS = ('multinomial', 'systematic', 'stratified', 'residual', 'ssp')


def resample_ancestors(kind: str, keys: jax.Array, logw: jax.Array, n: int) -> jax.Array:
  """Ancestors `[B, n]` int32, in increasing order, drawn by log-weights `[B, M]`, keys `[B]`.

  A log-weight of -inf is never drawn while a finite one exists; where none is, all are alike.
  `kind` is one of `RESAMPLERS`; 'ssp' is the Srinivasan sampling process (Srinivasan 2001; Gerber,
  Chopin and Whiteley 2019), which rounds each n * w_i up or down.
  """
  alive = jnp.isfinite(logw).any(axis=1, keepdims=True)
  weights = jax.nn.softmax(jnp.where(alive, logw, 0.0), axis=1)
  return jax.vmap(lambda key, w: _ancestors(kind, key, w, n))(keys, weights)


def effective_sample_size(logw: jax.Array) -> jax.Array:
  """Effective sample size `[B]`, 1 / sum of squared normalised weights, of log-weights `[B, M]`; M
  where none is finite."""
  alive = jnp.isfinite(logw).any(axis=1, keepdims=True)
  weights = jax.nn.softmax(jnp.where(alive, logw, 0.0), axis=1)
  return 1 / (weights**2).sum(axis=1)


def _ancestors(kind, key, w, n):
  m = w.shape[0]
  if kind in ('multinomial', 'systematic', 'stratified'):
    return _inverse(w, _points(kind, key, n))
  whole = jnp.floor(n * w + 1e-5)  # sums of float32 weights fall short of an integer by rounding
  if kind == 'residual':
    left = n - whole.sum().astype(jnp.int32)
    rest = jnp.maximum(n * w - whole, 0.0)
    rest = jnp.where(rest.sum() > 0, rest, w)
    extra = _inverse(rest / rest.sum(), _points('multinomial', key, n))
    # the uniform points of the rest are unordered draws: any `left` of the n will do
    taken = jax.random.permutation(jax.random.fold_in(key, 1), n) < left
    counts = whole + jnp.zeros(m).at[extra].add(taken.astype(jnp.float32))
  else:
    counts = whole + _ssp(key, jnp.maximum(n * w - whole, 0.0), n - whole.sum())
  # counts to ancestors: the i-th copy belongs to the first whose cumulated count exceeds i
  upto = jnp.cumsum(counts)
  index = jnp.searchsorted(upto, jnp.arange(n) + 0.5)
  return jnp.minimum(index, m - 1).astype(jnp.int32)


def _points(kind, key, n):
  """n increasing points in [0, 1)."""
  if kind == 'multinomial':
    return jnp.sort(jax.random.uniform(key, (n,)))
  shift = jax.random.uniform(key, () if kind == 'systematic' else (n,))
  return (jnp.arange(n) + shift) / n


def _inverse(w, points):
  """Where the points fall in the cumulated weights; never on a weight of 0."""
  upto = jnp.cumsum(w)
  last = jnp.max(jnp.where(w > 0, jnp.arange(w.shape[0]), 0))
  index = jnp.searchsorted(upto, points * upto[-1], side='right')
  return jnp.minimum(index, last).astype(jnp.int32)


def _ssp(key, parts, total):
  """Rounds each of `parts [M]` in [0, 1) to 0 or 1 without bias, so that `total` of them are 1.

  Walks through them with one undecided entry at hand: of the pair (held, next) one becomes 0 or 1
  and the other takes up the rest.
  """
  m = parts.shape[0]

  def step(carry, this):
    held, where = carry
    i, p, u = this
    both = held + p
    low = both < 1
    # below 1: one of them becomes 0, the other holds the sum; else one becomes 1
    stay = u * jnp.where(low, both, 2 - both) < jnp.where(low, held, 1 - p)
    rest = jnp.where(low, both, both - 1)
    decided = jnp.where(stay == low, i, where)
    return (rest, jnp.where(stay == low, where, i)), (decided, jnp.where(low, 0.0, 1.0))

  draws = jax.random.uniform(key, (m,))
  rest = (jnp.arange(1, m), parts[1:], draws[1:])
  (_, last), (decided, value) = jax.lax.scan(step, (parts[0], 0), rest)
  out = jnp.zeros(m).at[decided].set(value)
  return out.at[last].set(jnp.where(out.sum() < total - 0.5, 1.0, 0.0))


# --------------------------------------------------------------------------------------- diversity


def pick_diverse(keys: jax.Array, features: jax.Array, valid: jax.Array, n: int) -> jax.Array:
  """Indices `[B, n]` of candidates that lie far apart: k-means++ seeding (Arthur and Vassilvitskii
  2007) on features `[B, M, D]`, then of each cluster the candidate nearest to its mean.

  Candidates that are not `valid [B, M]` are never picked while a valid one is left. A cluster has
  its seed at least, so the n differ where n are valid.
  """
  return jax.vmap(lambda *row: _diverse(*row, n))(keys, features, valid)


def _diverse(key, x, valid, n):
  distance = lambda c: ((x - c) ** 2).sum(-1)
  usable = jnp.where(valid.any(), valid, True)

  def seed(carry, key):
    nearest, taken = carry
    chance = jnp.where(usable & ~taken, jnp.minimum(nearest, 1e30), 0.0)
    left = jnp.where((usable & ~taken).any(), usable & ~taken, usable)
    chance = jnp.where(chance.sum() > 0, chance, left)
    pick = jax.random.categorical(key, jnp.log(chance))
    return (jnp.minimum(nearest, distance(x[pick])), taken.at[pick].set(True)), pick

  # the first seed is drawn at random: nothing is near to anything yet
  start = (jnp.full(len(x), 1e30), jnp.zeros(len(x), bool))
  _, seeds = jax.lax.scan(seed, start, jax.random.split(key, n))
  # then of each cluster the candidate nearest to its mean
  apart = jax.vmap(distance)(x[seeds])  # [n, M]
  own = (apart.argmin(0)[None] == jnp.arange(n)[:, None]) & usable
  own = own.at[jnp.arange(n), seeds].set(True)
  means = (own[..., None] * x).sum(1) / own.sum(1, keepdims=True)
  return jnp.where(own, jax.vmap(distance)(means), jnp.inf).argmin(1).astype(jnp.int32)
