"""Tree search over prefixes: what a node draws and holds, subtree reuse, bad scores and settings.

Its laws are with those of the other algorithms, in test_search.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.engine.search import search, validate
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.mcts import MCTS
from vtts_jax.testing import toys

KEY = jax.random.key(11)
PROMPTS = ['a', 'bb', 'ccc']
GEN, VER = toys.Tokens(), toys.Target()
AHEAD = toys.Tokens(value_of='target', rollout_model='small')


def test_children_of_the_root_are_the_continuations_of_its_keys():
  """With chunks as long as a sample the leaves are draws whose keys are known."""
  algo = MCTS(simulations=4, leaves=4, slots=4, size=GEN.num_stages, rule='uct')
  found = search(algo, GEN, VER, PROMPTS, seed=KEY, collect=('states',)).steps[1]
  ctx = GEN.encode({}, GEN.tokenize(core.as_prompts(PROMPTS)))
  roots = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(3)), jnp.arange(1))
  keys = core.child_keys(roots, 0, 4)[:, 0]
  drawn = GEN.extend({}, ctx, GEN.init({}, ctx, keys), keys, 0, GEN.num_stages)
  np.testing.assert_array_equal(np.sort(found.states.tokens, 1), np.sort(drawn.tokens, 1))


def test_what_is_tried_gets_better():
  """The mean score of the leaves rises over the search, and above that of plain samples."""
  prompts = [f'p{i}' for i in range(32)]
  algo = MCTS(
    simulations=96,
    leaves=4,
    size=1,
    slots=8,
    rule='puct',
    greedy=False,
    rule_settings={'fraction': 0.0},
  )
  means = [s.totals.mean() for s in search(algo, GEN, VER, prompts, seed=KEY).steps]
  drawn = search(BestOfN(n=97), GEN, VER, prompts, seed=KEY).steps[0].totals
  assert np.mean(means[1:5]) < np.mean(means[9:13]) < np.mean(means[21:])
  assert np.mean(means[21:]) > drawn.mean() + 0.5 * drawn.std()


def trees(algo, gen=GEN):
  """The tree after each step, at first of the root alone; a score is how near tokens are to 3."""
  ctx = gen.encode({}, gen.tokenize(core.as_prompts(PROMPTS)))
  prompt_keys = core.prompt_keys(KEY, jnp.arange(3))
  sampler = core.Sampler(gen, {}, ctx)
  frontier = algo.init(sampler, prompt_keys, jnp.zeros((3, 0), jnp.int32))

  @functools.partial(jax.jit, static_argnums=1)
  def advance(frontier, shape, row):
    cands = algo.ask(sampler, frontier, shape, row)
    totals = -((cands.state.tokens - 3.0) ** 2).mean(-1)
    return algo.tell(sampler, frontier, cands, totals, shape, row)[0]

  for shape, row in core.steps_of(algo, gen):
    frontier = advance(frontier, shape, row)
    yield frontier.own[1]


def test_commit_moves_the_root_and_keeps_what_is_below():
  algo = MCTS(simulations=24, leaves=4, size=2, slots=3, commit=8, rule='puct')
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
  *_, grown = trees(MCTS(simulations=6, leaves=1, size=3, slots=2, rule=rule))
  finished = (grown.embedding[2] >= GEN.num_stages) & (jnp.arange(7) < grown.used[:, None])
  assert (grown.used == 7).all() and (finished.sum(1) == 4).all()
  assert (np.asarray(grown.visits)[np.asarray(finished)] == 1).all()


def test_a_rollout_with_a_bad_score_is_the_worst():
  algo = MCTS(simulations=32, leaves=4, size=1)
  best = search(algo, GEN, VER, PROMPTS, seed=KEY).best.state.tokens
  ver = toys.Target(poison=float(best[0, 0]) / (GEN.vocab - 1))  # what would win scores NaN
  found = search(algo, GEN, ver, PROMPTS, seed=KEY)
  assert (found.best.state.tokens[0, 0] != best[0, 0]).all()
  assert found.bad['target'].sum() > 0 and np.isfinite(found.best.total).all()


def test_a_node_costs_bytes_not_a_cache():
  gen = components.load('scenes.ar')
  algo = MCTS(simulations=16, leaves=4)

  def grown(params):
    ctx = gen.encode(params, {'text': jnp.zeros((1, 12), jnp.int32)})
    keys, sampler = core.prompt_keys(KEY, jnp.arange(1)), core.Sampler(gen, params, ctx)
    frontier = algo.init(sampler, keys, jnp.zeros((1, 0), jnp.int32))
    cands = algo.ask(sampler, frontier, 'root', (0,))
    return algo.tell(sampler, frontier, cands, jnp.zeros((1, 1)), 'root', (0,))[0].own[1]

  tree = jax.eval_shape(grown, gen.load())
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree.embedding)) / 17
  assert size == 32 * 4 + 32 * 4 + 8 + 4  # tokens, their log-probabilities, key, stage


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'simulations': 6, 'leaves': 4}, 'multiple of search.leaves=4'),
    ({'rule': 'best'}, "'gumbel'"),
    ({'rule': 'puct', 'rule_settings': {'cpuct': 1}}, "'fraction'"),
    ({'mix': 0.0}, 'search.finish=0'),
    ({'mix': 2.0}, r'in \[0, 1\]'),
    ({'size': 9}, 'search.size=9'),
  ],
)
def test_bad_settings(settings, text):
  with pytest.raises(ConfigError, match=text):
    components.load('search.mcts', **settings).check(GEN)


def test_a_value_head_must_predict_the_score_searched_on():
  algo = MCTS(simulations=4, leaves=2, mix=0.5)
  with pytest.raises(ConfigError, match="predicts 'target', the search is on brightness"):
    validate(algo, AHEAD, toys.Brightness())
