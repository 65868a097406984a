"""Families of arms at equal budgets: what each buys for the same NFE, FLOPs or seconds.

A family is one search at several budgets: the prefixes of best-of-N, or arms of several widths. At
a budget a family plays one of the points that it can afford: the one with the highest *searched*
score, as one would choose without the metric. A choice by accuracy would select on the noise of
what is reported. Prompts are paired: all families are compared on the prompts that all of them
have, and differences are resampled together.

Letters: K points of a family, P prompts.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import stats
from vtts_jax.report.stats import Interval

COST_AXES = {'generator': 'network evaluations (NFE)', 'flops': 'FLOPs', 'seconds': 'seconds'}


class FamilySeries(NamedTuple):
  """A family, prompt by prompt.

  Attributes:
    name: name of the family.
    labels: names of its points by rising cost, 'N=16' or that of an arm.
    costs: `{axis: [K]}`, mean cost per prompt; 'seconds' only where they were measured.
    correct: `[K, P]`, accuracy, mean over seeds.
    total: `[K, P]`, searched score, mean over seeds; NaN where none was finite.
    arm: one of the family's arms; the generator and the verifier of the family are its.
  """

  name: str
  labels: tuple[str, ...]
  costs: dict[str, np.ndarray]
  correct: np.ndarray
  total: np.ndarray
  arm: str


class BudgetCell(NamedTuple):
  """A family at a budget.

  Attributes:
    point: label of the point that it plays.
    accuracy: its accuracy there.
    gain: paired difference to best-of-N at the same budget; None where there is no best-of-N.
  """

  point: str
  accuracy: Interval
  gain: Interval | None


def seconds_per_prompt(timing) -> dict[str, tuple[float, float]]:
  """`{arm: (measured seconds per prompt, seconds of compilation)}` from timing lines."""
  out = {}
  for name in dict.fromkeys(t['arm'] for t in timing):
    own = [t for t in timing if t['arm'] == name]
    # padded rows are counted too, because a full batch would have taken as long
    prompts = sum(t['prompts'] for t in own)
    out[name] = (sum(t['run'] for t in own) / prompts, sum(t['compile'] for t in own))
  return out


def family_series(rows, seconds) -> tuple[list[FamilySeries], np.ndarray, np.ndarray]:
  """All families over their common prompts, with the ids `[P]` and tags `[P]` of these prompts.

  Args:
    rows: result lines.
    seconds: of `seconds_per_prompt`.

  Returns:
    (families, ids, tags); no families where the arms have no prompt in common.
  """
  by_arm: dict[str, dict[int, list[dict]]] = {}
  for row in rows:
    by_arm.setdefault(row['arm'], {}).setdefault(row['id'], []).append(row)
  # only prompts that every arm has can be paired
  ids = np.array(sorted(set.intersection(*(set(own) for own in by_arm.values()))), int)
  if not len(ids):
    return [], ids, np.array([], str)
  first = next(iter(by_arm.values()))
  tags = np.array([first[i][0]['tag'] for i in ids])
  points: dict[str, list] = {}
  for name, own in by_arm.items():
    groups = [own[i] for i in ids]
    curve, holds_all_budgets = groups[0][0]['curve'], groups[0][0]['ladder']
    # the best after an early step is no point: a shorter search would be planned otherwise
    for j in range(len(curve)) if holds_all_budgets else [len(curve) - 1]:
      lines = [row for group in groups for row in group]
      cost = {
        axis: float(np.mean([row['curve'][j][axis] for row in lines]))
        for axis in ('generator', 'flops')
      }
      if name in seconds:
        # nobody timed a prefix by itself, so it gets its share of the run by FLOPs
        prefix = holds_all_budgets and curve[-1]['flops']
        share = curve[j]['flops'] / curve[-1]['flops'] if prefix else 1.0
        cost['seconds'] = seconds[name][0] * share
      # the seeds of a prompt are averaged first: prompts are the independent sample
      correct = np.array([np.mean([r['curve'][j]['correct'] for r in g]) for g in groups])
      totals = [[r['curve'][j]['total'] for r in g] for g in groups]
      total = np.array([_mean_or_nan([t for t in own if t is not None]) for own in totals])
      label = f'N={_count_samples(curve, j)}' if holds_all_budgets else name
      points.setdefault(stats.family_name(name), []).append((cost, label, correct, total, name))
  return [_build_series(name, own) for name, own in points.items()], ids, tags


def _count_samples(curve, j) -> int:
  """How many samples prefix `j` of best-of-N holds: its cost over the cost of one sample."""
  # whatever a sample costs: a search without a network or without a verifier has zeros there
  unit = next((k for k in ('verify', 'generator', 'flops') if curve[0][k]), None)
  return round(curve[j][unit] / curve[0][unit]) if unit else 2**j


def _mean_or_nan(values) -> float:
  """The mean; NaN of nothing, without numpy's warning."""
  return float(np.mean(values)) if values else float('nan')


