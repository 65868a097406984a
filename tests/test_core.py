"""Keys, selection, sampling, schedules: against closed forms and scipy."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats as scipy_stats

from vtts_jax import components, core
from vtts_jax import token_sampling as sampling
from vtts_jax.errors import ConfigError
from vtts_jax.search import schedules, select

KEY = jax.random.key(7)


def test_keys_depend_on_prompt_and_candidate_only():
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.array([5, 2])), jnp.arange(4))
  alone = core.candidate_keys(core.prompt_keys(KEY, jnp.array([2])), jnp.array([3]))
  assert jax.random.key_data(keys[1, 3]).tolist() == jax.random.key_data(alone[0, 0]).tolist()
  by_hand = jax.random.fold_in(jax.random.fold_in(KEY, 2), 3)
  assert jax.random.key_data(alone[0, 0]).tolist() == jax.random.key_data(by_hand).tolist()


def test_children_differ_and_the_first_is_its_parent():
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(3))
  data = [jax.random.key_data(core.child_keys(keys, s, 4)) for s in (0, 1)]
  assert (data[0][:, :, 0] == jax.random.key_data(keys)).all()
  used = {tuple(k) for k in np.asarray(data[0]).reshape(-1, 2)}
  used |= {tuple(k) for k in np.asarray(data[1])[:, :, 1:].reshape(-1, 2)}
  assert len(used) == 24 + 18


def test_cost_adds_up():
  a = core.Cost(1, 2, 3, 4)
  assert a + 2 * a == core.Cost(3, 6, 9, 12)


@given(st.lists(st.floats(-5, 5, width=16), min_size=2, max_size=9), st.data())
@settings(max_examples=40, deadline=None)
def test_ranks_are_scipys(values, data):
  valid = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
  ranks = np.asarray(select.mean_ranks(jnp.array([values], jnp.float32), jnp.array([valid])))[0]
  if valid.any():
    want = scipy_stats.rankdata(np.array(values, np.float32)[valid]) - 1
    np.testing.assert_allclose(ranks[valid], want)


def test_top_never_keeps_a_bad_score_while_a_good_one_exists():
  totals = jnp.array([[1.0, -jnp.inf, 3.0, -jnp.inf], [-jnp.inf] * 4])
  index, values = select.top_candidates(totals, 3)
  assert index[0].tolist() == [2, 0, 2]
  assert values[0].tolist() == [3, 1, 3]
  assert values[1].tolist() == [-np.inf] * 3


def test_min_max_ignores_bad_scores():
  values = jnp.array([[2.0, 1e9, 4.0, 3.0]])
  got = select.scale_min_max(values, jnp.array([[True, False, True, True]]))[0]
  assert got[jnp.array([0, 2, 3])].tolist() == [0, 1, 0.5]


def test_draws_follow_the_distribution():
  p = np.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.log(jnp.array(p, jnp.float32))
  keys = jax.random.split(KEY, 20_000)
  drawn = np.asarray(sampling.draw_tokens(jnp.broadcast_to(logits, (20_000, 4)), keys))
  assert scipy_stats.chisquare(np.bincount(drawn, minlength=4), 20_000 * p).pvalue > 1e-3
  pairs = np.asarray(sampling.draw_distinct(jnp.broadcast_to(logits, (20_000, 4)), keys, 2))
  assert (pairs[:, 0] == drawn).all() and (pairs[:, 0] != pairs[:, 1]).all()
  order = list(itertools.permutations(range(4), 2))
  want = np.array([p[a] * p[b] / (1 - p[a]) for a, b in order])
  seen = np.array([((pairs == o).all(1)).sum() for o in order])
  assert scipy_stats.chisquare(seen, 20_000 * want / want.sum()).pvalue > 1e-3


def test_truncation():
  logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
  kept = lambda **how: np.isfinite(np.asarray(sampling.truncate_logits(logits, **how))).tolist()
  assert kept(top_k=2) == [True, True, False, False]
  assert kept(top_p=0.69) == [True, True, False, False]
  assert kept(top_p=0.71) == [True, True, True, False]
  assert kept(top_p=1e-6) == [True, False, False, False]
  warm = sampling.truncate_logits(logits, temperature=0.5)
  np.testing.assert_allclose(warm, logits * 2, rtol=1e-6)


@given(
  st.sampled_from(schedules.SCHEDULES),
  st.integers(2, 9),
  st.integers(0, 5),
  st.integers(0, 20),
  st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_schedules_rise_to_the_end(kind, size, steps, start, more):
  marks = schedules.schedule_cuts(kind, size, steps, start, start + more)
  assert all(a < b for a, b in zip((start, *marks), marks)) and marks[-1] <= start + more
  assert len(marks) <= steps if steps else marks[-1] == start + more


def test_published_schedules():
  assert schedules.schedule_cuts('geometric', 2, 9, 0, 256) == tuple(2**i for i in range(9))
  assert schedules.schedule_cuts('linear', 32, 0, 0, 100) == (32, 64, 96, 100)
  assert schedules.schedule_cuts('fixed', 2, 3, 10, 100) == (11, 12, 13)
  assert schedules.schedule_cuts((4, 9), 2, 0, 0, 12) == (4, 9)
  with pytest.raises(ConfigError, match=r'search.schedule=\[4, 4\]: must be increasing'):
    schedules.schedule_cuts((4, 4), 2, 0, 0, 12)


@pytest.mark.parametrize(
  ('name', 'given', 'message'),
  [
    ('search.beam', {'width': 0}, r'search.width=0: must be an integer >= 1'),
    ('search.beam', {'widht': 3}, r'unknown setting widht=3; allowed: width, branch'),
    ('search.beam', {'schedule': 'log'}, r"search.schedule='log': must be one of 'geometric'"),
    ('search.beam', {'replace': False, 'branch_at': 'first'}, "needs search.branch_at='last'"),
    ('search.best_of_n', {'lookahead': 2}, r'unknown setting lookahead=2; allowed: n, round'),
    ('search.best_of_n', {'n': 8, 'round': 3}, r'search.round=3: must divide search.n=8'),
    ('search.beams', {}, r"unknown component 'search.beams'; allowed: generators"),
    ('scenes.ar', {'order': '3d'}, r"generator.order='3d': must be one of"),
    ('scenes.ar', {'top_p': 0.0}, r'generator.top_p=0.0: must be in \(0, 1\]'),
    ('verifiers.host', {}, 'exactly one of score_fn'),
  ],
)
def test_impossible_settings_are_named(name, given, message):
  with pytest.raises(ConfigError, match=message):
    components.load(name, **given)


def test_components_are_listed_without_importing_them():
  found = components.list_components()
  assert {'search.beam', 'scenes.ar', 'verifiers.ensemble'} <= set(found)
  assert all(found.values()), 'a component without a docstring'
