"""Particle search: N particles move together, are weighted by a verifier and resampled.

One class spans the published methods: inverse temperature (constant, increasing, infinite) x
potential (current, difference, max, sum) x resampler x when to resample. That grid is the one of
"Inference-time scaling of diffusion models through classical search" (2505.23614); `PRESETS` names
its published points: FK steering (Singhal et al., 2501.06848), DAS (Kim et al., 2501.05803), SVDD
(Li et al., 2408.08252), TTS-VAR (2507.18537) and the best point of the grid.

Weights stay in logs and are carried forward where no resampling takes place, and the last step
divides out the potentials of the way, so that the particles target p(x) exp(strength * score)
whatever the potential (Singhal et al., section 3): checked on an enumerable problem.

A key belongs to the slot and not to the lineage: copies of a particle part ways at the next stage.
Letters: B prompts, N particles, K children of each, M = N * K, S steps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules, select

ANNEAL = ('constant', 'increasing', 'infinite')
POTENTIALS = ('current', 'difference', 'max', 'sum')
RESAMPLE = core.CHILD - 2  # folded into the prompt's key, with the step, for the resampler

PRESETS = {
  'fk': {'strength': 10.0, 'potential': 'max', 'resampler': 'multinomial', 'ess': 0.5},
  'das': {'anneal': 'increasing', 'potential': 'difference', 'resampler': 'ssp', 'ess': 0.5},
  'svdd': {
    'anneal': 'infinite',
    'potential': 'current',
    'resampler': 'multinomial',
    'branch': 10,
    'groups': 'particles',
  },
  'tts_var': {
    'strength': 10.0,
    'potential': 'current',
    'resampler': 'multinomial',
    'particles': (8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1),
    'diverse': (1, 4),  # before scales 2 and 5
    'resample_at': (5, 8),  # and 6 and 9
  },
  'best': {'anneal': 'increasing', 'potential': 'max', 'resampler': 'ssp'},
}


class Weights(NamedTuple):
  """What a particle carries besides its state, `[B, N]`.

  Attributes:
    logw: log-weight since the last resampling.
    done: sum of the log-potentials of its lineage.
    level: what the potential 'difference' subtracts.
    high, total: largest score and sum of scores.
  """

  logw: jax.Array
  done: jax.Array
  level: jax.Array
  high: jax.Array
  total: jax.Array


@dataclasses.dataclass(frozen=True)
class SMC(core.Algorithm):
  """Particle search.

  Attributes:
    particles: N; an integer, or a tuple with one entry a step (a population that shrinks).
    branch: children of each particle at each step.
    groups: particles are resampled within so many groups of neighbours; 1 for all together.
    schedule, size, steps: stages at which particles are weighed; see `schedules.cuts`.
    strength: inverse temperature, in units of the verifier's score; 0 is best-of-N.
    anneal: 'constant'; 'increasing', from near 0 to `strength` as 2 ** (s / S) - 1 (the shape of
      DAS); 'infinite', only the best is copied.
    potential: what a particle is weighed by: its score, its gain, its best or its sum.
    resampler: see `select.resample`.
    every: weigh and resample at every so manieth step, and at the last.
    ess: and only if the effective sample size is below this share of M (1: whenever weights
      differ).
    resample_at: the steps (from 0) at which particles are weighed and resampled; empty for `every`.
      Where the population shrinks they always are.
    diverse: steps at which particles are picked by k-means++ on the verifier's features instead.
    lookahead: greedy stages before a particle is looked at; -1 to the end.
    initial: stages that are given and not drawn.
  """

  particles: int | tuple[int, ...] = 8
  branch: int = 1
  groups: int = 1
  schedule: str | tuple[int, ...] = 'linear'
  size: int = 4
  steps: int = 0
  strength: float = 10.0
  anneal: str = 'constant'
  potential: str = 'max'
  resampler: str = 'ssp'
  every: int = 1
  ess: float = 1.0
  resample_at: tuple[int, ...] = ()
  diverse: tuple[int, ...] = ()
  lookahead: int = 0
  initial: int = 0

  donates = True

  def __post_init__(self):
    values = self.particles if isinstance(self.particles, tuple) else (self.particles,)
    for value in values:
      checks.integer('particles', value, 1)
      if value % self.groups:
        raise ConfigError(f'search.groups={self.groups}: must divide search.particles={value}')
    for name, low in (('branch', 1), ('groups', 1), ('steps', 0), ('every', 1), ('initial', 0)):
      checks.integer(name, getattr(self, name), low)
    checks.integer('lookahead', self.lookahead, -1)
    checks.number('strength', self.strength, 0)
    checks.number('ess', self.ess, 0, 1)
    checks.one_of('anneal', self.anneal, ANNEAL)
    checks.one_of('potential', self.potential, POTENTIALS)
    checks.one_of('resampler', self.resampler, select.RESAMPLERS)
    if any(b > a for a, b in zip(values, values[1:])):
      raise ConfigError(f'search.particles={list(values)}: must not grow from step to step')
    if isinstance(self.schedule, str):
      checks.one_of(
        'schedule', self.schedule, (*schedules.SCHEDULES, 'a list of cumulative stage counts')
      )

  @property
  def features(self):
    return bool(self.diverse)

  # -------------------------------------------------------------------------------- static shapes

  def plan(self, gen) -> tuple['Move', ...]:
    """What each step does; the last one always reaches the end."""
    end = gen.num_stages
    checks.integer('initial', self.initial, 0, end - 1)
    marks = schedules.cuts(self.schedule, self.size, self.steps, self.initial, end)
    marks = (*marks[:-1], end)
    sizes = schedules.per_step('particles', self.particles, len(marks))
    moves, begin = [], self.initial
    for s, (mark, n) in enumerate(zip(marks, sizes)):
      after = sizes[min(s + 1, len(sizes) - 1)]
      chosen = s in self.resample_at if self.resample_at else (s + 1) % self.every == 0
      chosen |= s == len(marks) - 1
      look = end - mark if self.lookahead < 0 else min(self.lookahead, end - mark)
      how = 'diverse' if s in self.diverse else 'resample' if chosen else 'carry'
      if how == 'carry' and (after < n or self.branch > 1):
        how = 'resample'
      moves.append(Move(begin, mark - begin, n, after, look, how))
      begin = mark
    return tuple(moves)

  def check(self, gen):
    moves = self.plan(gen)
    for name in ('resample_at', 'diverse'):
      for s in getattr(self, name):
        if not isinstance(s, int) or not 0 <= s < len(moves):
          raise ConfigError(
            f'search.{name}={list(getattr(self, name))}: must be steps in 0 .. {len(moves) - 1}'
          )
    if not gen.stochastic:
      raise ConfigError(
        f'search: copies of a particle never part ways with a {type(gen).__name__} that draws '
        'nothing after the start; allowed: a stochastic sampler (generator.eta above 0)'
      )

  def reach(self, gen, step):
    move = self.plan(gen)[step]
    return move.begin + move.size + move.look

  def phases(self, gen):
    shapes = [dataclasses.replace(move, begin=0) for move in self.plan(gen)]
    runs = []
    for i, shape in enumerate(shapes):
      if runs and shape == shapes[runs[-1][0]] and shape.before == shape.after:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
      else:
        runs.append((i, 1))
    return tuple(runs)

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, gen, params, ctx, keys, initial):
    n = self.plan(gen)[0].before
    slots = core.candidate_keys(keys, jnp.arange(n))
    frontier = schedules.start(gen, params, ctx, slots, initial)
    zero = jnp.zeros(slots.shape)
    weights = Weights(zero, zero, zero, zero + core.NEG_INF, zero)
    return core.Told(frontier, slots, zero, jnp.zeros(slots.shape, jnp.int32), (weights, keys))

  def ask(self, gen, params, ctx, state, step):
    move, begin, _ = self._at(gen, step)
    keys = core.child_keys(state.keys, begin, self.branch).reshape(len(state.keys), -1)
    parent = jnp.broadcast_to(jnp.arange(keys.shape[1]) // self.branch, keys.shape)
    moved = core.repeat(state.frontier, self.branch)
    moved = gen.extend(params, ctx, moved, keys, begin, move.size)
    shown, stage = moved, begin + move.size
    if move.look:
      shown = gen.extend(params, ctx, moved, keys, stage, move.look, greedy=True)
    own = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape)
    stage = jnp.int32(stage + move.look)
    return core.Candidates(gen.slim(shown), stage, parent, moved, (moved, own))

  def tell(self, gen, params, ctx, state, cands, totals, step):
    move, _, strength = self._at(gen, step)
    weights, prompt = state.inner
    last = step.index == len(self.plan(gen)) - 1
    weights = core.repeat(weights, self.branch)
    if move.how == 'carry':  # not due: particles are not weighed, but a bad score is out
      bad = jnp.isneginf(totals)
      weights = weights._replace(logw=jnp.where(bad, core.NEG_INF, weights.logw))
    else:
      weights = self._weigh(weights, totals, strength, last)
    keys = core.fold(core.fold(prompt, RESAMPLE), step.index)
    if move.how == 'diverse':
      index = select.diverse(keys, cands.features, totals > core.NEG_INF, move.after)
      logw = jnp.take_along_axis(weights.logw, index, axis=1)
    else:
      index, logw = self._pick(weights.logw, keys, move)
    moved, weights, scores = core.take((cands.inner, weights, totals), index)
    inner = (weights._replace(logw=logw), prompt)
    return core.Told(moved, state.keys[:, : move.after], scores, index, inner)

  def _weigh(self, w: Weights, score, strength, last) -> Weights:
    """Weights `[B, M]` after the scores of this step."""
    good = score > core.NEG_INF
    score = jnp.where(good, score, 0.0)
    high, total = jnp.maximum(w.high, score), w.total + score
    value = {'current': score, 'difference': score, 'max': high, 'sum': total}[self.potential]
    if self.anneal == 'infinite':
      level = value
      gain = jnp.where(good, value - w.level if self.potential == 'difference' else value, -jnp.inf)
      logw = jnp.where(gain >= gain.max(axis=1, keepdims=True), 0.0, core.NEG_INF)
    else:
      level = strength * value
      gain = level - w.level if self.potential == 'difference' else level
      # at the end what was weighed on the way is divided out: all together is exp(strength * score)
      gain = jnp.where(last, self.strength * score - w.done, gain)
      logw = w.logw + gain
    return Weights(jnp.where(good, logw, core.NEG_INF), w.done + gain, level, high, total)

  def _pick(self, logw, keys, move):
    """Which particles go on `[B, N']`, and their log-weights."""
    batch = len(logw)
    grouped = logw.reshape(batch * self.groups, -1)
    size, n = grouped.shape[1], move.after // self.groups
    keys = jax.vmap(lambda k: jax.random.split(k, self.groups))(keys).reshape(-1)
    index = select.resample(self.resampler, keys, grouped, n)
    if n == size:
      low = select.ess(grouped) < self.ess * size * (1 - 1e-5)
      if move.how == 'carry':
        low = jnp.zeros_like(low)
      low |= ~jnp.isfinite(grouped).all(axis=1)  # what must not be kept is not
      stay = jnp.broadcast_to(jnp.arange(size), index.shape)
      index = jnp.where(low[:, None], index, stay)
      kept = jnp.where(low[:, None], 0.0, grouped)
    else:
      kept = jnp.zeros(index.shape)
    offset = (jnp.arange(batch * self.groups) % self.groups * size)[:, None]
    index = (index + offset).reshape(batch, -1).astype(jnp.int32)
    return index, kept.reshape(batch, -1)

  def _at(self, gen, step):
    """The static move of this phase, and begin and strength of this step."""
    moves = self.plan(gen)
    move, s = moves[step.first], step.index
    share = 2 ** ((s + 1) / len(moves)) - 1 if self.anneal == 'increasing' else 1.0
    if isinstance(s, int):
      return move, moves[s].begin, self.strength * share
    begins = jnp.asarray([m.begin for m in moves], jnp.int32)
    return move, begins[s], self.strength * share

  def step_cost(self, gen, step):
    move = self.plan(gen)[step]
    m = move.before * self.branch
    cost = m * (
      gen.cost('extend', move.begin, move.size)
      + gen.cost('extend', move.begin + move.size, move.look)
    )
    if step == 0:
      cost += move.before * schedules.start_cost(gen, self.initial)
    return cost, m


@dataclasses.dataclass(frozen=True)
class Move:
  """One step: stages `begin .. begin + size - 1` of `before` particles, of which `after` go on, by
  'resample', 'diverse' or 'carry'; `look` stages ahead."""

  begin: int
  size: int
  before: int
  after: int
  look: int
  how: str


def build(preset: str = '', **given) -> SMC:
  """From settings; `preset` names a published method whose settings the others replace.

  Raises:
    ConfigError: an unknown preset or setting.
  """
  if preset:
    checks.one_of('preset', preset, PRESETS)
    given = PRESETS[preset] | given
  given = {name: checks.numbers(value) for name, value in given.items()}
  if given.get('groups') == 'particles':
    given['groups'] = given.get('particles', SMC.particles)
  return components.build_dataclass(SMC, **given)
