"""The compute-optimal choice per prompt difficulty (Snell et al., 2408.03314, section 3).

Prompts are cut into equally many by pass@1, the share of best-of-N's single samples that are right
('oracle' difficulty there), or by the mean searched score of those samples ('predicted': needs no
metric). In each bin the family with the highest accuracy at a budget is chosen on one half of the
prompts and evaluated on the other, and the other way round, so that no prompt is graded by a choice
that it took part in; the best single family is chosen in the same way. Widths within a family are
chosen by the searched score, on the same half as the family. Ties in difficulty are cut by prompt
id; oracle difficulty shares its samples with best-of-N's own accuracy, as it does in the paper.

Letters: F families, P prompts, Q bins.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import budgets, stats
from vtts_jax.report.stats import Interval

BINS = 5


class Choice(NamedTuple):
  """The choice at one budget.

  Attributes:
    budget: per prompt.
    chosen: for each bin, hardest first, the families chosen on either half.
    accuracy: for each bin, of what was chosen, on the half that did not choose.
    optimal: accuracy of the choice per bin, over all prompts.
    single: accuracy of the one family that is best over all bins.
    best: the families chosen as that on either half.
    gain: paired difference of the two.
  """

  budget: float
  chosen: list[tuple[str, str]]
  accuracy: list[float]
  optimal: Interval
  single: Interval
  best: tuple[str, str]
  gain: Interval


def measure_difficulty(rows, ids: np.ndarray, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Pass@1 and mean searched score of the single samples of a best-of-N arm, each `[P]`, over all
  seeds; None where a prompt has none."""
  own: dict[int, list[dict]] = {}
  for row in rows:
    if row['arm'] == arm and 'samples' in row:
      own.setdefault(row['id'], []).append(row['samples'])
  if any(i not in own for i in ids.tolist()):
    return None
  right = [np.mean([s['correct'] for s in own[i]]) for i in ids.tolist()]
  known = [[t for s in own[i] for t in s['totals'] if t is not None] for i in ids.tolist()]
  return np.array(right), np.array([np.mean(k) if k else -np.inf for k in known])


def difficulty_bins(difficulty: np.ndarray, count: int = BINS) -> np.ndarray:
  """Which bin `[P]` each prompt is in, 0 the hardest: equally many by rank of `difficulty [P]`
  (larger is easier), ties by place."""
  rank = np.argsort(np.argsort(difficulty, kind='stable'), kind='stable')
  return rank * count // len(difficulty)


def split_halves(which: np.ndarray, tags: np.ndarray) -> np.ndarray:
  """0 or 1 `[P]`: every second prompt of each bin, by category, so that both halves are alike."""
  out = np.zeros(len(which), int)
  for q in np.unique(which):
    own = np.flatnonzero(which == q)
    out[own[np.argsort(tags[own], kind='stable')]] = (np.arange(len(own)) + q) % 2
  return out


def cross_fit(
  families: list[budgets.Series],
  tags: np.ndarray,
  which: np.ndarray,
  axis: str,
  budget: float,
) -> Choice | None:
  """The choice at one budget; None where fewer than two families afford it.

  Args:
    families: candidates, over the same prompts.
    which: bins `[P]`, see `difficulty_bins`; each needs at least two prompts.
  """
  half = split_halves(which, tags)
  able = [f for f in families if budgets.choose_point(f, axis, budget) is not None]
  if len(able) < 2:
    return None
  optimal, single = np.zeros((2, len(which)))
  chosen, best = [['', ''] for _ in range(which.max() + 1)], ['', '']
  for h in (0, 1):
    # chosen on one half, evaluated on the other; widths are chosen by score, on the same half
    fit, held = half == h, half != h
    points = [budgets.choose_point(f, axis, budget, fit) for f in able]
    correct = np.stack([f.correct[k] for f, k in zip(able, points)])  # [F, P]
    winner = int(correct[:, fit].mean(1).argmax())
    best[h], single[held] = able[winner].name, correct[winner, held]
    for q in range(which.max() + 1):
      inside = which == q
      winner = int(correct[:, fit & inside].mean(1).argmax())
      chosen[q][h], optimal[held & inside] = able[winner].name, correct[winner, held & inside]
  return Choice(
    float(budget),
    [tuple(pair) for pair in chosen],
    [float(optimal[which == q].mean()) for q in range(which.max() + 1)],
    stats.bootstrap_interval(optimal, tags),
    stats.bootstrap_interval(single, tags),
    tuple(best),
    stats.bootstrap_interval(optimal - single, tags),
  )
