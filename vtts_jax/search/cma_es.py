"""CMA-ES on the low frequencies of the initial noise.

The layout of a picture follows from the low frequencies of its noise, and a model hardly reacts to
the others (Spectral Evolution Search, 2026, arXiv 2602.03208, which has wavelets and the
cross-entropy method). So the `block` lowest frequencies along each axis of the noise, of its
orthonormal cosine transform, are searched by CMA-ES (Hansen 2016, arXiv 1604.00772: weights of the
better half, rank-one and rank-mu updates, cumulative step-size adaptation, its default constants);
the rest stays that of candidate 0 of best-of-N. White noise is white in that basis, too: with
mean 0 and step 1 the first generation is drawn as the model expects it.

Letters: B prompts, M candidates of a generation, n dimensions searched.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, select


class Own(NamedTuple):
  """The search distribution of a prompt, in Hansen's words.

  Attributes:
    mean: `[B, n]`. step: sigma `[B]`. covariance: C `[B, n, n]`.
    step_path, covariance_path: p_sigma and p_c `[B, n]`.
  """

  mean: Any
  step: Any
  covariance: Any
  step_path: Any
  covariance_path: Any


class Constants(NamedTuple):
  """Hansen's default constants for n dimensions: weights `[mu]`, mu_eff, c_sigma, d_sigma, c_c,
  c_1, c_mu, and the mean length of a standard normal vector."""

  weights: np.ndarray
  mass: float
  c_step: float
  damping: float
  c_path: float
  c_one: float
  c_mu: float
  length: float


def default_constants(population: int, n: int) -> Constants:
  """Table 1 of the tutorial, without negative weights."""
  half = population // 2
  weights = math.log((population + 1) / 2) - np.log(np.arange(1, half + 1))
  weights = weights / weights.sum()
  mass = float(1 / (weights**2).sum())
  c_step = (mass + 2) / (n + mass + 5)
  damping = 1 + 2 * max(0, math.sqrt((mass - 1) / (n + 1)) - 1) + c_step
  c_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
  c_one = 2 / ((n + 1.3) ** 2 + mass)
  c_mu = min(1 - c_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
  length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
  return Constants(weights, mass, c_step, damping, c_path, c_one, c_mu, length)


@dataclasses.dataclass(frozen=True)
class CMAES(core.Algorithm):
  """CMA-ES in a low-frequency block of the noise.

  Attributes:
    population: candidates of a generation; the better half moves the distribution.
    generations: number of generations.
    block: frequencies searched along every axis of the noise but the last, the channels.
    step: sigma of the first generation.
  """

  population: int = 16
  generations: int = 8
  block: int = 4
  step: float = 1.0

  needs = frozenset({'noise'})

  def __post_init__(self):
    checks.check_integer('population', self.population, 2)
    checks.check_integer('generations', self.generations, 1)
    checks.check_integer('block', self.block, 1)
    checks.check_number('step', self.step, 0)

  def plan(self, gen):
    """A row holds the number of the generation."""
    return (core.Phase('generation', tuple((number,) for number in range(self.generations))),)

  def init(self, sampler, keys, initial):
    slot = core.candidate_keys(keys, jnp.arange(1))
    start = sampler.init(slot)
    noise = sampler.initial_noise(start)
    if min(noise.shape[2:-1]) < self.block:
      raise ConfigError(
        f'search.block={self.block}: must be at most {min(noise.shape[2:-1])}, the shortest side '
        f'of noise {noise.shape[2:]}'
      )
    zero = jnp.zeros_like(_lower(noise, self.block)[:, 0])
    identity = jnp.broadcast_to(jnp.eye(zero.shape[1]), (*zero.shape, zero.shape[1]))
    own = Own(zero, jnp.full(keys.shape, self.step), identity, zero, zero)
    return core.Frontier(start, slot, jnp.full(slot.shape, core.NEG_INF), own)

  def ask(self, sampler, frontier, shape, row):
    own, m = frontier.own, self.population
    keys = core.child_keys(frontier.keys, row[0], m + 1)[:, 0, 1:]
    draw = jax.vmap(lambda key: jax.random.normal(key, own.mean.shape[1:]))
    normal = draw(keys.reshape(-1)).reshape(*keys.shape, -1)  # [B, M, n]
    # moves are C^(1/2) normal, by the symmetric root: eigenvectors of equal eigenvalues, of which
    # C has many at first, are not determined; rounding may leave an eigenvalue below 0
    squares, basis = jnp.linalg.eigh(own.covariance)
    scales = jnp.sqrt(jnp.maximum(squares, 1e-12))
    root, inverse = (
      jnp.einsum('bij,bkj->bik', basis * s[:, None], basis) for s in (scales, 1 / scales)
    )
    moves = jnp.einsum('bij,bmj->bmi', root, normal)
    points = own.mean[:, None] + own.step[:, None, None] * moves
    noise = sampler.initial_noise(frontier.state)
    noise = noise + _raise(points - _lower(noise, self.block), noise.shape[2:], self.block)
    shared = jnp.broadcast_to(frontier.keys, keys.shape)  # candidates differ in their noise alone
    grown = sampler.extend(sampler.start_state(noise), shared, 0, sampler.num_stages)
    parent = jnp.broadcast_to(jnp.where(jnp.asarray(row[0]) == 0, -1, 0), keys.shape)
    return core.Candidates(
      sampler.drop_cache(grown), sampler.num_stages, parent, own=(moves, inverse)
    )

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    own, (moves, inverse) = frontier.own, candidates.own
    c = default_constants(self.population, own.mean.shape[1])
    index, best = select.top_candidates(totals, len(c.weights))
    chosen = core.take(moves, index)  # [B, mu, n]
    weights = jnp.asarray(c.weights, jnp.float32)
    move = jnp.einsum('m,bmi->bi', weights, chosen)
    # the move in units of the distribution, C^(-1/2) move
    white = jnp.einsum('bij,bj->bi', inverse, move)
    step_path = (1 - c.c_step) * own.step_path
    step_path += math.sqrt(c.c_step * (2 - c.c_step) * c.mass) * white
    length = jnp.sqrt((step_path**2).sum(axis=1))
    step = own.step * jnp.exp(c.c_step / c.damping * (length / c.length - 1))
    # a path that is still long says that the step is too small: C waits
    reached = 1 - (1 - c.c_step) ** (2 * (jnp.asarray(row[0]) + 1.0))
    goes = length / jnp.sqrt(reached) < (1.4 + 2 / (own.mean.shape[1] + 1)) * c.length
    goes = goes.astype(jnp.float32)[:, None]
    path = (1 - c.c_path) * own.covariance_path
    path += goes * math.sqrt(c.c_path * (2 - c.c_path) * c.mass) * move
    lost = (1 - goes)[:, :, None] * c.c_path * (2 - c.c_path)
    covariance = (1 - c.c_one - c.c_mu + c.c_one * lost) * own.covariance
    covariance += c.c_one * path[:, :, None] * path[:, None, :]
    covariance += c.c_mu * jnp.einsum('m,bmi,bmj->bij', weights, chosen, chosen)
    moved = Own(own.mean + own.step[:, None] * move, step, covariance, step_path, path)
    # without any finite score there is nothing to learn
    found = best[:, 0] > core.NEG_INF
    kept = jnp.where(found[:, None], index[:, :1], -1)
    scores = jnp.where(found[:, None], best[:, :1], frontier.scores)
    own = core.where(found, moved, own)
    return core.Frontier(frontier.state, frontier.keys, scores, own), kept

  def step_cost(self, gen, shape, row):
    return self.population * gen.cost('extend', 0, gen.num_stages), self.population


# ------------------------------------------------------------------------------- low frequencies


def cosine_rows(size: int, count: int) -> np.ndarray:
  """The `count` lowest rows `[count, size]` of the orthonormal cosine transform (DCT-II)."""
  angles = np.pi * (np.arange(size) + 0.5) * np.arange(count)[:, None] / size
  rows = np.cos(angles) * math.sqrt(2 / size)
  rows[0] /= math.sqrt(2)
  return rows.astype(np.float32)


def _lower(noise, block: int):
  """The lowest frequencies `[B, N, n]` of noise `[B, N, ..., C]`, of all axes but the channels."""
  for axis in range(2, noise.ndim - 1):
    rows = cosine_rows(noise.shape[axis], block)
    noise = jnp.moveaxis(jnp.tensordot(rows, noise, (1, axis)), 0, axis)
  return noise.reshape(*noise.shape[:2], -1)


def _raise(points, shape: tuple[int, ...], block: int):
  """Noise `[B, N, *shape]` with these lowest frequencies `[B, N, n]` and no others."""
  noise = points.reshape(*points.shape[:2], *(block for _ in shape[:-1]), shape[-1])
  for axis, size in enumerate(shape[:-1], start=2):
    rows = cosine_rows(size, block)
    noise = jnp.moveaxis(jnp.tensordot(rows.T, noise, (1, axis)), 0, axis)
  return noise
