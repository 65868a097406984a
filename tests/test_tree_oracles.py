"""The array tree against mctx, a plain tree in numpy, and problems with known answers."""

import math

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from trees import KEY, QUIET, adversary, random_search, search

from vtts_jax.games import tic_tac_toe
from vtts_jax.games import trees as games
from vtts_jax.search.mcts import simulate
from vtts_jax.search.mcts.rules import DTS, PUCT, UCT, Gumbel

# ------------------------------------------------------------------------------------------- mctx


@pytest.mark.parametrize('policy', ['muzero', 'gumbel'])
@pytest.mark.parametrize(
  ('slots', 'simulations', 'masked', 'depth', 'recurrent'),
  [
    (16, 64, True, None, adversary),
    (3, 48, False, 3, games.random_step),
  ],
  ids=['two players, wide, masked', 'shallow'],
)
def test_mctx_finds_the_same_tree(policy, slots, simulations, masked, depth, recurrent):
  params, start = games.random_tree(jax.random.key(1), 8, slots)
  invalid = None
  if masked:  # row r may not use slot r, and the last slot neither in odd rows
    rows = jnp.arange(8)[:, None]
    invalid = (jnp.arange(slots) == rows % slots) | (
      (jnp.arange(slots) == slots - 1) & (rows % 2 == 1)
    )
  theirs = jax.jit(
    lambda root, key: getattr(mctx, f'{policy}{"_muzero" if policy == "gumbel" else ""}_policy')(
      params,
      key,
      root,
      lambda p, k, a, e: (lambda r, e: (mctx.RecurrentFnOutput(**r._asdict()), e))(
        *recurrent(p, k, a, e)
      ),
      simulations,
      invalid_actions=None if invalid is None else invalid.astype(jnp.float32),
      max_depth=depth,
    )
  )(mctx.RootFnOutput(**start._asdict()), KEY)
  rule = {'muzero': PUCT(), 'gumbel': Gumbel()}[policy]
  ours, found = search(
    start,
    params,
    KEY,
    recurrent=recurrent,
    rule=rule,
    simulations=simulations,
    invalid=invalid,
    depth=depth,
  )
  summary = theirs.search_tree.summary()
  np.testing.assert_array_equal(found.visits, summary.visit_counts)
  np.testing.assert_array_equal(found.action, theirs.action)
  np.testing.assert_allclose(found.policy, theirs.action_weights, atol=1e-5)
  np.testing.assert_allclose(found.value, summary.value, atol=1e-5)
  seen = np.asarray(found.visits) > 0
  np.testing.assert_allclose(found.q, np.where(seen, summary.qvalues, 0), atol=1e-5)
  if depth is None:  # else mctx leaves rows of its arrays empty, and numbers the nodes otherwise
    np.testing.assert_array_equal(ours.parent, theirs.search_tree.parents)
    np.testing.assert_array_equal(ours.action, theirs.search_tree.action_from_parent)
    np.testing.assert_array_equal(ours.visits, theirs.search_tree.node_visits)
  if masked:
    assert not found.visits[invalid].any()


# ----------------------------------------------------------------------- a plain tree, node by node


