"""Particle search: N particles move together, are weighted by a verifier and resampled.

One class spans the published methods: inverse temperature (constant, increasing, infinite) x
potential (current, difference, max, sum) x resampler x when to resample. That grid is the one of
"Inference-time scaling of diffusion models through classical search" (2505.23614); `PRESETS` names
its published points:

  'fk'       FK steering (Singhal et al., 2501.06848) as launched on SDXL: 4 particles, strength
             10, potential 'max' ('difference', 'sum' and 'current' are its 'diff', 'add' and 'rt'),
             weighed every 20 of 100 stages. The authors' own times are schedule=(21, 41, 61, 81,
             100); ess=0.5 is their adaptive resampling. On a flow the copies diverge by `eta` or,
             as GLASS Flows has it (2509.25170), by `inner_steps` of the generator.
  'das'      DAS (Kim et al., 2501.05803) without the gradient in its proposals: 4 particles, every
             stage, strength tempered by gamma = 0.008 (for 100 stages; the strength is that of the
             verifier: 200 for aesthetics, 100 for CLIP).
  'svdd'     SVDD-PM (Li et al., 2408.08252): the best of 20 children at every stage, judged by the
             data predicted at the child. The children share the call at their parent, so a stage is
             branch + 1 evaluations and the last one 1, as in the authors' code.
  'tts_var'  TTS-VAR (2507.18537), for 13 scales.
  'best'     the best point of the grid.

On a diffusion generator a particle shows the data that its last step predicted, so with
`lookahead` 0 it is judged as in FK steering, by what was known before its last noise; `lookahead=1`
judges it where it is, at one evaluation more.

Weights stay in logs and are carried forward where no resampling takes place, and the last step
divides out the potentials of the way, so that the particles target p(x) exp(strength * score)
whatever the potential (Singhal et al., section 3): checked on problems with a known answer. (The
authors' code carries no weights, and cuts off 'max' below at 0.)

A key belongs to the slot and not to the lineage: copies of a particle diverge at the next stage.
Letters: B prompts, N particles, K children of each, M = N * K, S steps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules, select

ANNEAL = ('constant', 'increasing', 'infinite')
POTENTIALS = ('current', 'difference', 'max', 'sum')
RESAMPLE = core.CHILD - 2  # folded into the prompt's key, with the step, for the resampler

PRESETS = {
  'fk': {
    'particles': 4,
    'size': 20,
    'strength': 10.0,
    'potential': 'max',
    'resampler': 'multinomial',
  },
  'das': {
    'particles': 4,
    'size': 1,
    'anneal': 'increasing',
    'gamma': 0.008,
    'potential': 'difference',
    'resampler': 'ssp',
    'ess': 0.5,
  },
  'svdd': {
    'particles': 1,
    'branch': 20,
    'groups': 'particles',
    'size': 1,
    'lookahead': 1,
    'anneal': 'infinite',
    'potential': 'current',
    'resampler': 'multinomial',
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
    groups: particles are resampled within so many groups of neighbours; 1 for all together,
      'particles' for each one among its own children.
    schedule, size, steps: stages at which particles are weighed; see `schedules.schedule_cuts`.
    strength: inverse temperature, in units of the verifier's score; 0 is best-of-N.
    anneal: 'constant'; 'increasing', from near 0 to `strength`; 'infinite', only the best is
      copied.
    gamma: how 'increasing' does: with i stages done before the one that a particle shows, the
      share of `strength` is (1 + gamma) ** i - 1, at most 1, and 1 at the end (DAS). 0 takes 2 **
      (s / S) - 1 after s of the S steps.
    potential: what a particle is weighed by: its score, its gain, its best or its sum.
    resampler: see `select.resample_ancestors`.
    every: weigh and resample every `every` steps, and at the last.
    ess: and only if the effective sample size is below this share of M (1: whenever weights
      differ).
    resample_at: the steps (from 0) at which particles are weighed and resampled; empty for `every`.
      Where the population shrinks they always are.
    diverse: steps at which particles are picked by k-means++ on the verifier's features instead.
    lookahead: greedy stages before a particle is observed; -1 to the end.
    initial: stages that are given and not drawn.
  """

  particles: int | tuple[int, ...] = 8
  branch: int = 1
  groups: int | str = 1
  schedule: str | tuple[int, ...] = 'linear'
  size: int = 4
  steps: int = 0
  strength: float = 10.0
  anneal: str = 'constant'
  gamma: float = 0.0
  potential: str = 'max'
  resampler: str = 'ssp'
  every: int = 1
  ess: float = 1.0
  resample_at: tuple[int, ...] = ()
  diverse: tuple[int, ...] = ()
  lookahead: int = 0
  initial: int = 0

  offers_caches = True

  def __post_init__(self):
    for name in ('particles', 'schedule', 'resample_at', 'diverse'):
      object.__setattr__(self, name, checks.parse_integers(getattr(self, name)))
    if self.groups == 'particles':
      object.__setattr__(self, 'groups', self.particles)
    checks.check_integer('groups', self.groups, 1)
    values = self.particles if isinstance(self.particles, tuple) else (self.particles,)
    for value in values:
      checks.check_integer('particles', value, 1)
      if value % self.groups:
        raise ConfigError(f'search.groups={self.groups}: must divide search.particles={value}')
    for name, low in (('branch', 1), ('steps', 0), ('every', 1), ('initial', 0)):
      checks.check_integer(name, getattr(self, name), low)
    checks.check_integer('lookahead', self.lookahead, -1)
    checks.check_number('strength', self.strength, 0)
    checks.check_number('ess', self.ess, 0, 1)
    checks.check_number('gamma', self.gamma, 0)
    if self.gamma and self.anneal != 'increasing':
      raise ConfigError(
        f"search.gamma={self.gamma}: must be 0 with search.anneal={self.anneal!r}"
      )
    checks.check_choice('anneal', self.anneal, ANNEAL)
    checks.check_choice('potential', self.potential, POTENTIALS)
    checks.check_choice('resampler', self.resampler, select.RESAMPLERS)
    if any(b > a for a, b in zip(values, values[1:])):
      raise ConfigError(f'search.particles={list(values)}: must not grow from step to step')
    if isinstance(self.schedule, str):
      checks.check_choice(
        'schedule', self.schedule, (*schedules.SCHEDULES, 'a list of cumulative stage counts')
      )

  @property
  def needs(self):
    return frozenset({'stochastic'} | ({'features'} if self.diverse else set()))

  # -------------------------------------------------------------------------------- static shapes

  def moves(self, gen) -> list[tuple['Move', int]]:
    """Each step's shape and the stage at which it begins; the last one always reaches the end."""
    end = gen.num_stages
    checks.check_integer('initial', self.initial, 0, end - 1)
    marks = schedules.schedule_cuts(self.schedule, self.size, self.steps, self.initial, end)
    marks = (*marks[:-1], end)
    sizes = schedules.setting_per_step('particles', self.particles, len(marks))
    steps, begin = [], self.initial
    for s, (mark, n) in enumerate(zip(marks, sizes)):
      after = sizes[min(s + 1, len(sizes) - 1)]
      chosen = s in self.resample_at if self.resample_at else (s + 1) % self.every == 0
      chosen |= s == len(marks) - 1
      ahead = end - mark if self.lookahead < 0 else min(self.lookahead, end - mark)
      how = 'diverse' if s in self.diverse else 'resample' if chosen else 'carry'
      if how == 'carry' and (after < n or self.branch > 1):
        how = 'resample'
      steps.append((Move(mark - begin, n, after, ahead, how), begin))
      begin = mark
    return steps

  def plan(self, gen):
    """A row holds the stage at which the step begins, its number, the inverse temperature, and
    whether it is the last."""
    steps, rows = self.moves(gen), []
    for number, (move, begin) in enumerate(steps):
      last, share = number == len(steps) - 1, 1.0
      if self.anneal == 'increasing' and self.gamma:
        before = begin + move.size + move.lookahead - 1
        share = 1.0 if last else min((1 + self.gamma) ** before - 1, 1.0)
      elif self.anneal == 'increasing':
        share = 2 ** ((number + 1) / len(steps)) - 1
      rows.append((move, (begin, number, float(self.strength * share), last)))
    return schedules.group_steps(gen, rows, lambda move: move.before == move.after)

  def check(self, gen):
    steps = len(self.moves(gen))
    for name in ('resample_at', 'diverse'):
      for s in getattr(self, name):
        if not isinstance(s, int) or not 0 <= s < steps:
          raise ConfigError(
            f'search.{name}={list(getattr(self, name))}: must be steps in 0 .. {steps - 1}'
          )

  def stages_shown(self, gen, shape, row):
    return row[0] + shape.size + shape.lookahead

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, sampler, keys, initial):
    slots = core.candidate_keys(keys, jnp.arange(self.moves(sampler.gen)[0][0].before))
    zero = jnp.zeros(slots.shape)
    weights = Weights(zero, zero, zero, zero + core.NEG_INF, zero)
    return core.Frontier(sampler.init(slots, initial), slots, zero, own=(weights, keys))

  def ask(self, sampler, frontier, shape, row):
    begin = row[0]
    keys = core.child_keys(frontier.keys, begin, self.branch)
    moved = self._move_children(sampler, frontier.state, keys, begin, shape.size)
    keys = keys.reshape(len(keys), -1)
    index = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape)
    shown, stage = moved, begin + shape.size
    if shape.lookahead:
      shown = sampler.extend(moved, keys, stage, shape.lookahead, greedy=True)
    return core.Candidates(
      sampler.drop_cache(shown),
      stage + shape.lookahead,
      parent=index // self.branch,
      own=moved,
      cache_owner=(moved, index),
    )

  def _move_children(self, sampler, state, keys, begin, size):
    """Children `[B, N * K, ...]` of particles, `size` stages on, with keys `[B, N, K]`."""
    flat = keys.reshape(len(keys), -1)
    if self.branch == 1:
      return sampler.extend(state, flat, begin, size)
    # what the children of a particle have in common is computed once
    drawn, owners = sampler.fork(state, keys, begin, self.branch)
    parent = jnp.broadcast_to(jnp.arange(flat.shape[1]) // self.branch, flat.shape)
    moved = sampler.rebuild_cache(drawn, begin + 1, share=core.take(owners, parent))
    return sampler.extend(moved, flat, begin + 1, size - 1) if size > 1 else moved

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    _, number, strength, last = row
    weights, prompt = frontier.own
    weights = core.repeat(weights, self.branch)
    if shape.how == 'carry':  # not due: particles are not weighed, but a bad score is out
      bad = jnp.isneginf(totals)
      weights = weights._replace(logw=jnp.where(bad, core.NEG_INF, weights.logw))
    else:
      weights = self._weigh(weights, totals, strength, last)
    keys = core.fold(core.fold(prompt, RESAMPLE), number)
    if shape.how == 'diverse':
      valid = totals > core.NEG_INF
      index = select.pick_diverse(keys, candidates.features, valid, shape.after)
      logw = jnp.take_along_axis(weights.logw, index, axis=1)
    else:
      index, logw = self._resample(weights.logw, keys, shape)
    moved, weights, scores = core.take((candidates.own, weights, totals), index)
    own = (weights._replace(logw=logw), prompt)
    return core.Frontier(moved, frontier.keys[:, : shape.after], scores, own), index

  def _weigh(self, w: Weights, score, strength, last) -> Weights:
    """Weights `[B, M]` after the scores of this step."""
    # a bad score must not spoil the sums; its particle is put out at the end
    good = score > core.NEG_INF
    score = jnp.where(good, score, 0.0)
    high, total = jnp.maximum(w.high, score), w.total + score
    value = {'current': score, 'difference': score, 'max': high, 'sum': total}[self.potential]
    if self.anneal == 'infinite':  # the limit of a large strength: only the best have weight
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

  def _resample(self, logw, keys, shape: 'Move'):
    """Which particles go on `[B, N']`, and their log-weights."""
    batch = len(logw)
    # every group of neighbours is a row of its own
    grouped = logw.reshape(batch * self.groups, -1)
    size, n = grouped.shape[1], shape.after // self.groups
    keys = jax.vmap(lambda k: jax.random.split(k, self.groups))(keys).reshape(-1)
    index = select.resample_ancestors(self.resampler, keys, grouped, n)
    if n == size:
      low = select.effective_sample_size(grouped) < self.ess * size * (1 - 1e-5)
      if shape.how == 'carry':
        low = jnp.zeros_like(low)
      low |= ~jnp.isfinite(grouped).all(axis=1)  # what must not be kept is not
      stay = jnp.broadcast_to(jnp.arange(size), index.shape)
      index = jnp.where(low[:, None], index, stay)
      kept = jnp.where(low[:, None], 0.0, grouped)
    else:
      kept = jnp.zeros(index.shape)
    # back from places in a group to places among all
    offset = (jnp.arange(batch * self.groups) % self.groups * size)[:, None]
    index = (index + offset).reshape(batch, -1).astype(jnp.int32)
    return index, kept.reshape(batch, -1)

  # ------------------------------------------------------------------------------------------ bill

  def init_cost(self, gen):
    return self.moves(gen)[0][0].before * schedules.given_cost(gen, self.initial)

  def step_cost(self, gen, shape, row):
    m, after = shape.before * self.branch, row[0] + shape.size
    if self.branch == 1:
      moved = m * gen.cost('extend', row[0], shape.size)
    else:
      rest = gen.cost('extend', row[0] + 1, shape.size - 1)
      moved = shape.before * gen.cost('fork', row[0], self.branch) + m * rest
    return moved + m * gen.cost('extend', after, shape.lookahead), m


@dataclasses.dataclass(frozen=True)
class Move:
  """The shape of a step: `size` stages of `before` particles, of which `after` go on, by
  'resample', 'diverse' or 'carry'; particles are observed `lookahead` greedy stages later."""

  size: int
  before: int
  after: int
  lookahead: int
  how: str


def build(preset: str = '', **settings) -> SMC:
  """From settings; `preset` names a published method, whose settings the others replace.

  Raises:
    ConfigError: an unknown preset or setting.
  """
  return checks.build_preset(SMC, PRESETS, preset, settings)
