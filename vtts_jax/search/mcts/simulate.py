"""Whole searches on the array tree, with a model inside: what tests, games and benchmarks run.

An algorithm that asks and tells calls `tree.select` and `tree.expand` with `tree.backup` itself.
`run` uses the key as mctx 0.0.71 does, so both find the same tree from the same key (checked for
PUCT against `mctx.muzero_policy`, for Gumbel against `mctx.gumbel_muzero_policy`).

Letters: B prompts, K slots of a node, L leaves a step, R = B * L.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search.mcts import tree as trees
from vtts_jax.search.mcts.rule import TINY, Rule, check_positive, check_within
from vtts_jax.search.mcts.tree import Tree


class RootOutput(NamedTuple):
  """What a search starts from: prior logits `[B, K]`, value `[B]`, embedding `[B, ...]`."""

  prior_logits: jax.Array
  value: jax.Array
  embedding: Any


class RecurrentOutput(NamedTuple):
  """What a recurrent function says of continuations: reward, discount, value `[R]`, prior logits
  `[R, K]`."""

  reward: jax.Array
  discount: jax.Array
  prior_logits: jax.Array
  value: jax.Array


def run_search(
  start: RootOutput,
  recurrent,
  rule: Rule,
  simulations: int,
  key,
  *,
  params=(),
  leaves: int = 1,
  invalid=None,
  depth: int | None = None,
):
  """A whole search with a model inside, in the manner of mctx and with its use of the key.

  Args:
    start: `RootOutput`, or an `mctx.RootFnOutput`.
    recurrent: `(params, key, action [R], embedding [R, ...]) -> (RecurrentOutput, embedding)`,
      where R = B * L; mctx's recurrent functions fit.
    simulations: leaves evaluated per tree.
    key: one typed key.
    leaves: how many of them a step; must divide `simulations`.
    invalid: slots of the root `[B, K]` that must not be tried.
    depth: limit of the depth below the root.

  Returns:
    The tree and its `Summary`, the action drawn as mctx draws it: from the visits (PUCT, UCT) or
    the best (Gumbel, DTS).
  """
  if leaves < 1 or simulations < 1 or simulations % leaves:
    raise ConfigError(
      f'search.leaves={leaves!r}: must be an integer that divides search.simulations={simulations}'
    )
  rule = rule.for_simulations(simulations)
  b = start.value.shape[0]
  # mctx's own use of the key, so that both find the same tree
  drawn, noise, loop = rule.split_key(key)
  keys = core.prompt_keys(loop, jnp.arange(b)) if rule.random else None
  tree = trees.init_tree(start.embedding, start.prior_logits, start.value, simulations + 1, keys)
  tree = trees.add_root_noise(tree, rule, noise, invalid)

  def step(carry, _):
    tree, key = carry
    key, _, evaluate = jax.random.split(key, 3)
    tree, paths = trees.select_leaves(tree, rule, leaves, depth)
    # all leaves of all prompts are one batch of the recurrent function
    flat = lambda x: x.reshape(b * leaves, *x.shape[2:])
    wide = lambda x: x.reshape(b, leaves, *x.shape[1:])
    reply, embedding = recurrent(
      params, evaluate, flat(paths.action), jax.tree.map(flat, trees.parent_embeddings(tree, paths))
    )
    tree = trees.expand_leaves(
      tree,
      paths,
      jax.tree.map(wide, embedding),
      *(wide(x) for x in (reply.prior_logits, reply.value, reply.reward, reply.discount)),
    )
    return (trees.back_up(tree, rule, paths, trees.at_nodes(tree.raw, paths.leaf)), key), None

  (tree, _), _ = jax.lax.scan(step, (tree, loop), None, length=simulations // leaves)
  return tree, root_summary(tree, rule, drawn)


class Summary(NamedTuple):
  """The root after a search: visits `[B, K]` (int32), q `[B, K]` (0 without a visit), value `[B]`,
  the policy `[B, K]` (sums to 1), and the slot to commit to `[B]`."""

  visits: jax.Array
  q: jax.Array
  value: jax.Array
  policy: jax.Array
  action: jax.Array


def root_summary(tree: Tree, rule: Rule, key=None, temperature: float = 1.0) -> Summary:
  """What was found.

  Args:
    key: to draw the action from the policy, one for the batch or one per prompt `[B]`; None for
      the rule's best.
    temperature: the policy is `policy ** (1 / temperature)`; 0 puts all on its maximum.
  """
  check_positive('temperature', temperature, zero=True)
  row, root = trees.root_statistics(tree, rule)
  logits = rule.final_policy(row, root)
  cold = (logits - logits.max(-1, keepdims=True)) / max(temperature, TINY)
  if key is None:
    action = rule.best_slot(row, root)
  elif key.ndim:
    action = jax.vmap(jax.random.categorical)(key, cold)
  else:
    action = jax.random.categorical(key, cold)
  q = jnp.where(row.visits > 0, row.q, 0)
  return Summary(row.visits.astype(jnp.int32), q, row.value, jax.nn.softmax(cold), action)


def mix_values(value, rollout, mix: float = 0.5):
  """AlphaGo's leaf value, `(1 - mix) * value + mix * rollout`; mix in [0, 1]."""
  check_within('mix', mix, 0, 1)
  return (1 - mix) * value + mix * rollout


def node_bytes(tree: Tree) -> float:
  """Bytes of a node, embedding and statistics; of a tree or of its `jax.eval_shape`."""
  b, n, _ = tree.child.shape
  nodes = tree._replace(root=None, used=None, noise=None, base=None, keys=None)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nodes)) / (b * n)
