"""The page's tables as texts and marks: equal budgets, the choice by difficulty, selection rules,
fitted laws. What they mean stands in `budgets`, `difficulty`, `study.selection`, `scaling_laws`.

Letters: P prompts, S prefix sizes of best-of-N, K points of a family.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import budgets, difficulty, scaling_laws, stats
from vtts_jax.report.stats import Interval

AXES = {'generator': 'network evaluations (NFE)', 'flops': 'FLOPs', 'seconds': 'seconds'}
RULE_LABELS = {
  'any': 'any right (upper bound)',
  'weighted': 'weighted best-of-N',
  'best': 'best-of-N',
  'medoid': 'majority vote (medoid)',
  'single': 'single sample (pass@1)',
}


class RuleCurves(NamedTuple):
  """Selection rules of one best-of-N arm.

  Attributes:
    arm: its name.
    sizes: N of each prefix, S numbers.
    curves: `{rule: S intervals}` of accuracy.
    gains: `{rule: interval}`, what it gains over the best score at the largest size.
    space: the measured verifier whose features say what is alike.
  """

  arm: str
  sizes: list[int]
  curves: dict[str, list[Interval]]
  gains: dict[str, Interval]
  space: str


class FittedLaws(NamedTuple):
  """One family's laws.

  Attributes:
    name: the family's.
    k: budgets over the least one `[K]`.
    errors: 1 - accuracy at each, K intervals.
    scores: mean searched scores there `[K]`.
    spread: standard deviation of the scores at the least budget, over prompts.
    power, log: the two fits; no `log` where no score is known.
  """

  name: str
  k: np.ndarray
  errors: list[Interval]
  scores: np.ndarray
  spread: float
  power: scaling_laws.PowerLaw
  log: scaling_laws.LogLaw | None


def format_amount(value: float, axis: str = '') -> str:
  """A cost in three digits: 1.55 G, 2,048, 0.031."""
  if axis != 'flops':
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
  power = max(min(int(np.log10(value) // 3), 6), 0) if value >= 1 else 0
  return f'{value / 1000**power:.3g} {" kMGTPE"[power]}'.strip()


def _gain_cell(gain: Interval | None) -> dict:
  """Points of accuracy with their interval, and whether they are beyond chance."""
  if gain is None:
    return {'gain': '', 'kind': ''}
  mean, low, high = (100 * v for v in gain)
  kind = 'up' if low > 0 else 'down' if high < 0 else ''
  return {'gain': f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]', 'kind': kind}


def equal_budget_tables(families, tags, base) -> list[dict]:
  """One table an axis; a cell has accuracy, its interval, the point played, the gain over
  best-of-N, and whether the accuracy is its column's highest."""
  out = []
  for axis, label in AXES.items():
    measured = [f for f in families if axis in f.costs]
    grid = budgets.budget_grid(measured, axis)
    if not len(grid):
      continue
    rows = budgets.equal_budget_cells(measured, tags, axis, grid, base)
    tops = [max(r[i].accuracy.mean for r in rows.values() if r[i]) for i in range(len(grid))]
    out.append(
      {
        'axis': label,
        'budgets': [format_amount(b, axis) for b in grid],
        'rows': [
          {'name': name, 'cells': [_budget_cell(c, top) for c, top in zip(row, tops)]}
          for name, row in rows.items()
        ],
      }
    )
  return out


def _budget_cell(cell, top: float) -> dict | None:
  """One cell of a table at equal budgets; `top` is the highest accuracy of its column."""
  if cell is None:
    return None
  return {
    'accuracy': f'{cell.accuracy.mean:.3f}',
    'interval': f'{cell.accuracy.low:.3f} to {cell.accuracy.high:.3f}',
    'point': cell.point,
    'top': cell.accuracy.mean >= top,
    **_gain_cell(cell.gain),
  }


def difficulty_tables(rows, families, ids, tags, ladders, settings) -> list[dict]:
  """One table a generator that has best-of-N with graded samples and another family."""
  out, done = [], []  # a generator has one table, whatever the number of its best-of-N arms
  for base in (f for f in families if f.name in ladders):
    generator = settings[base.arm]['generator']
    group = [f for f in families if settings[f.arm]['generator'] == generator]
    found = difficulty.measure_difficulty(rows, ids, base.arm)
    if generator in done or found is None or len(group) < 2 or len(ids) < 2 * difficulty.BINS:
      continue
    done.append(generator)
    axis = 'flops' if all((f.costs['flops'] > 0).all() for f in group) else 'generator'
    grid = budgets.budget_grid(group, axis)
    oracle, predicted = (difficulty.difficulty_bins(d) for d in found)
    fitted = [difficulty.cross_fit(group, tags, oracle, axis, b) for b in grid]
    choices = [c for c in fitted if c]
    if not choices:
      continue
    guessed = [difficulty.cross_fit(group, tags, predicted, axis, c.budget) for c in choices]
    passed = [found[0][oracle == q] for q in range(difficulty.BINS)]
    out.append(
      {
        'title': base.name,
        'axis': AXES[axis],
        'budgets': [format_amount(c.budget, axis) for c in choices],
        'bins': [
          {
            'name': f'{q + 1}: {own.min():.2f} to {own.max():.2f}',
            'cells': [
              {'families': _pair(c.chosen[q]), 'accuracy': f'{c.accuracy[q]:.2f}'} for c in choices
            ],
          }
          for q, own in enumerate(passed)
        ],
        'optimal': [f'{c.optimal.mean:.3f}' for c in choices],
        'single': [
          {'families': _pair(c.best), 'accuracy': f'{c.single.mean:.3f}'} for c in choices
        ],
        'gain': [_gain_cell(c.gain) for c in choices],
        'predicted': [_gain_cell(c.gain) for c in guessed],
      }
    )
  return out


