"""Equal budgets and the compute-optimal choice, on tables small enough to work out by hand."""

import numpy as np
import pytest

from vtts_jax.report import budgets, difficulty, stats


def row(arm, seed, i, curve, ladder=False, **more):
  made = [
    {'generator': g, 'flops': 10.0 * g, 'verify': v, 'total': t, 'correct': c}
    for g, v, t, c in curve
  ]
  tag = 'ab'[i % 2]
  return {'arm': arm, 'seed': seed, 'id': i, 'tag': tag, 'ladder': ladder, 'curve': made, **more}


def toy_rows():
  """Best-of-4 and two beams over four prompts; beam/w8 is right most often, beam/w2 scores best."""
  rows = []
  for i in range(4):
    ladder = [(8, 1, 0.0, 0), (16, 2, 1.0, int(i == 0)), (32, 4, 2.0, int(i < 2))]
    rows.append(row('bon', 0, i, ladder, ladder=True))
    rows.append(row('beam/w2', 0, i, [(5, 1, 9.0, 1), (16, 4, 3.0, int(i < 3))]))
    rows.append(row('beam/w8', 0, i, [(40, 9, 2.5, 1)]))
  return rows


def test_families_hold_prefixes_and_last_points_over_common_prompts():
  rows = [*toy_rows(), row('bon', 0, 9, [(8, 1, 0, 0)] * 3, ladder=True)]
  timing = [
    {'arm': 'bon', 'run': 3.0, 'prompts': 2.0, 'compile': 1.0},
    {'arm': 'bon', 'run': 1.0, 'prompts': 2.0, 'compile': 0.5},
  ]
  seconds = budgets.seconds_per_prompt(timing)
  assert seconds == {'bon': (1.0, 1.5)}
  (bon, beam), ids, tags = budgets.family_series(rows, seconds)
  assert ids.tolist() == [0, 1, 2, 3] and tags.tolist() == ['a', 'b', 'a', 'b']
  assert bon.labels == ('N=1', 'N=2', 'N=4') and beam.labels == ('beam/w2', 'beam/w8')
  np.testing.assert_allclose(bon.costs['seconds'], [0.25, 0.5, 1.0])  # shares of the FLOPs
  assert 'seconds' not in beam.costs and beam.costs['generator'].tolist() == [16, 40]
  np.testing.assert_allclose(bon.correct, [[0] * 4, [1, 0, 0, 0], [1, 1, 0, 0]])
  np.testing.assert_allclose(beam.total, [[3.0] * 4, [2.5] * 4])


def test_seeds_are_averaged_and_lost_scores_are_left_out():
  rows = [row('x', s, i, [(4, 1, [None, 2.0][s], s)]) for s in (0, 1) for i in range(2)]
  rows += [row('y', 0, i, [(4, 1, None, 0)]) for i in range(2)]
  (x, y), *_ = budgets.family_series(rows, {})
  assert x.correct.tolist() == [[0.5, 0.5]] and x.total.tolist() == [[2.0, 2.0]]
  assert np.isnan(y.total).all() and budgets.choose_point(y, 'flops', 40) == 0


def test_the_point_is_chosen_by_score_and_not_by_accuracy():
  (bon, beam), *_ = budgets.family_series(toy_rows(), {})
  played = [budgets.choose_point(beam, 'generator', b) for b in (15, 16, 39, 40, 1000)]
  assert played == [None, 0, 0, 0, 0]  # w8 is affordable and right everywhere, but scores less
  played = [budgets.choose_point(bon, 'flops', b) for b in (79, 80, 160, 319, 320)]
  assert played == [None, 0, 1, 1, 2]
  assert budgets.choose_point(bon, 'seconds', 1e9) is None


def test_table_has_paired_differences_to_best_of_n():
  (bon, beam), _, tags = budgets.family_series(toy_rows(), {})
  grid = np.array([8.0, 16, 32])
  table = budgets.equal_budget_cells([bon, beam], tags, 'generator', grid, {'beam': 'bon'})
  assert [c and c.point for c in table['beam']] == [None, 'beam/w2', 'beam/w2']
  assert all(c.gain is None for c in table['bon'])
  accuracies = [c and c.accuracy.mean for c in table['beam']]
  assert accuracies == [None, 0.75, 0.75]  # 'a': 0 right, 2 right of 2 -> mean of means
  gains = [c.gain for c in table['beam'][1:]]
  assert [g.mean for g in gains] == [0.5, 0.25]
  # right with beam, wrong with best-of-4
  want = stats.bootstrap_interval(np.array([0.0, 0, 1, 0]), tags)
  assert gains[1] == want and want.low < want.mean < want.high


def test_pairing_makes_differences_sharp():
  """Two arms that are right on the same prompts but for one: the difference hardly varies."""
  right = np.random.default_rng(0).random(100) < 0.5
  other = right.copy()
  other[np.flatnonzero(~right)[0]] = True
  tags = np.repeat('a', 100)
  paired = stats.bootstrap_interval(other.astype(float) - right, tags)
  alone = stats.bootstrap_interval(right.astype(float), tags)
  assert paired.mean == pytest.approx(0.01) and paired.high - paired.low < 0.05
  assert alone.high - alone.low > 0.15


