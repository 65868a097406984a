"""The compute-optimal choice by difficulty of the prompt (Snell et al., 2408.03314, section 3).

Difficulty is either of two numbers. 'Oracle' difficulty is pass@1, the share of best-of-N's single
samples that are right. 'Predicted' difficulty is the mean searched score of these samples, which
needs no metric. Prompts are sorted by it into bins of equal size, ties by prompt id.

The choice is cross-fitted. In each bin the family with the highest accuracy at a budget is chosen
on one half of the prompts and evaluated on the other half, and the other way round. So no prompt is
graded by a choice that it took part in. The best single family is chosen in the same way, and the
width within a family is chosen by the searched score on the same half. Oracle difficulty shares its
samples with the accuracy of best-of-N, as it does in the paper.

Letters: F families, P prompts, Q bins.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import budgets, stats
from vtts_jax.report.stats import Interval

NUM_BINS = 5  # as in the paper


class OptimalChoice(NamedTuple):
  """The choice at one budget.

  Attributes:
    budget: the most that a prompt may cost.
    chosen: for each bin, hardest first, the families chosen on the two halves.
    accuracy: for each bin, accuracy of the choice on the half that did not choose.
    optimal: accuracy of the choices over all bins.
    single: accuracy of the one family that is best over all bins.
    best: this family, as chosen on the two halves.
    gain: paired difference of `optimal` and `single`.
  """

  budget: float
  chosen: list[tuple[str, str]]
  accuracy: list[float]
  optimal: Interval
  single: Interval
  best: tuple[str, str]
  gain: Interval


def measure_difficulty(rows, ids: np.ndarray, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Oracle and predicted difficulty, each `[P]`, from the single samples of a best-of-N arm.

  Args:
    rows: result lines.
    ids: of the P prompts.
    arm: name of the arm.

  Returns:
    Pass@1 and mean searched score over all samples and seeds, larger is easier; None where a prompt
    has no graded samples.
  """
  own: dict[int, list[dict]] = {}
  for row in rows:
    if row['arm'] == arm and 'samples' in row:
      own.setdefault(row['id'], []).append(row['samples'])
  if any(i not in own for i in ids.tolist()):
    return None
  right = [np.mean([s['correct'] for s in own[i]]) for i in ids.tolist()]
  known = [[t for s in own[i] for t in s['totals'] if t is not None] for i in ids.tolist()]
  # a prompt none of whose samples had a finite score counts as the hardest
  return np.array(right), np.array([np.mean(k) if k else -np.inf for k in known])


def difficulty_bins(difficulty: np.ndarray, count: int = NUM_BINS) -> np.ndarray:
  """The bin `[P]` of each prompt, 0 the hardest, from `difficulty [P]` (larger is easier).

  All bins have as many prompts, or one more; ties in difficulty are cut by place.
  """
  # by rank and not by value: pass@1 of few samples has few values, and bins would be uneven
  rank = np.argsort(np.argsort(difficulty, kind='stable'), kind='stable')
  return rank * count // len(difficulty)


def split_halves(bins: np.ndarray, tags: np.ndarray) -> np.ndarray:
  """The half `[P]`, 0 or 1, of each prompt: both halves are alike in bins and categories."""
  out = np.zeros(len(bins), int)
  for q in np.unique(bins):
    # every second prompt in the order of categories; an odd one goes to either half in turn
    own = np.flatnonzero(bins == q)
    out[own[np.argsort(tags[own], kind='stable')]] = (np.arange(len(own)) + q) % 2
  return out


def cross_fit(
  families: list[budgets.FamilySeries],
  tags: np.ndarray,
  bins: np.ndarray,
  axis: str,
  budget: float,
) -> OptimalChoice | None:
  """The cross-fitted choice at one budget; None where fewer than two families afford it.

  Args:
    families: what is chosen from, all over the same P prompts.
    tags: categories `[P]` of the prompts.
    bins: `[P]`, of `difficulty_bins`; each bin needs at least two prompts.
    axis, budget: what is limited, and to how much per prompt.
  """
  half = split_halves(bins, tags)
  able = [f for f in families if budgets.choose_point(f, axis, budget) is not None]
  if len(able) < 2:
    return None
  optimal, single = np.zeros((2, len(bins)))
  chosen, best = [['', ''] for _ in range(bins.max() + 1)], ['', '']
  for h in (0, 1):
    # a family that is chosen and graded on the same prompts wins by their noise: of twenty equal
    # families the best one would seem 10 points better (tests/test_budgets.py)
    fit, held = half == h, half != h
    points = [budgets.choose_point(f, axis, budget, fit) for f in able]
    correct = np.stack([f.correct[k] for f, k in zip(able, points)])  # [F, P]
    # the single best family is chosen with the same care, or the comparison would favour the bins
    winner = int(correct[:, fit].mean(1).argmax())
    best[h], single[held] = able[winner].name, correct[winner, held]
    for q in range(bins.max() + 1):
      inside = bins == q
      winner = int(correct[:, fit & inside].mean(1).argmax())
      chosen[q][h], optimal[held & inside] = able[winner].name, correct[winner, held & inside]
  return OptimalChoice(
    float(budget),
    [tuple(pair) for pair in chosen],
    [float(optimal[bins == q].mean()) for q in range(bins.max() + 1)],
    stats.bootstrap_interval(optimal, tags),
    stats.bootstrap_interval(single, tags),
    tuple(best),
    stats.bootstrap_interval(optimal - single, tags),
  )