class Plain:
  """One tree of Python objects, float64, its rules evaluated on the way down."""

  def __init__(self, params, start, row, rule, slots):
    self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    self.rule, self.slots = rule, slots
    self.root = self.node(np.asarray(start.embedding[row], np.float64), 0.0)
    self.root['n'] = 1

  def node(self, state, reward):
    logits, value = state @ self.params.prior, float(state @ self.params.value)
    prior = np.exp(logits - logits.max())
    fresh = {'children': {}, 'pending': np.zeros(self.slots), 'waiting': False, 'n': 0}
    return fresh | {
      'state': state,
      'prior': prior / prior.sum(),
      'raw': value,
      'value': value,
      'reward': reward,
    }

  def q(self, node, a):
    child = node['children'][a]
    return child['reward'] + 0.97 * child['value']

  def choose_slot(self, node):
    rule, pending = self.rule, node['pending']
    visits = np.array([node['children'][a]['n'] if a in node['children'] else 0 for a in self.all])
    q = {a: self.q(node, a) for a in self.all if visits[a]}
    n = node['n'] + pending.sum()
    virtual = getattr(rule, 'virtual_loss', 1) * pending
    allowed = min(self.slots, math.ceil(rule.widen * n**rule.widen_power)) or self.slots
    if isinstance(rule, DTS):
      untried = [a for a in range(allowed) if not visits[a] + pending[a]]
      return untried[0] if untried else max(q, key=q.get)
    low, high = min([node['value'], *q.values()]), max([node['value'], *q.values()])
    scores = []
    for a in range(allowed):
      tried = visits[a] + virtual[a]
      scaled = (q[a] - low) / max(high - low, 1e-8) if visits[a] else 0
      scaled *= visits[a] / max(tried, 1)  # games under way count as lost
      if isinstance(rule, UCT):
        total = (visits + virtual).sum()
        scores.append(scaled + rule.c * math.sqrt(math.log(total) / tried) if tried else math.inf)
      else:
        games_here = node['n'] + virtual.sum()
        c = rule.init + math.log((games_here + rule.base + 1) / rule.base)
        scores.append(scaled + c * math.sqrt(games_here) * node['prior'][a] / (1 + tried))
    return int(np.argmax(scores))

  @property
  def all(self):
    return range(self.slots)

  def step(self, leaves):
    paths = []
    for _ in range(leaves):
      path, node = [], self.root
      while not node['waiting']:
        a = self.choose_slot(node)
        path.append((node, a))
        node['pending'][a] += 1
        if a not in node['children']:
          state = np.tanh(self.params.step[a] @ node['state'])
          child = self.node(state, float(state @ self.params.reward))
          node['children'][a] = child | {'waiting': True}
        node = node['children'][a]
      paths.append((path, node))
    for path, leaf in paths:
      leaf['waiting'] = False
      value = leaf['raw']
      for node in [leaf] + [node for node, _ in path[::-1]]:
        node['value'] = (node['value'] * node['n'] + value) / (node['n'] + 1)
        node['n'] += 1
        value = node['reward'] + 0.97 * value
      for node, _ in path:
        node['pending'][:] = 0
    if self.rule.soft:
      for path, _ in paths:
        for node, _ in path[::-1]:
          q = np.array([self.q(node, a) for a in node['children']])
          node['value'] = math.log(np.mean(np.exp(self.rule.sharpness * q))) / self.rule.sharpness


