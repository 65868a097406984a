"""The study's tables as plain text and marks for the page: equal budgets, the choice by difficulty,
selection rules, fitted laws. What they mean is in `matched`, `difficulty`, `rules` and `fits`.

Letters: P prompts, S prefix sizes of best-of-N, K points of a family.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import budgets as matched
from vtts_jax.report import difficulty, stats
from vtts_jax.report import scaling_laws as fits
from vtts_jax.report.stats import Interval

AXES = {'generator': 'network evaluations (NFE)', 'flops': 'FLOPs', 'seconds': 'seconds'}
RULES = {
  'any': 'any right (upper bound)',
  'weighted': 'weighted best-of-N',
  'best': 'best-of-N',
  'medoid': 'majority vote (medoid)',
  'single': 'single sample (pass@1)',
}


class Rules(NamedTuple):
  """Selection rules of one best-of-N arm: sizes `[S]`, `{rule: [Interval] * S}`, each rule's
  difference to the best score at the largest size, and whose features."""

  arm: str
  sizes: list[int]
  curves: dict[str, list[Interval]]
  gains: dict[str, Interval]
  space: str


class Law(NamedTuple):
  """One family's laws: budgets over the least one `[K]`, errors and scores there, the two fits."""

  name: str
  k: np.ndarray
  errors: list[Interval]
  scores: np.ndarray
  spread: float
  power: fits.Power
  log: fits.Log | None


def amount(value: float, axis: str = '') -> str:
  """A cost in three digits: 1.55 G, 2,048, 0.031."""
  if axis != 'flops':
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
  power = max(min(int(np.log10(value) // 3), 6), 0) if value >= 1 else 0
  return f'{value / 1000**power:.3g} {" kMGTPE"[power]}'.strip()


def _gain(gain: Interval | None) -> dict:
  """Points of accuracy with their interval, and whether they are beyond chance."""
  if gain is None:
    return {'gain': '', 'kind': ''}
  mean, low, high = (100 * v for v in gain)
  kind = 'up' if low > 0 else 'down' if high < 0 else ''
  return {'gain': f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]', 'kind': kind}


def equal_budgets(families, tags, base) -> list[dict]:
  """One table an axis; a cell has accuracy, its interval, the point played, the gain over
  best-of-N, and whether the accuracy is its column's highest."""
  out = []
  for axis, label in AXES.items():
    measured = [f for f in families if axis in f.costs]
    grid = matched.budgets(measured, axis)
    if not len(grid):
      continue
    rows = matched.table(measured, tags, axis, grid, base)
    tops = [max(r[i].accuracy.mean for r in rows.values() if r[i]) for i in range(len(grid))]
    cells = lambda row, tops=tops: [
      c
      and {
        'accuracy': f'{c.accuracy.mean:.3f}',
        'interval': f'{c.accuracy.low:.3f} to {c.accuracy.high:.3f}',
        'point': c.point,
        'top': c.accuracy.mean >= top,
        **_gain(c.gain),
      }
      for c, top in zip(row, tops)
    ]
    out.append(
      {
        'axis': label,
        'budgets': [amount(b, axis) for b in grid],
        'rows': [{'name': name, 'cells': cells(row)} for name, row in rows.items()],
      }
    )
  return out


def by_difficulty(rows, families, ids, tags, ladders, settings) -> list[dict]:
  """One table a generator that has best-of-N with graded samples and another family."""
  out, done = [], []
  for base in (f for f in families if f.name in ladders):
    generator = settings[base.arm]['generator']
    group = [f for f in families if settings[f.arm]['generator'] == generator]
    found = difficulty.measure(rows, ids, base.arm)
    if generator in done or found is None or len(group) < 2 or len(ids) < 2 * difficulty.BINS:
      continue
    done.append(generator)
    axis = 'flops' if all((f.costs['flops'] > 0).all() for f in group) else 'generator'
    grid = matched.budgets(group, axis)
    oracle, predicted = (difficulty.bins(d) for d in found)
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
        'budgets': [amount(c.budget, axis) for c in choices],
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
        'gain': [_gain(c.gain) for c in choices],
        'predicted': [_gain(c.gain) for c in guessed],
      }
    )
  return out


def _pair(names: tuple[str, str]) -> list[str]:
  return list(dict.fromkeys(names))


def selection(rows) -> list[Rules]:
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

    def handed(rule):
      return mean(lambda s: [s['correct'][i] if i >= 0 else 0 for i in s['picks'][rule]])

    right = {rule: handed(rule) for rule in names}  # [P, S]
    right['any'] = mean(lambda s: [max(s['correct'][:n]) for n in s['sizes']])
    right['single'] = mean(lambda s: [np.mean(s['correct'])] * len(s['sizes']))
    curves = {
      rule: [stats.interval(v, tags) for v in right[rule].T] for rule in RULES if rule in right
    }
    gains = {rule: stats.interval((right[rule] - right['best'])[:, -1], tags) for rule in curves}
    out.append(Rules(arm, sizes, curves, gains, own[0]['samples']['space']))
  return out


def selection_rows(found: list[Rules]) -> list[dict]:
  return [
    {
      'arm': rules.arm,
      'space': rules.space,
      'sizes': rules.sizes,
      'rules': [
        {
          'name': RULES[rule],
          'cells': [f'{p.mean:.3f}' for p in points],
          'interval': f'{points[-1].low:.3f} to {points[-1].high:.3f}',
          **_gain(None if rule == 'best' else rules.gains[rule]),
        }
        for rule, points in rules.curves.items()
      ],
    }
    for rules in found
  ]


def laws(families, tags) -> list[Law]:
  """Both laws of every family with enough budgets."""
  out = []
  for family in families:
    cost = family.costs['flops']
    cost = cost if (cost > 0).all() else family.costs['generator']
    if (cost <= 0).any() or len(np.unique(cost)) < fits.LEAST:
      continue
    k, errors = cost / cost.min(), 1 - family.correct
    means = np.array([stats.interval(e, tags).mean for e in errors])
    power = fits.fit_power(k, means, stats.draws(errors.T, tags))
    known = np.isfinite(family.total).all(0)
    log, scores, spread = None, np.full(len(k), np.nan), 1.0
    if known.any():
      total, own = family.total[:, known], tags[known]
      scores = np.array([stats.interval(t, own).mean for t in total])
      log = fits.fit_log(k, scores, stats.draws(total.T, own))
      spread = float(total[k.argmin()].std()) or 1.0
    intervals = [stats.interval(e, tags) for e in errors]
    out.append(Law(family.name, k, intervals, scores, spread, power, log))
  return out


def law_rows(found: list[Law]) -> list[dict]:
  out = []
  for law in found:
    text = lambda e: f'{e.value:.3g} ± {e.error:.2g}'
    cells = [text(law.power.a), text(law.power.b), text(law.power.c), f'{law.power.rmse:.3f}']
    if not law.power.determined:
      cells[1] = 'undetermined'
    log = [text(law.log.alpha), text(law.log.beta), f'{law.log.r2:.3f}'] if law.log else [''] * 3
    out.append({'name': law.name, 'points': len(law.k), 'cells': cells + log})
  return out
