"""Beam search over stages: extend, branch, observe (partial) candidates, keep the best prefixes.

The search of SoTo ("(1D) Ordered Tokens Enable Efficient Test-Time Search", arXiv 2604.15453;
published defaults width 5, branch 10, geometric schedule), with lookahead (Snell et al.,
2408.03314) as a setting. Candidates of one beam differ only in the last stage of a chunk when
`branch_at='last'`, so a candidate costs one stage, not a chunk.

Letters: B prompts, N beams, K children of each, M = N * K candidates, T stages.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules, select


@dataclasses.dataclass(frozen=True)
class Beam(core.Algorithm):
  """Beam search.

  Attributes:
    width: beams kept; an integer, or a tuple (or text, '4,4,2') with one entry a step.
    branch: children of each beam; an integer or a tuple with one entry a step. With branch 1 the
      beam is best-of-N.
    roots: beams at the start; 0 for the (first) width. The published loop has 1.
    schedule: 'geometric', 'linear', 'fixed' or a tuple of cumulative stage counts; see
      `schedules.schedule_cuts`.
    size: base of 'geometric', stages a step of 'linear'.
    steps: at most so many steps; 0 for as many as the schedule has.
    branch_at: 'last' draws K children at the last stage of a chunk, 'first' draws K whole chunks.
    replace: whether children are drawn with replacement ('last' only).
    lookahead: greedy stages that a candidate is continued by before it is observed; -1 to the end.
    lookahead_steps: the first so many steps look ahead; -1 for all.
    complete: after the last step, finish the unfinished beams greedily and score them once more.
    initial: stages that are given and not drawn; their tokens are an argument of `search`.
  """

  width: int | tuple[int, ...] = 5
  branch: int | tuple[int, ...] = 10
  roots: int = 0
  schedule: str | tuple[int, ...] = 'geometric'
  size: int = 2
  steps: int = 0
  branch_at: str = 'last'
  replace: bool = True
  lookahead: int = 0
  lookahead_steps: int = -1
  complete: bool = True
  initial: int = 0

  offers_caches = True

  def __post_init__(self):
    for name in ('width', 'branch', 'schedule'):
      object.__setattr__(self, name, checks.parse_integers(getattr(self, name)))
    for name in ('width', 'branch'):
      value = getattr(self, name)
      for v in value if isinstance(value, tuple) else (value,):
        checks.check_integer(name, v, 1)
    checks.check_integer('roots', self.roots, 0)
    checks.check_integer('steps', self.steps, 0)
    checks.check_integer('lookahead', self.lookahead, -1)
    checks.check_integer('lookahead_steps', self.lookahead_steps, -1)
    checks.check_integer('initial', self.initial, 0)
    checks.check_choice('branch_at', self.branch_at, ('last', 'first'))
    checks.check_flag('replace', self.replace)
    checks.check_flag('complete', self.complete)
    if isinstance(self.schedule, str):
      checks.check_choice(
        'schedule', self.schedule, (*schedules.SCHEDULES, 'a list of cumulative stage counts')
      )
    if self.branch_at == 'first' and not self.replace:
      raise ConfigError("search.replace=False: needs search.branch_at='last'")

  # --------------------------------------------------------------------------------- static shapes

  def chunks(self, gen) -> list[tuple['Chunk', int]]:
    """Each step's shape and the stage at which it begins."""
    end = gen.num_stages
    checks.check_integer('initial', self.initial, 0, end - 1)
    marks = schedules.schedule_cuts(self.schedule, self.size, self.steps, self.initial, end)
    widths = schedules.setting_per_step('width', self.width, len(marks))
    branches = schedules.setting_per_step('branch', self.branch, len(marks))
    # every number of beams follows from the settings: shapes are known before anything runs
    steps, begin, beams = [], self.initial, self.roots or widths[0]
    for i, (mark, width, branch) in enumerate(zip(marks, widths, branches)):
      wanted = self.lookahead if self.lookahead_steps < 0 or i < self.lookahead_steps else 0
      ahead = end - mark if wanted < 0 else min(wanted, end - mark)
      kept = min(width, beams * branch)
      steps.append((Chunk(mark - begin, beams, branch, kept, ahead), begin))
      begin, beams = mark, kept
    if self.complete and begin < end:
      steps.append((Chunk(end - begin, beams, 0, beams, 0), begin))
    return steps

  def plan(self, gen):
    """A row holds the stage at which the step begins."""
    steps = [(chunk, (begin,)) for chunk, begin in self.chunks(gen)]
    return schedules.group_steps(gen, steps, lambda chunk: chunk.beams == chunk.kept)

  def check(self, gen):
    steps = self.chunks(gen)
    if not self.replace and 'fork_distinct' not in gen.offers:
      raise ConfigError(
        f"search.replace=False: {type(gen).__name__} does not offer 'fork_distinct'; allowed: True"
      )
    if not self.replace and max(chunk.branch for chunk, _ in steps) > gen.vocab:
      raise ConfigError(
        f'search.replace=False with search.branch={self.branch}: {type(gen).__name__} has '
        f'{gen.vocab} choices a stage; allowed: True, or a smaller branch'
      )
    reached = self.stages_shown(gen, steps[-1][0], steps[-1][1:])
    if not gen.prefixes_are_samples and reached < gen.num_stages:
      raise ConfigError(
        f'search.complete=False: the schedule ends at stage {reached} of {gen.num_stages} and an '
        f'unfinished candidate of {type(gen).__name__} is no sample; allowed: True'
      )

  def stages_shown(self, gen, shape, row):
    return row[0] + shape.size + shape.lookahead

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, sampler, keys, initial):
    roots = core.candidate_keys(keys, jnp.arange(self.chunks(sampler.gen)[0][0].beams))
    scores = jnp.full(roots.shape, core.NEG_INF)
    return core.Frontier(sampler.init(roots, initial), roots, scores)

  def ask(self, sampler, frontier, shape, row):
    (begin,) = row
    after = begin + shape.size
    drawn, keys, cache_owner = self._extend_beams(sampler, frontier, shape, begin)
    states, owner = cache_owner
    shown = drawn
    if shape.lookahead:
      ahead = sampler.rebuild_cache(drawn, after, share=core.take(states, owner))
      ahead = sampler.extend(ahead, keys, after, shape.lookahead, greedy=True)
      shown = sampler.drop_cache(ahead)
    parent = _parents(shape, frontier.keys.shape[0])
    stage = after + shape.lookahead
    return core.Candidates(shown, stage, parent, own=(drawn, keys), cache_owner=cache_owner)

  def _extend_beams(self, sampler, frontier, shape, begin):
    """(candidates without caches `[B, M, ...]`, their keys `[B, M]`, (cache owners, index))."""
    batch, last = frontier.keys.shape[0], begin + shape.size - 1
    own = jnp.broadcast_to(jnp.arange(shape.proposed), (batch, shape.proposed))
    if shape.branch == 0:  # the completion after the last step
      grown = sampler.extend(frontier.state, frontier.keys, begin, shape.size, greedy=True)
      return sampler.drop_cache(grown), frontier.keys, (grown, own)
    if self.branch_at == 'first':  # every child draws the whole chunk
      keys = core.child_keys(frontier.keys, begin, shape.branch).reshape(own.shape)
      grown = core.repeat(frontier.state, shape.branch)
      grown = sampler.extend(grown, keys, begin, shape.size)
      return sampler.drop_cache(grown), keys, (grown, own)
    # the beam draws the chunk but for its last stage, which its children draw from one cache
    trunk = frontier.state
    if shape.size > 1:
      trunk = sampler.extend(trunk, frontier.keys, begin, shape.size - 1)
    keys = core.child_keys(frontier.keys, last, shape.branch)
    drawn, owners = sampler.fork(trunk, keys, last, shape.branch, replace=self.replace)
    return drawn, keys.reshape(own.shape), (owners, _parents(shape, batch))

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    (drawn, keys), (states, owner) = candidates.own, candidates.cache_owner
    kept, scores = select.top_candidates(totals, shape.kept)
    # chosen children take over the caches that they shared with their siblings
    drawn, keys, owner = core.take((drawn, keys, owner), kept)
    state = sampler.rebuild_cache(drawn, row[0] + shape.size, share=core.take(states, owner))
    return core.Frontier(state, keys, scores), kept

  # ------------------------------------------------------------------------------------------ bill

  def init_cost(self, gen):
    return self.chunks(gen)[0][0].beams * schedules.given_cost(gen, self.initial)

  def step_cost(self, gen, shape, row):
    begin, last = row[0], row[0] + shape.size - 1
    if shape.branch == 0 or self.branch_at == 'first':
      cost = shape.proposed * gen.cost('extend', begin, shape.size)
    else:
      trunk = gen.cost('extend', begin, shape.size - 1)
      cost = shape.beams * (trunk + gen.cost('fork', last, shape.branch))
    return cost + shape.proposed * gen.cost('extend', last + 1, shape.lookahead), shape.proposed


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The shape of a step: `size` stages of `beams` beams, `branch` children each (0: the beam is
  completed), of which `kept` go on; candidates are observed `lookahead` greedy stages later."""

  size: int
  beams: int
  branch: int
  kept: int
  lookahead: int

  @property
  def proposed(self) -> int:
    return self.beams * max(self.branch, 1)


def _parents(shape: Chunk, batch: int):
  """The beam that each candidate comes from `[B, M]`; children of one beam are neighbours."""
  parent = jnp.arange(shape.proposed) // max(shape.branch, 1)
  return jnp.broadcast_to(parent, (batch, shape.proposed))
