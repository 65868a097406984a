"""Selection rules: against votes over equal answers, brute force, and the limits of the kernel."""

import itertools

import numpy as np
import pytest

from vtts_jax.study import selection

INF = float('inf')


def test_distances_are_squared_and_euclidean():
  f = np.random.default_rng(0).normal(size=(7, 3))
  want = [[((a - b) ** 2).sum() for b in f] for a in f]
  np.testing.assert_allclose(selection.squared_distances(f), want, atol=1e-12)


def test_over_equal_answers_weighted_is_the_sum_and_the_medoid_the_vote():
  """Answers as one-hot points: the rules must be the verifier-weighted and the plain majority."""
  rng = np.random.default_rng(1)
  differed = 0
  for _ in range(200):
    answers, totals = rng.integers(0, 4, 11), rng.normal(size=11)
    apart = selection.squared_distances(np.eye(4)[answers])
    z = np.exp((totals - totals.mean()) / totals.std())
    mass = np.array([z[answers == a].sum() for a in range(4)])
    got = selection.pick_weighted(totals, apart, bandwidth=1e-3)
    assert answers[got] == mass.argmax()
    assert totals[got] == totals[answers == mass.argmax()].max()  # the best of the answer
    counts = np.bincount(answers, minlength=4)
    voted = selection.pick_medoid(np.ones(11, bool), apart)
    assert counts[answers[voted]] == counts.max()
    assert voted == np.flatnonzero(np.isin(answers, np.flatnonzero(counts == counts.max())))[0]
    differed += mass.argmax() != counts.argmax()
  assert differed > 20  # the two rules are not the same rule


def test_the_kernel_has_best_of_n_at_one_end():
  rng = np.random.default_rng(2)
  totals, apart = rng.normal(size=9), selection.squared_distances(rng.normal(size=(9, 4)))
  assert selection.pick_weighted(totals, apart, bandwidth=1e-6) == totals.argmax()
  assert selection.pick_weighted(totals, apart, bandwidth=0.0) == totals.argmax()
  alike = np.zeros((9, 9))  # ties go by the total
  assert selection.pick_weighted(totals, alike) == totals.argmax()
  assert selection.pick_weighted(np.full(9, 2.0), apart) == density(apart)  # equal totals: the mode


def density(apart):
  n = len(apart)
  pairs = [apart[i, j] for i, j in itertools.combinations(range(n), 2)]
  h = np.median(pairs) / np.log(n)
  return int(np.argmax([sum(np.exp(-apart[i, j] / h) for j in range(n)) for i in range(n)]))


def test_a_cluster_outvotes_a_lucky_outlier():
  """Nine alike pictures of good scores, one far away that the verifier likes best."""
  features = np.concatenate([np.random.default_rng(3).normal(0, 0.1, (9, 5)), np.full((1, 5), 9.0)])
  totals = np.append(np.linspace(0, 1, 9), 1.1)
  got = selection.pick_samples([totals], features)
  assert got['best'] == [9] and got['weighted'][0] < 9 and got['medoid'][0] < 9


def test_what_is_not_finite_is_never_handed_out():
  features = np.eye(4)[[0, 0, 0, 1]]
  totals = np.array([-INF, -INF, 0.5, 0.1])
  got = selection.pick_samples([totals[:n] for n in (1, 2, 3, 4)], features)
  assert got == {'best': [-1, -1, 2, 2], 'weighted': [-1, -1, 2, 2], 'medoid': [-1, -1, 2, 2]}
  assert selection.pick_samples([totals], None) == {'best': [2]}
  features[2] = np.nan
  assert selection.pick_samples([totals], features)['weighted'] == [3]


def test_medoid_is_brute_force():
  rng = np.random.default_rng(4)
  f, valid = rng.normal(size=(12, 3)), rng.random(12) < 0.7
  own = np.flatnonzero(valid)
  mean = [np.mean([np.linalg.norm(f[i] - f[j]) for j in own]) for i in own]
  assert selection.pick_medoid(valid, selection.squared_distances(f)) == own[np.argmin(mean)]
  assert selection.pick_medoid(np.zeros(12, bool), selection.squared_distances(f)) == -1


@pytest.mark.parametrize('n', [1, 2])
def test_prefixes_of_one_and_two(n):
  features, totals = np.random.default_rng(5).normal(size=(n, 3)), np.arange(n) * 1.0
  picks = selection.pick_samples([totals], features)
  assert picks == {'best': [n - 1], 'weighted': [n - 1], 'medoid': [0]}
