"""Tree search over prefixes: what a node draws and holds, subtree reuse, bad scores and settings.

Its laws are with those of the other algorithms, in test_search.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.engine import search as run
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.mcts import search as mcts
from vtts_jax.testing import toys

KEY = jax.random.key(11)
NONE = {'generator': {}, 'verifier': {}}
PROMPTS = ['a', 'bb', 'ccc']
GEN, VER = toys.Tokens(), toys.Target()
AHEAD = toys.Tokens(value_of='target', rollout_policy='small')


def test_children_of_the_root_are_the_continuations_of_its_keys():
  """With chunks as long as a sample the leaves are draws whose keys are known."""
  algo = mcts.build(simulations=4, leaves=4, slots=4, size=GEN.num_stages, rule='uct')
  found = run.search(algo, GEN, VER, NONE, PROMPTS, KEY, trace=True).steps[1]
  ctx = GEN.encode({}, GEN.tokenize(PROMPTS))
  roots = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(3)), jnp.arange(1))
  keys = core.child_keys(roots, 0, 4)[:, 0]
  drawn = GEN.extend({}, ctx, GEN.init({}, ctx, keys), keys, 0, GEN.num_stages)
  np.testing.assert_array_equal(np.sort(found.shown.tokens, 1), np.sort(drawn.tokens, 1))


def test_what_is_tried_gets_better():
  """The mean score of the leaves rises over the search, and above that of plain samples."""
  prompts = [f'p{i}' for i in range(32)]
  algo = mcts.build(
    simulations=96,
    leaves=4,
    size=1,
    slots=8,
    rule='puct',
    greedy=False,
    rule_settings={'fraction': 0.0},
  )
  means = [s.totals.mean() for s in run.search(algo, GEN, VER, NONE, prompts, KEY).steps]
  drawn = run.search(BestOfN(n=97), GEN, VER, NONE, prompts, KEY).steps[0].totals
  assert np.mean(means[1:5]) < np.mean(means[9:13]) < np.mean(means[21:])
  assert np.mean(means[21:]) > drawn.mean() + 0.5 * drawn.std()


def trees(algo, gen=GEN):
  """The tree after each step, at first of the root alone; a score is how near tokens are to 3."""
  ctx = gen.encode({}, gen.tokenize(PROMPTS))
  prompt_keys = core.prompt_keys(KEY, jnp.arange(3))
  told = algo.init(gen, {}, ctx, prompt_keys, jnp.zeros((3, 0), jnp.int32))
  best = core.Best((), jnp.zeros(3), {}, jnp.zeros(3))
  state = core.SearchState(told.frontier, told.keys, told.scores, best, told.inner)

  def one(state, step):
    cands = algo.ask(gen, {}, ctx, state, step)
    totals = -((cands.shown.tokens - 3.0) ** 2).mean(-1)
    told = algo.tell(gen, {}, ctx, state, cands, totals, step)
    return state._replace(inner=told.inner)

  grow = jax.jit(lambda state, index: one(state, core.Step(index, 1)))
  state = one(state, core.Step(0, 0))
  yield state.inner[1]
  for index in range(1, algo.num_steps(gen)):
    state = grow(state, jnp.int32(index))
    yield state.inner[1]


def test_commit_moves_the_root_and_keeps_what_is_below():
  algo = mcts.build(simulations=24, leaves=4, size=2, slots=3, commit=8, rule='puct')
  before, rows = None, np.arange(3)
  for index, grown in enumerate(trees(algo)):
    if index and index % 2 == 0:
      open_ = np.asarray(grown.logits)[rows, before.root] > -np.inf
      top = np.where(open_, np.asarray(grown.counts)[rows, before.root], 0).max(1)
      np.testing.assert_array_equal(np.asarray(grown.parent)[rows, grown.root], before.root)
      left = top > 0  # else all below the root is finished
      assert index > 4 or left.all()
      np.testing.assert_array_equal(np.asarray(grown.visits)[rows, grown.root][left], top[left])
    elif index:
      np.testing.assert_array_equal(grown.root, before.root)
    before = grown
  stage = np.asarray(grown.embedding[2])[rows, grown.root]
  assert (stage >= 4).all(), 'commits move on'


@pytest.mark.parametrize('rule', ['puct', 'uct', 'gumbel', 'dts'])
def test_no_finished_sample_is_tried_again(rule):
  """Two chunks of two slots each: six leaves in all, and no more however long the search."""
  *_, grown = trees(mcts.build(simulations=6, leaves=1, size=3, slots=2, rule=rule))
  finished = (grown.embedding[2] >= GEN.num_stages) & (jnp.arange(7) < grown.used[:, None])
  assert (grown.used == 7).all() and (finished.sum(1) == 4).all()
  assert (np.asarray(grown.visits)[np.asarray(finished)] == 1).all()


def test_a_rollout_with_a_bad_score_is_the_worst():
  algo = mcts.build(simulations=32, leaves=4, size=1)
  best = run.search(algo, GEN, VER, NONE, PROMPTS, KEY).best.state.tokens
  ver = toys.Target(poison=float(best[0, 0]) / (GEN.vocab - 1))  # what would win scores NaN
  found = run.search(algo, GEN, ver, NONE, PROMPTS, KEY)
  assert (found.best.state.tokens[0, 0] != best[0, 0]).all()
  assert found.bad['target'].sum() > 0 and np.isfinite(found.best.total).all()


def test_a_node_costs_bytes_not_a_cache():
  gen = components.load('scenes.ar')
  algo = mcts.build(simulations=16, leaves=4)

  def grown(params):
    ctx = gen.encode(params, {'text': jnp.zeros((1, 12), jnp.int32)})
    keys = core.prompt_keys(KEY, jnp.arange(1))
    told = algo.init(gen, params, ctx, keys, jnp.zeros((1, 0), jnp.int32))
    state = core.SearchState(told.frontier, told.keys, told.scores, None, told.inner)
    cands = algo.ask(gen, params, ctx, state, core.Step(0, 0))
    return algo.tell(gen, params, ctx, state, cands, jnp.zeros((1, 1)), core.Step(0, 0)).inner[1]

  tree = jax.eval_shape(grown, gen.load())
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree.embedding)) / 17
  assert size == 32 * 4 + 4 + 8 + 4  # tokens, log-probability, key, stage


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'simulations': 6, 'leaves': 4}, 'multiple of search.leaves=4'),
    ({'rule': 'best'}, "'gumbel'"),
    ({'rule': 'puct', 'rule_settings': {'cpuct': 1}}, "'fraction'"),
    ({'mix': 0.0}, 'search.finish=0'),
    ({'mix': 2.0}, r'in \[0, 1\]'),
    ({'rollout': 'small'}, 'has no small policy'),
    ({'size': 9}, 'search.size=9'),
  ],
)
def test_bad_settings(settings, text):
  with pytest.raises(ConfigError, match=text):
    components.load('search.mcts', **settings).check(GEN)


def test_a_value_head_must_predict_the_score_searched_on():
  algo = mcts.build(simulations=4, leaves=2, mix=0.5)
  with pytest.raises(ConfigError, match="predicts 'target', the search is on brightness"):
    run.validate(algo, AHEAD, toys.Brightness())
