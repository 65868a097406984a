"""Trees of a whole batch as arrays: select, expand and back up, one compiled program for all rows.

A node is a prefix of a sample and an action is "the k-th continuation of this node": K slots a
node, whatever the vocabulary. A node stores what the user's embedding holds (tokens and a key, not
a KV cache) and about 25 numbers per slot. Rows never look at each other, so a batch shards over
prompts.

Semantics are those of mctx 0.0.71 (checked visit for visit), the layout is not:

- Each node keeps its *next step* ready (`best`): the statistics of a node change only when a path
  through it is backed up, so its rule is evaluated then, for all levels of a path at once, and a
  descent is one look-up a level.
- A descent records its path, so that a backup is a few scatters over `[B, L, levels]`.
- L descents a step: each adds a pending visit to the edges it takes, which the next one sees as a
  virtual loss and the backup takes away. A descent that ends on a node that an earlier one of the
  same step is about to expand has that node as its leaf (`fresh` is False): it is expanded once and
  backed up twice.

Letters: B prompts, N nodes, K slots, L leaves a step, D + 1 nodes of the longest path.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search.mcts.rule import NEVER, NodeStatistics, RootStatistics, Rule

LEVELS = 8  # levels of a path that are backed up at a time
CLOSED = -(1 << 30)  # `best` of a node below which nothing is tried


class Tree(NamedTuple):
  """Statistics of a batch of trees.

  Attributes:
    root: index of the current root `[B]`.
    used: nodes in use `[B]`; they are numbered in the order of their expansion.
    noise: what the rule drew for the root `[B, K]`.
    base: visits of the root's slots when it became the root `[B, K]`, int32.
    keys: for rules that draw `[B]`, else None.
    parent, action: where a node comes from `[B, N]`; -1 for the first root.
    visits: evaluations of the node and of nodes below it `[B, N]`, int32.
    value: mean (DTS: soft mean) of the values backed up to the node `[B, N]`.
    raw: the node's own value `[B, N]`.
    reward, discount: of the edge to the node `[B, N]`; a player's turn is a discount of -1.
    best: the next step of a descent `[B, N]`: a child's index, or -1 - slot for a slot to expand,
      or `CLOSED`.
    child: index of the child in each slot `[B, N, K]`; -1 for none.
    logits: prior `[B, N, K]`; at or below `rules.NEVER`, the slot must not be tried.
    counts: visits of each slot's child `[B, N, K]`, int32.
    pending: descents under way through each slot `[B, N, K]`, int32; 0 between two steps.
    q: reward + discount * value of each slot's child `[B, N, K]`.
    embedding: the user's pytree, leaves `[B, N, ...]`.
  """

  root: jax.Array
  used: jax.Array
  noise: jax.Array
  base: jax.Array
  keys: jax.Array | None
  parent: jax.Array
  action: jax.Array
  visits: jax.Array
  value: jax.Array
  raw: jax.Array
  reward: jax.Array
  discount: jax.Array
  best: jax.Array
  child: jax.Array
  logits: jax.Array
  counts: jax.Array
  pending: jax.Array
  q: jax.Array
  embedding: Any


class Paths(NamedTuple):
  """What `select_leaves` found.

  Attributes:
    nodes: from the root to the leaf `[B, L, D + 1]`; N (out of range) behind it.
    length: edges from the root to the leaf `[B, L]`.
    leaf: index of the leaf `[B, L]`.
    parent: the node it hangs from `[B, L]`, whose embedding is to be continued.
    action: the slot it hangs in `[B, L]`.
    fresh: whether the leaf is new and waits for `expand_leaves` `[B, L]`. If not it is a closed
      node, one at the depth limit, one that an earlier descent of this step expands, or, where all
      N nodes are in use, the node that would have got a child.
  """

  nodes: jax.Array
  length: jax.Array
  leaf: jax.Array
  parent: jax.Array
  action: jax.Array
  fresh: jax.Array


def init_tree(embedding, logits, value, nodes: int, keys=None) -> Tree:
  """Trees of one node each.

  Args:
    embedding: of the root, leaves `[B, ...]`.
    logits: prior of the root's slots `[B, K]`; -inf where a slot must not be tried.
    value: of the root `[B]`.
    nodes: room for so many nodes a tree, over all stages of a search.
    keys: typed keys `[B]`, for rules that draw (DTS).

  Raises:
    ConfigError: fewer than two nodes.
  """
  if nodes < 2:
    raise ConfigError(f'search.nodes={nodes!r}: must be an integer >= 2')
  b, k = logits.shape
  ints = lambda fill, *shape: jnp.full((b, *shape), fill, jnp.int32)
  floats = lambda *shape: jnp.zeros((b, *shape), jnp.float32)
  grow = lambda x: jnp.zeros((b, nodes, *x.shape[1:]), x.dtype).at[:, 0].set(x)
  for leaf in jax.tree.leaves(embedding):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise ConfigError(f'search.embedding={leaf.dtype}: must be numbers; keep jax.random.key_data')
  return Tree(
    root=ints(0),
    used=ints(1),
    noise=floats(k),
    base=ints(0, k),
    keys=keys,
    parent=ints(-1, nodes),
    action=ints(-1, nodes),
    visits=ints(0, nodes).at[:, 0].set(1),
    value=floats(nodes).at[:, 0].set(value),
    raw=floats(nodes).at[:, 0].set(value),
    reward=floats(nodes),
    discount=floats(nodes),
    best=ints(-1, nodes),
    child=ints(-1, nodes, k),
    logits=floats(nodes, k).at[:, 0].set(logits),
    counts=ints(0, nodes, k),
    pending=ints(0, nodes, k),
    q=floats(nodes, k),
    embedding=jax.tree.map(grow, embedding),
  )


def add_root_noise(tree: Tree, rule: Rule, key, invalid=None) -> Tree:
  """Gives the root its noise, once after `init_tree` and after each `move_root`.

  Args:
    key: one typed key for the batch, or one per prompt `[B]`.
    invalid: slots `[B, K]` of the root that must not be tried, True or 1; None for none.
  """
  rows = jnp.arange(tree.root.shape[0])
  logits, noise = rule.draw_noise(key, tree.logits[rows, tree.root], invalid)
  return tree._replace(logits=tree.logits.at[rows, tree.root].set(logits), noise=noise)


def move_root(tree: Tree, action) -> Tree:
  """Moves the root to the child in slot `action [B]`; what is below it stays.

  A row whose slot has no child keeps its root: compare `root` before and after. The indices of
  nodes that are no longer below the root are not used again.
  """
  rows = jnp.arange(tree.root.shape[0])
  child = tree.child[rows, tree.root, action]
  root = jnp.where(child >= 0, child, tree.root)
  return tree._replace(root=root, noise=jnp.zeros_like(tree.noise), base=tree.counts[rows, root])


# ------------------------------------------------------------------------------------------ a step


def select_leaves(tree: Tree, rule: Rule, leaves: int = 1, depth: int | None = None):
  """L descents in each tree.

  Args:
    leaves: L.
    depth: no leaf lies more than so many edges below the root; None for no limit. The cost in
      memory of `Paths` grows with it.

  Returns:
    The trees, in which the new leaves hang already, and the `Paths`. Both must go through
    `expand_leaves` and `back_up` before the next `select_leaves`.
  """
  b, n, _ = tree.child.shape
  rows = jnp.arange(b)
  limit = n - 1 if depth is None else depth
  for name, value in (('leaves', leaves), ('depth', limit)):
    if value < 1:
      raise ConfigError(f'search.{name}={value!r}: must be an integer >= 1')
  if rule.random and tree.keys is None:
    raise ConfigError(f'search.keys=None: {type(rule).__name__} draws; give `init_tree` keys [B]')
  # paths are padded to whole blocks of levels, as `back_up` reads them
  size = -(-(limit + 1) // LEVELS) * LEVELS

  def descend(tree):
    # the root's slot is chosen anew: its noise and its plan are not in `best`
    row, root = root_statistics(tree, rule)
    slot = rule.choose_root(row, root)
    first = _next_step(tree.child[rows, tree.root, slot], slot)
    shut = (tree.best[rows, tree.root] == CLOSED) | ~row.open.any(-1)
    first = jnp.where(shut, CLOSED, first)

    def going(state):
      _, step, d, *_ = state
      return (d < limit) & jnp.any(step >= 0)

    def level(state):
      node, step, d, path, length = state
      down = step >= 0
      path = jax.lax.dynamic_update_slice(path, jnp.where(down, step, n)[:, None], (0, d + 1))
      node = jnp.where(down, step, node)
      return node, jnp.where(down, at_nodes(tree.best, node), step), d + 1, path, length + down

    # n is no node: writes to it are dropped, so the padding of a path changes nothing
    path = jnp.full((b, size), n, jnp.int32).at[:, 0].set(tree.root)
    state = tree.root, first, 0, path, jnp.zeros_like(tree.root)
    node, step, _, path, length = jax.lax.while_loop(going, level, state)
    # a step below 0 that is not CLOSED names a slot without a child: the leaf will be a new node
    slot = -1 - step
    fresh = (step < 0) & (step > CLOSED) & (length < limit) & (tree.used < n)
    leaf = jnp.where(fresh, tree.used, node)
    length = length + fresh
    path = path.at[rows, jnp.where(fresh, length, size)].set(leaf, mode='drop')
    new, under = jnp.where(fresh, leaf, n), jnp.where(fresh, node, n)
    # hung up at once, so that the next descent of this step finds it; closed until it is expanded
    tree = tree._replace(
      used=tree.used + fresh,
      parent=tree.parent.at[rows, new].set(node, mode='drop'),
      action=tree.action.at[rows, new].set(slot, mode='drop'),
      best=tree.best.at[rows, new].set(CLOSED, mode='drop'),
      child=tree.child.at[rows, under, slot].set(new, mode='drop'),
    )
    above = lambda x: jnp.maximum(at_nodes(x, leaf), 0)
    return tree, Paths(path, length, leaf, above(tree.parent), above(tree.action), fresh)

  if leaves == 1:
    tree, one = descend(tree)
    return tree, jax.tree.map(lambda x: x[:, None], one)

  def another(tree, _):
    tree, one = descend(tree)
    return _mark_pending(tree, rule, one), one

  tree, paths = jax.lax.scan(another, tree, None, length=leaves)
  return tree, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), paths)


def parent_embeddings(tree: Tree, paths: Paths):
  """Embeddings `[B, L, ...]` that the leaves continue (by `paths.action`)."""
  return jax.tree.map(lambda x: at_nodes(x, paths.parent), tree.embedding)


def expand_leaves(
  tree: Tree, paths: Paths, embedding, logits, value, reward, discount, closed=None
) -> Tree:
  """Fills in the fresh leaves; what is given for other leaves is dropped.

  Args:
    embedding: of the leaves, `[B, L, ...]`.
    logits: prior of their slots `[B, L, K]`; -inf where a slot must not be tried.
    value, reward, discount: `[B, L]`.
    closed: finished samples `[B, L]`, below which nothing is tried; a discount of 0 or a leaf
      without a legal slot closes too.
  """
  b, n, _ = tree.child.shape
  rows = jnp.arange(b)[:, None]
  leaf = jnp.where(paths.fresh, paths.leaf, n)
  put = lambda x, new: x.at[rows, leaf].set(new, mode='drop')
  shut = (discount == 0) | ~(logits > NEVER).any(-1)
  shut = shut if closed is None else shut | closed
  return tree._replace(
    raw=put(tree.raw, value),
    reward=put(tree.reward, reward),
    discount=put(tree.discount, discount),
    best=put(tree.best, jnp.where(shut, CLOSED, -1)),
    logits=put(tree.logits, logits),
    embedding=jax.tree.map(put, tree.embedding, embedding),
  )


def back_up(tree: Tree, rule: Rule, paths: Paths, values) -> Tree:
  """Adds the values `[B, L]` of the leaves to all nodes on their paths.

  A leaf that is not fresh gets one more value: give its `raw` one, or a new estimate of it.
  """
  leaves = paths.nodes.shape[1]
  size = 1 if rule.soft else LEVELS

  def levels(state):
    tree, above, c = state
    nodes = jax.lax.dynamic_slice_in_dim(paths.nodes, c * size, size, axis=2)
    depth = c * size + jnp.arange(size)
    inside = depth <= paths.length[..., None]
    # returns of a block of levels, from its deepest one up; `above` goes on into the next block
    reward, discount = at_nodes(tree.reward, nodes), at_nodes(tree.discount, nodes)
    returns = []
    for i in reversed(range(size)):
      here = jnp.where(depth[i] == paths.length, values, above)
      above = jnp.where(inside[..., i], reward[..., i] + discount[..., i] * here, above)
      returns.append(here)
    returns = jnp.stack(returns[::-1], -1)
    times = 1
    if leaves > 1:  # paths that share a node share it at the same depth
      same = (nodes[:, :, None] == nodes[:, None]).astype(jnp.float32)
      times = same.sum(2)
      returns = jnp.einsum('blmd,bmd->bld', same, returns, precision='highest')
    visits = at_nodes(tree.visits, nodes)
    value = (at_nodes(tree.value, nodes) * visits + returns) / (visits + times)
    if rule.soft:
      row = node_statistics(tree, rule, nodes)
      value = jnp.where((row.visits > 0).any(-1), rule.soft_value(row), value)
    visits = (visits + times).astype(jnp.int32)
    tree = tree._replace(
      visits=_put_nodes(tree.visits, nodes, visits), value=_put_nodes(tree.value, nodes, value)
    )
    # what the parent knows of the edge to each node; the virtual loss is taken back
    edge = _edges_to(tree, nodes, inside & (depth > 0))
    tree = tree._replace(
      counts=tree.counts.at[edge].set(visits, mode='drop'),
      q=tree.q.at[edge].set(reward + discount * value, mode='drop'),
      pending=tree.pending.at[edge].set(0, mode='drop') if leaves > 1 else tree.pending,
    )
    return refresh_choices(tree, rule, nodes), above, c - 1

  # the deepest block first; a soft value needs its children's, so it goes level by level
  state = tree, jnp.zeros_like(values), paths.length.max() // size
  return jax.lax.while_loop(lambda s: s[2] >= 0, levels, state)[0]


# ------------------------------------------------------------------------------------------ pieces


def at_nodes(x, nodes):
  """`x [B, N, ...]` at nodes `[B, ...]`; those out of range read some other node."""
  rows = jnp.arange(nodes.shape[0]).reshape(-1, *(1,) * (nodes.ndim - 1))
  return x.at[rows, nodes].get(mode='clip')


def root_statistics(tree: Tree, rule: Rule) -> tuple[NodeStatistics, RootStatistics]:
  """What a rule sees of the roots, `[B]`."""
  row = jax.tree.map(lambda x: x[:, 0], node_statistics(tree, rule, tree.root[:, None]))
  return row, RootStatistics(tree.noise, row.visits - tree.base)


def _put_nodes(x, nodes, new):
  rows = jnp.arange(nodes.shape[0]).reshape(-1, *(1,) * (nodes.ndim - 1))
  return x.at[rows, nodes].set(new, mode='drop')


def _edges_to(tree, nodes, real):
  """Index of the edges to `nodes [B, ...]` into `[B, N, K]`; out of range where not `real`."""
  rows = jnp.arange(nodes.shape[0]).reshape(-1, *(1,) * (nodes.ndim - 1))
  above = jnp.where(real, at_nodes(tree.parent, nodes), tree.child.shape[1])
  return rows, above, at_nodes(tree.action, nodes)


def _next_step(child, slot):
  return jnp.where(child >= 0, child, -1 - slot)


def node_statistics(tree: Tree, rule: Rule, nodes) -> NodeStatistics:
  """What the rule sees of nodes `[B, ...]`."""
  logits, pending = at_nodes(tree.logits, nodes), at_nodes(tree.pending, nodes).astype(jnp.float32)
  visits = at_nodes(tree.visits, nodes).astype(jnp.float32)
  open_ = logits > NEVER
  if rule.widen:
    # where all that is allowed is finished, one more slot is
    wider = open_ & (jnp.cumsum(open_, axis=-1) == 1)
    open_ &= rule.allowed_slots(visits + pending.sum(-1), logits.shape[-1])
    open_ = jnp.where(open_.any(-1, keepdims=True), open_, wider)
  keys = None
  if rule.random:
    of_row = jnp.broadcast_to(tree.keys.reshape(-1, *(1,) * (nodes.ndim - 1)), nodes.shape)
    drawn = visits + pending.sum(-1)
    keys = core.fold(core.fold(of_row, nodes), drawn)
  return NodeStatistics(
    logits=logits,
    open=open_,
    visits=at_nodes(tree.counts, nodes).astype(jnp.float32),
    pending=pending,
    q=at_nodes(tree.q, nodes),
    node_visits=visits,
    value=at_nodes(tree.value, nodes),
    raw=at_nodes(tree.raw, nodes),
    keys=keys,
  )


def refresh_choices(tree, rule, nodes):
  """Evaluates the rule at nodes `[B, ...]` and keeps what it says in `best`."""
  slot = rule.choose_slot(node_statistics(tree, rule, nodes))
  rows = jnp.arange(nodes.shape[0]).reshape(-1, *(1,) * (nodes.ndim - 1))
  child = tree.child.at[rows, nodes, slot].get(mode='clip')
  best = jnp.where(at_nodes(tree.best, nodes) == CLOSED, CLOSED, _next_step(child, slot))
  return tree._replace(best=_put_nodes(tree.best, nodes, best))


def _mark_pending(tree, rule, one: Paths):
  """Marks the edges of one path per row as under way."""

  def levels(state):
    tree, c = state
    nodes = jax.lax.dynamic_slice_in_dim(one.nodes, c * LEVELS, LEVELS, axis=1)
    depth = c * LEVELS + jnp.arange(LEVELS)
    edge = _edges_to(tree, nodes, (depth > 0) & (depth <= one.length[:, None]))
    tree = tree._replace(pending=tree.pending.at[edge].add(1, mode='drop'))
    return refresh_choices(tree, rule, nodes), c - 1

  state = tree, one.length.max() // LEVELS
  return jax.lax.while_loop(lambda s: s[1] >= 0, levels, state)[0]