def _build_series(name, points) -> FamilySeries:
  """A family of points (cost, label, correct, total, arm), put in the order of their cost."""
  # a generator without a network has no evaluations to sort by
  axis = 'generator' if any(cost['generator'] for cost, *_ in points) else 'flops'
  points = sorted(points, key=lambda p: p[0][axis])
  # an axis that one point lacks would leave a curve with a hole
  axes = [a for a in COST_AXES if all(a in cost for cost, *_ in points)]
  return FamilySeries(
    name,
    tuple(label for _, label, *_ in points),
    {a: np.array([cost[a] for cost, *_ in points]) for a in axes},
    np.stack([p[2] for p in points]),
    np.stack([p[3] for p in points]),
    points[0][4],
  )


def budget_grid(families: list[FamilySeries], axis: str, most: int = 7) -> np.ndarray:
  """Budgets at which families are compared: powers of two times the least cost of all.

  The last budget is the least that affords every point. Where there would be more than `most`,
  every second, third ... is kept. Empty where nothing costs anything on this axis.
  """
  costs = np.concatenate([f.costs[axis] for f in families if axis in f.costs] or [[]])
  costs = costs[costs > 0]
  if not len(costs):
    return costs
  # 1e-9: a largest cost of exactly a power of two must not ask for one budget more
  doublings = int(np.ceil(np.log2(costs.max() / costs.min()) - 1e-9))
  step = -(-max(doublings, 1) // (most - 1))
  # thinned from the top, so that the budget that affords everything stays
  return costs.min() * 2.0 ** np.arange(doublings, -1, -step)[::-1]


def choose_point(family: FamilySeries, axis: str, budget: float, of=slice(None)) -> int | None:
  """The point that a family plays at a budget: the one with the highest mean searched score.

  Args:
    family: the family.
    axis: what the budget limits, of `COST_AXES`.
    budget: the most that a prompt may cost.
    of: which prompts the mean is over, all by default.

  Returns:
    The number of the point, the cheapest among ties; None where the family affords none.
  """
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
  families: list[FamilySeries], tags: np.ndarray, axis: str, grid: np.ndarray, base: dict[str, str]
) -> dict[str, list[BudgetCell | None]]:
  """`{family: one cell for each budget}`; None where the family affords nothing.

  Args:
    families, tags: of `family_series`.
    axis: what the budgets limit.
    grid: the budgets.
    base: of `find_baselines`.
  """
  named = {f.name: f for f in families}
  out: dict[str, list[BudgetCell | None]] = {}
  for family in families:
    cells = out.setdefault(family.name, [])
    for budget in grid:
      k = choose_point(family, axis, budget)
      if k is None:
        cells.append(None)
        continue
      accuracy, gain = stats.bootstrap_interval(family.correct[k], tags), None
      # the difference is taken prompt by prompt, so that what is hard for both cancels
      other = named.get(base.get(family.name, ''))
      if other and other is not family:
        j = choose_point(other, axis, budget)
        if j is not None:
          gain = stats.bootstrap_interval(family.correct[k] - other.correct[j], tags)
      cells.append(BudgetCell(family.labels[k], accuracy, gain))
  return out


def find_baselines(families: list[FamilySeries], best_of_n: set[str], settings) -> dict[str, str]:
  """`{family: the best-of-N that it is compared with}`.

  Best-of-N itself is left out, and so is a family without a best-of-N of its generator.

  Args:
    families: of `family_series`.
    best_of_n: names of the families that are best-of-N.
    settings: `{arm: its generator, verifier and search}`.
  """
  out = {}
  for family in families:
    own = settings[family.arm]
    others = [f for f in families if f.name in best_of_n and f is not family]
    # another generator is another task; another verifier still says what search is worth
    same = [f for f in others if settings[f.arm]['generator'] == own['generator']]
    exact = [f for f in same if settings[f.arm]['verifier'] == own['verifier']]
    if family.name not in best_of_n and same:
      out[family.name] = (exact or same)[0].name
  return out
