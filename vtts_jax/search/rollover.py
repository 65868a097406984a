"""Rollover budget forcing: move on once a candidate is good enough, spend the rest later.

RBF (Kim et al., 2503.19385): each chunk of stages has a quota of evaluations; a candidate that
beats the best seen so far is taken at once and the unspent rest rolls over to the next chunk; a
chunk whose quota is gone takes its best candidate. With a `threshold` it is the rule of 2512.08985:
taken is what reaches it.

Prompts move on at their own pace: in one call each candidate has its own stage, and a prompt that
has arrived needs no further step (it leaves the batch in the stepped driver and is masked in the
fused one; its bill ends there).
Letters: B prompts, R candidates of a round, D chunks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules


class Own(NamedTuple):
  """What a prompt carries besides its state, `[B]`.

  Attributes:
    chunk: chunks taken. left: evaluations that it may still spend on this one. used: spent on it.
    bar: the score to beat.
    found: best of this chunk: state without caches `[B, 1, ...]`, key `[B, 1]`, score.
  """

  chunk: Any
  left: Any
  used: Any
  bar: Any
  found: Any


@dataclasses.dataclass(frozen=True)
class Rollover(core.Algorithm):
  """Rollover budget forcing.

  Attributes:
    quota: evaluations of a chunk, a multiple of `round`.
    round: candidates proposed at a time; the published method has 1.
    schedule: 'linear' or 'fixed': all chunks have the same size.
    size: stages of a chunk.
    threshold: a finite number: take what reaches it; infinity: take what beats the best so far.
    lookahead: greedy stages before a candidate is observed; -1 to the end.
  """

  quota: int = 8
  round: int = 1
  schedule: str = 'linear'
  size: int = 4
  threshold: float = float('inf')
  lookahead: int = -1

  def __post_init__(self):
    checks.check_integer('quota', self.quota, 1)
    checks.check_integer('round', self.round, 1)
    checks.check_integer('size', self.size, 1)
    checks.check_integer('lookahead', self.lookahead, -1)
    checks.check_choice('schedule', self.schedule, ('linear', 'fixed'))
    if self.quota % self.round:
      raise ConfigError(
        f'search.quota={self.quota}: must be a multiple of search.round={self.round}'
      )
    if not isinstance(self.threshold, float | int) or self.threshold != self.threshold:
      raise ConfigError(f'search.threshold={self.threshold!r}: must be a number')

  needs = frozenset({'ragged_stages'})

  def _chunks(self, gen) -> int:
    return len(schedules.schedule_cuts(self.schedule, self.size, 0, 0, gen.num_stages))

  def _size(self, gen) -> int:
    return min(self.size if self.schedule == 'linear' else 1, gen.num_stages)

  def _lookahead(self, gen) -> int:
    rest = gen.num_stages - self._size(gen)
    return rest if self.lookahead < 0 else min(self.lookahead, rest)

  def check(self, gen):
    if not gen.prefixes_are_samples and self.lookahead >= 0 and gen.num_stages % self._size(gen):
      raise ConfigError(
        f'search.size={self.size}: must divide the {gen.num_stages} stages where '
        'search.lookahead is not -1'
      )

  def plan(self, gen):
    """All rounds are alike: how far a prompt is stands in its frontier."""
    rounds = self._chunks(gen) * self.quota // self.round
    return (core.Phase('round', tuple((number,) for number in range(rounds))),)

  def init(self, sampler, keys, initial):
    roots = core.candidate_keys(keys, jnp.arange(1))
    state = sampler.drop_cache(sampler.init(roots))
    zero = jnp.zeros(keys.shape, jnp.int32)
    none = jnp.full(keys.shape, core.NEG_INF)
    own = Own(zero, zero + self.quota, zero, none, (state, roots, none))
    return core.Frontier(state, roots, none[:, None], own)

  def ask(self, sampler, frontier, shape, row):
    # each prompt is at its own chunk, and proposes the children that it has not tried yet
    own, size, end = frontier.own, self._size(sampler.gen), sampler.num_stages
    index = own.used[:, None] + jnp.arange(self.round)
    begin = jnp.broadcast_to(jnp.minimum(own.chunk * size, end)[:, None], index.shape)
    keys = core.child_key(jnp.broadcast_to(frontier.keys, index.shape), begin, index)
    trunk = sampler.rebuild_cache(frontier.state, begin[:, :1])
    grown = sampler.extend(core.repeat(trunk, self.round), keys, begin, size)
    stage = jnp.minimum(begin + size, end)
    shown, ahead = grown, self._lookahead(sampler.gen)
    if ahead:
      shown = sampler.extend(grown, keys, stage, ahead, greedy=True)
    return core.Candidates(
      sampler.drop_cache(shown),
      jnp.minimum(stage + ahead, end),
      parent=jnp.zeros(index.shape, jnp.int32),
      own=(sampler.drop_cache(grown), keys),
    )

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    own, (grown, keys) = frontier.own, candidates.own
    # the best of this chunk so far
    top = jnp.argmax(totals, axis=1)[:, None]
    score = totals.max(axis=1)
    better = score > own.found[2]
    new = (*(core.take(x, top) for x in (grown, keys)), score)
    found = tuple(core.where(better, a, b) for a, b in zip(new, own.found))
    used, left = own.used + self.round, own.left - self.round
    bar = own.bar
    # taken is what reaches the threshold, or beats the best so far; or the best of a spent quota
    if self.threshold < float('inf'):
      enough = found[2] >= self.threshold
    else:
      enough = (found[2] > bar) & (bar > core.NEG_INF)
    # the first observation sets the bar that the next ones have to beat
    bar = jnp.where(bar > core.NEG_INF, bar, totals[:, 0])
    take = (enough | (left <= 0)) & (found[2] > core.NEG_INF)
    bar = jnp.where(take, jnp.maximum(bar, found[2]), bar)
    state = core.where(take, found[0], frontier.state)
    keys = core.where(take, found[1], frontier.keys)
    moved = Own(
      own.chunk + take,
      jnp.where(take, left + self.quota, left),
      jnp.where(take, 0, used),
      bar,
      (*found[:2], jnp.where(take, core.NEG_INF, found[2])),
    )
    # -1: the prompt stays where it is, or takes what an earlier round proposed
    kept = jnp.where((take & better)[:, None], top, -1)
    return core.Frontier(state, keys, found[2][:, None], moved), kept

  def finished_prompts(self, gen, frontier):
    return frontier.own.chunk >= self._chunks(gen)

  def step_cost(self, gen, shape, row):
    size = self._size(gen)
    one = gen.cost('extend', 0, size) + gen.cost('extend', size, self._lookahead(gen))
    return gen.cost('rebuild_cache') + self.round * one, self.round
