"""The tables of the page, as texts and CSS classes that the template prints.

They are accuracy at equal budgets, the choice by difficulty, selection rules and fitted laws. What
the numbers mean is said in `budgets`, `difficulty`, `study.selection` and `scaling_laws`.

Letters: P prompts, S prefix sizes of best-of-N, K points of a family.
"""

from typing import NamedTuple

import numpy as np

from vtts_jax.report import budgets, difficulty, scaling_laws, stats
from vtts_jax.report.stats import Interval

RULE_LABELS = {
  'any': 'any right (upper bound)',
  'weighted': 'weighted best-of-N',
  'best': 'best-of-N',
  'medoid': 'majority vote (medoid)',
  'single': 'single sample (pass@1)',
}


class RuleCurves(NamedTuple):
  """Accuracy of the selection rules on one best-of-N arm.

  Attributes:
    arm: name of the arm.
    sizes: N of each prefix, S numbers.
    curves: `{rule: S intervals}`, accuracy at each size.
    gains: `{rule: interval}`, gain over the rule 'best' at the largest size, paired.
    space: the measuring verifier whose features say which samples are alike.
  """

  arm: str
  sizes: list[int]
  curves: dict[str, list[Interval]]
  gains: dict[str, Interval]
  space: str


class FittedLaws(NamedTuple):
  """The laws of one family.

  Attributes:
    name: name of the family.
    k: `[K]`, budgets in units of the least one.
    errors: 1 - accuracy at each budget, K intervals.
    scores: `[K]`, mean searched score at each budget; NaN where none is known.
    spread: standard deviation over prompts of the scores at the least budget.
    power: the law of the errors.
    log: the law of the scores; None where no score is known.
  """

  name: str
  k: np.ndarray
  errors: list[Interval]
  scores: np.ndarray
  spread: float
  power: scaling_laws.PowerLaw
  log: scaling_laws.LogLaw | None


