"""Best-of-N's samples, one by one: which are right, and which one each selection rule returns.

The search collects every sample and its features, and the metric grades them here. The report reads
two things off them: pass@1 of a prompt, which is its difficulty, and the accuracy of every
selection rule at every smaller budget.

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
  """The samples of a batch.

  Attributes:
    correct: `[P, N]` bool, which samples are right.
    features: `[P, N, D]`, or None where no measuring verifier gives any.
    space: name of the measuring verifier whose features they are, '' without features.
  """

  correct: np.ndarray
  features: np.ndarray | None
  space: str


def grade_samples(
  arm: Arm, trace: StepTrace, valid: np.ndarray, prompts: Sequence[Prompt], metric
) -> GradedSamples:
  """Grades every sample of a batch.

  Args:
    arm: the arm, whose search is best-of-N in one step.
    trace: of that step, with 'samples' and 'measured' collected.
    valid: `[P, N]` bool, which samples have a finite total.
    prompts: P prompt rows.
    metric: what grades, see `grading`.
  """
  outputs = trace.outputs[arm.output_name]
  # the metric takes a flat list of outputs, each with its prompt
  flat = outputs.reshape(-1, *outputs.shape[2:])
  repeated = [prompt for prompt in prompts for _ in range(valid.shape[1])]
  # a sample without a finite total is never returned, so it counts as wrong
  correct = metric.grade(flat, repeated).reshape(valid.shape) & valid
  if not len(trace.features):
    return GradedSamples(correct, None, '')
  return GradedSamples(correct, trace.features, arm.measured_in_search.features_of)


def record_samples(graded: GradedSamples, prefixes: list[np.ndarray], row: int) -> dict:
  """What a result line keeps of the samples of prompt `row`.

  Args:
    graded: the samples of the batch.
    prefixes: totals `[P, n]` of the first n samples, for each n; -inf where not finite.
    row: the prompt's place in the batch.

  Returns:
    A mapping: `correct` has 0 or 1 for each of N samples, `totals` a number or None for each;
    `sizes` are the prefixes n; `space` says whose features were used; `picks` has for each rule the
    sample that it returns of each prefix, -1 for none.
  """
  totals = [t[row] for t in prefixes]
  features = None if graded.features is None else graded.features[row]
  return {
    'correct': graded.correct[row].astype(int).tolist(),
    'totals': [float(t) if np.isfinite(t) else None for t in totals[-1]],
    'sizes': [len(t) for t in totals],
    'space': graded.space,
    # picked now: lines have no features, which are too large to keep
    'picks': selection.pick_samples(totals, features),
  }
