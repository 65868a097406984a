"""Multi-fidelity verification: successive halving over how well a candidate is looked at.

A full decode and its verification cost many times the tokens of a candidate (about 16 x at released
sizes), and most candidates are not worth it. Any algorithm's candidates go through *rungs*
(successive halving, Jamieson and Talwalkar 2016): all are rendered as drafts (fewer decoder steps,
`Generator.draft`) or after a short lookahead, a share is kept, and only the last rung is looked at
in full. The wrapped algorithm is told the scores of the last rung; the others are out. Each rung is
a step of its own, so that the bill is exact and no draft is ever returned.

Letters: B prompts, M candidates of the wrapped algorithm, m of a rung, R rungs.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, select


@dataclasses.dataclass(frozen=True)
class Rung:
  """One fidelity.

  Attributes:
    keep: share of the candidates of this rung that go on to the next (of the last rung: 1).
    look: greedy stages that a candidate is continued by, counted from where the wrapped algorithm
      shows it; -1 to the end. Must not shrink from rung to rung.
    draft: settings of the generator that make rendering cheaper, as pairs; () renders in full.
  """

  keep: float = 1.0
  look: int = 0
  draft: tuple[tuple[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Halving(core.Algorithm):
  """Successive halving around another algorithm.

  Attributes:
    inner: the algorithm.
    rungs: fidelities, from cheap to full.
    least: candidates that a rung keeps at least (a beam wants its width).
  """

  inner: core.Algorithm
  rungs: tuple[Rung, ...] = (Rung(keep=0.25), Rung(look=-1))
  least: int = 1

  def __post_init__(self):
    checks.integer('least', self.least, 1)
    if not self.rungs:
      raise ConfigError('search.rungs=(): must hold at least one')
    for i, rung in enumerate(self.rungs):
      checks.number(f'rungs.{i}.keep', rung.keep, 0, 1)
      checks.integer(f'rungs.{i}.look', rung.look, -1)
    looks = [float('inf') if rung.look < 0 else rung.look for rung in self.rungs]
    if looks != sorted(looks):
      raise ConfigError(
        f'search.rungs: look={[r.look for r in self.rungs]} must not shrink from rung to rung'
      )
    if self.rungs[-1].draft:
      raise ConfigError('search.rungs: the last one must render in full (draft=())')

  @property
  def initial(self):
    return self.inner.initial

  @property
  def uses_value(self):
    return self.inner.uses_value

  def check(self, gen):
    self.inner.check(gen)
    if self.inner.features:
      raise ConfigError(
        f'search.inner: {type(self.inner).__name__} needs features of all of its candidates'
      )
    fields = [f.name for f in dataclasses.fields(gen)] if dataclasses.is_dataclass(gen) else []
    for rung in self.rungs:
      for name, _ in rung.draft:
        if name not in fields:
          raise ConfigError(
            f'search.rungs.draft: {type(gen).__name__} has no setting {name!r}; '
            f'allowed: {", ".join(fields)}'
          )

  # -------------------------------------------------------------------------------- static shapes

  def _place(self, step: int) -> tuple[int, int]:
    """Step of the wrapped algorithm, and rung."""
    return divmod(step, len(self.rungs))

  def phases(self, gen):
    return tuple((i, 1) for i in range(self.inner.num_steps(gen) * len(self.rungs)))

  def view(self, gen, step):
    draft = self.rungs[self._place(step)[1]].draft
    return gen.draft(**dict(draft)) if draft else gen

  def reach(self, gen, step):
    at, rung = self._place(step)
    return self._seen(gen, at, rung)

  def _seen(self, gen, at: int, rung: int) -> int:
    """Stages done of what a rung shows."""
    end, from_ = gen.num_stages, self.inner.reach(gen, at)
    look = self.rungs[rung].look
    return end if look < 0 else min(end, from_ + look)

  def _sizes(self, m: int) -> list[int]:
    """Candidates of each rung."""
    sizes = [m]
    for rung in self.rungs[:-1]:
      sizes.append(min(sizes[-1], max(self.least, math.ceil(rung.keep * sizes[-1]))))
    return sizes

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, gen, params, ctx, keys, initial):
    told = self.inner.init(gen, params, ctx, keys, initial)
    return told._replace(inner=(told.inner,))

  def ask(self, gen, params, ctx, state, step):
    at, rung = self._place(step.first)
    if rung == 0:
      own = state._replace(inner=state.inner[0])
      cands = self.inner.ask(gen, params, ctx, own, core.Step(at, at))
      cands = cands._replace(stage=jnp.broadcast_to(cands.stage, cands.parent.shape))
      index = jnp.broadcast_to(jnp.arange(cands.parent.shape[1]), cands.parent.shape)
      parent = cands.parent
    else:
      _, cands, index = state.inner
      parent = jnp.broadcast_to(jnp.arange(index.shape[1]), index.shape)
    shown, stage = core.take((cands.shown, cands.stage), index)
    more = self._seen(gen, at, rung) - self.inner.reach(gen, at)
    if more:
      like = None
      if self.inner.donates:
        donor, source = cands.donor
        like = core.take(donor, jnp.take_along_axis(source, index, axis=1))
      shown = gen.fatten(params, ctx, shown, self.inner.reach(gen, at), like=like)
      keys = jnp.broadcast_to(jax.random.key(0), index.shape)  # a greedy look uses none
      reach = self.inner.reach(gen, at)
      shown = gen.slim(gen.extend(params, ctx, shown, keys, reach, more, greedy=True))
      stage = stage + more
    return core.Candidates(shown, stage, parent, (cands, index))

  def tell(self, gen, params, ctx, state, cands, totals, step):
    at, rung = self._place(step.first)
    proposed, index = cands.inner
    if rung < len(self.rungs) - 1:
      m = self._sizes(proposed.parent.shape[1])[rung + 1]
      kept, _ = select.top(totals, m)
      index = jnp.take_along_axis(index, kept, axis=1)
      inner = (state.inner[0], proposed, index)
      return core.Told(state.frontier, state.keys, state.scores, kept, inner)
    whole = jnp.full(proposed.parent.shape, core.NEG_INF)
    whole = jax.vmap(lambda row, i, t: row.at[i].max(t))(whole, index, totals)
    own = state._replace(inner=state.inner[0])
    told = self.inner.tell(gen, params, ctx, own, proposed, whole, core.Step(at, at))
    # by the number that a candidate has in this rung
    kept = jnp.argmax(told.kept[:, :, None] == index[:, None, :], axis=2)
    return told._replace(kept=kept, inner=(told.inner,))

  def done(self, gen, state):
    return self.inner.done(gen, state._replace(inner=state.inner[0]))

  def step_cost(self, gen, step):
    at, rung = self._place(step)
    cost, m = self.inner.step_cost(gen, at)
    cost = cost if rung == 0 else core.Cost()
    m = self._sizes(m)[rung]
    reach = self.inner.reach(gen, at)
    if more := self._seen(gen, at, rung) - reach:
      one = gen.cost('extend', reach, more)
      cost += m * (one if self.inner.donates else one + gen.cost('fatten', reach))
    return cost, m


def build(inner: Mapping | core.Algorithm = (), rungs=Halving.rungs, least: int = 1) -> Halving:
  """From settings: `inner={'name': 'search.beam', ...}`, `rungs=({'keep': 0.25}, {'look': -1})`.

  Raises:
    ConfigError: no or an unknown inner algorithm, an unknown setting of a rung.
  """
  if not isinstance(inner, core.Algorithm):
    settings_of = dict(inner)
    if 'name' not in settings_of:
      raise ConfigError('search.inner.name: missing; e.g. search.beam')
    inner = components.load(settings_of.pop('name'), **settings_of)
  made = []
  for rung in rungs:
    if not isinstance(rung, Rung):
      rung = dict(rung)
      rung['draft'] = tuple(sorted(dict(rung.get('draft', {})).items()))
      rung = components.build_dataclass(Rung, **rung)
    made.append(rung)
  return Halving(inner, tuple(made), least)
