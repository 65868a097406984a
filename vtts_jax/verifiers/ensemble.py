"""Several verifiers at once: searched on by mean rank (Ma et al., 2501.09732) or by a min-max
weighted sum.

All scores travel with every candidate. A member of weight 0 is measured and not searched on: that
is how a held-out score comes along. A member that fails fails the search; nothing is ever skipped.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search import select

MODES = ('rank', 'minmax')


@dataclasses.dataclass(frozen=True)
class Ensemble(core.Verifier):
  """Verifiers with weights.

  Attributes:
    members: `((name, verifier), ...)`; a member's scores are called `name` where it has one, else
      `name/score`.
    weights: `((name, weight >= 0), ...)`, one for each member.
    mode: 'rank' averages the ranks among the candidates at hand (0 worst, M - 1 best, ties share),
      'minmax' the scores scaled to [0, 1] over them. Both are relative: the best so far is always
      ranked along.
  """

  members: tuple[tuple[str, core.Verifier], ...]
  weights: tuple[tuple[str, float], ...] = ()
  mode: str = 'rank'

  def __post_init__(self):
    names = [name for name, _ in self.members]
    if self.mode not in MODES:
      raise ConfigError(
        f'verifier.mode={self.mode!r}: must be one of {", ".join(map(repr, MODES))}'
      )
    if not names or len(set(names)) != len(names):
      raise ConfigError(f'verifier.members: names must be given and differ, got {names}')
    weights = dict(self.weights) or dict.fromkeys(names, 1.0)
    if set(weights) != set(names):
      raise ConfigError(
        f'verifier.weights names {sorted(weights)}: must name each member once: {sorted(names)}'
      )
    if any(not np.isfinite(w) or w < 0 for w in weights.values()) or not any(weights.values()):
      raise ConfigError(f'verifier.weights={weights}: must be >= 0 and not all 0')
    object.__setattr__(self, 'weights', tuple((name, float(weights[name])) for name in names))

  @property
  def uses(self):
    return frozenset().union(*(member.uses for _, member in self.members))

  @property
  def jittable(self):
    return all(member.jittable for _, member in self.members)

  @property
  def names(self):
    return tuple(label for name, member in self.members for label in _labels(name, member).values())

  def check(self):
    for _, member in self.members:
      member.check()

  def load(self):
    return {name: member.load() for name, member in self.members}

  def tokenize(self, texts):
    return {name: member.tokenize(texts) for name, member in self.members}

  def encode(self, params, prompt):
    return {name: member.encode(params[name], prompt[name]) for name, member in self.members}

  def score(self, params, vctx, images, **signals):
    scores = {}
    for name, member in self.members:
      call = member.score if self.jittable or not member.jittable else _compiled(member)
      got = call(params[name], vctx[name], images, **signals)
      scores |= {label: got[own] for own, label in _labels(name, member).items()}
    return scores

  def total(self, scores, valid):
    relative = select.ranks if self.mode == 'rank' else select.min_max
    weights = dict(self.weights)
    total = 0.0
    for name, member in self.members:
      if weights[name]:
        own = {inner: scores[label] for inner, label in _labels(name, member).items()}
        total = total + weights[name] * relative(member.total(own, valid), valid)
    return total / sum(weights.values())

  def cost(self, op):
    return sum((member.cost(op) for _, member in self.members), core.Cost())


def _labels(name, member) -> dict[str, str]:
  """The member's own score names and what they are called here."""
  own = member.names
  return {own[0]: name} if len(own) == 1 else {inner: f'{name}/{inner}' for inner in own}


def _compiled(member):
  """A jittable member beside one on the host; jit caches by the (hashable) member."""
  return lambda params, vctx, images, **signals: _score(member, params, vctx, images, signals)


@jax.jit(static_argnums=0)
def _score(member, params, vctx, images, signals):
  return member.score(params, vctx, images, **signals)


def build(
  members: Mapping | tuple = (), weights: Mapping | tuple = (), mode: str = 'rank'
) -> Ensemble:
  """From settings: `members={'a': {'name': 'scenes.clip', ...}, ...}`, `weights={'a':
  1.0, ...}`."""
  made = []
  for name, settings in dict(members).items():
    if isinstance(settings, core.Verifier):
      made.append((name, settings))
    elif 'name' not in settings:
      raise ConfigError(f'verifier.members.{name}: needs a name, e.g. verifiers.likelihood')
    else:
      settings = dict(settings)
      made.append((name, components.load(settings.pop('name'), **settings)))
  return Ensemble(tuple(made), tuple(dict(weights).items()), mode)
