"""Zero-order search: a hill climb in the space of initial noise.

Ma et al. (2025, arXiv 2501.09732), section 3: a pivot noise has N neighbours at a fixed distance,
all are sampled, and the best becomes the pivot. The paper leaves the neighbour open; here it is the
one of tt-scale-flux, a rotation on the sphere by arccos(0.95). From there too: the pivot stays
while no neighbour is better, and a search that is stuck draws a new base noise.

The base noises are those of the candidates 0, 1 ... of best-of-N. A base is sampled along with its
first N - 1 neighbours, so every round has N candidates and none is sampled twice. Where steps are
stochastic, neighbours share the step noises of their base. The winner's picture is at hand, so the
bill is the published search NFE; published totals add one more sample.

Letters: B prompts, N neighbours.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.search import checks


class Own(NamedTuple):
  """What a prompt carries besides its pivot.

  Attributes:
    prompt: its key `[B]`.
    base: number of the base noise `[B]`.
    failures: rounds without a better candidate since the last one with `[B]`.
    angle: of the next neighbours `[B]`.
    scores: of the pivot, `{name: [B, 1]}`; -inf before it is sampled.
  """

  prompt: Any
  base: Any
  failures: Any
  angle: Any
  scores: Any


@dataclasses.dataclass(frozen=True)
class ZeroOrder(core.Algorithm):
  """Zero-order search.

  Attributes:
    neighbours: candidates of a round. The paper has 2 and 4.
    rounds: number of rounds.
    angle: distance between a pivot and its neighbours, in radians; pi / 2 is an independent draw.
    adapt: at least 1; 1 keeps the angle. Else a round multiplies it by adapt if all neighbours are
      better than the pivot, divides it by the fourth root of adapt if none is, and keeps it if one
      in five is (the one-fifth success rule, Rechenberg 1973).
    patience: rounds without a gain after which a new base noise is drawn; 0 never draws one.
  """

  neighbours: int = 4
  rounds: int = 16
  angle: float = math.acos(0.95)
  adapt: float = 1.0
  patience: int = 1

  needs = frozenset({'perturb'})

  def __post_init__(self):
    checks.check_integer('neighbours', self.neighbours, 1)
    checks.check_integer('rounds', self.rounds, 1)
    checks.check_number('angle', self.angle, 0, math.pi / 2)
    checks.check_number('adapt', self.adapt, 1)
    checks.check_integer('patience', self.patience, 0)

  def plan(self, gen):
    """A row holds the number of the round."""
    return (core.Phase('round', tuple((number,) for number in range(self.rounds))),)

  def init(self, sampler, keys, initial):
    base = jnp.zeros(keys.shape, jnp.int32)
    pivot = core.candidate_keys(keys, jnp.arange(1))
    none = jnp.full(pivot.shape, core.NEG_INF)
    scores = dict.fromkeys(sampler.score_names, none)
    own = Own(keys, base, base, jnp.full(keys.shape, self.angle), scores)
    # a pivot without a score has not been sampled yet
    return core.Frontier(sampler.init(pivot), pivot, none, own)

  def ask(self, sampler, frontier, shape, row):
    n = self.neighbours
    keys = core.child_keys(frontier.keys, row[0], n + 1)[:, 0, 1:]
    sampled = frontier.scores > core.NEG_INF  # [B, 1]
    angle = jnp.broadcast_to(frontier.own.angle[:, None], keys.shape)
    # the first candidate of a new base is the base itself
    angle = jnp.where(~sampled & (jnp.arange(n) == 0), 0.0, angle)
    start = sampler.perturb(core.repeat(frontier.state, n), keys, angle)
    shared = jnp.broadcast_to(frontier.keys, keys.shape)
    grown = sampler.extend(start, shared, 0, sampler.num_stages)
    parent = jnp.broadcast_to(jnp.where(sampled, 0, -1), keys.shape)
    return core.Candidates(sampler.drop_cache(grown), sampler.num_stages, parent, own=start)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    own = frontier.own
    # the pivot's total is judged anew, along with its neighbours
    named = {name: candidates.scores[name] for name in own.scores}
    pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), named, own.scores)
    judged = sampler.total(pool)
    new, before = jnp.where(totals > core.NEG_INF, judged[:, :-1], core.NEG_INF), judged[:, -1:]
    top, score = jnp.argmax(new, axis=1)[:, None], new.max(axis=1)
    better = score > before[:, 0]
    pivot, scores = core.where(
      better, core.take((candidates.own, named), top), (frontier.state, own.scores)
    )
    failures = jnp.where(better, 0, own.failures + 1)
    # neighbours of a new base are compared with nothing
    share = jnp.where(before[:, 0] > core.NEG_INF, (new > before).mean(axis=1), 0.2)
    angle = jnp.minimum(own.angle * self.adapt ** ((share - 0.2) / 0.8), math.pi / 2)
    # a stuck search goes on from the next base noise
    stuck = failures >= self.patience if self.patience else jnp.zeros_like(better)
    base = own.base + stuck
    keys = core.fold(own.prompt, base)[:, None]
    none = jnp.full_like(before, core.NEG_INF)
    unsampled = (sampler.init(keys), none, dict.fromkeys(scores, none))
    total = jnp.where(better, score, before[:, 0])[:, None]
    pivot, total, scores = core.where(stuck, unsampled, (pivot, total, scores))
    failures, angle = core.where(stuck, (jnp.zeros_like(base), jnp.full_like(angle, self.angle)),
                                 (failures, angle))  # fmt: skip
    own = Own(own.prompt, base, failures, angle, scores)
    return core.Frontier(pivot, keys, total, own), jnp.where(better[:, None], top, -1)

  def step_cost(self, gen, shape, row):
    one = gen.cost('perturb') + gen.cost('extend', 0, gen.num_stages)
    return self.neighbours * one, self.neighbours
