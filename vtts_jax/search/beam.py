"""Beam search over stages: extend, branch, look at (partial) pictures, keep the best prefixes.

The search of SoTo ("(1D) Ordered Tokens Enable Efficient Test-Time Search", arXiv 2604.15453;
published defaults width 5, branch 10, geometric schedule), with lookahead (Snell et al.,
2408.03314) as a setting. Candidates of one beam differ only in the last stage of a chunk when
`branch_at='last'`, so a candidate costs one stage, not a chunk.

Letters: B prompts, N beams, K children of each, M = N * K candidates, T stages.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules, select


@dataclasses.dataclass(frozen=True)
class Beam(core.Algorithm):
  """Beam search.

  Attributes:
    width: beams kept; an integer, or a tuple with one entry a step.
    branch: children of each beam; an integer or a tuple with one entry a step. With branch 1 the
      beam is best-of-N.
    roots: beams at the start; 0 for the (first) width. The published loop has 1.
    schedule: 'geometric', 'linear', 'fixed' or a tuple of cumulative stage counts; see
      `schedules.cuts`.
    size: base of 'geometric', stages a step of 'linear'.
    steps: at most so many steps; 0 for as many as the schedule has.
    branch_at: 'last' draws K children at the last stage of a chunk, 'first' draws K whole chunks.
    replace: whether children are drawn with replacement ('last' only).
    lookahead: greedy stages that a candidate is continued by before it is looked at; -1 to the end.
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

  donates = True

  def __post_init__(self):
    for name in ('width', 'branch'):
      value = getattr(self, name)
      for v in value if isinstance(value, tuple) else (value,):
        checks.integer(name, v, 1)
    checks.integer('roots', self.roots, 0)
    checks.integer('steps', self.steps, 0)
    checks.integer('lookahead', self.lookahead, -1)
    checks.integer('lookahead_steps', self.lookahead_steps, -1)
    checks.integer('initial', self.initial, 0)
    checks.one_of('branch_at', self.branch_at, ('last', 'first'))
    checks.flag('replace', self.replace)
    checks.flag('complete', self.complete)
    if isinstance(self.schedule, str):
      checks.one_of(
        'schedule', self.schedule, (*schedules.SCHEDULES, 'a list of cumulative stage counts')
      )
    if self.branch_at == 'first' and not self.replace:
      raise ConfigError("search.replace=False: needs search.branch_at='last'")

  # ------------------------------------------------------------------------------------- static
  # shapes

  def plan(self, gen) -> tuple['Chunk', ...]:
    """What each step does, all of it known before anything runs."""
    end = gen.num_stages
    checks.integer('initial', self.initial, 0, end - 1)
    marks = schedules.cuts(self.schedule, self.size, self.steps, self.initial, end)
    widths = schedules.per_step('width', self.width, len(marks))
    branches = schedules.per_step('branch', self.branch, len(marks))
    chunks, begin, beams = [], self.initial, self.roots or widths[0]
    for i, (mark, width, branch) in enumerate(zip(marks, widths, branches)):
      looks = self.lookahead if self.lookahead_steps < 0 or i < self.lookahead_steps else 0
      look = end - mark if looks < 0 else min(looks, end - mark)
      kept = min(width, beams * branch)
      chunks.append(Chunk(begin, mark - begin, beams, branch, kept, look))
      begin, beams = mark, kept
    if self.complete and begin < end:
      chunks.append(Chunk(begin, end - begin, beams, 0, beams, 0))
    return tuple(chunks)

  def check(self, gen):
    chunks = self.plan(gen)
    if not self.replace and max(c.branch for c in chunks) > gen.vocab:
      raise ConfigError(
        f'search.replace=False with search.branch={self.branch}: {type(gen).__name__} has '
        f'{gen.vocab} choices a stage; allowed: True, or a smaller branch'
      )
    reached = chunks[-1].begin + chunks[-1].size + chunks[-1].look
    if not gen.anytime and reached < gen.num_stages:
      raise ConfigError(
        f'search.complete=False: the schedule ends at stage {reached} of {gen.num_stages} and an '
        f'unfinished sample of {type(gen).__name__} is no picture; allowed: True'
      )

  def reach(self, gen, step):
    chunk = self.plan(gen)[step]
    return chunk.begin + chunk.size + chunk.look

  def phases(self, gen):
    runs, shapes = [], [dataclasses.replace(c, begin=0) for c in self.plan(gen)]
    for i, shape in enumerate(shapes):
      same = runs and shape == shapes[runs[-1][0]] and shape.beams == shape.kept
      if same:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
      else:
        runs.append((i, 1))
    return tuple(runs)

  # --------------------------------------------------------------------------------------- ask and
  # tell

  def init(self, gen, params, ctx, keys, initial):
    beams = self.plan(gen)[0].beams
    roots = core.candidate_keys(keys, jnp.arange(beams))
    frontier = schedules.start(gen, params, ctx, roots, initial)
    scores = jnp.full(roots.shape, core.NEG_INF)
    return core.Told(frontier, roots, scores, jnp.zeros(roots.shape, jnp.int32))

  def ask(self, gen, params, ctx, state, step):
    chunk, begin = self._at(gen, step)
    index = jnp.broadcast_to(
      jnp.arange(chunk.beams * max(chunk.branch, 1)), (state.keys.shape[0], chunk.proposed)
    )
    parent = index // max(chunk.branch, 1)
    last = begin + chunk.size - 1
    if chunk.branch == 0:  # the completion after the last step
      donor = gen.extend(params, ctx, state.frontier, state.keys, begin, chunk.size, greedy=True)
      drawn, keys, source = gen.slim(donor), state.keys, index
    elif self.branch_at == 'first':
      keys = core.child_keys(state.keys, begin, chunk.branch).reshape(index.shape)
      donor = gen.extend(
        params, ctx, core.repeat(state.frontier, chunk.branch), keys, begin, chunk.size
      )
      drawn, source = gen.slim(donor), index
    else:
      trunk = state.frontier
      if chunk.size > 1:
        trunk = gen.extend(params, ctx, trunk, state.keys, begin, chunk.size - 1)
      keys = core.child_keys(state.keys, last, chunk.branch)
      drawn, donor = gen.fork(params, ctx, trunk, keys, last, chunk.branch, replace=self.replace)
      keys, source = keys.reshape(index.shape), parent
    shown = drawn
    if chunk.look:
      state_of = gen.fatten(params, ctx, drawn, last + 1, like=core.take(donor, source))
      shown = gen.slim(gen.extend(params, ctx, state_of, keys, last + 1, chunk.look, greedy=True))
    stage = jnp.int32(last + 1 + chunk.look)
    return core.Candidates(shown, stage, parent, (drawn, keys), (donor, source))

  def tell(self, gen, params, ctx, state, cands, totals, step):
    chunk, begin = self._at(gen, step)
    (drawn, keys), (donor, source) = cands.inner, cands.donor
    kept, scores = select.top(totals, chunk.kept)
    drawn, keys = core.take((drawn, keys), kept)
    like = core.take(donor, jnp.take_along_axis(source, kept, axis=1))
    frontier = gen.fatten(params, ctx, drawn, begin + chunk.size, like=like)
    return core.Told(frontier, keys, scores, kept)

  def _at(self, gen, step):
    chunks = self.plan(gen)
    chunk = chunks[step.first]
    if isinstance(step.index, int):
      return chunk, chunks[step.index].begin
    return chunk, jnp.asarray([c.begin for c in chunks], jnp.int32)[step.index]

  def step_cost(self, gen, step):
    chunk = self.plan(gen)[step]
    begin, last = chunk.begin, chunk.begin + chunk.size - 1
    cost = chunk.beams * schedules.start_cost(gen, self.initial) if step == 0 else core.Cost()
    if chunk.branch == 0 or self.branch_at == 'first':
      cost += chunk.proposed * gen.cost('extend', begin, chunk.size)
    else:
      cost += chunk.beams * (
        gen.cost('extend', begin, chunk.size - 1) + gen.cost('fork', last, chunk.branch)
      )
    return cost + chunk.proposed * gen.cost('extend', last + 1, chunk.look), chunk.proposed


@dataclasses.dataclass(frozen=True)
class Chunk:
  """One step: stages `begin .. begin + size - 1` of `beams` beams, `branch` children each, `look`
  stages ahead."""

  begin: int
  size: int
  beams: int
  branch: int
  kept: int
  look: int

  @property
  def proposed(self) -> int:
    return self.beams * max(self.branch, 1)


def build(**given) -> Beam:
  """From settings; lists may be given as text, '4,8,32'."""
  return components.build_dataclass(Beam, **{k: checks.numbers(v) for k, v in given.items()})
