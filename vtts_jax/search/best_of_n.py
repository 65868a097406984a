"""Best-of-N: draw N complete samples, keep the one that scores best ("random search" of Ma et al.,
2501.09732).

Candidate i depends only on (seed, prompt id, i), so one run at N contains every smaller budget as
its prefix.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules


@dataclasses.dataclass(frozen=True)
class BestOfN(core.Algorithm):
  """N complete samples per prompt.

  Attributes:
    n: samples.
    round: samples drawn at a time, to bound memory; must divide n; 0 draws all at once. Totals
      that are relative to the candidates at hand (`verifiers.ensemble`) compare each round with
      the best so far.
    initial: stages that are given and not drawn; their tokens are an argument of `search`.
  """

  n: int = 16
  round: int = 0
  initial: int = 0

  def __post_init__(self):
    checks.integer('n', self.n, 1)
    checks.integer('round', self.round, 0)
    checks.integer('initial', self.initial, 0)
    if self.round and self.n % self.round:
      raise ConfigError(f'search.round={self.round}: must divide search.n={self.n}')

  @property
  def per_step(self) -> int:
    return self.round or self.n

  def check(self, gen):
    checks.integer('initial', self.initial, 0, gen.num_stages - 1)

  def phases(self, gen):
    return ((0, self.n // self.per_step),)

  def init(self, gen, params, ctx, keys, initial):
    empty = jnp.zeros((keys.shape[0], 0))
    return core.Told(
      (), keys[:, None][:, :0], empty, empty.astype(jnp.int32), inner=(keys, initial)
    )

  def ask(self, gen, params, ctx, state, step):
    prompt_keys, initial = state.inner
    ids = step.index * self.per_step + jnp.arange(self.per_step)
    keys = core.candidate_keys(prompt_keys, ids)
    drawn = schedules.start(gen, params, ctx, keys, initial)
    drawn = gen.extend(params, ctx, drawn, keys, self.initial, gen.num_stages - self.initial)
    return core.Candidates(gen.slim(drawn), jnp.int32(gen.num_stages), jnp.full(keys.shape, -1), ())

  def tell(self, gen, params, ctx, state, cands, totals, step):
    kept = jnp.zeros((totals.shape[0], 0), jnp.int32)
    return core.Told((), state.keys, state.scores, kept, state.inner)

  def step_cost(self, gen, step):
    one = gen.cost('extend', self.initial, gen.num_stages - self.initial)
    return self.per_step * (schedules.start_cost(gen, self.initial) + one), self.per_step


def build(**given) -> BestOfN:
  return components.build_dataclass(BestOfN, **given)
