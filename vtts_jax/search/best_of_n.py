"""Best-of-N: draw N complete samples and keep the one that scores best.

It is the "random search" of Ma et al. (2025, arXiv 2501.09732). Candidate i depends only on (seed,
prompt id, i), so one run at N contains every smaller budget as its prefix.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
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
    checks.check_integer('n', self.n, 1)
    checks.check_integer('round', self.round, 0)
    checks.check_integer('initial', self.initial, 0)
    if self.round and self.n % self.round:
      raise ConfigError(f'search.round={self.round}: must divide search.n={self.n}')

  @property
  def samples_per_step(self) -> int:
    return self.round or self.n

  def check(self, gen):
    checks.check_integer('initial', self.initial, 0, gen.num_stages - 1)

  def plan(self, gen):
    """A row holds the number of the step's first candidate."""
    steps = [('round', (first,)) for first in range(0, self.n, self.samples_per_step)]
    return schedules.group_steps(gen, steps, lambda shape: True)

  def init(self, sampler, keys, initial):
    empty = jnp.zeros((keys.shape[0], 0))
    return core.Frontier((), keys[:, None][:, :0], empty, own=(keys, initial))

  def ask(self, sampler, frontier, shape, row):
    prompt_keys, initial = frontier.own
    keys = core.candidate_keys(prompt_keys, row[0] + jnp.arange(self.samples_per_step))
    drawn = sampler.init(keys, initial)
    drawn = sampler.extend(drawn, keys, self.initial, sampler.num_stages - self.initial)
    none = jnp.full(keys.shape, -1, jnp.int32)
    return core.Candidates(sampler.drop_cache(drawn), sampler.num_stages, none)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    return frontier, jnp.zeros((totals.shape[0], 0), jnp.int32)

  def step_cost(self, gen, shape, row):
    one = gen.cost('extend', self.initial, gen.num_stages - self.initial)
    given = schedules.given_cost(gen, self.initial)
    return self.samples_per_step * (given + one), self.samples_per_step
