"""Grades outputs: with a metric module, or with a verifier thresholded at one half.

`config.metric` names a module with `grade(outputs, prompts)`, such as 'scenes.oracle', or holds the
settings of a verifier, such as `{'name': 'verifiers.geneval', 'output': 'strict'}`. By a verifier
an output is right where its first score is at least one half. 'data.prompts' grades nothing.

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
MODULE_CHUNK = 256  # outputs that a module grades at a time, on the host
VERIFIER_CHUNK = 32  # outputs that each group of devices grades at a time


class ModuleMetric:
  """Grades with a module's `grade(outputs, prompts)`, which gets pictures as floats in [0, 1]."""

  def __init__(self, module):
    self._module = module

  def read_prompts(self, prompts: Sequence[Prompt]) -> None:
    """Does nothing: a module reads its prompts when it grades."""

  def check_output(self, name: str) -> None:
    """Does nothing: a module says nothing of the outputs that it can grade."""

  def grade(self, outputs: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """Which of outputs `[R, ...]` are right for their prompts: bool `[R]`."""

    def grade_part(part):
      return self._module.grade(files.image_floats(outputs[part]), prompts[part])

    return _grade_in_chunks(grade_part, len(prompts), MODULE_CHUNK)


class VerifierMetric:
  """Grades with a verifier: an output is right where the first score is at least one half.

  Args:
    verifier: the verifier, compiled or on the host.
    mesh: outputs are split over its 'data' axis; None for one device.
  """

  def __init__(self, verifier: Verifier, mesh: Mesh | None = None):
    self.verifier, self._scorer = verifier, Scorer(verifier, mesh)
    # a larger mesh takes larger chunks, so that every device is busy
    self._chunk = VERIFIER_CHUNK * (mesh.shape['data'] if mesh is not None else 1)

  def read_prompts(self, prompts: Sequence[Prompt]) -> None:
    """Tokenizes the prompts that will be graded; loads no weights.

    Raises:
      ConfigError: a prompt that the verifier cannot read.
    """
    try:
      self._scorer.tokenize_prompts(prompts)
    except ConfigError as error:
      raise ConfigError(f'metric: {error}') from None

  def check_output(self, name: str) -> None:
    """Raises `ConfigError` where the verifier reads something else than the output `name`."""
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
  """Grades `[count]` of a function that grades a slice of the outputs at a time."""
  # all samples of a batch at once may not fit: 24 prompts x 64 samples are 1,536 pictures
  parts = [grade_part(slice(low, low + chunk)) for low in range(0, count, chunk)]
  return np.concatenate(parts).astype(bool) if parts else np.zeros(0, bool)


def build_metric(
  settings: str | Mapping[str, Any], mesh: Mesh | None = None
) -> ModuleMetric | VerifierMetric:
  """The metric that `config.metric` asks for; reads no weights.

  Raises:
    ConfigError: no such module or verifier, or a verifier that reads more than one output.
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
  """What a report calls accuracy by this metric.

  GenEval's rules on another detector than GenEval's are 'not official', and they are an 'oracle'
  where a search was on a model that decides.

  Args:
    settings: of `config.metric`.
    searched: the verifiers that the study's searches were on.
  """
  if isinstance(settings, str):
    return 'nothing: outputs are not graded' if settings == UNGRADED else settings
  verifier = build_metric(settings).verifier
  # a search that saw the model which decides has seen the answers
  on = set().union(*map(geneval.scoring_models_of, searched))
  models = getattr(verifier, 'scoring_models', ())
  return geneval.benchmark_label(models, on) if models else verifier.names[0]
