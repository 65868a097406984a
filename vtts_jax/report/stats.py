"""Statistics of result lines: accuracy and scores of every arm by budget, with intervals.

Accuracy is that of GenEval: the mean over categories of the accuracy in each. Intervals are 95 %
percentile intervals of a bootstrap over prompts. The seeds of a prompt stay together, and
categories keep their sizes.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
COST_NAMES = ('generator', 'observe', 'verify', 'flops')  # the fields of `core.Cost`


class Interval(NamedTuple):
  """A mean and its 95 % interval."""

  mean: float
  low: float
  high: float


class Point(NamedTuple):
  """One arm at one budget.

  Attributes:
    cost: mean cost per prompt, by the names of `core.Cost`.
    accuracy: its accuracy.
    categories: accuracy in each category.
    total: the searched score.
    measured: measured scores by name.
    spread: standard deviation of each measured score over prompts and seeds.
  """

  cost: dict[str, float]
  accuracy: Interval
  categories: dict[str, float]
  total: Interval
  measured: dict[str, Interval]
  spread: dict[str, float]


class ArmStats(NamedTuple):
  """One arm.

  Attributes:
    name: its name.
    points: its points by rising budget.
    holds_all_budgets: whether each point is a search of its own (a prefix of best-of-N); if not, a
      point is what the search of the last one had found by then.
    prompts, seeds: how many it has.
  """

  name: str
  points: list[Point]
  holds_all_budgets: bool
  prompts: int
  seeds: int

  @property
  def family_name(self) -> str:
    """The curve that it belongs to, see `family_name`."""
    return family_name(self.name)


def family_name(arm: str) -> str:
  """The curve that an arm belongs to: 'a' for 'a/w2' and 'a/w4', 'a clip' for 'a/w2 clip'."""
  return re.sub(r'/[^/\s]*(?=\s|$)', '', arm)


@functools.lru_cache(maxsize=64)
def _bootstrap_weights(groups: tuple[int, ...]) -> np.ndarray:
  """Weights `[RESAMPLES, P]` of prompts that lie group by group, for groups of these sizes.

  A weighted sum is the mean over groups of the mean over prompts drawn again with replacement.
  """
  # always the same draws, so that differences are paired and a page is the same when made again
  rng = np.random.default_rng(0)
  parts = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n / len(groups) for n in groups]
  return np.concatenate(parts, axis=1)


def bootstrap_interval(values: np.ndarray, tags: np.ndarray) -> Interval:
  """Mean over categories of the mean of `values [P]` in each, with its bootstrap interval.

  Args:
    values: a number for each prompt.
    tags: `[P]`, the category of each.
  """
  # a category with few prompts counts as much as one with many, as in GenEval
  centre = np.mean([values[tags == t].mean() for t in np.unique(tags)])
  low, high = np.percentile(bootstrap_draws(values, tags), (2.5, 97.5))
  return Interval(float(centre), float(low), float(high))


def bootstrap_draws(values: np.ndarray, tags: np.ndarray) -> np.ndarray:
  """Bootstrap draws `[RESAMPLES, ...]` of the mean that `bootstrap_interval` takes.

  Args:
    values: `[P, ...]`. Calls with the same tags draw the same prompts, so that pairs stay pairs.
    tags: `[P]`, the category of each prompt.
  """
  # categories are fixed by the prompt set, so prompts are drawn within each
  order = np.argsort(tags, kind='stable')
  groups = tuple(int((tags == t).sum()) for t in np.unique(tags))
  return np.tensordot(_bootstrap_weights(groups), values[order], 1)


def arm_statistics(rows: list[dict]) -> list[ArmStats]:
  """Statistics of every arm in result lines, in the order of the lines."""
  return [
    _statistics_of(name, [r for r in rows if r['arm'] == name])
    for name in dict.fromkeys(r['arm'] for r in rows)
  ]


def _statistics_of(name: str, rows: list[dict]) -> ArmStats:
  """Statistics of one arm from its result lines."""
  # seeds of a prompt share its difficulty: they are averaged, and prompts are what is drawn
  ids = sorted({r['id'] for r in rows})
  by_id: dict[int, list[dict]] = {i: [] for i in ids}
  for row in rows:
    by_id[row['id']].append(row)
  tags = np.array([by_id[i][0]['tag'] for i in ids])

  def interval_of(read):
    """Interval of what `read` finds in a line; None where a score was not finite."""
    values = [[v for v in map(read, by_id[i]) if v is not None] for i in ids]
    known = np.array([len(v) > 0 for v in values])
    if not known.any():
      return Interval(float('nan'), float('nan'), float('nan'))
    return bootstrap_interval(np.array([np.mean(v) for v in values if v]), tags[known])

  # lines of one arm have the same budgets, so the first line gives their number and names
  points = []
  for j, first in enumerate(rows[0]['curve']):
    correct = np.array([np.mean([r['curve'][j]['correct'] for r in by_id[i]]) for i in ids])
    points.append(
      Point(
        {k: float(np.mean([r['curve'][j][k] for r in rows])) for k in COST_NAMES},
        bootstrap_interval(correct, tags),
        {str(t): float(correct[tags == t].mean()) for t in np.unique(tags)},
        interval_of(lambda r, j=j: r['curve'][j]['total']),
        {
          k: interval_of(lambda r, j=j, k=k: r['curve'][j]['measured'][k])
          for k in first['measured']
        },
        {k: _known_spread([r['curve'][j]['measured'][k] for r in rows]) for k in first['measured']},
      )
    )
  return ArmStats(name, points, bool(rows[0]['ladder']), len(ids), len({r['seed'] for r in rows}))


def _known_spread(values) -> float:
  """Standard deviation of the values that are not None; 0 of none."""
  known = [v for v in values if v is not None]
  return float(np.std(known)) if known else 0.0


class Family(NamedTuple):
  """One curve by rising budget: the prefixes of best-of-N, or the last points of several arms."""

  name: str
  points: list[Point]


def group_families(arms: list[ArmStats]) -> list[Family]:
  """The curves that the arms make up."""
  grouped: dict[str, list[Point]] = {}
  for arm in arms:
    # what a search had found half way is no point: at that budget it would have searched otherwise
    points = arm.points if arm.holds_all_budgets else arm.points[-1:]
    grouped.setdefault(arm.family_name, []).extend(points)
  return [Family(k, sorted(v, key=lambda p: p.cost['generator'])) for k, v in grouped.items()]