def _pair(names: tuple[str, str]) -> list[str]:
  return list(dict.fromkeys(names))


def rule_curves(rows) -> list[RuleCurves]:
  """Every best-of-N arm whose samples were graded."""
  out = []
  for arm in dict.fromkeys(r['arm'] for r in rows if 'samples' in r):
    own = [r for r in rows if r['arm'] == arm and 'samples' in r]
    sizes, names = own[0]['samples']['sizes'], list(own[0]['samples']['picks'])
    by_id: dict[int, list[dict]] = {}
    for row in own:
      by_id.setdefault(row['id'], []).append(row)
    tags = np.array([group[0]['tag'] for group in by_id.values()])

    def mean(read, by_id=by_id):
      return np.array([np.mean([read(r['samples']) for r in g], 0) for g in by_id.values()])

    def accuracy(rule):
      return mean(lambda s: [s['correct'][i] if i >= 0 else 0 for i in s['picks'][rule]])

    right = {rule: accuracy(rule) for rule in names}  # [P, S]
    right['any'] = mean(lambda s: [max(s['correct'][:n]) for n in s['sizes']])
    right['single'] = mean(lambda s: [np.mean(s['correct'])] * len(s['sizes']))
    curves = {
      rule: [stats.bootstrap_interval(v, tags) for v in right[rule].T]
      for rule in RULE_LABELS
      if rule in right
    }
    last = {rule: (right[rule] - right['best'])[:, -1] for rule in curves}
    gains = {rule: stats.bootstrap_interval(v, tags) for rule, v in last.items()}
    out.append(RuleCurves(arm, sizes, curves, gains, own[0]['samples']['space']))
  return out


def rule_rows(found: list[RuleCurves]) -> list[dict]:
  return [
    {
      'arm': rules.arm,
      'space': rules.space,
      'sizes': rules.sizes,
      'rules': [
        {
          'name': RULE_LABELS[rule],
          'cells': [f'{p.mean:.3f}' for p in points],
          'interval': f'{points[-1].low:.3f} to {points[-1].high:.3f}',
          **_gain_cell(None if rule == 'best' else rules.gains[rule]),
        }
        for rule, points in rules.curves.items()
      ],
    }
    for rules in found
  ]


def fit_laws(families, tags) -> list[FittedLaws]:
  """Both laws of every family with enough budgets."""
  out = []
  for family in families:
    cost = family.costs['flops']
    cost = cost if (cost > 0).all() else family.costs['generator']
    if (cost <= 0).any() or len(np.unique(cost)) < scaling_laws.LEAST:
      continue
    # both laws are in units of the family's least budget
    k, errors = cost / cost.min(), 1 - family.correct
    means = np.array([stats.bootstrap_interval(e, tags).mean for e in errors])
    power = scaling_laws.fit_power_law(k, means, stats.bootstrap_draws(errors.T, tags))
    known = np.isfinite(family.total).all(0)
    log, scores, spread = None, np.full(len(k), np.nan), 1.0
    if known.any():
      total, own = family.total[:, known], tags[known]
      scores = np.array([stats.bootstrap_interval(t, own).mean for t in total])
      log = scaling_laws.fit_log_law(k, scores, stats.bootstrap_draws(total.T, own))
      spread = float(total[k.argmin()].std()) or 1.0
    intervals = [stats.bootstrap_interval(e, tags) for e in errors]
    out.append(FittedLaws(family.name, k, intervals, scores, spread, power, log))
  return out


def law_rows(found: list[FittedLaws]) -> list[dict]:
  out = []
  for law in found:
    text = lambda e: f'{e.value:.3g} ± {e.error:.2g}'
    cells = [text(law.power.a), text(law.power.b), text(law.power.c), f'{law.power.rmse:.3f}']
    if not law.power.determined:
      cells[1] = 'undetermined'
    log = [text(law.log.alpha), text(law.log.beta), f'{law.log.r2:.3f}'] if law.log else [''] * 3
    out.append({'name': law.name, 'points': len(law.k), 'cells': cells + log})
  return out