def format_amount(value: float, axis: str = '') -> str:
  """A cost in about three digits: '1.55 G', '2,048', '0.031'."""
  if axis != 'flops':
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
  power = max(min(int(np.log10(value) // 3), 6), 0) if value >= 1 else 0
  return f'{value / 1000**power:.3g} {" kMGTPE"[power]}'.strip()


def _gain_cell(gain: Interval | None) -> dict:
  """A gain in points of accuracy with its interval, coloured where the interval excludes 0."""
  if gain is None:
    return {'gain': '', 'css': ''}
  mean, low, high = (100 * v for v in gain)
  css = 'up' if low > 0 else 'down' if high < 0 else ''
  return {'gain': f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]', 'css': css}


def equal_budget_tables(families, tags, base) -> list[dict]:
  """One table for each cost axis on which anything costs anything.

  Args:
    families, tags: of `budgets.family_series`.
    base: of `budgets.find_baselines`.
  """
  out = []
  for axis, label in budgets.COST_AXES.items():
    # arms merged from runs without timing have no seconds; the other axes have them still
    measured = [f for f in families if axis in f.costs]
    grid = budgets.budget_grid(measured, axis)
    if not len(grid):
      continue
    rows = budgets.equal_budget_cells(measured, tags, axis, grid, base)
    # the highest accuracy of each column is underlined, ties and all
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
  """A cell of a table at equal budgets; `top` is the highest accuracy of its column."""
  if cell is None:
    return None
  return {
    'accuracy': f'{cell.accuracy.mean:.3f}',
    'interval': f'{cell.accuracy.low:.3f} to {cell.accuracy.high:.3f}',
    'point': cell.point,
    'top': cell.accuracy.mean >= top,
    **_gain_cell(cell.gain),
  }


def difficulty_tables(rows, families, ids, tags, best_of_n, settings) -> list[dict]:
  """One table for each generator with a best-of-N whose samples are graded, and another family.

  Args:
    rows: result lines.
    families, ids, tags: of `budgets.family_series`.
    best_of_n: names of the families that are best-of-N.
    settings: `{arm: its generator, verifier and search}`.
  """
  out, done = [], []
  # difficulty is a fact of prompt and generator, so the first best-of-N of a generator decides it
  for base in (f for f in families if f.name in best_of_n):
    generator = settings[base.arm]['generator']
    group = [f for f in families if settings[f.arm]['generator'] == generator]
    found = difficulty.measure_difficulty(rows, ids, base.arm)
    # a bin is split in halves, so it needs two prompts
    if generator in done or found is None or len(group) < 2 or len(ids) < 2 * difficulty.NUM_BINS:
      continue
    done.append(generator)
    # searches differ in what they decode and score, which evaluations of the network leave out
    axis = 'flops' if all((f.costs['flops'] > 0).all() for f in group) else 'generator'
    grid = budgets.budget_grid(group, axis)
    oracle, predicted = (difficulty.difficulty_bins(d) for d in found)
    fitted = [difficulty.cross_fit(group, tags, oracle, axis, b) for b in grid]
    choices = [c for c in fitted if c]
    if not choices:
      continue
    guessed = [difficulty.cross_fit(group, tags, predicted, axis, c.budget) for c in choices]
    passed = [found[0][oracle == q] for q in range(difficulty.NUM_BINS)]
    out.append(
      {
        'title': base.name,
        'axis': budgets.COST_AXES[axis],
        'budgets': [format_amount(c.budget, axis) for c in choices],
        'bins': [
          {
            'name': f'{q + 1}: {own.min():.2f} to {own.max():.2f}',
            'cells': [
              {'families': _distinct_names(c.chosen[q]), 'accuracy': f'{c.accuracy[q]:.2f}'}
              for c in choices
            ],
          }
          for q, own in enumerate(passed)
        ],
        'optimal': [f'{c.optimal.mean:.3f}' for c in choices],
        'single': [
          {'families': _distinct_names(c.best), 'accuracy': f'{c.single.mean:.3f}'}
          for c in choices
        ],
        'gain': [_gain_cell(c.gain) for c in choices],
        'predicted': [_gain_cell(c.gain) for c in guessed],
      }
    )
  return out


def _distinct_names(names: tuple[str, str]) -> list[str]:
  """Both names, or one where the halves chose the same."""
  return list(dict.fromkeys(names))


def rule_curves(rows) -> list[RuleCurves]:
  """Accuracy of the selection rules on every best-of-N arm whose samples were graded."""
  out = []
  for arm in dict.fromkeys(r['arm'] for r in rows if 'samples' in r):
    own = [r for r in rows if r['arm'] == arm and 'samples' in r]
    sizes, names = own[0]['samples']['sizes'], list(own[0]['samples']['picks'])
    by_id: dict[int, list[dict]] = {}
    for row in own:
      by_id.setdefault(row['id'], []).append(row)
    tags = np.array([group[0]['tag'] for group in by_id.values()])

    def mean_over_seeds(read, by_id=by_id):
      return np.array([np.mean([read(r['samples']) for r in g], 0) for g in by_id.values()])

    def accuracy_of(rule):
      return mean_over_seeds(lambda s: [s['correct'][i] if i >= 0 else 0 for i in s['picks'][rule]])

    right = {rule: accuracy_of(rule) for rule in names}  # [P, S]
    # what frames the rules: one that knew the answers, and taking a sample unseen
    right['any'] = mean_over_seeds(lambda s: [max(s['correct'][:n]) for n in s['sizes']])
    right['single'] = mean_over_seeds(lambda s: [np.mean(s['correct'])] * len(s['sizes']))
    curves = {
      rule: [stats.bootstrap_interval(v, tags) for v in right[rule].T]
      for rule in RULE_LABELS
      if rule in right
    }
    # rules pick among the same samples of the same prompts, so differences are paired
    last = {rule: (right[rule] - right['best'])[:, -1] for rule in curves}
    gains = {rule: stats.bootstrap_interval(v, tags) for rule, v in last.items()}
    out.append(RuleCurves(arm, sizes, curves, gains, own[0]['samples']['space']))
  return out


def rule_rows(found: list[RuleCurves]) -> list[dict]:
  """One table for each arm, with a row for each selection rule."""
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
  """Both laws of every family that has enough budgets.

  Args:
    families, tags: of `budgets.family_series`.
  """
  out = []
  for family in families:
    cost = family.costs['flops']
    cost = cost if (cost > 0).all() else family.costs['generator']
    if (cost <= 0).any() or len(np.unique(cost)) < scaling_laws.FEWEST_BUDGETS:
      continue
    # in units of the least budget, `a + c` and `beta` can be read off as what that budget gives
    k, errors = cost / cost.min(), 1 - family.correct
    means = np.array([stats.bootstrap_interval(e, tags).mean for e in errors])
    power = scaling_laws.fit_power_law(k, means, stats.bootstrap_draws(errors.T, tags))
    # a prompt without a score at one budget would bend the curve there
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
  """One row for each family: the estimates of both laws."""
  out = []
  for law in found:
    cells = [*map(_format_estimate, law.power[:3]), f'{law.power.rmse:.3f}']
    # an exponent that means nothing must not be quoted
    if not law.power.determined:
      cells[1] = 'undetermined'
    log = [''] * 3
    if law.log:
      log = [*map(_format_estimate, law.log[:2]), f'{law.log.r2:.3f}']
    out.append({'name': law.name, 'points': len(law.k), 'cells': cells + log})
  return out


def _format_estimate(estimate: scaling_laws.Estimate) -> str:
  """An estimate with its error, as in '0.62 ± 0.03'."""
  return f'{estimate.value:.3g} ± {estimate.error:.2g}'
