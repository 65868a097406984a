"""The array tree: what always holds, whatever the problem, and its settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import KEY, QUIET, random_search, search

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.games import tic_tac_toe
from vtts_jax.games import trees as games
from vtts_jax.search.mcts import simulate, tree
from vtts_jax.search.mcts.rules import DTS, PUCT, UCT, Gumbel

# ------------------------------------------------------------------------------ what always holds

RULES = [
  (PUCT(widen=1.0, virtual_loss=3.0), 4),
  (UCT(), 2),
  (Gumbel(considered=4), 2),
  (DTS(sharpness=3.0, widen=1.0), 1),
]


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


@pytest.mark.parametrize(('rule', 'leaves'), RULES, ids=['puct', 'uct', 'gumbel', 'dts'])
def test_statistics_agree_and_rows_do_not_meet(rule, leaves):
  """One program a rule, for several problems."""
  args = {'rule': rule, 'simulations': 24, 'leaves': leaves}
  for seed in range(3):
    params, start = games.random_tree(jax.random.key(seed), 4, 5)
    grown, found = random_search(start, params, KEY, **args)
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
  # two rows stay what they are beside two others
  other = jax.tree.map(lambda x: x.at[2:].set(x[1::-1]), start)
  again, _ = random_search(other, params, KEY, **args)
  np.testing.assert_array_equal(again.parent[:2], grown.parent[:2])
  np.testing.assert_array_equal(again.visits[:2], grown.visits[:2])
  assert not np.array_equal(again.parent[2:], grown.parent[2:])


def test_noise_of_a_row_is_its_own_key():
  _, start = games.random_tree(KEY, 6, 4)
  grown = tree.init_tree(start.embedding, start.prior_logits, start.value, 3)
  keys = core.prompt_keys(KEY, jnp.arange(6))
  for rule, field in ((PUCT(), 'logits'), (Gumbel(), 'noise')):
    stir = jax.jit(lambda t, keys, r=rule, f=field: getattr(tree.add_root_noise(t, r, keys), f))
    whole = stir(grown, keys)
    last = jax.tree.map(lambda x: x[4:], grown)
    np.testing.assert_array_equal(stir(last, keys[4:]), whole[4:])
    assert not np.array_equal(whole, stir(grown, keys[::-1]))


def grow(t, params, rule, simulations, leaves=1):
  """Select, expand and back up, as an algorithm of the library does."""

  def step(t, _):
    b = t.root.shape[0]
    t, paths = tree.select_leaves(t, rule, leaves)
    flat = lambda x: x.reshape(b * leaves, *x.shape[2:])
    wide = lambda x: x.reshape(b, leaves, *x.shape[1:])
    above = flat(tree.parent_embeddings(t, paths))
    reply, state = games.random_step(params, None, flat(paths.action), above)
    r = jax.tree.map(wide, reply)
    t = tree.expand_leaves(t, paths, wide(state), r.prior_logits, r.value, r.reward, r.discount)
    return tree.back_up(t, rule, paths, tree.at_nodes(t.raw, paths.leaf)), paths

  return jax.lax.scan(step, t, None, length=simulations)


def test_committing_keeps_what_is_below():
  params, start = games.random_tree(KEY, 4, 4)
  t = tree.init_tree(start.embedding, start.prior_logits, start.value, 64)
  go = jax.jit(grow, static_argnums=(2, 3, 4))
  t, _ = go(t, params, QUIET, 25)
  first = simulate.root_summary(t, QUIET)
  moved = jax.jit(tree.move_root)(t, first.action)
  root = np.asarray(moved.root)
  np.testing.assert_array_equal(root, t.child[jnp.arange(4), 0, first.action])
  had = simulate.root_summary(moved, QUIET)
  np.testing.assert_array_equal(had.visits.sum(-1) + 1, first.visits.max(-1))
  on, paths = go(moved, params, QUIET, 25)
  check(on)
  assert (paths.nodes[:, :, 0, 0] == root).all()
  np.testing.assert_array_equal(
    simulate.root_summary(on, QUIET).visits.sum(-1), had.visits.sum(-1) + 25
  )
  np.testing.assert_array_equal(on.visits[:, 0], t.visits[:, 0])
  # where the slot has no child the root stays
  stay = jax.jit(tree.move_root)(t, jnp.argmin(first.visits, -1))
  none = np.asarray(first.visits.min(-1)) == 0
  assert none.any() and (np.asarray(stay.root) == 0)[none].all()


def test_gumbel_plans_each_stage_anew():
  params, start = games.random_tree(KEY, 4, 8)
  rule = Gumbel(simulations=16, considered=4, scale=0.0)
  t = tree.init_tree(start.embedding, start.prior_logits, start.value, 64)
  go = jax.jit(grow, static_argnums=(2, 3, 4))
  for _ in range(2):
    before = simulate.root_summary(t, rule).visits
    t, _ = go(t, params, rule, 16)
    found = simulate.root_summary(t, rule)
    spent = np.sort(np.asarray(found.visits - before), -1)[:, ::-1]
    # four slots get 2 visits each, then the better two 4 more each
    np.testing.assert_array_equal(spent, [[6, 6, 2, 2, 0, 0, 0, 0]] * 4)
    t = tree.move_root(t, found.action)


def test_a_full_tree_goes_on_counting():
  params, start = games.random_tree(KEY, 3, 4)
  t = tree.init_tree(start.embedding, start.prior_logits, start.value, 9)
  t, paths = jax.jit(grow, static_argnums=(2, 3, 4))(t, params, QUIET, 10, 2)
  assert (t.used == 9).all()
  assert (t.visits[:, 0] == 21).all()
  assert not paths.fresh[-1].any()
  assert not t.pending.any()


def test_leaves_of_a_step_differ():
  _, start = games.random_tree(KEY, 4, 16)
  even = jnp.zeros_like(start.prior_logits)
  for rule in (PUCT.alphago(), UCT(), DTS(sharpness=1.0, greedy=True)):
    t = tree.init_tree(start.embedding, even, start.value, 64)
    _, paths = jax.jit(tree.select_leaves, static_argnums=(1, 2))(t, rule, 8)
    assert paths.fresh.all()
    np.testing.assert_array_equal(np.sort(paths.action, -1), [range(8)] * 4)


def test_closed_nodes_are_leaves_for_ever():
  boards = np.array([[1, 1, 0, -1, -1, 0, 0, 0, 0]], np.int8)  # a win at 2
  grown, found = search(
    tic_tac_toe.start_game(boards), (), KEY, recurrent=tic_tac_toe.step_game, rule=QUIET,
    simulations=64,
  )  # fmt: skip
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
    (lambda: simulate.mix_values(1.0, 0.0, mix=2), 'mix'),
    (lambda: simulate.run_search(*_small(), QUIET, 10, KEY, leaves=3), 'leaves'),
    (lambda: tree.select_leaves(_tree(), Gumbel()), 'simulations'),
    (lambda: tree.select_leaves(_tree(), DTS()), 'keys'),
    (lambda: tree.select_leaves(_tree(), QUIET, depth=0), 'depth'),
    (lambda: tree.init_tree((), jnp.zeros((1, 2)), jnp.zeros(1), 1), 'nodes'),
    (lambda: tree.init_tree(KEY[None], jnp.zeros((1, 2)), jnp.zeros(1), 4), 'embedding'),
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
  return tree.init_tree(start.embedding, start.prior_logits, start.value, 8)


def test_presets_and_small_parts():
  assert PUCT.alphazero() == PUCT()
  assert dataclasses.replace(PUCT.alphago(), init=4.0) == PUCT.alphago(init=4.0)
  assert float(simulate.mix_values(jnp.float32(2.0), 4.0, mix=0.25)) == 2.5
  grown = _tree()
  summary = simulate.root_summary(grown, PUCT(), KEY, temperature=0.0)
  assert summary.policy.shape == (2, 2) and float(summary.policy.sum()) == 2.0
