"""Search over Paths: expand candidates on their way from noise to data.

Ma et al. (2025, arXiv 2501.09732), section 3, settings of appendix A.3. N candidates are sampled
down to the noise level `start`. Then, round by round, each gets M fresh noises that take it back by
`forward`, the N * M candidates are sampled by `backward`, which is more, and the N best are kept,
until the noise is gone; the best of the last round wins.

Levels are shares of the generator's stages, rounded to whole ones; on the linear path with even
steps that is the paper's sigma. A candidate is scored by the data that its last step predicted,
which costs no further evaluation. Keys belong to the slot, so survivors of one parent diverge.

Letters: B prompts, N paths, M expansions.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules, select


@dataclasses.dataclass(frozen=True)
class Paths(core.Algorithm):
  """Search over Paths.

  Attributes:
    paths: N; the paper has 2 and more. expansions: M.
    start: noise level of the first expansion, as a share of the stages.
    forward: share of the stages by which noise takes a candidate back.
    backward: share of the stages that it is sampled by afterwards.
  """

  paths: int = 2
  expansions: int = 5
  start: float = 0.11
  forward: float = 0.78
  backward: float = 0.81

  needs = frozenset({'renoise'})

  def __post_init__(self):
    checks.check_integer('paths', self.paths, 1)
    checks.check_integer('expansions', self.expansions, 1)
    for name in ('start', 'forward', 'backward'):
      checks.check_number(name, getattr(self, name), 0, 1)
    if self.backward <= self.forward:
      raise ConfigError(
        f'search.backward={self.backward}: must be above search.forward={self.forward}, or the '
        'search never ends'
      )

  def in_stages(self, gen) -> tuple[int, int, int]:
    """Stages left at the first expansion, stages that noise takes back, stages gained a round."""
    shares = self.start, self.forward, self.backward - self.forward
    # above one half by rounding alone is one half: shares are decimal numbers
    left, back, gain = (int(round(share * gen.num_stages, 6) + 0.5) for share in shares)
    return left, back, gain

  def check(self, gen):
    left, back, gain = self.in_stages(gen)
    # the published shares differ by 3 % of the stages: a generator of few stages cannot have them
    if not min(left, back, gain):
      raise ConfigError(
        f'search.start={self.start}, search.forward={self.forward}, search.backward='
        f'{self.backward}: are rounded to {left} stages left, {back} back and {gain} gained a '
        f'round of the {gen.num_stages} of the generator; each must be at least 1, so raise them '
        'or the number of stages'
      )
    if left + back > gen.num_stages:
      raise ConfigError(
        f'search.forward={self.forward}: {back} stages back from {left} before the end are more '
        f'than the {gen.num_stages} of the generator'
      )

  def plan(self, gen):
    """A row holds the stage at which a round begins and its number; its shape is the stages that
    it gains."""
    left, _, gain = self.in_stages(gen)
    # the last round gains what is left, so that it ends at the data
    begins = range(gen.num_stages - left, gen.num_stages, gain)
    steps = [(min(gain, gen.num_stages - at), (at, number)) for number, at in enumerate(begins)]
    return schedules.group_steps(gen, steps, lambda shape: True)

  def init(self, sampler, keys, initial):
    slots = core.candidate_keys(keys, jnp.arange(self.paths))
    # nothing is scored on the way: the noise level is too high for a prediction to say much
    begin = sampler.num_stages - self.in_stages(sampler.gen)[0]
    state = sampler.extend(sampler.init(slots), slots, 0, begin)
    return core.Frontier(sampler.drop_cache(state), slots, jnp.zeros(slots.shape))

  def ask(self, sampler, frontier, shape, row):
    begin, number = row
    back, m = self.in_stages(sampler.gen)[1], self.expansions
    # never the slot's own key, which would draw the noise of an earlier round again
    keys = core.child_keys(frontier.keys, number, m + 1)[:, :, 1:]
    keys = keys.reshape(len(frontier.keys), -1)
    noised = sampler.renoise(core.repeat(frontier.state, m), keys, begin, begin - back)
    grown = sampler.extend(noised, keys, begin - back, back + shape)
    parent = jnp.broadcast_to(jnp.arange(self.paths * m) // m, keys.shape)
    return core.Candidates(sampler.drop_cache(grown), begin + shape, parent)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    kept, scores = select.top_candidates(totals, self.paths)
    return core.Frontier(core.take(candidates.state, kept), frontier.keys, scores), kept

  def stages_shown(self, gen, shape, row):
    return row[0] + shape

  def init_cost(self, gen):
    return self.paths * gen.cost('extend', 0, gen.num_stages - self.in_stages(gen)[0])

  def step_cost(self, gen, shape, row):
    back, m = self.in_stages(gen)[1], self.paths * self.expansions
    one = gen.cost('renoise', row[0]) + gen.cost('extend', row[0] - back, back + shape)
    return m * one, m