@pytest.mark.parametrize(
  ('rule', 'leaves'),
  [
    (QUIET, 4),
    (PUCT(fraction=0.0, init=3.0, virtual_loss=3.0, widen=1.0), 6),
    (UCT(), 1),
    (UCT(virtual_loss=2.0, widen=1.5, widen_power=0.4), 4),
    (DTS(sharpness=2.0, greedy=True, widen=1.0), 1),
  ],
  ids=['puct', 'puct widened', 'uct', 'uct widened', 'dts'],
)
def test_visits_are_those_of_a_plain_tree(rule, leaves):
  slots, simulations, rows = 6, 72, 3
  params, start = games.random_tree(jax.random.key(2), rows, slots)
  grown, found = random_search(
    start, params, KEY, rule=rule, simulations=simulations, leaves=leaves
  )
  for row in range(rows):
    plain = Plain(params, start, row, rule, slots)
    for _ in range(simulations // leaves):
      plain.step(leaves)
    pairs = [(0, plain.root)]
    while pairs:
      index, node = pairs.pop()
      assert int(grown.visits[row, index]) == node['n']
      np.testing.assert_allclose(grown.value[row, index], node['value'], atol=2e-5)
      children = {a: int(c) for a, c in enumerate(grown.child[row, index]) if c >= 0}
      assert children.keys() == node['children'].keys()
      pairs += [(c, node['children'][a]) for a, c in children.items()]
    np.testing.assert_allclose(found.value[row], plain.root['value'], atol=2e-5)


def test_two_descents_to_one_leaf_expand_it_once():
  params, start = games.random_tree(KEY, 4, 1)  # one slot: all descents of a step are the same
  grown, found = random_search(start, params, KEY, rule=QUIET, simulations=12, leaves=4)
  assert (grown.used == 4).all(), 'three steps, three leaves'
  np.testing.assert_array_equal(grown.visits[0, :4], [13, 12, 8, 4])
  assert (found.visits == 12).all()


# ---------------------------------------------------------------------------------- known answers


def soft_value(leaves, sharpness):
  """Soft value of complete trees `[B, K, .., K]`, and of the slots of their roots."""
  q = np.asarray(leaves, np.float64)
  while q.ndim > 2:
    q = np.log(np.mean(np.exp(sharpness * q), -1)) / sharpness
  return np.log(np.mean(np.exp(sharpness * q), -1)) / sharpness, q


def test_dts_is_exact_once_all_leaves_were_seen():
  leaves = jax.random.uniform(KEY, (8, 3, 3, 3))
  rule = DTS(sharpness=2.0)
  grown, found = search(
    games.leaf_tree(leaves), leaves, KEY, recurrent=games.leaf_step, rule=rule, simulations=400
  )
  assert (grown.used == 1 + 3 + 9 + 27).all()
  value, q = soft_value(leaves, 2.0)
  np.testing.assert_allclose(found.value, value, atol=1e-5)
  np.testing.assert_allclose(found.q, q, atol=1e-5)
  tilted = np.exp(2 * q) / np.exp(2 * q).sum(-1, keepdims=True)
  np.testing.assert_allclose(found.policy, tilted, atol=1e-5)
  np.testing.assert_array_equal(found.action, q.argmax(-1))
  # descents draw slots in proportion to exp(sharpness q): mean over 8 rows of 400 draws
  shares = np.asarray(found.visits) / 400
  assert np.abs(shares - tilted).mean() < 0.03


@pytest.mark.parametrize(
  'rule',
  [
    PUCT(fraction=0.0, init=2.5),
    PUCT.alphago(),
    UCT(),
    Gumbel(scale=0.0, rescale=False),  # rescaled, it never leaves the first leaf better than 0
  ],
  ids=['puct', 'alphago', 'uct', 'gumbel'],
)
def test_the_best_leaf_is_found(rule):
  keys = jax.random.split(jax.random.key(11))
  best = jax.random.randint(keys[0], (32,), 0, 9)
  leaves = 0.5 * jax.random.uniform(keys[1], (32, 9))
  leaves = leaves.at[jnp.arange(32), best].set(1.0).reshape(32, 3, 3)
  grown, _ = search(
    games.leaf_tree(leaves), leaves, KEY, recurrent=games.leaf_step, rule=rule, simulations=600
  )
  found = simulate.root_summary(grown, rule.for_simulations(600))
  np.testing.assert_array_equal(found.action, best // 3)


@pytest.mark.parametrize(
  ('rule', 'leaves', 'simulations'),
  [
    (PUCT(fraction=0.0, bounds=(-1.0, 1.0)), 1, 4096),
    (Gumbel(scale=0.0), 1, 2048),
  ],
  ids=['puct', 'gumbel'],
)
def test_tictactoe_is_played_perfectly(rule, leaves, simulations):
  """All openings of up to three stones, to symmetry: the move must keep the value of the game."""
  boards = tic_tac_toe.list_openings(3)
  assert len(boards) == 1 + 3 + 12 + 38

  def move(boards):
    start = tic_tac_toe.start_game(boards)
    grown, _ = simulate.run_search(
      start, tic_tac_toe.step_game, rule, simulations, KEY, leaves=leaves, depth=9
    )
    return simulate.root_summary(grown, rule.for_simulations(simulations)).action

  # long enough to be worth the optimiser that tests do without
  fast = jax.jit(move, compiler_options={'xla_backend_optimization_level': 2})
  for board, action in zip(boards, np.asarray(fast(np.array(boards, np.int8)))):
    assert action in tic_tac_toe.solve_board(board)[1], f'{board}: {action}'
