"""Whole lines of a tree: rollouts kept as chains of nodes, lines drawn by a policy, finished lines.

Diffusion tree sampling (Jain et al., 2506.20701) needs the first two: all states of a rollout join
the tree, and its samples are drawn from the root down.

Letters: B prompts, N nodes, K slots, L leaves a step, C nodes of a chain, F lines.
"""

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.search.mcts import tree as trees
from vtts_jax.search.mcts.rule import Rule
from vtts_jax.search.mcts.tree import Paths, Tree


def append_chains(tree: Tree, paths: Paths, embedding, count, value):
  """Hangs a chain of nodes below each fresh leaf: the child in its first slot, in the first slot of
  that, and so on, down to a finished sample. There must be room for them. Each has one visit, the
  rollout's; the leaf and what is above it get theirs by `back_up`.

  Args:
    embedding: of the nodes, leaves `[B, L, C, ...]`.
    count: how many of the C there are `[B, L]`.
    value: of all nodes of a chain `[B, L]`.

  Returns:
    The trees, and the paths down to the ends of the chains, for `close_finished`.
  """
  b, n, _ = tree.child.shape
  rows, places = jnp.arange(b)[:, None, None], jnp.arange(jax.tree.leaves(embedding)[0].shape[2])
  count = jnp.where(paths.fresh, count, 0)
  # numbered chain by chain; n, which is no node, where there is none
  first = tree.used[:, None] + jnp.cumsum(count, axis=1) - count
  node = jnp.where(places < count[..., None], first[..., None] + places, n)
  above = jnp.concatenate([paths.leaf[..., None], node[..., :-1]], axis=-1)
  above = jnp.where(node < n, above, n)
  last = places == count[..., None] - 1
  put = lambda x, new: x.at[rows, node].set(new, mode='drop')
  tree = tree._replace(
    used=tree.used + count.sum(1),
    parent=put(tree.parent, above),
    action=put(tree.action, 0),
    visits=put(tree.visits, 1),
    value=put(tree.value, value[..., None]),
    raw=put(tree.raw, value[..., None]),
    discount=put(tree.discount, 1.0),
    best=put(tree.best, jnp.where(last, trees.CLOSED, -1)),
    child=tree.child.at[rows, above, 0].set(node, mode='drop'),
    counts=tree.counts.at[rows, above, 0].set(1, mode='drop'),
    q=tree.q.at[rows, above, 0].set(value[..., None], mode='drop'),
    embedding=jax.tree.map(put, tree.embedding, embedding),
  )
  size = paths.nodes.shape[2]
  at = jnp.where(node < n, paths.length[..., None] + 1 + places, size)
  lanes = jnp.arange(node.shape[1])[:, None]
  nodes = paths.nodes.at[rows, lanes, at].set(node, mode='drop')
  end = jnp.take_along_axis(node, jnp.maximum(count - 1, 0)[..., None], axis=2)[..., 0]
  leaf = jnp.where(count > 0, end, paths.leaf)
  return tree, paths._replace(nodes=nodes, length=paths.length + count, leaf=leaf)


def root_paths(tree: Tree, depth: int) -> Paths:
  """The paths `[B, 1]` that end at the roots, as if these were fresh; `depth` limits a line."""
  b, n, _ = tree.child.shape
  # as in `select_leaves`: padded to whole blocks of levels, with what is no node
  size = -(-(depth + 1) // trees.LEVELS) * trees.LEVELS
  nodes = jnp.full((b, 1, size), n, jnp.int32).at[:, 0, 0].set(tree.root)
  none = jnp.zeros((b, 1), jnp.int32)
  return Paths(nodes, none, tree.root[:, None], none, none, jnp.ones((b, 1), bool))


def draw_lines(tree: Tree, rule: Rule, keys: jax.Array, depth: int) -> jax.Array:
  """The nodes `[B, F]` at the ends of lines that go down from the roots; each child is drawn by the
  rule's policy, among those that were visited. Keys `[B, F]`; at most `depth` edges a line."""
  rows = jnp.arange(len(keys))[:, None]
  draw = jax.vmap(jax.vmap(jax.random.categorical))

  def go_down(level, node):
    row = trees.node_statistics(tree, rule, node)
    slot = draw(core.fold(keys, level), rule.final_policy(row, None))
    child = tree.child.at[rows, node, slot].get(mode='clip')
    return jnp.where((row.visits > 0).any(-1), child, node)

  return jax.lax.fori_loop(0, depth, go_down, jnp.broadcast_to(tree.root[:, None], keys.shape))


def close_finished(tree: Tree, rule: Rule, paths: Paths) -> Tree:
  """No sample is observed twice: slots of the nodes on these paths below which all is finished are
  not tried again, and a node without another slot is closed. After `back_up`."""
  rows, deepest = jnp.arange(len(paths.nodes))[:, None], paths.length.max()

  def close_level(i, tree):
    node = jax.lax.dynamic_index_in_dim(paths.nodes, deepest - i, axis=2, keepdims=False)
    child, best = trees.at_nodes(tree.child, node), trees.at_nodes(tree.best, node)
    below = trees.at_nodes(tree.best, jnp.maximum(child, 0))
    done = (child >= 0) & (below == trees.CLOSED)
    logits = jnp.where(done, -jnp.inf, trees.at_nodes(tree.logits, node))
    best = jnp.where(done.all(-1), trees.CLOSED, best)
    return tree._replace(
      logits=tree.logits.at[rows, node].set(logits, mode='drop'),
      best=tree.best.at[rows, node].set(best, mode='drop'),
    )

  # from the deepest level up, as a node is finished once all of its children are
  tree = jax.lax.fori_loop(0, deepest + 1, close_level, tree)
  return trees.refresh_choices(tree, rule, paths.nodes)
