"""Families of arms at equal budgets: what each buys for the same NFE, FLOPs or seconds.

A family is one algorithm at its several widths (best-of-N: its prefixes). At a budget it plays the
point with the highest *searched* score among those it can afford, as one would without the metric:
choosing by held-out accuracy would select on the noise of what is reported. Prompts are paired:
everything is over the prompts that all families have, and differences are resampled together.

Letters: K points of a family, P prompts.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import stats
from vtts_jax.report.stats import Interval

AXES = ('generator', 'flops', 'seconds')


class Series(NamedTuple):
  """A family, prompt by prompt.

  Attributes:
    name: the family's.
    labels: of its points by rising cost, 'N=16' or the arm's name.
    costs: axis to `[K]`, mean per prompt; 'seconds' only where they were measured.
    correct: `[K, P]`, mean over seeds.
    total: `[K, P]`, the searched score, mean over seeds; NaN where none was finite.
    arm: one of the family's arms, whose generator and verifier are the family's.
  """

  name: str
  labels: tuple[str, ...]
  costs: dict[str, np.ndarray]
  correct: np.ndarray
  total: np.ndarray
  arm: str


class Cell(NamedTuple):
  """A family at a budget: the point it plays, its accuracy, and by how much it beats best-of-N."""

  point: str
  accuracy: Interval
  gain: Interval | None


def seconds_per_prompt(timing) -> dict[str, tuple[float, float]]:
  """Arm to (measured seconds a prompt, seconds of compilation); a batch counts by its prompts."""
  out = {}
  for name in dict.fromkeys(t['arm'] for t in timing):
    own = [t for t in timing if t['arm'] == name]
    prompts = sum(t['prompts'] for t in own)
    out[name] = (sum(t['run'] for t in own) / prompts, sum(t['compile'] for t in own))
  return out


def family_series(rows, seconds) -> tuple[list[Series], np.ndarray, np.ndarray]:
  """All families over their common prompts, with the prompts' ids `[P]` and tags `[P]`.

  Args:
    rows: result lines.
    seconds: as `seconds_per_prompt`; a prefix of best-of-N gets its share by FLOPs.
  """
  by_arm: dict[str, dict[int, list[dict]]] = {}
  for row in rows:
    by_arm.setdefault(row['arm'], {}).setdefault(row['id'], []).append(row)
  ids = np.array(sorted(set.intersection(*(set(own) for own in by_arm.values()))), int)
  if not len(ids):
    return [], ids, np.array([], str)
  first = next(iter(by_arm.values()))
  tags = np.array([first[i][0]['tag'] for i in ids])
  points: dict[str, list] = {}
  for name, own in by_arm.items():
    groups = [own[i] for i in ids]
    curve, ladder = groups[0][0]['curve'], groups[0][0]['ladder']
    for j in range(len(curve)) if ladder else [len(curve) - 1]:
      spent = [[r['curve'][j][axis] for g in groups for r in g] for axis in AXES[:2]]
      cost = {axis: float(np.mean(own)) for axis, own in zip(AXES, spent)}
      if name in seconds:
        share = curve[j]['flops'] / curve[-1]['flops'] if ladder and curve[-1]['flops'] else 1.0
        cost['seconds'] = seconds[name][0] * share
      correct = np.array([np.mean([r['curve'][j]['correct'] for r in g]) for g in groups])
      totals = [[r['curve'][j]['total'] for r in g] for g in groups]
      total = np.array([_mean([t for t in own if t is not None]) for own in totals])
      label = f'N={_samples(curve, j)}' if ladder else name
      points.setdefault(stats.family_name(name), []).append((cost, label, correct, total, name))
  return [_series(name, own) for name, own in points.items()], ids, tags


def _samples(curve, j) -> int:
  """How many samples a prefix of best-of-N holds: what it costs, over what one costs."""
  unit = next((k for k in ('verify', 'generator', 'flops') if curve[0][k]), None)
  return round(curve[j][unit] / curve[0][unit]) if unit else 2**j


def _mean(values) -> float:
  return float(np.mean(values)) if values else float('nan')


def _series(name, points) -> Series:
  axis = 'generator' if any(cost['generator'] for cost, *_ in points) else 'flops'
  points = sorted(points, key=lambda p: p[0][axis])
  axes = [a for a in AXES if all(a in cost for cost, *_ in points)]
  return Series(
    name,
    tuple(label for _, label, *_ in points),
    {a: np.array([cost[a] for cost, *_ in points]) for a in axes},
    np.stack([p[2] for p in points]),
    np.stack([p[3] for p in points]),
    points[0][4],
  )


def budget_grid(families: list[Series], axis: str, most: int = 7) -> np.ndarray:
  """Budgets that double from the least cost of all, at most `most` of them; the last is the first
  that affords every point. Empty where an axis costs nothing."""
  costs = np.concatenate([f.costs[axis] for f in families if axis in f.costs] or [[]])
  costs = costs[costs > 0]
  if not len(costs):
    return costs
  doublings = int(np.ceil(np.log2(costs.max() / costs.min()) - 1e-9))
  step = -(-max(doublings, 1) // (most - 1))
  return costs.min() * 2.0 ** np.arange(doublings, -1, -step)[::-1]


def choose_point(family: Series, axis: str, budget: float, of=slice(None)) -> int | None:
  """The point that a family plays at a budget: the highest mean searched score over the prompts
  `of`, the cheapest among ties; None where it affords none."""
  if axis not in family.costs:
    return None
  cost = family.costs[axis]
  allowed = [int(k) for k in np.argsort(cost, kind='stable') if cost[k] <= budget * (1 + 1e-9)]
  scores = []
  for k in allowed:
    known = family.total[k][of]
    known = known[np.isfinite(known)]
    scores.append(known.mean() if len(known) else -np.inf)
  return allowed[int(np.argmax(scores))] if allowed else None


def equal_budget_cells(
  families: list[Series], tags: np.ndarray, axis: str, grid: np.ndarray, base: dict[str, str]
) -> dict[str, list[Cell | None]]:
  """Family to one cell a budget, None where it affords nothing.

  Args:
    base: family to the family of best-of-N that it is compared with, where there is one.
  """
  named = {f.name: f for f in families}
  out: dict[str, list[Cell | None]] = {}
  for family in families:
    cells = out.setdefault(family.name, [])
    for budget in grid:
      k = choose_point(family, axis, budget)
      if k is None:
        cells.append(None)
        continue
      accuracy, gain = stats.bootstrap_interval(family.correct[k], tags), None
      other = named.get(base.get(family.name, ''))
      if other and other is not family:
        j = choose_point(other, axis, budget)
        if j is not None:
          gain = stats.bootstrap_interval(family.correct[k] - other.correct[j], tags)
      cells.append(Cell(family.labels[k], accuracy, gain))
  return out


def find_baselines(families: list[Series], ladders: set[str], settings) -> dict[str, str]:
  """Family to the best-of-N it is measured against: of the same generator and verifier, else of
  the same generator; best-of-N itself and families without one are left out.

  Args:
    ladders: names of the families that are best-of-N.
    settings: arm to its generator, verifier and search.
  """
  out = {}
  for family in families:
    own = settings[family.arm]
    others = [f for f in families if f.name in ladders and f is not family]
    same = [f for f in others if settings[f.arm]['generator'] == own['generator']]
    exact = [f for f in same if settings[f.arm]['verifier'] == own['verifier']]
    if family.name not in ladders and same:
      out[family.name] = (exact or same)[0].name
  return out
