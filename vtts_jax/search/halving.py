"""Multi-fidelity verification: successive halving over how well a candidate is observed.

A full decode and its verification cost many times the tokens of a candidate (about 16 x at released
sizes), and most candidates are not worth it. Any algorithm's candidates go through *rungs*
(successive halving, Jamieson and Talwalkar 2016): all are observed as drafts (fewer decoder steps,
`Generator.draft`) or after a short lookahead, a share is kept, and only the last rung observes in
full. The wrapped algorithm is told the scores of the last rung; the others are out. Each rung is a
step of its own, so that the bill is exact and no draft is ever returned.

Letters: B prompts, M candidates of the wrapped algorithm, m of a rung, R rungs.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, select


@dataclasses.dataclass(frozen=True)
class Rung:
  """One fidelity.

  Attributes:
    keep: share of the candidates of this rung that go on to the next (of the last rung: 1).
    lookahead: greedy stages that a candidate is continued by, counted from where the wrapped
      algorithm shows it; -1 to the end. Must not shrink from rung to rung.
    draft: settings of the generator that make observing cheaper, as pairs; () observes in full.
  """

  keep: float = 1.0
  lookahead: int = 0
  draft: tuple[tuple[str, object], ...] = ()


class RungShape(NamedTuple):
  """The shape of a step: the wrapped algorithm's, the rung's number, and its m candidates."""

  inner: Hashable
  rung: int
  size: int


class Proposed(NamedTuple):
  """What the rungs carry besides the wrapped algorithm's own arrays: its candidates, and which of
  them are left `[B, m]`."""

  candidates: Any
  index: jax.Array


@dataclasses.dataclass(frozen=True)
class Halving(core.Algorithm):
  """Successive halving around another algorithm.

  Attributes:
    inner: the algorithm.
    rungs: fidelities, from cheap to full; mappings of `Rung`'s settings in a config.
    least: candidates that a rung keeps at least (a beam wants its width).
  """

  inner: core.Algorithm
  rungs: tuple[Rung, ...] = (Rung(keep=0.25), Rung(lookahead=-1))
  least: int = 1

  def __post_init__(self):
    if not isinstance(self.inner, core.Algorithm):
      raise ConfigError(f'search.inner={self.inner!r}: needs a name, e.g. search.beam')
    object.__setattr__(self, 'rungs', tuple(map(_as_rung, self.rungs)))
    checks.check_integer('least', self.least, 1)
    if not self.rungs:
      raise ConfigError('search.rungs=(): must hold at least one')
    for i, rung in enumerate(self.rungs):
      checks.check_number(f'rungs.{i}.keep', rung.keep, 0, 1)
      checks.check_integer(f'rungs.{i}.lookahead', rung.lookahead, -1)
    ahead = [float('inf') if rung.lookahead < 0 else rung.lookahead for rung in self.rungs]
    if ahead != sorted(ahead):
      raise ConfigError(
        f'search.rungs: lookahead={[r.lookahead for r in self.rungs]} must not shrink from rung to '
        'rung'
      )
    if self.rungs[-1].draft:
      raise ConfigError('search.rungs: the last one must observe in full (draft=())')
    for name in ('features', 'gradient'):
      if name in self.inner.needs:
        raise ConfigError(
          f'search.inner: {type(self.inner).__name__} needs {name} of all of its candidates'
        )

  @property
  def initial(self):
    return self.inner.initial

  @property
  def needs(self):
    return self.inner.needs

  def check(self, gen):
    self.inner.check(gen)
    fields = [f.name for f in dataclasses.fields(gen)] if dataclasses.is_dataclass(gen) else []
    for rung in self.rungs:
      for name, _ in rung.draft:
        if name not in fields:
          raise ConfigError(
            f'search.rungs.draft: {type(gen).__name__} has no setting {name!r}; '
            f'allowed: {", ".join(fields)}'
          )

  # -------------------------------------------------------------------------------- static shapes

  def plan(self, gen):
    """Every rung of every step of the wrapped algorithm, whose rows are kept."""
    phases = []
    for shape, row in core.steps_of(self.inner, gen):
      size = self.inner.step_cost(gen, shape, row)[1]
      for number, rung in enumerate(self.rungs):
        phases.append(core.Phase(RungShape(shape, number, size), (row,)))
        if number < len(self.rungs) - 1:
          size = min(size, max(self.least, math.ceil(rung.keep * size)))
    return tuple(phases)

  def _next_size(self, shape: RungShape) -> int:
    """Candidates of the next rung."""
    kept = math.ceil(self.rungs[shape.rung].keep * shape.size)
    return min(shape.size, max(self.least, kept))

  def observer(self, gen, shape):
    draft = self.rungs[shape.rung].draft
    return gen.draft(**dict(draft)) if draft else gen

  def stages_shown(self, gen, shape, row):
    begin = self.inner.stages_shown(gen, shape.inner, row)
    ahead = self.rungs[shape.rung].lookahead
    return gen.num_stages if ahead < 0 else min(gen.num_stages, begin + ahead)

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, sampler, keys, initial):
    frontier = self.inner.init(sampler, keys, initial)
    return frontier._replace(own=(frontier.own, ()))

  def ask(self, sampler, frontier, shape, row):
    inner_own, proposed = frontier.own
    if shape.rung == 0:
      inner = self.inner.ask(sampler, frontier._replace(own=inner_own), shape.inner, row)
      inner = inner._replace(stage=jnp.broadcast_to(jnp.asarray(inner.stage), inner.parent.shape))
      index = jnp.broadcast_to(jnp.arange(inner.parent.shape[1]), inner.parent.shape)
      proposed, parent = Proposed(inner, index), inner.parent
    else:  # the parent of what a rung observes is the same candidate, one rung before
      parent = jnp.broadcast_to(jnp.arange(proposed.index.shape[1]), proposed.index.shape)
    cands, index = proposed
    shown, stage = core.take((cands.state, cands.stage), index)
    begin = self.inner.stages_shown(sampler.gen, shape.inner, row)
    # a lookahead goes on from the caches of whoever has them, else from a prefill
    if more := self.stages_shown(sampler.gen, shape, row) - begin:
      share = None
      if cands.cache_owner:
        states, owner = cands.cache_owner
        share = core.take(states, jnp.take_along_axis(owner, index, axis=1))
      shown = sampler.rebuild_cache(shown, begin, share=share)
      keys = jnp.broadcast_to(jax.random.key(0), index.shape)  # greedy stages use none
      shown = sampler.drop_cache(sampler.extend(shown, keys, begin, more, greedy=True))
      stage = stage + more
    return core.Candidates(shown, stage, parent, own=proposed)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    inner_own, _ = frontier.own
    proposed, index = candidates.own
    if shape.rung < len(self.rungs) - 1:
      kept, _ = select.top_candidates(totals, self._next_size(shape))
      index = jnp.take_along_axis(index, kept, axis=1)
      return frontier._replace(own=(inner_own, Proposed(proposed, index))), kept
    # the wrapped algorithm is told of all of its candidates; those that fell out are at -inf
    def spread(values):
      whole = jnp.full(proposed.parent.shape, core.NEG_INF)
      return jax.vmap(lambda row, i, v: row.at[i].max(v))(whole, index, values)

    whole, scores = spread(totals), jax.tree.map(spread, candidates.scores)
    proposed = proposed._replace(scores=scores, context=candidates.context)
    frontier, kept = self.inner.tell(
      sampler, frontier._replace(own=inner_own), proposed, whole, shape.inner, row
    )
    # by the number that a candidate has in this rung
    matches = kept[:, :, None] == index[:, None, :]
    kept = jnp.where(matches.any(axis=2), jnp.argmax(matches, axis=2), -1)
    return frontier._replace(own=(frontier.own, ())), kept

  def finished_prompts(self, gen, frontier):
    return self.inner.finished_prompts(gen, frontier._replace(own=frontier.own[0]))

  # ------------------------------------------------------------------------------------------ bill

  def init_cost(self, gen):
    return self.inner.init_cost(gen)

  def step_cost(self, gen, shape, row):
    cost = self.inner.step_cost(gen, shape.inner, row)[0] if shape.rung == 0 else core.Cost()
    begin = self.inner.stages_shown(gen, shape.inner, row)
    if more := self.stages_shown(gen, shape, row) - begin:
      one = gen.cost('extend', begin, more)
      if not self.inner.offers_caches:
        one = one + gen.cost('rebuild_cache', begin)
      cost += shape.size * one
    return cost, shape.size


def _as_rung(given) -> Rung:
  """A rung from its settings, of which `draft` may be a mapping."""
  if isinstance(given, Rung):
    return given
  known = [field.name for field in dataclasses.fields(Rung)]
  settings = dict(given) if isinstance(given, Mapping) else {}
  unknown = [name for name in settings if name not in known]
  if unknown or not isinstance(given, Mapping):
    raise ConfigError(f'search.rungs: {given!r} must be a mapping of {", ".join(known)}')
  settings['draft'] = tuple(sorted(dict(settings.get('draft', ())).items()))
  return Rung(**settings)
