"""Best-of-N's samples, one by one: which are right, and what each selection rule would return.

The search collects every sample, its measured scores and its features; here they are graded by the
metric. Pass@1 of a prompt (its difficulty) and every rule at every smaller budget are read off
these.

Letters: P prompts, N samples, D features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vtts_jax.core import Prompt
from vtts_jax.engine.program import StepTrace
from vtts_jax.study import selection
from vtts_jax.study.arms import Arm


class GradedSamples(NamedTuple):
  """Samples of a batch: which are right `[P, N]` bool, their features `[P, N, D]` or None, and the
  name of the measured verifier whose features they are."""

  correct: np.ndarray
  features: np.ndarray | None
  space: str


def grade_samples(
  arm: Arm, trace: StepTrace, valid: np.ndarray, prompts: Sequence[Prompt], metric
) -> GradedSamples:
  """Grades every sample of a batch.

  Args:
    trace: of the one step, with 'samples' and 'measured' collected.
    valid: `[P, N]` bool; samples that are not valid are never right.
    prompts: P prompt rows.
    metric: what grades, see `grading`.
  """
  shown = trace.outputs[arm.output]
  flat = shown.reshape(-1, *shown.shape[2:])
  repeated = [prompt for prompt in prompts for _ in range(valid.shape[1])]
  correct = metric.grade(flat, repeated).reshape(valid.shape)
  if not len(trace.features):
    return GradedSamples(correct & valid, None, '')
  return GradedSamples(correct & valid, trace.features, arm.measured_in_search.features_of)


def record_samples(graded: GradedSamples, prefixes: list[np.ndarray], row: int) -> dict:
  """What a result line keeps of one prompt's samples.

  Args:
    graded: of the batch.
    prefixes: totals `[P, n]` of the first n samples, for each n; -inf where not valid.
    row: which prompt.

  Returns:
    `correct` N times 0 or 1; `totals` N numbers or None; `sizes` the prefixes n; `space` whose
    features; `picks` for each rule the sample returned of each prefix, -1 for none.
  """
  totals = [t[row] for t in prefixes]
  features = None if graded.features is None else graded.features[row]
  return {
    'correct': graded.correct[row].astype(int).tolist(),
    'totals': [float(t) if np.isfinite(t) else None for t in totals[-1]],
    'sizes': [len(t) for t in totals],
    'space': graded.space,
    'picks': selection.pick_samples(totals, features),
  }
