"""Several verifiers together, combined by mean rank (Ma et al., 2501.09732) or min-max sum.

Every candidate carries the scores of all members. A member of weight 0 is scored but does not
influence the search; that is how a run records a held-out score. If a member fails, the search
fails; no member is ever skipped.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import jax
import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import select

MODES = ('rank', 'minmax')


@dataclasses.dataclass(frozen=True)
class Ensemble(core.Verifier):
  """Verifiers with weights.

  Attributes:
    members: `{name: verifier}`, or pairs. In a config a verifier is a mapping with a `name`, as in
      `members={'clip': {'name': 'scenes.clip', 'which': 'a'}}`. The score of a member with one
      score is named `name`, those of a member with several `name/score`.
    weights: `{name: weight >= 0}` for every member; 1 for all by default.
    mode: 'rank' averages the ranks among the candidates of a step (0 worst, M - 1 best, ties
      share); 'minmax' averages scores scaled to [0, 1] over these candidates. Both are relative,
      so the best candidate so far is always among those compared.
  """

  members: Mapping[str, core.Verifier] | tuple[tuple[str, core.Verifier], ...] = ()
  weights: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
  mode: str = 'rank'

  def __post_init__(self):
    # a config gives mappings, code may give pairs
    members = self.members.items() if isinstance(self.members, Mapping) else self.members
    names = [name for name, _ in members]
    if self.mode not in MODES:
      raise ConfigError(
        f'verifier.mode={self.mode!r}: must be one of {", ".join(map(repr, MODES))}'
      )
    if not names or len(set(names)) != len(names):
      raise ConfigError(f'verifier.members: names must be given and differ, got {names}')
    for name, member in members:
      if not isinstance(member, core.Verifier):
        raise ConfigError(f'verifier.members.{name}: needs a name, e.g. verifiers.likelihood')
    weights = dict(self.weights) or dict.fromkeys(names, 1.0)
    if set(weights) != set(names):
      raise ConfigError(
        f'verifier.weights names {sorted(weights)}: must name each member once: {sorted(names)}'
      )
    if any(not np.isfinite(w) or w < 0 for w in weights.values()) or not any(weights.values()):
      raise ConfigError(f'verifier.weights={weights}: must be >= 0 and not all 0')
    # tuples, because a verifier is a static argument of jit and must be hashable
    object.__setattr__(self, 'members', tuple(members))
    object.__setattr__(self, 'weights', tuple((name, float(weights[name])) for name in names))

  @property
  def needs(self):
    return frozenset().union(*(member.needs for _, member in self.members))

  @property
  def gives(self):
    """'features' if a member gives them; 'gradient' if all members with a weight do."""
    searched = [member for name, member in self.members if dict(self.weights)[name]]
    found = {'features'} if self.features_of else set()
    # ranks are piecewise constant: their gradient is 0
    if self.mode != 'rank' and all('gradient' in member.gives for member in searched):
      found.add('gradient')
    return frozenset(found)

  @property
  def features_of(self) -> str:
    """Name of the first member that gives features; '' if none does."""
    return next((name for name, member in self.members if 'features' in member.gives), '')

  @property
  def jittable(self):
    return all(member.jittable for _, member in self.members)

  @property
  def names(self):
    labels = (_score_labels(name, member).values() for name, member in self.members)
    return tuple(itertools.chain.from_iterable(labels))

  def check(self):
    for _, member in self.members:
      member.check()

  def load(self):
    return {name: member.load() for name, member in self.members}

  def shardings(self, mesh):
    return {name: member.shardings(mesh) for name, member in self.members}

  def tokenize(self, prompts):
    return {name: member.tokenize(prompts) for name, member in self.members}

  def encode(self, params, prompt):
    return {name: member.encode(params[name], prompt[name]) for name, member in self.members}

  def score(self, params, vctx, observed):
    """Outputs `{name: [B, M, ...]}` to the scores of all members, `{score: [B, M]}`."""
    scores = {}
    for name, member in self.members:
      # a member sees only what it asked for, as it would alone
      seen = {output: observed[output] for output in sorted(member.needs)}
      call = member.score
      # beside a host member the driver runs `score` eagerly; this member is still compiled
      if member.jittable and not self.jittable:
        call = functools.partial(_score_compiled, member)
      found = call(params[name], vctx[name], seen)
      scores |= {label: found[own] for own, label in _score_labels(name, member).items()}
    return scores

  def embed_images(self, params, images):
    """Features of the member `features_of`."""
    name = self.features_of
    if not name:
      return super().embed_images(params, images)
    return dict(self.members)[name].embed_images(params[name], images)

  def total(self, scores, valid):
    # scores of different verifiers have different scales; only relative ones can be added
    relative = select.mean_ranks if self.mode == 'rank' else select.scale_min_max
    weights = dict(self.weights)
    total = 0.0
    for name, member in self.members:
      if weights[name]:
        own = {inner: scores[label] for inner, label in _score_labels(name, member).items()}
        total = total + weights[name] * relative(member.total(own, valid), valid)
    return total / sum(weights.values())

  def cost(self, op):
    return sum((member.cost(op) for _, member in self.members), core.Cost())


def _score_labels(name, member) -> dict[str, str]:
  """Maps the member's own score names to their names in the ensemble."""
  own = member.names
  return {own[0]: name} if len(own) == 1 else {inner: f'{name}/{inner}' for inner in own}


@functools.partial(jax.jit, static_argnums=0)
def _score_compiled(member, params, vctx, observed):
  return member.score(params, vctx, observed)
