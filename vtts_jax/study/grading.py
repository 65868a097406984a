"""Grades outputs: with a metric module, or with a verifier thresholded at one half.

`config.metric` names a module with `grade(images, prompts)` ('scenes.oracle'), or holds the
settings of a verifier ({'name': 'verifiers.geneval', 'output': 'strict'}): an output is right where
the first score is at least one half. 'data.prompts' grades nothing.

Letters: R outputs with a prompt each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vtts_jax import components
from vtts_jax.core import Prompt, Verifier
from vtts_jax.engine.scorer import Scorer
from vtts_jax.errors import ConfigError
from vtts_jax.media import files
from vtts_jax.metrics import geneval

UNGRADED = 'data.prompts'
MODULE_CHUNK = 256  # outputs that a module grades at a time
VERIFIER_CHUNK = 32  # and that each group of devices does


class ModuleMetric:
  """A module with `grade(outputs, prompts)`, which gets pictures as floats in [0, 1]."""

  def __init__(self, module):
    self._module = module

  def read_prompts(self, prompts: Sequence[Prompt]) -> None:
    """A module reads them when it grades."""

  def check_output(self, name: str) -> None:
    """A module takes what it gets."""

  def grade(self, outputs: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """Which of outputs `[R, ...]` are right for their prompts: bool `[R]`."""

    def grade_part(part):
      return self._module.grade(files.image_floats(outputs[part]), prompts[part])

    return _grade_in_chunks(grade_part, len(prompts), MODULE_CHUNK)


class VerifierMetric:
  """A verifier whose first score says at one half or more that an output is right.

  Args:
    mesh: outputs are split over its 'data' axis.
  """

  def __init__(self, verifier: Verifier, mesh: Mesh | None = None):
    self.verifier, self._scorer = verifier, Scorer(verifier, mesh)
    self._chunk = VERIFIER_CHUNK * (mesh.shape['data'] if mesh is not None else 1)

  def read_prompts(self, prompts: Sequence[Prompt]) -> None:
    """Tokenizes the prompts that will be graded, once; loads no weights.

    Raises:
      ConfigError: a prompt that the verifier cannot read.
    """
    try:
      self._scorer.tokenize_prompts(prompts)
    except ConfigError as error:
      raise ConfigError(f'metric: {error}') from None

  def check_output(self, name: str) -> None:
    """Raises `ConfigError` where the verifier does not read the output of this name."""
    if self.verifier.needs != {name}:
      raise ConfigError(
        f'metric {self.verifier.names[0]}: needs {", ".join(self.verifier.needs)}; the output that '
        f'is graded is {name}'
      )

  def grade(self, outputs: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """Which of outputs `[R, ...]` are right for their prompts: bool `[R]`."""
    (output,), name = self.verifier.needs, self.verifier.names[0]

    def grade_part(part):
      return self._scorer({output: outputs[part]}, prompts[part])[name] >= 0.5

    return _grade_in_chunks(grade_part, len(prompts), self._chunk)


def _grade_in_chunks(grade_part, count: int, chunk: int) -> np.ndarray:
  parts = [grade_part(slice(low, low + chunk)) for low in range(0, count, chunk)]
  return np.concatenate(parts).astype(bool) if parts else np.zeros(0, bool)


def build_metric(
  settings: str | Mapping[str, Any], mesh: Mesh | None = None
) -> ModuleMetric | VerifierMetric:
  """What the settings of a config name; reads no weights.

  Raises:
    ConfigError: there is no such part, or it cannot grade an output alone.
  """
  if isinstance(settings, str):
    return ModuleMetric(components.find_module(settings, 'grade'))
  settings = dict(settings)
  name = settings.pop('name', '')
  verifier = components.load(name, **settings)
  if not isinstance(verifier, Verifier) or len(verifier.needs) != 1:
    raise ConfigError(f'metric.name={name}: must be a verifier of one output alone')
  verifier.check()
  return VerifierMetric(verifier, mesh)


def metric_label(settings: str | Mapping[str, Any], searched: Sequence[Verifier] = ()) -> str:
  """What accuracy by this metric is called.

  It is 'not official' by another detector than GenEval's, and an 'oracle' where a search was on one
  of the models that decide.
  """
  if isinstance(settings, str):
    return 'nothing: outputs are not graded' if settings == UNGRADED else settings
  verifier = build_metric(settings).verifier
  on = set().union(*map(geneval.scoring_models_of, searched))
  models = getattr(verifier, 'scoring_models', ())
  return geneval.benchmark_label(models, on) if models else verifier.names[0]
