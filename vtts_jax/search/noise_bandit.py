"""Noise-trajectory search: which noise to inject at each level, as epsilon-greedy bandits.

Ramesh and Mardani (2025, arXiv 2506.03164): denoising is a sequence of independent contextual
bandits whose arms are the noises injected at a level. In each of K rounds N arms are tried, each
with probability epsilon a fresh draw and else the pivot moved in a random direction by U(0, 1)
`scale` sqrt(d); the arm with the best predicted data is the next pivot, and that of the last round
goes on to the next level. The published settings are the defaults.

The published sampler (EDM) adds noise before each step. Here the noise takes a candidate `back`
stages back (`renoise`, which keeps the marginal of the path for standard normal noise), and it is
sampled by one stage more. Level 0 chooses the initial noise; level l goes on from stage l + back,
for going back to stage 0 would forget all. Steps draw no noise of their own.

Letters: B prompts, N arms, K rounds of a level, L levels.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.search import checks, schedules


class Own(NamedTuple):
  """What a prompt carries besides what goes on: its key `[B]`, and the pivot noise
  `[B, 1, ...]`."""

  prompt: Any
  pivot: Any


@dataclasses.dataclass(frozen=True)
class NoiseBandit(core.Algorithm):
  """Epsilon-greedy search over injected noise.

  Attributes:
    arms: N, noises tried in a round.
    rounds: K, rounds of a level; an integer, or one for each level (published as the cheaper
      variant: fewer at the first and last levels).
    scale: largest distance of an arm from the pivot, in units of sqrt(d), the norm of a draw.
    epsilon: share of arms that are fresh draws; 0 is the local search, 1 takes the best of N.
    back: stages that the noise of a level takes a candidate back.
  """

  arms: int = 4
  rounds: int | tuple[int, ...] = 20
  scale: float = 0.15
  epsilon: float = 0.4
  back: int = 1

  needs = frozenset({'noise', 'renoise'})

  def __post_init__(self):
    object.__setattr__(self, 'rounds', checks.parse_integers(self.rounds))
    checks.check_integer('arms', self.arms, 1)
    if not isinstance(self.rounds, tuple):
      checks.check_integer('rounds', self.rounds, 1)
    checks.check_number('scale', self.scale, 0)
    checks.check_number('epsilon', self.epsilon, 0, 1)
    checks.check_integer('back', self.back, 1)

  def check(self, gen):
    checks.check_integer('back', self.back, 1, gen.num_stages - 1)
    self.rounds_of_levels(gen)

  def rounds_of_levels(self, gen) -> tuple[int, ...]:
    """K of each level."""
    return schedules.setting_per_step('rounds', self.rounds, gen.num_stages - self.back)

  def plan(self, gen):
    """A row holds the level, the round, the number of the step, and whether the level ends."""
    rows = [
      (level, number, number == count - 1)
      for level, count in enumerate(self.rounds_of_levels(gen))
      for number in range(count)
    ]
    rows = [(level, number, step, last) for step, (level, number, last) in enumerate(rows)]
    return (core.Phase('round', tuple(rows)),)

  def init(self, sampler, keys, initial):
    slot = core.candidate_keys(keys, jnp.arange(1))
    start = sampler.init(slot)
    none = jnp.full(slot.shape, core.NEG_INF)
    return core.Frontier(start, slot, none, Own(keys, sampler.initial_noise(start)))

  def ask(self, sampler, frontier, shape, row):
    level, number, step, _ = row
    # the slot's own key belongs to the first pivot
    keys = core.child_keys(frontier.keys, step, self.arms + 1)[:, 0, 1:]
    # a level begins with a fresh pivot, the first one with the noise of candidate 0
    fresh = self._draw(sampler, core.fold(frontier.keys, core.CHILD + step))
    begins = (jnp.asarray(number) == 0) & (jnp.asarray(step) > 0)
    noise = self._arms(sampler, jnp.where(begins, fresh, frontier.own.pivot), keys)
    # there is nothing to go back from at the first level; either way costs no evaluation
    first, base = jnp.asarray(level) == 0, core.repeat(frontier.state, self.arms)
    noised = sampler.renoise(base, keys, level + self.back, level, noise)
    noised = jax.tree.map(lambda a, b: jnp.where(first, a, b), sampler.start_state(noise), noised)
    grown = sampler.extend(noised, keys, level, self.back + 1, greedy=True)
    parent = jnp.broadcast_to(jnp.where(first, -1, 0), keys.shape)
    stage = level + self.back + 1
    return core.Candidates(sampler.drop_cache(grown), stage, parent, own=noise)

  def _draw(self, sampler, keys):
    """Standard normal noise for keys `[B, M]`: what a candidate would start from."""
    return sampler.initial_noise(sampler.init(keys))

  def _arms(self, sampler, pivot, keys):
    """Noises `[B, N, ...]` around the pivot `[B, 1, ...]` or, by chance, anywhere."""
    # one draw serves both: as the fresh arm, and as the direction of the near one
    drawn = self._draw(sampler, keys)
    data = tuple(range(2, drawn.ndim))
    chances = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys.reshape(-1))
    chance, share = (c.reshape(*keys.shape, *(1 for _ in data)) for c in chances.T)
    unit = drawn / jnp.sqrt((drawn**2).sum(data, keepdims=True))
    near = pivot + share * self.scale * drawn[0, 0].size ** 0.5 * unit
    return jnp.where(chance < self.epsilon, drawn, near)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    top = jnp.argmax(totals, axis=1)[:, None]
    prompt, old = frontier.own
    found = totals.max(axis=1) > core.NEG_INF  # where all arms are bad the pivot stays
    pivot = core.where(found, core.take(candidates.own, top), old)
    # the arm that the last round chose goes on
    moves = jnp.broadcast_to(jnp.asarray(row[3]), found.shape)
    state = core.where(moves, core.take(candidates.state, top), frontier.state)
    kept = jnp.where(moves[:, None], top, -1)
    scores = jnp.where(moves[:, None], totals.max(axis=1)[:, None], frontier.scores)
    return core.Frontier(state, frontier.keys, scores, Own(prompt, pivot)), kept

  def stages_shown(self, gen, shape, row):
    return row[0] + self.back + 1

  def step_cost(self, gen, shape, row):
    one = gen.cost('renoise', row[0]) + gen.cost('extend', row[0], self.back + 1)
    return self.arms * one, self.arms
