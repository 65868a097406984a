"""The array tree: against mctx, a plain tree in numpy, and problems with known answers."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from hypothesis import given, settings

from vtts_jax import core
from vtts_jax.core import ConfigError
from vtts_jax.search import simulate, tree
from vtts_jax.search.policies import DTS, PUCT, UCT, Gumbel
from vtts_jax.testing import games

KEY = jax.random.key(5)
QUIET = PUCT(fraction=0.0)


@functools.partial(jax.jit, static_argnames=('recurrent', 'rule', 'simulations', 'leaves', 'depth'))
def search(start, params, key, *, recurrent, rule, simulations, leaves=1, invalid=None, depth=None):
  return simulate.run(
    start,
    recurrent,
    rule,
    simulations,
    key,
    params=params,
    leaves=leaves,
    invalid=invalid,
    depth=depth,
  )


random_search = functools.partial(search, recurrent=games.random_step)


def adversary(params, key, action, state):
  """The random tree as a game of two players."""
  return games.random_step(params, key, action, state, discount=-1.0)


# ------------------------------------------------------------------------------------------- mctx


@pytest.mark.parametrize('policy', ['muzero', 'gumbel'])
@pytest.mark.parametrize(
  ('slots', 'simulations', 'masked', 'depth', 'recurrent'),
  [
    (16, 64, False, None, games.random_step),
    (5, 48, True, None, adversary),
    (3, 48, True, 3, games.random_step),
  ],
  ids=['wide', 'two players, masked', 'shallow, masked'],
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

  def choose(self, node):
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
        a = self.choose(node)
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
    DTS(sharpness=4.0),
  ],
  ids=['puct', 'alphago', 'uct', 'gumbel', 'dts'],
)
def test_the_best_leaf_is_found(rule):
  keys = jax.random.split(jax.random.key(11))
  best = jax.random.randint(keys[0], (32,), 0, 9)
  leaves = 0.5 * jax.random.uniform(keys[1], (32, 9))
  leaves = leaves.at[jnp.arange(32), best].set(1.0).reshape(32, 3, 3)
  grown, _ = search(
    games.leaf_tree(leaves), leaves, KEY, recurrent=games.leaf_step, rule=rule, simulations=600
  )
  found = simulate.root_summary(grown, rule.planned(600))
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
  boards = games.openings(3)
  assert len(boards) == 1 + 3 + 12 + 38

  def move(boards):
    start = games.tictactoe(boards)
    grown, _ = simulate.run(
      start, games.tictactoe_step, rule, simulations, KEY, leaves=leaves, depth=9
    )
    return simulate.root_summary(grown, rule.planned(simulations)).action

  for board, action in zip(boards, np.asarray(jax.jit(move)(np.array(boards, np.int8)))):
    assert action in games.outcome(board)[1], f'{board}: {action}'


# ------------------------------------------------------------------------------ what always holds

RULES = st.one_of(
  st.builds(PUCT, widen=st.sampled_from([0.0, 1.0]), virtual_loss=st.sampled_from([1.0, 3.0])),
  st.just(UCT()),
  st.just(Gumbel(considered=4)),
  st.just(DTS(sharpness=3.0, widen=1.0)),
)


def check(grown):
  """Statistics that follow from each other do."""
  t = jax.tree.map(np.asarray, grown._replace(keys=None))
  rows = len(t.root)
  assert not t.pending.any()
  for b in range(rows):
    for i in set(range(1, t.used[b])) - {t.root[b]}:  # what is above a root is left as it was
      up, a = t.parent[b, i], t.action[b, i]
      assert t.child[b, up, a] == i and t.counts[b, up, a] == t.visits[b, i] > 0
      q = t.reward[b, i] + t.discount[b, i] * t.value[b, i]
      np.testing.assert_allclose(t.q[b, up, a], q, atol=1e-5)
    assert (t.child[b] >= 0).sum() == t.used[b] - 1
    used = slice(0, t.used[b])
    assert (t.visits[b, used] >= 1 + t.counts[b, used].sum(-1)).all()
    assert (t.counts[b, t.used[b] :] == 0).all() and (t.visits[b, t.used[b] :] == 0).all()


@given(rule=RULES, leaves=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_statistics_agree(rule, leaves, seed):
  params, start = games.random_tree(jax.random.key(seed), 3, 5)
  grown, found = random_search(start, params, KEY, rule=rule, simulations=24, leaves=leaves)
  check(grown)
  assert (found.visits.sum(-1) == 24).all()
  assert (grown.visits[:, 0] == 25).all()
  if rule.widen:
    children = np.asarray((grown.child >= 0).sum(-1))
    most = np.ceil(rule.widen * np.maximum(np.asarray(grown.visits), 1) ** rule.widen_power)
    assert (children <= most).all()
    if leaves == 1:  # slots are opened in their order by DTS, or by prior among the allowed
      used = np.where(np.asarray(grown.child) >= 0, np.arange(5) + 1, 0).max(-1)
      assert (used <= most).all()


@pytest.mark.parametrize('rule', [QUIET, DTS(sharpness=2.0)], ids=['puct', 'dts'])
def test_rows_do_not_meet(rule):
  params, start = games.random_tree(KEY, 6, 4)
  few = jax.tree.map(lambda x: x[:2], start)
  args = {'rule': rule, 'simulations': 30, 'leaves': 3}
  whole, _ = random_search(start, params, KEY, **args)
  part, _ = random_search(few, params, KEY, **args)
  np.testing.assert_array_equal(part.parent, whole.parent[:2])
  np.testing.assert_array_equal(part.visits, whole.visits[:2])


def test_noise_of_a_row_is_its_own_key():
  _, start = games.random_tree(KEY, 6, 4)
  grown = tree.init(start.embedding, start.prior_logits, start.value, 3)
  keys = core.prompt_keys(KEY, jnp.arange(6))
  for rule, field in ((PUCT(), 'logits'), (Gumbel(), 'noise')):
    stir = jax.jit(lambda t, keys, r=rule, f=field: getattr(tree.stir(t, r, keys), f))
    whole = stir(grown, keys)
    last = jax.tree.map(lambda x: x[4:], grown)
    np.testing.assert_array_equal(stir(last, keys[4:]), whole[4:])
    assert not np.array_equal(whole, stir(grown, keys[::-1]))


def grow(t, params, rule, simulations, leaves=1):
  """Select, expand and back up, as an algorithm of the library does."""

  def step(t, _):
    b = t.root.shape[0]
    t, paths = tree.select(t, rule, leaves)
    flat = lambda x: x.reshape(b * leaves, *x.shape[2:])
    wide = lambda x: x.reshape(b, leaves, *x.shape[1:])
    reply, state = games.random_step(params, None, flat(paths.action), flat(tree.parents(t, paths)))
    r = jax.tree.map(wide, reply)
    t = tree.expand(t, paths, wide(state), r.prior_logits, r.value, r.reward, r.discount)
    return tree.backup(t, rule, paths, tree.at(t.raw, paths.leaf)), paths

  return jax.lax.scan(step, t, None, length=simulations)


def test_committing_keeps_what_is_below():
  params, start = games.random_tree(KEY, 4, 4)
  t = tree.init(start.embedding, start.prior_logits, start.value, 64)
  go = jax.jit(grow, static_argnums=(2, 3, 4))
  t, _ = go(t, params, QUIET, 30)
  first = simulate.root_summary(t, QUIET)
  moved = jax.jit(tree.commit)(t, first.action)
  root = np.asarray(moved.root)
  np.testing.assert_array_equal(root, t.child[jnp.arange(4), 0, first.action])
  had = simulate.root_summary(moved, QUIET)
  np.testing.assert_array_equal(had.visits.sum(-1) + 1, first.visits.max(-1))
  on, paths = go(moved, params, QUIET, 20)
  check(on)
  assert (paths.nodes[:, :, 0, 0] == root).all()
  np.testing.assert_array_equal(
    simulate.root_summary(on, QUIET).visits.sum(-1), had.visits.sum(-1) + 20
  )
  np.testing.assert_array_equal(on.visits[:, 0], t.visits[:, 0])
  # where the slot has no child the root stays
  stay = jax.jit(tree.commit)(t, jnp.argmin(first.visits, -1))
  none = np.asarray(first.visits.min(-1)) == 0
  assert none.any() and (np.asarray(stay.root) == 0)[none].all()


def test_gumbel_plans_each_stage_anew():
  params, start = games.random_tree(KEY, 4, 8)
  rule = Gumbel(simulations=16, considered=4, scale=0.0)
  t = tree.init(start.embedding, start.prior_logits, start.value, 64)
  go = jax.jit(grow, static_argnums=(2, 3, 4))
  for _ in range(2):
    before = simulate.root_summary(t, rule).visits
    t, _ = go(t, params, rule, 16)
    found = simulate.root_summary(t, rule)
    spent = np.sort(np.asarray(found.visits - before), -1)[:, ::-1]
    # four slots get 2 visits each, then the better two 4 more each
    np.testing.assert_array_equal(spent, [[6, 6, 2, 2, 0, 0, 0, 0]] * 4)
    t = tree.commit(t, found.action)


def test_a_full_tree_goes_on_counting():
  params, start = games.random_tree(KEY, 3, 4)
  t = tree.init(start.embedding, start.prior_logits, start.value, 9)
  t, paths = jax.jit(grow, static_argnums=(2, 3, 4))(t, params, QUIET, 10, 2)
  assert (t.used == 9).all()
  assert (t.visits[:, 0] == 21).all()
  assert not paths.fresh[-1].any()
  assert not t.pending.any()


def test_leaves_of_a_step_differ():
  _, start = games.random_tree(KEY, 4, 16)
  even = jnp.zeros_like(start.prior_logits)
  for rule in (PUCT.alphago(), UCT(), DTS(sharpness=1.0, greedy=True)):
    t = tree.init(start.embedding, even, start.value, 64)
    _, paths = jax.jit(tree.select, static_argnums=(1, 2))(t, rule, 8)
    assert paths.fresh.all()
    np.testing.assert_array_equal(np.sort(paths.action, -1), [range(8)] * 4)


def test_closed_nodes_are_leaves_for_ever():
  boards = np.array([[1, 1, 0, -1, -1, 0, 0, 0, 0]], np.int8)  # a win at 2
  grown, found = search(
    games.tictactoe(boards), (), KEY, recurrent=games.tictactoe_step, rule=QUIET, simulations=64
  )
  won = int(grown.child[0, 0, 2])
  assert won > 0 and (grown.child[0, won] == -1).all()
  assert int(found.visits[0, 2]) > 32 and float(found.q[0, 2]) == 1.0


def test_depth_limit():
  params, start = games.random_tree(KEY, 4, 3)
  grown, _ = random_search(start, params, KEY, rule=QUIET, simulations=60, leaves=2, depth=2)
  parent = np.asarray(grown.parent)
  deep = np.take_along_axis(parent, np.maximum(parent, 0), 1)
  used = np.arange(61) < np.asarray(grown.used)[:, None]
  assert (np.asarray(grown.used) <= 1 + 3 + 9).all() and (deep[used] <= 0).all()
  assert (grown.visits[:, 0] == 61).all()


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (lambda: PUCT(init=-1), 'init'),
    (lambda: PUCT(fraction=1.5), 'fraction'),
    (lambda: PUCT(bounds=(1.0, 0.0)), 'bounds'),
    (lambda: UCT(c=float('nan')), 'c'),
    (lambda: Gumbel(considered=0), 'considered'),
    (lambda: DTS(sharpness=0), 'sharpness'),
    (lambda: PUCT(widen=-1), 'widen'),
    (lambda: PUCT(widen_power=0), 'widen_power'),
    (lambda: simulate.leaf_value(1.0, 0.0, mix=2), 'mix'),
    (lambda: simulate.run(*_small(), QUIET, 10, KEY, leaves=3), 'leaves'),
    (lambda: tree.select(_tree(), Gumbel()), 'simulations'),
    (lambda: tree.select(_tree(), DTS()), 'keys'),
    (lambda: tree.select(_tree(), QUIET, depth=0), 'depth'),
    (lambda: tree.init((), jnp.zeros((1, 2)), jnp.zeros(1), 1), 'nodes'),
    (lambda: tree.init(KEY[None], jnp.zeros((1, 2)), jnp.zeros(1), 4), 'embedding'),
  ],
)
def test_bad_settings_say_which(make, name):
  with pytest.raises(ConfigError, match=rf'search\.{name}='):
    make()


def _small():
  _, start = games.random_tree(KEY, 2, 2)
  return start, games.random_step


def _tree():
  start = _small()[0]
  return tree.init(start.embedding, start.prior_logits, start.value, 8)


def test_presets_and_small_parts():
  assert PUCT.alphazero() == PUCT()
  assert dataclasses.replace(PUCT.alphago(), init=4.0) == PUCT.alphago(init=4.0)
  assert float(simulate.leaf_value(jnp.float32(2.0), 4.0, mix=0.25)) == 2.5
  grown = _tree()
  summary = simulate.root_summary(grown, PUCT(), KEY, temperature=0.0)
  assert summary.policy.shape == (2, 2) and float(summary.policy.sum()) == 2.0
