"""Tic-tac-toe, solved: a game of two players for tree search, and its minimax oracle.

A board is `[9]` int8, 1 where the player to move has a stone, -1 where the other one has.
Letters: B boards, R boards of a call.
"""

import functools

import jax.numpy as jnp
import numpy as np

from vtts_jax.search.mcts.simulate import RecurrentOutput, RootOutput

ILLEGAL = float(jnp.finfo(jnp.float32).min)  # as mctx marks illegal actions: finite

LINES = np.array(
  [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]]
)


def play_move(boards, action):
  """A move on `boards [R, 9]`: the boards as the other player sees them, whether the mover has
  won `[R]` and whether the game is over `[R]`."""
  boards = jnp.where(jnp.arange(9) == action[:, None], jnp.int8(1), boards)
  won = (boards[:, LINES] == 1).all(-1).any(-1)
  return -boards, won, won | (boards != 0).all(-1)


def start_game(boards) -> RootOutput:
  """The start of games at `boards [B, 9]`, no value known, an even prior over the empty squares."""
  boards = jnp.asarray(boards, jnp.int8)
  logits = jnp.where(boards == 0, 0.0, ILLEGAL)
  return RootOutput(logits, jnp.zeros(boards.shape[0]), boards)


def step_game(params, key, action, boards):
  """The `recurrent` function of `start_game`: a win pays 1, then it is the other player's turn."""
  boards, won, over = play_move(boards, action)
  reward, discount = won.astype(jnp.float32), jnp.where(over, 0.0, -1.0)
  logits = jnp.where((boards == 0) & ~over[:, None], 0.0, ILLEGAL)
  return RecurrentOutput(reward, discount, logits, jnp.zeros(action.shape)), boards


def _wins(board) -> bool:
  return any(all(board[s] == 1 for s in line) for line in LINES.tolist())


def list_openings(stones: int) -> list[tuple[int, ...]]:
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
def solve_board(board: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
  """Minimax on the host: what the player to move gets (1, 0, -1) and the moves that get it."""
  found = {}
  for action in (a for a in range(9) if not board[a]):
    after = board[:action] + (1,) + board[action + 1 :]
    if _wins(after):
      found[action] = 1
    elif all(after):
      found[action] = 0
    else:
      found[action] = -solve_board(tuple(-s for s in after))[0]
  best = max(found.values())
  return best, tuple(a for a, value in found.items() if value == best)
