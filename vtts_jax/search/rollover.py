"""Rollover budget forcing: move on once a candidate is good enough, spend the rest later.

RBF (Kim et al., 2503.19385): each chunk of stages has a quota of tries; a candidate that beats the
best seen so far is taken at once and the unspent rest rolls over to the next chunk; a chunk whose
quota is gone takes its best candidate. With a `threshold` it is the rule of 2512.08985: taken is
what reaches it. `PRESETS` has

  'rbf'   the authors' run on FLUX: 10 steps and 500 evaluations, of which 25 choose the initial
          noise and 47 are the quota of a step. A candidate is judged by the data predicted where
          its step ends; at the ninth step these are the picture, and this step spends what is
          left. A try is two calls here, for the step and at its end; theirs is one, as they keep
          the second for the next step. (Their SDE is `diffusion='quartic'` on the
          variance-preserving path.)

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

PRESETS = {'rbf': {'quota': 47, 'tries': 474, 'roots': 25, 'size': 1, 'steps': 9, 'lookahead': 1}}


class Own(NamedTuple):
  """What a prompt carries besides its state, `[B]`.

  Attributes:
    chunk: chunks taken. left: tries that it may still spend on this one. used: spent on it.
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
    quota: tries of a chunk, a multiple of `round`.
    tries: of all chunks: the last one goes on until they are spent; 0: the last one ends as the
      others do, and what it does not need is not spent.
    round: candidates proposed at a time; the published method has 1.
    roots: candidates at the start, seen after `lookahead` stages; the best one goes on, and its
      score is to be beaten. 1: the first try sets the score to beat.
    schedule: 'linear' or 'fixed': all chunks have the same size.
    size: stages of a chunk.
    steps: at most so many chunks, where what the last one shows is complete; 0 for all.
    threshold: a finite number: take what reaches it; infinity: take what beats the best so far.
    lookahead: greedy stages before a candidate is observed; -1 to the end.
  """

  quota: int = 8
  tries: int = 0
  round: int = 1
  roots: int = 1
  schedule: str = 'linear'
  size: int = 4
  steps: int = 0
  threshold: float = float('inf')
  lookahead: int = -1

  def __post_init__(self):
    for name, low in (
      ('quota', 1), ('tries', 0), ('round', 1), ('roots', 1), ('size', 1), ('steps', 0),
      ('lookahead', -1),
    ):  # fmt: skip
      checks.check_integer(name, getattr(self, name), low)
    checks.check_choice('schedule', self.schedule, ('linear', 'fixed'))
    for name in ('quota', 'tries'):
      if getattr(self, name) % self.round:
        raise ConfigError(
          f'search.{name}={getattr(self, name)}: must be a multiple of search.round={self.round}'
        )
    if self.roots > 1 and not self.lookahead:
      raise ConfigError(f'search.roots={self.roots}: must be 1 with search.lookahead=0')
    if not isinstance(self.threshold, float | int) or self.threshold != self.threshold:
      raise ConfigError(f'search.threshold={self.threshold!r}: must be a number')

  needs = frozenset({'ragged_stages', 'stochastic'})

  def _chunks(self, gen) -> int:
    return len(schedules.schedule_cuts(self.schedule, self.size, self.steps, 0, gen.num_stages))

  def _size(self, gen) -> int:
    return min(self.size if self.schedule == 'linear' else 1, gen.num_stages)

  def _lookahead(self, gen, begin: int | None = None) -> int:
    """Greedy stages after `begin`, by default after the first chunk."""
    rest = gen.num_stages - (self._size(gen) if begin is None else begin)
    return rest if self.lookahead < 0 else min(self.lookahead, rest)

  def check(self, gen):
    size, chunks = self._size(gen), self._chunks(gen)
    if not gen.prefixes_are_samples and self.lookahead >= 0 and gen.num_stages % size:
      raise ConfigError(
        f'search.size={self.size}: must divide the {gen.num_stages} stages where '
        'search.lookahead is not -1'
      )
    reached = chunks * size + self._lookahead(gen)
    if not gen.prefixes_are_samples and reached < gen.num_stages:
      raise ConfigError(
        f'search.steps={self.steps}: the last chunk shows stage {reached} of {gen.num_stages}; '
        'allowed: 0, or more steps'
      )
    if self.tries and self.tries < chunks * self.quota:
      raise ConfigError(
        f'search.tries={self.tries}: must be 0 or at least {chunks * self.quota}, the quotas of '
        f'{chunks} chunks'
      )

  def plan(self, gen):
    """All rounds are alike: how far a prompt is stands in its frontier."""
    rounds = (self.tries or self._chunks(gen) * self.quota) // self.round
    roots = (core.Phase('roots', ((0,),)),) if self.roots > 1 else ()
    return (*roots, core.Phase('round', tuple((number,) for number in range(rounds))))

  def init(self, sampler, keys, initial):
    roots = core.candidate_keys(keys, jnp.arange(self.roots))
    state = sampler.drop_cache(sampler.init(roots))
    zero = jnp.zeros(keys.shape, jnp.int32)
    none = jnp.full(keys.shape, core.NEG_INF)
    first = core.take((state, roots), jnp.zeros((len(keys), 1), jnp.int32))
    own = Own(zero, zero + self.quota, zero, none, (*first, none))
    return core.Frontier(state, roots, jnp.full(roots.shape, core.NEG_INF), own)

  def ask(self, sampler, frontier, shape, row):
    if shape == 'roots':
      return self._ask_roots(sampler, frontier)
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

  def _ask_roots(self, sampler, frontier):
    ahead = self._lookahead(sampler.gen, 0)
    ready = sampler.rebuild_cache(frontier.state, 0)
    shown = sampler.extend(ready, frontier.keys, 0, ahead, greedy=True)
    index = jnp.broadcast_to(jnp.arange(self.roots), frontier.keys.shape)
    return core.Candidates(sampler.drop_cache(shown), ahead, parent=index)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    own = frontier.own
    top = jnp.argmax(totals, axis=1)[:, None]
    score = totals.max(axis=1)
    if shape == 'roots':
      state, keys = core.take((frontier.state, frontier.keys), top)
      own = own._replace(bar=score, found=(state, keys, own.found[2]))
      return core.Frontier(state, keys, score[:, None], own), top
    # the best of this chunk so far
    grown, keys = candidates.own
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
    if self.tries:  # the last chunk goes on to the end
      take &= own.chunk < self._chunks(sampler.gen) - 1
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
    if shape == 'roots':
      one = gen.cost('rebuild_cache') + gen.cost('extend', 0, self._lookahead(gen, 0))
      return self.roots * one, self.roots
    size = self._size(gen)
    one = gen.cost('extend', 0, size) + gen.cost('extend', size, self._lookahead(gen))
    return gen.cost('rebuild_cache') + self.round * one, self.round


def build(preset: str = '', **settings) -> Rollover:
  """From settings; `preset` names a published run, whose settings the others replace.

  Raises:
    ConfigError: an unknown preset or setting.
  """
  return checks.build_preset(Rollover, PRESETS, preset, settings)
