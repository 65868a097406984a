"""Whether pictures are right: by a metric, or by a verifier's judgement of them.

`config.metric` names a module with a `score(images, entries)` ('scenes.oracle'), or holds a
verifier's settings ({'name': 'verifiers.geneval', 'mode': 'strict'}), by which a picture is right
where the first score is at least one half. 'data.prompts' grades nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtts_jax import components
from vtts_jax.core import Verifier
from vtts_jax.engine import scorer as score
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval

NONE = 'data.prompts'
PICTURES = 32  # that a verifier grades at a time


class Judge:
  """A verifier as metric."""

  def __init__(self, verifier: Verifier):
    self.verifier, self._scorer = verifier, None

  def score(self, images, entries: Sequence[Mapping]) -> np.ndarray:
    """Pictures `[R, H, W, 3]` of R prompt entries -> bool `[R]`."""
    self._scorer = self._scorer or score.Scorer(self.verifier)
    texts, name, found = [e['prompt'] for e in entries], self.verifier.names[0], []
    for low in range(0, len(texts), PICTURES):
      part = slice(low, low + PICTURES)
      found.append(self._scorer(images[part], texts[part])[name])
    return np.concatenate(found) >= 0.5


def metric(settings: str | Mapping[str, Any], texts: Sequence[str] = ()):
  """What `settings` of a config name, with `score(images, entries)`; reads no weights.

  Raises:
    ConfigError: there is no such part, or it cannot grade pictures of these prompts.
  """
  if isinstance(settings, str):
    return components.module(settings, 'score')
  settings = dict(settings)
  verifier = components.load(settings.pop('name', ''), **settings)
  if not isinstance(verifier, Verifier) or verifier.uses != frozenset({'images'}):
    raise ConfigError(f'metric.name={settings}: must be a verifier of pictures alone')
  verifier.check()
  try:
    if texts:
      verifier.tokenize(texts)
  except ValueError as error:
    raise ConfigError(f'metric: {error}') from None
  return Judge(verifier)


def label(settings: str | Mapping[str, Any], searched: Sequence[Verifier] = ()) -> str:
  """What accuracy by this metric is called: 'not official' by another detector than GenEval's, and
  an 'oracle' where a search was on one of its judges."""
  if isinstance(settings, str):
    return 'nothing: pictures are not graded' if settings == NONE else settings
  verifier = metric(settings).verifier
  on = set().union(*map(geneval.judges_of, searched))
  judges = getattr(verifier, 'judges', ())
  return geneval.column(judges, on) if judges else verifier.names[0]
