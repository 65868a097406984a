"""Rollover budget forcing against an independent loop, threshold stopping, shrinking batches."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.engine.search import search
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.rollover import Rollover
from vtts_jax.testing import laws, toys

KEY = jax.random.key(8)
PROMPTS = ['a', 'bb', 'ccc', 'dddd', 'e']
GEN, VER = toys.Tokens(), toys.Target()


@functools.partial(jax.jit, static_argnums=(5, 6))
def score_child(ctx, vctx, state, key, k, begin, size):
  """Child k of a candidate: its state, key and the score of its greedy completion."""
  own = jax.lax.dynamic_index_in_dim(core.child_keys(key, begin, 16), k, 2, keepdims=False)
  grown = GEN.extend({}, ctx, state, own, begin, size)
  rest = GEN.num_stages - begin - size
  whole = GEN.extend({}, ctx, grown, own, begin + size, rest, greedy=True)
  seen = GEN.observe({}, ctx, whole, GEN.num_stages, ('image',))
  return grown, own, VER.score({}, vctx, seen)['target'][0, 0]


def by_hand(text, number, quota, size, threshold=None):
  """The method for one prompt, one candidate at a time: (best total, candidates scored)."""
  ctx = GEN.encode({}, GEN.tokenize([{'text': text}]))
  vctx = VER.encode({}, VER.tokenize([{'text': text}]))
  key = core.candidate_keys(core.prompt_keys(KEY, jnp.array([number])), jnp.arange(1))
  state = GEN.init({}, ctx, key)
  best, scored, budget, bar = -np.inf, 0, 0, None
  for begin in range(0, GEN.num_stages, size):
    budget += quota
    chosen, k = (-np.inf, None, None), 0
    while budget > 0:
      grown, own, score = score_child(ctx, vctx, state, key, k, begin, size)
      score, scored, budget, k = float(score), scored + 1, budget - 1, k + 1
      best = max(best, score)
      if score > chosen[0]:
        chosen = (score, grown, own)
      if threshold is not None and chosen[0] >= threshold:
        break
      if threshold is None and bar is not None and chosen[0] > bar:
        break
      bar = score if bar is None else bar
    bar = max(bar, chosen[0])
    state, key = chosen[1:]
  return best, scored


@pytest.mark.parametrize('threshold', [None, -0.12])
def test_rollover_is_the_published_loop(threshold):
  algo = Rollover(quota=3, size=2, threshold=np.inf if threshold is None else threshold)
  for mode in ('fused', 'stepped'):
    found = search(algo, GEN, VER, PROMPTS, seed=KEY, mode=mode)
    want = [by_hand(text, i, 3, 2, threshold) for i, text in enumerate(PROMPTS)]
    np.testing.assert_allclose(found.best.total, [w[0] for w in want], rtol=1e-5)
    scored = sum(s.active for s in found.steps)
    np.testing.assert_array_equal(scored, [w[1] for w in want])
    assert scored.min() < 9, 'someone must arrive early'
    verify = found.spent()[:, -1, 2]
    np.testing.assert_array_equal(verify, scored)


class Calls(toys.Target):
  """Counts the rows that reach the host."""

  jittable = False
  rows = 6
  seen: ClassVar[list] = []

  def score(self, params, vctx, observed):
    self.seen.append(observed['image'].shape[0])
    return super().score(params, vctx, observed)


def test_prompts_that_are_good_enough_leave_the_batch():
  algo = BestOfN(n=16, round=1)
  whole = search(algo, GEN, VER, PROMPTS, seed=KEY)
  stop = float(np.sort(whole.best.total)[2]) - 1e-4
  fused = search(algo, GEN, VER, PROMPTS, seed=KEY, stop=stop, collect=('states',))
  ver = Calls()
  ver.seen.clear()
  left = search(algo, GEN, ver, PROMPTS, seed=KEY, stop=stop, mode='stepped', collect=('states',))
  laws.assert_same(left.best, fused.best, 'stepped with early exit against masked')
  active = np.stack([s.active for s in fused.steps])
  laws.assert_same(np.stack([s.active for s in left.steps]), active, 'active prompts')
  assert set(ver.seen) <= {5, 3, 2, 1} and min(ver.seen) < 5, 'the batch shrinks by halves'
  first = np.argmax(np.stack([s.best.total for s in whole.steps]) >= stop, axis=0)
  for i, total in enumerate(whole.best.total):
    assert active[:, i].sum() == (first[i] + 1 if total >= stop else 16)
    want = whole.steps[first[i]].best.total[i] if total >= stop else total
    assert fused.best.total[i] == pytest.approx(want, rel=1e-5)


def test_a_batch_in_which_all_are_done_stops():
  algo = BestOfN(n=8, round=1)
  ver = Calls()
  ver.seen.clear()
  found = search(algo, GEN, ver, PROMPTS, seed=KEY, stop=-1e9, mode='stepped')
  assert ver.seen == [5] and len(found.steps) == 8
  assert found.spent()[:, -1, 2].tolist() == [1] * 5


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'quota': 3, 'round': 2}, 'multiple of search.round=2'),
    ({'schedule': 'geometric'}, "'linear'"),
    ({'threshold': float('nan')}, 'search.threshold=nan'),
  ],
)
def test_bad_settings(settings, text):
  with pytest.raises(ConfigError, match=text):
    Rollover(**settings)
