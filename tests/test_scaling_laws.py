"""Fitted laws: exact laws are recovered, noisy ones as scipy does, errors as the bootstrap says."""

import numpy as np
import pytest
from scipy import optimize

from vtts_jax.report import scaling_laws

K = 2.0 ** np.arange(8)


@pytest.mark.parametrize(
  ('a', 'b', 'c'), [(0.6, 0.5, 0.1), (0.3, 1.7, 0.0), (0.8, 0.12, 0.05), (0.2, 3.0, 0.4)]
)
def test_exact_power_laws_are_recovered(a, b, c):
  got = scaling_laws.solve_power_law(K, a * K**-b + c)
  np.testing.assert_allclose(np.ravel(got), (a, b, c), rtol=2e-3, atol=2e-3)


def test_many_at_once_are_each_by_itself():
  rng = np.random.default_rng(0)
  y = 0.5 * K**-0.7 + 0.1 + rng.normal(0, 0.02, (5, len(K)))
  together = np.stack(scaling_laws.solve_power_law(K, y))
  apart = np.concatenate([np.stack(scaling_laws.solve_power_law(K, one)) for one in y], axis=1)
  np.testing.assert_allclose(together, apart, atol=1e-12)


def test_noisy_laws_have_the_least_squares_of_scipy():
  """Bounded least squares from many starts must not find anything better, nor anything else."""
  rng = np.random.default_rng(1)
  law = lambda k, a, b, c: a * k**-b + c
  for _ in range(20):
    y = law(K, 0.5, rng.uniform(0.2, 1.5), 0.1) + rng.normal(0, 0.015, len(K))
    (a,), (b,), (c,) = scaling_laws.solve_power_law(K, y)
    loss = ((law(K, a, b, c) - y) ** 2).sum()
    bounds = ([0, scaling_laws.EXPONENTS[0], 0], [np.inf, scaling_laws.EXPONENTS[1], np.inf])
    starts = [(0.5, s, 0.1) for s in (0.1, 0.5, 1.5)]
    found = [optimize.curve_fit(law, K, y, s, bounds=bounds, max_nfev=9999)[0] for s in starts]
    least = min(((law(K, *f) - y) ** 2).sum() for f in found)
    assert loss <= least * (1 + 1e-3)


def test_bounds_hold_and_flat_curves_are_undetermined():
  a, _, c = scaling_laws.solve_power_law(K, np.stack([0.6 * K**-0.5 - 0.05, 0.1 * K**0.2]))
  assert c[0] == 0 and a[0] > 0  # a negative floor is none
  assert a[1] == 0 and c[1] == pytest.approx((0.1 * K**0.2).mean())  # a rising error is a constant
  flat = np.full(len(K), 0.3)
  assert not scaling_laws.fit_power_law(K, flat, np.tile(flat, (10, 1))).determined
  step = np.array([0.9, *[0.3] * 7])
  edge = scaling_laws.fit_power_law(K, step, np.tile(step, (10, 1)))  # b runs to its edge
  assert not edge.determined


def test_errors_are_those_of_repeated_experiments():
  """Standard errors over bootstrap draws of prompts against the spread over new prompt sets."""
  rng = np.random.default_rng(2)
  rate = 0.6 * K**-0.6 + 0.15
  new = lambda: (rng.random((400, 1)) < rate).astype(float)  # paired: one uniform a prompt
  refits = np.stack([np.ravel(scaling_laws.solve_power_law(K, new().mean(0))) for _ in range(200)])
  spreads = []
  for _ in range(5):
    own = new()
    draws = rng.multinomial(400, np.full(400, 1 / 400), 300) @ own / 400
    got = scaling_laws.fit_power_law(K, own.mean(0), draws)
    spreads.append([e.error for e in got[:3]])
    assert got.determined and got.rmse < 0.03
  np.testing.assert_allclose(np.mean(spreads, 0), refits.std(0), rtol=0.35)


def test_log_law_is_a_line_in_ln_k():
  rng = np.random.default_rng(3)
  y = 1.3 * np.log(K) - 0.4
  exact = scaling_laws.fit_log_law(K, y, np.tile(y, (4, 1)))
  assert exact.alpha == pytest.approx((1.3, 0), abs=1e-12)
  assert exact.beta == pytest.approx((-0.4, 0), abs=1e-12) and exact.r2 == pytest.approx(1)
  draws = y + rng.normal(0, 0.1, (4000, len(K)))
  noisy = scaling_laws.fit_log_law(K, draws[0], draws)
  slope = np.polyfit(np.log(K), draws[0], 1)
  np.testing.assert_allclose((noisy.alpha.value, noisy.beta.value), slope)
  x = np.log(K) - np.log(K).mean()
  assert noisy.alpha.error == pytest.approx(0.1 / np.sqrt((x**2).sum()), rel=0.05)


@pytest.mark.parametrize('k', [[1, 2, 4], [1, 2, 2, 4, 4], [0, 1, 2, 4]])
def test_too_few_or_impossible_budgets(k):
  for fit in (scaling_laws.fit_power_law, scaling_laws.fit_log_law):
    with pytest.raises(ValueError, match='at least 4 different ones'):
      fit(np.array(k), np.ones(len(k)), np.ones((2, len(k))))
