"""Numbers with intervals from result lines: accuracy and scores of every arm by budget.

Accuracy is GenEval's: the unweighted mean of the categories' accuracies. Intervals are 95 %
percentile bootstrap intervals over prompts (a prompt's seeds stay together, categories keep their
sizes).
"""

import functools
import re
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
COSTS = ('generator', 'observe', 'verify', 'flops')


class Interval(NamedTuple):
  """A mean and its 95 % interval."""

  mean: float
  low: float
  high: float


class Point(NamedTuple):
  """One arm at one budget: mean cost per prompt, accuracy, searched score, measured scores by name
  and their standard deviation over prompts and seeds."""

  cost: dict[str, float]
  accuracy: Interval
  categories: dict[str, float]
  total: Interval
  measured: dict[str, Interval]
  spread: dict[str, float]


class ArmStats(NamedTuple):
  """One arm: its points by rising budget. `ladder` says that each point is a search of its own
  (best-of-N's prefixes) and not what the last one had found by then."""

  name: str
  points: list[Point]
  ladder: bool
  prompts: int
  seeds: int

  @property
  def family(self) -> str:
    return family_name(self.name)


def family_name(arm: str) -> str:
  """Arms 'a/w2' and 'a/w4' are points of one curve, 'a'; 'a/w2 clip' is one of 'a clip'."""
  return re.sub(r'/[^/\s]*(?=\s|$)', '', arm)


@functools.lru_cache(maxsize=64)
def _bootstrap_weights(groups: tuple[int, ...]) -> np.ndarray:
  """Weights `[RESAMPLES, sum(groups)]`: each group's prompts are drawn again with replacement, and
  the mean over groups is taken of their means."""
  rng = np.random.default_rng(0)
  parts = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n / len(groups) for n in groups]
  return np.concatenate(parts, axis=1)


def bootstrap_interval(values: np.ndarray, tags: np.ndarray) -> Interval:
  """Mean over tags of the mean over prompts, `values [P]`, with its bootstrap interval."""
  centre = np.mean([values[tags == t].mean() for t in np.unique(tags)])
  low, high = np.percentile(bootstrap_draws(values, tags), (2.5, 97.5))
  return Interval(float(centre), float(low), float(high))


def bootstrap_draws(values: np.ndarray, tags: np.ndarray) -> np.ndarray:
  """Bootstrap draws `[RESAMPLES, ...]` of the mean over tags of the mean over prompts of `values
  [P, ...]`. Equal tags give the same draws of prompts, so that what is paired stays paired."""
  order = np.argsort(tags, kind='stable')
  groups = tuple(int((tags == t).sum()) for t in np.unique(tags))
  return np.tensordot(_bootstrap_weights(groups), values[order], 1)


def arm_statistics(rows: list[dict]) -> list[ArmStats]:
  """Statistics of every arm, in the order of the lines."""
  return [
    _statistics_of(name, [r for r in rows if r['arm'] == name])
    for name in dict.fromkeys(r['arm'] for r in rows)
  ]


def _statistics_of(name: str, rows: list[dict]) -> ArmStats:
  # a prompt's seeds are averaged, then prompts are drawn
  ids = sorted({r['id'] for r in rows})
  by_id: dict[int, list[dict]] = {i: [] for i in ids}
  for row in rows:
    by_id[row['id']].append(row)
  tags = np.array([by_id[i][0]['tag'] for i in ids])

  def mean(read):
    values = [[v for v in map(read, by_id[i]) if v is not None] for i in ids]
    known = np.array([len(v) > 0 for v in values])
    if not known.any():
      return Interval(float('nan'), float('nan'), float('nan'))
    return bootstrap_interval(np.array([np.mean(v) for v in values if v]), tags[known])

  points = []
  for j, first in enumerate(rows[0]['curve']):
    correct = np.array([np.mean([r['curve'][j]['correct'] for r in by_id[i]]) for i in ids])
    points.append(
      Point(
        {k: float(np.mean([r['curve'][j][k] for r in rows])) for k in COSTS},
        bootstrap_interval(correct, tags),
        {str(t): float(correct[tags == t].mean()) for t in np.unique(tags)},
        mean(lambda r, j=j: r['curve'][j]['total']),
        {k: mean(lambda r, j=j, k=k: r['curve'][j]['measured'][k]) for k in first['measured']},
        {k: _spread([r['curve'][j]['measured'][k] for r in rows]) for k in first['measured']},
      )
    )
  return ArmStats(name, points, bool(rows[0]['ladder']), len(ids), len({r['seed'] for r in rows}))


def _spread(values) -> float:
  known = [v for v in values if v is not None]
  return float(np.std(known)) if known else 0.0


class Family(NamedTuple):
  """Points of one curve by rising budget: best-of-N's prefixes, or the final points of several
  arms."""

  name: str
  points: list[Point]


def group_families(stats: list[ArmStats]) -> list[Family]:
  """The curves that the arms make up."""
  grouped: dict[str, list[Point]] = {}
  for arm in stats:
    points = arm.points if arm.ladder else arm.points[-1:]
    grouped.setdefault(arm.family, []).extend(points)
  return [Family(k, sorted(v, key=lambda p: p.cost['generator'])) for k, v in grouped.items()]
