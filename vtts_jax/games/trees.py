"""Problems with known answers for tree search: random trees, and small trees to enumerate.

Each has a root and a `recurrent` function with mctx's signature, so mctx can run on it too.

Letters: B rows, R rows of a call (B times leaves), K slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax.search.mcts.simulate import RecurrentOutput, RootOutput

# ------------------------------------------------------------------------------------ random trees


class RandomTree(NamedTuple):
  """Parameters of `random_tree`: step `[K, D, D]`, prior `[D, K]`, value and reward `[D]`."""

  step: jax.Array
  prior: jax.Array
  value: jax.Array
  reward: jax.Array


def random_tree(key, rows: int, slots: int, width: int = 8) -> tuple[RandomTree, RootOutput]:
  """An endless tree; its states `[B, D]` come from a random recurrent network, so nothing ties."""
  keys = jax.random.split(key, 5)
  normal = lambda k, *shape: jax.random.normal(keys[k], shape)
  # scaled so that states neither die out nor saturate the tanh
  params = RandomTree(
    1.5 * normal(0, slots, width, width) / width**0.5,
    normal(1, width, slots),
    normal(2, width) / width**0.5,
    0.1 * normal(3, width) / width**0.5,
  )
  state = normal(4, rows, width)
  return params, RootOutput(state @ params.prior, state @ params.value, state)


def random_step(params: RandomTree, key, action, state, discount: float = 0.97):
  """The `recurrent` function of `random_tree`."""
  state = jnp.tanh(jnp.einsum('rij,rj->ri', params.step[action], state))
  discounts = jnp.full(action.shape, discount)
  reward, value = state @ params.reward, state @ params.value
  return RecurrentOutput(reward, discounts, state @ params.prior, value), state


# ---------------------------------------------------------------------------- trees to enumerate


class Place(NamedTuple):
  """A node of an enumerable tree: row of the batch, depth, index among the nodes of that depth."""

  row: jax.Array
  depth: jax.Array
  index: jax.Array


def leaf_tree(leaves) -> RootOutput:
  """The root of a complete tree with `leaves [B, K, .., K]`, one axis per level.

  Inner nodes have value 0 and a uniform prior. An edge to a leaf has the leaf's value as its reward
  and discount 0.
  """
  rows, slots = leaves.shape[0], leaves.shape[-1]
  zero = jnp.zeros(rows, jnp.int32)
  return RootOutput(jnp.zeros((rows, slots)), jnp.zeros(rows), Place(jnp.arange(rows), zero, zero))


def leaf_step(leaves, key, action, place: Place):
  """The `recurrent` function of `leaf_tree`; `leaves [B, K, .., K]` are its parameters."""
  slots, levels = leaves.shape[-1], leaves.ndim - 1
  index = place.index * slots + action
  place = Place(place.row, place.depth + 1, index)
  done = place.depth == levels
  # the index of a leaf is its path in base K
  flat = leaves.reshape(leaves.shape[0], -1)
  # tree search also steps past the leaves, where the index is out of range
  reward = jnp.where(done, flat[place.row, jnp.minimum(index, flat.shape[1] - 1)], 0.0)
  zero = jnp.zeros(action.shape)
  discount, prior = jnp.where(done, 0.0, 1.0), zero[:, None].repeat(slots, 1)
  return RecurrentOutput(reward, discount, prior, zero), place
