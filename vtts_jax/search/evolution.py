"""EvoSearch: a population that evolves as it moves from noise to data.

He et al. (2025, arXiv 2505.17618); schedule, sizes and selection as in its public code. The first
generation is sampled from noise to data and scored, and its states on the way are kept. At each
mark of the schedule a new generation is bred of the states that all earlier candidates had there:
the elites as they are, and the winners of tournaments, mutated. It is sampled from the mark to the
data. At stage 0 a mutation mixes the noise with a fresh one (here it is a rotation by
arcsin(mutation), which also keeps the norm); later it adds the noise of a step of the reverse SDE.

A candidate's key is that of best-of-N under its running number. So where steps are stochastic an
elite takes another path to its data, as published; where they are not it ends where it did.

Letters: B prompts, P candidates so far, G generations.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, select

TOURNAMENT = core.CHILD - 4  # folded into the prompt's key, with the generation


class Own(NamedTuple):
  """What a prompt carries besides the candidates so far at the mark where the next generation
  begins: its key `[B]`, the states `[B, P, ...]` of these candidates at each mark after it, and
  their scores `{name: [B, P]}`."""

  prompt: Any
  later: Any
  scores: Any


class Generation(NamedTuple):
  """The shape of a step: a generation's number, its size, how many candidates there were before,
  the stage at which it begins, and the marks that are left."""

  number: int
  size: int
  before: int
  begin: int
  marks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Evolution(core.Algorithm):
  """Evolutionary search.

  Attributes:
    schedule: where new generations begin, as shares of the stages; rounded to whole ones.
    sizes: candidates of the first generation and of one for each mark.
    elites: best candidates that a generation takes over as they are.
    mutation: share of the initial noise that a mutation draws fresh, in [0, 1].
    tournament: share of all candidates that take part in a tournament.
  """

  schedule: tuple[float, ...] = (0.0, 0.4, 0.6, 0.8)
  sizes: tuple[int, ...] = (42, 26, 26, 26, 30)
  elites: int = 3
  mutation: float = 0.2
  tournament: float = 0.9

  needs = frozenset({'perturb'})

  def __post_init__(self):
    checks.check_integer('elites', self.elites, 0)
    checks.check_number('mutation', self.mutation, 0, 1)
    checks.check_number('tournament', self.tournament, 0, 1)
    object.__setattr__(self, 'sizes', checks.parse_integers(self.sizes))
    for name in ('schedule', 'sizes'):
      if not isinstance(getattr(self, name), tuple):
        raise ConfigError(f'search.{name}={getattr(self, name)!r}: must be a list')
    for share in self.schedule:
      checks.check_number('schedule', share, 0, 1)
    for size in self.sizes:
      checks.check_integer('sizes', size, self.elites + 1)
    if len(self.sizes) != len(self.schedule) + 1:
      raise ConfigError(
        f'search.sizes={list(self.sizes)}: must be {len(self.schedule) + 1}, one more than '
        f'search.schedule={list(self.schedule)}'
      )

  def marks(self, gen) -> tuple[int, ...]:
    """The schedule in whole stages."""
    return tuple(int(round(share * gen.num_stages, 6) + 0.5) for share in self.schedule)

  def check(self, gen):
    marks = self.marks(gen)
    if any(b <= a for a, b in zip(marks, (*marks[1:], gen.num_stages))):
      raise ConfigError(
        f'search.schedule={list(self.schedule)}: falls on stages {list(marks)} of the '
        f'{gen.num_stages} of the generator; they must increase and be below {gen.num_stages}'
      )

  def plan(self, gen):
    marks, phases = self.marks(gen), []
    for number, size in enumerate(self.sizes):
      begin = marks[number - 1] if number else 0
      before = sum(self.sizes[:number])
      phases.append(core.Phase(Generation(number, size, before, begin, marks[number:])))
    return tuple(phases)

  def init(self, sampler, keys, initial):
    none = core.candidate_keys(keys, jnp.arange(0))
    state = sampler.drop_cache(sampler.init(none))
    later = (state,) * len(self.schedule)
    zero = jnp.zeros(none.shape)
    own = Own(keys, later, dict.fromkeys(sampler.score_names, zero))
    return core.Frontier(state, none, zero, own)

  def ask(self, sampler, frontier, shape, row):
    prompt, end = frontier.own.prompt, sampler.num_stages
    keys = core.candidate_keys(prompt, shape.before + jnp.arange(shape.size))
    if shape.number:
      parent = self._choose_parents(frontier.scores, prompt, shape)
      bred = jnp.arange(shape.size) >= self.elites
      # at stage 0 an angle, later a factor of the noise that a step draws
      scale = math.asin(self.mutation) if shape.begin == 0 else 1.0
      scale = jnp.broadcast_to(jnp.where(bred, scale, 0.0), keys.shape)
      state = sampler.perturb(core.take(frontier.state, parent), keys, scale, shape.begin)
    else:
      parent, state = jnp.full(keys.shape, -1, jnp.int32), sampler.init(keys)
    # on its way to the data a candidate leaves its state at every mark that it passes
    passed, at = [], shape.begin
    for mark in (*shape.marks, end):
      state = sampler.extend(state, keys, at, mark - at) if mark > at else state
      passed.append(sampler.drop_cache(state))
      at = mark
    return core.Candidates(passed[-1], end, parent, own=(keys, tuple(passed[:-1])))

  def _choose_parents(self, scores, prompt, shape: Generation):
    """Places `[B, size]` of the parents among the candidates so far, the elites first."""
    elites, _ = select.top_candidates(scores, self.elites)
    total = scores.shape[1]
    entrants = max(1, int(total * self.tournament))
    keys = core.fold(core.fold(prompt, TOURNAMENT), shape.number)

    # the best of a random share, without replacement
    def hold_tournament(key, scores):
      invited = jax.random.permutation(key, total)[:entrants]
      return invited[jnp.argmax(scores[invited])]

    def hold_all(key, scores):
      each = jax.random.split(key, shape.size - self.elites)
      return jax.vmap(hold_tournament, (0, None))(each, scores)

    return jnp.concatenate([elites, jax.vmap(hold_all)(keys, scores)], axis=1)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    keys, passed = candidates.own
    own = frontier.own
    # the best first, so that a genealogy draws them; bad scores do not enter the population
    order, best = select.top_candidates(totals, shape.size)
    if not shape.marks:  # the last generation has no children
      state, keys = core.take((candidates.state, keys), order)
      return core.Frontier(state, keys, best, Own(own.prompt, (), {})), order
    named = {name: candidates.scores[name] for name in own.scores}
    new = core.take((keys, passed, named), order)
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    keys, states, named = jax.tree.map(join, (frontier.keys, own.later, own.scores), new)
    # all generations are judged together; who was there before stays in its place
    kept = join(jnp.full(frontier.scores.shape, -1), order)
    own = Own(own.prompt, states[1:], named)
    return core.Frontier(states[0], keys, sampler.total(named), own), kept

  def step_cost(self, gen, shape, row):
    one = gen.cost('extend', shape.begin, gen.num_stages - shape.begin)
    if shape.number:
      one = one + gen.cost('perturb')
    return shape.size * one, shape.size
