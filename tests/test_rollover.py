"""Rollover budget forcing against an independent loop, threshold stopping, shrinking batches."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.engine.search import search
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.rollover import Rollover
from vtts_jax.testing import laws, toys

KEY = jax.random.key(8)
PROMPTS = ['a', 'bb', 'ccc', 'dddd', 'e']
GEN, VER = toys.Tokens(), toys.Target()


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def score_child(gen, ctx, vctx, state, key, begin, size, ahead):
  """A candidate `size` stages on, and the score of what it shows `ahead` greedy stages later."""
  grown = gen.extend({}, ctx, state, key, begin, size)
  shown = gen.extend({}, ctx, grown, key, begin + size, ahead, greedy=True)
  seen = gen.observe({}, ctx, shown, begin + size + ahead, ('image',))
  return grown, VER.score({}, vctx, seen)['target'][0, 0]


def by_hand(gen, text, number, algo):
  """The method for one prompt, one candidate at a time: (best total, candidates scored)."""
  ctx = gen.encode({}, gen.tokenize([{'text': text}]))
  vctx = VER.encode({}, VER.tokenize([{'text': text}]))
  end, size, bar, scored, seen = gen.num_stages, algo.size, None, 0, []
  ahead = lambda stage: min(algo.lookahead, end - stage) if algo.lookahead >= 0 else end - stage

  def try_child(state, key, begin, count):
    grown, score = score_child(gen, ctx, vctx, state, key, begin, count, ahead(begin + count))
    # only what is complete may be returned, where prefixes are no samples
    if gen.prefixes_are_samples or begin + count + ahead(begin + count) >= end:
      seen.append(float(score))
    return grown, float(score)

  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.array([number])), jnp.arange(algo.roots))
  starts = [(gen.init({}, ctx, keys[:, i : i + 1]), keys[:, i : i + 1]) for i in range(algo.roots)]
  state, key = starts[0]
  if algo.roots > 1:  # the best initial noise, whose score is to be beaten
    scores = [try_child(*start, 0, 0)[1] for start in starts]
    state, key = starts[int(np.argmax(scores))]
    bar, scored = max(scores), algo.roots
  chunks = algo.steps or end // size
  budget = 0
  for chunk in range(chunks):
    begin, chosen, k = chunk * size, (-np.inf, None, None), 0
    budget += algo.quota
    if algo.tries and chunk == chunks - 1:
      budget = algo.tries - (scored - (algo.roots > 1) * algo.roots)
    while budget > 0:
      own = core.child_key(key, begin, jnp.int32(k))
      grown, score = try_child(state, own, begin, size)
      scored, budget, k = scored + 1, budget - 1, k + 1
      if score > chosen[0]:
        chosen = (score, grown, own)
      if algo.tries and chunk == chunks - 1:
        continue
      if algo.threshold < np.inf and chosen[0] >= algo.threshold:
        break
      if algo.threshold == np.inf and bar is not None and chosen[0] > bar:
        break
      bar = score if bar is None else bar
    bar = max(bar, chosen[0])
    state, key = chosen[1:]
  return max(seen), scored


RUNS = {
  'rollover': (GEN, Rollover(quota=3, size=2)),
  'threshold': (GEN, Rollover(quota=3, size=2, threshold=-0.12)),
  # as the authors run it, shrunk: noise is chosen, the last chunk spends the rest
  'rbf': (
    toys.Flow(),
    components.load('search.rollover', preset='rbf', quota=4, tries=14, roots=5, steps=3),
  ),
}


@pytest.mark.parametrize('name', RUNS)
def test_rollover_is_the_published_loop(name):
  gen, algo = RUNS[name]
  want = [by_hand(gen, text, i, algo) for i, text in enumerate(PROMPTS)]
  for mode in ('fused', 'stepped') if name == 'rollover' else ('fused',):
    found = search(algo, gen, VER, PROMPTS, seed=KEY, mode=mode)
    laws.assert_same(found.best.total, np.float32([w[0] for w in want]), 'the best')
    scored = sum(s.active * s.totals.shape[1] for s in found.steps)
    np.testing.assert_array_equal(scored, [w[1] for w in want])
    np.testing.assert_array_equal(found.spent()[:, -1, 2], scored)
  if name == 'rbf':
    assert (scored == 5 + 14).all()
    # a call to choose the noise, then one for the step and one where it ends
    total = sum(found.costs, core.Cost())
    assert (total.generator, total.verify) == (5 + 14 * 2, 5 + 14)
    laws.check_algorithm(algo, gen, VER, PROMPTS[:3], KEY)
  else:
    assert scored.min() < 9, 'someone must arrive early'


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