def test_draws_are_the_same_prompts_for_every_column():
  rng = np.random.default_rng(1)
  values, tags = rng.random((30, 3)), np.repeat(['a', 'b'], [10, 20])
  draws = stats.bootstrap_draws(values, tags)
  assert draws.shape == (stats.RESAMPLES, 3)
  np.testing.assert_allclose(
    draws[:, 1] - draws[:, 0], stats.bootstrap_draws(values[:, 1] - values[:, 0], tags)
  )


def test_budgets_double_and_afford_everything():
  (bon, beam), *_ = budgets.family_series(toy_rows(), {})
  grid = budgets.budget_grid([bon, beam], 'generator')
  np.testing.assert_allclose(grid, [8, 16, 32, 64])
  wide = bon._replace(costs={'generator': np.array([1.0, 2, 1000])})
  thin = budgets.budget_grid([wide], 'generator')
  np.testing.assert_allclose(thin, 2.0 ** np.arange(0, 11, 2))
  assert not len(budgets.budget_grid([bon], 'seconds'))


def test_baselines_share_the_generator_and_rather_the_verifier():
  part = lambda g, v: {'generator': g, 'verifier': v, 'search': {}}
  settings = {'b1': part(1, 1), 'b2': part(1, 2), 'x': part(1, 2), 'y': part(1, 3), 'z': part(2, 1)}
  none = np.zeros((1, 1))
  families = [budgets.FamilySeries(n, (n,), {}, none, none, n) for n in settings]
  got = budgets.find_baselines(families, {'b1', 'b2'}, settings)
  assert got == {'x': 'b2', 'y': 'b1'}


# --------------------------------------------------------------------------------------- difficulty


def test_pass_at_one_and_mean_score_over_seeds():
  one = {'correct': [1, 0, 0, 0], 'totals': [1.0, 2.0, None, 3.0]}
  two = {'correct': [1, 1, 1, 0], 'totals': [0.0, 0.0, 0.0, 0.0]}
  rows = [{'arm': 'b', 'id': 3, 'samples': s} for s in (one, two)]
  right, score = difficulty.measure_difficulty(rows, np.array([3]), 'b')
  assert right.tolist() == [0.5] and score.tolist() == [6 / 7]
  assert difficulty.measure_difficulty(rows, np.array([3, 4]), 'b') is None
  assert difficulty.measure_difficulty(rows, np.array([3]), 'other') is None


def test_bins_are_quintiles_and_halves_are_balanced():
  rng = np.random.default_rng(0)
  value = rng.random(103)
  which = difficulty.difficulty_bins(value)
  assert set(np.bincount(which)) == {20, 21}
  for q in range(4):
    assert value[which == q].max() <= value[which == q + 1].min()
  assert np.bincount(difficulty.difficulty_bins(np.zeros(10))).tolist() == [2] * 5  # ties by place
  tags = rng.choice(['a', 'b'], 103)
  half = difficulty.split_halves(which, tags)
  for q in range(5):
    assert abs((half[which == q] == 0).sum() - (half[which == q] == 1).sum()) <= 1
    for t in 'ab':
      own = half[(which == q) & (tags == t)]
      assert abs((own == 0).sum() - (own == 1).sum()) <= 1


def _family(name, correct, cost=1.0):
  correct = np.asarray(correct, float)[None]
  costs = {'flops': np.array([cost])}
  return budgets.FamilySeries(name, (name,), costs, correct, correct * 0, name)


def test_each_bin_takes_what_suits_it():
  """One family is right on the hard half of the bins only, the other on the easy ones only."""
  which = np.repeat(np.arange(5), 8)
  tags = np.tile(['a', 'b'], 20)
  hard, easy = _family('hard', which < 2), _family('easy', which >= 2)
  got = difficulty.cross_fit([hard, easy], tags, which, 'flops', 1.0)
  assert got.chosen == [('hard', 'hard')] * 2 + [('easy', 'easy')] * 3
  assert got.optimal.mean == 1 and got.accuracy == [1.0] * 5
  assert got.single.mean == pytest.approx(0.6) and got.best == ('easy', 'easy')
  assert got.gain.mean == pytest.approx(0.4) and got.gain.low > 0
  dear = _family('hard', which < 2, cost=9.0)
  assert difficulty.cross_fit([dear, easy], tags, which, 'flops', 1.0) is None


def test_cross_fitting_finds_nothing_where_there_is_nothing():
  """Twenty families that are all coins: choosing on the prompts that are graded would claim a gain
  of about .1 (the best of twenty in each bin); the honest choice claims none."""
  rng = np.random.default_rng(0)
  which, tags = np.repeat(np.arange(5), 40), np.repeat('a', 200)
  gains, cheats = [], []
  for _ in range(20):
    families = [_family(str(i), rng.random(200) < 0.5) for i in range(20)]
    got = difficulty.cross_fit(families, tags, which, 'flops', 1.0)
    gains.append(got.optimal.mean - 0.5)
    table = np.concatenate([f.correct for f in families])
    cheats.append(np.mean([table[:, which == q].mean(1).max() for q in range(5)]) - 0.5)
  assert np.mean(cheats) > 0.1 and abs(np.mean(gains)) < 0.02
