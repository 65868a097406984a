"""Problems with known answers for tree search: random trees, small trees to enumerate, tic-tac-toe.

Each gives a `start` and a `recurrent` function of mctx's kind, so mctx runs on them too.

Letters: B rows, R rows of a call (B times leaves), K slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.search.mcts.simulate import Reply, Start

ILLEGAL = float(jnp.finfo(jnp.float32).min)  # as mctx marks illegal actions: finite


# ------------------------------------------------------------------------------------ random trees


class RandomTree(NamedTuple):
  """Parameters of `random_tree`: step `[K, D, D]`, prior `[D, K]`, value and reward `[D]`."""

  step: jax.Array
  prior: jax.Array
  value: jax.Array
  reward: jax.Array


def random_tree(key, rows: int, slots: int, width: int = 8) -> tuple[RandomTree, Start]:
  """An endless tree whose states `[B, D]` are a random recurrent network's: no two slots tie."""
  keys = jax.random.split(key, 5)
  normal = lambda k, *shape: jax.random.normal(keys[k], shape)
  params = RandomTree(
    1.5 * normal(0, slots, width, width) / width**0.5,
    normal(1, width, slots),
    normal(2, width) / width**0.5,
    0.1 * normal(3, width) / width**0.5,
  )
  state = normal(4, rows, width)
  return params, Start(state @ params.prior, state @ params.value, state)


def random_step(params: RandomTree, key, action, state, discount: float = 0.97):
  """The `recurrent` function of `random_tree`."""
  state = jnp.tanh(jnp.einsum('rij,rj->ri', params.step[action], state))
  discounts = jnp.full(action.shape, discount)
  return Reply(state @ params.reward, discounts, state @ params.prior, state @ params.value), state


# ---------------------------------------------------------------------------- trees to enumerate


class Place(NamedTuple):
  """A node of an enumerable tree: row of the batch, depth, and index among the nodes of its
  depth."""

  row: jax.Array
  depth: jax.Array
  index: jax.Array


def leaf_tree(leaves) -> Start:
  """The start of a complete tree with `leaves [B, K, .., K]`, one axis a level.

  Values of unfinished nodes are 0, the prior is even, an edge to a leaf has the leaf's value as its
  reward and a discount of 0.
  """
  rows, slots = leaves.shape[0], leaves.shape[-1]
  zero = jnp.zeros(rows, jnp.int32)
  return Start(jnp.zeros((rows, slots)), jnp.zeros(rows), Place(jnp.arange(rows), zero, zero))


def leaf_step(leaves, key, action, place: Place):
  """The `recurrent` function of `leaf_tree`; `leaves [B, K, .., K]` are its parameters."""
  slots, levels = leaves.shape[-1], leaves.ndim - 1
  index = place.index * slots + action
  place = Place(place.row, place.depth + 1, index)
  done = place.depth == levels
  flat = leaves.reshape(leaves.shape[0], -1)
  reward = jnp.where(done, flat[place.row, jnp.minimum(index, flat.shape[1] - 1)], 0.0)
  zero = jnp.zeros(action.shape)
  return Reply(reward, jnp.where(done, 0.0, 1.0), zero[:, None].repeat(slots, 1), zero), place


# ------------------------------------------------------------------------------------- tic-tac-toe
# A board is `[9]` int8, 1 where the player to move has a stone, -1 where the other one has.

LINES = np.array(
  [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]]
)


def play(boards, action):
  """A move on `boards [R, 9]`: the boards as the other player sees them, whether the mover has
  won `[R]` and whether the game is over `[R]`."""
  boards = jnp.where(jnp.arange(9) == action[:, None], jnp.int8(1), boards)
  won = (boards[:, LINES] == 1).all(-1).any(-1)
  return -boards, won, won | (boards != 0).all(-1)


def tictactoe(boards) -> Start:
  """The start of games at `boards [B, 9]`, no value known, an even prior over the empty squares."""
  boards = jnp.asarray(boards, jnp.int8)
  logits = jnp.where(boards == 0, 0.0, ILLEGAL)
  return Start(logits, jnp.zeros(boards.shape[0]), boards)


def tictactoe_step(params, key, action, boards):
  """The `recurrent` function of `tictactoe`: a win pays 1, then it is the other player's turn."""
  boards, won, over = play(boards, action)
  reward, discount = won.astype(jnp.float32), jnp.where(over, 0.0, -1.0)
  logits = jnp.where((boards == 0) & ~over[:, None], 0.0, ILLEGAL)
  return Reply(reward, discount, logits, jnp.zeros(action.shape)), boards


def _wins(board) -> bool:
  return any(all(board[s] == 1 for s in line) for line in LINES.tolist())


def openings(stones: int) -> list[tuple[int, ...]]:
  """All boards of 0 .. stones stones where nobody has won, one of each class of symmetry."""
  squares = np.arange(9).reshape(3, 3)
  turns = [np.rot90(s, k).ravel() for s in (squares, squares.T) for k in range(4)]
  level, found = {(0,) * 9}, []
  for _ in range(stones + 1):
    found += sorted(level)
    after = [b[:a] + (1,) + b[a + 1 :] for b in level for a in range(9) if not b[a]]
    level = {min(tuple(-b[s] for s in t) for t in turns) for b in after if not _wins(b)}
  return found


@functools.cache
def outcome(board: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
  """Minimax on the host: what the player to move gets (1, 0, -1) and the moves that get it."""
  found = {}
  for action in (a for a in range(9) if not board[a]):
    after = board[:action] + (1,) + board[action + 1 :]
    if _wins(after):
      found[action] = 1
    elif all(after):
      found[action] = 0
    else:
      found[action] = -outcome(tuple(-s for s in after))[0]
  best = max(found.values())
  return best, tuple(a for a, value in found.items() if value == best)
