"""Tic-tac-toe, a two-player game for tree search, and its minimax solution.

A board is `[9]` int8: 1 where the player to move has a stone, -1 where the opponent has one.
Letters: B boards, R boards of a call.
"""

import functools

import jax.numpy as jnp
import numpy as np

from vtts_jax.search.mcts.simulate import RecurrentOutput, RootOutput

ILLEGAL = float(jnp.finfo(jnp.float32).min)  # logit of an illegal action; finite, as in mctx

LINES = np.array(
  [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]]
)


def play_move(boards, action):
  """Plays `action [R]` on `boards [R, 9]`.

  Returns:
    (boards seen by the opponent, whether the mover has won `[R]`, whether the game is over `[R]`).
  """
  boards = jnp.where(jnp.arange(9) == action[:, None], jnp.int8(1), boards)
  won = (boards[:, LINES] == 1).all(-1).any(-1)
  # the sign flips, so the player to move always has the stones 1
  return -boards, won, won | (boards != 0).all(-1)


def start_game(boards) -> RootOutput:
  """The root of games at `boards [B, 9]`: value 0, a uniform prior over the empty squares."""
  boards = jnp.asarray(boards, jnp.int8)
  logits = jnp.where(boards == 0, 0.0, ILLEGAL)
  return RootOutput(logits, jnp.zeros(boards.shape[0]), boards)


def step_game(params, key, action, boards):
  """The `recurrent` function of `start_game`; a win pays 1."""
  boards, won, over = play_move(boards, action)
  # discount -1: the opponent's gain is the player's loss; 0 ends the game
  reward, discount = won.astype(jnp.float32), jnp.where(over, 0.0, -1.0)
  logits = jnp.where((boards == 0) & ~over[:, None], 0.0, ILLEGAL)
  return RecurrentOutput(reward, discount, logits, jnp.zeros(action.shape)), boards


def _has_won(board) -> bool:
  return any(all(board[s] == 1 for s in line) for line in LINES.tolist())


def list_openings(stones: int) -> list[tuple[int, ...]]:
  """All boards with up to `stones` stones where nobody has won, one of each symmetry class."""
  squares = np.arange(9).reshape(3, 3)
  # the 8 symmetries of the square, as permutations of the 9 squares
  turns = [np.rot90(s, k).ravel() for s in (squares, squares.T) for k in range(4)]
  level, found = {(0,) * 9}, []
  for _ in range(stones + 1):
    found += sorted(level)
    after = [b[:a] + (1,) + b[a + 1 :] for b in level for a in range(9) if not b[a]]
    # the smallest of its 8 forms stands for a class
    level = {min(tuple(-b[s] for s in t) for t in turns) for b in after if not _has_won(b)}
  return found


@functools.cache
def solve_board(board: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
  """Minimax on the host: the value for the player to move (1, 0, -1) and all best moves."""
  found = {}
  for action in (a for a in range(9) if not board[a]):
    after = board[:action] + (1,) + board[action + 1 :]
    if _has_won(after):
      found[action] = 1
    elif all(after):
      found[action] = 0
    else:
      found[action] = -solve_board(tuple(-s for s in after))[0]
  best = max(found.values())
  return best, tuple(a for a, value in found.items() if value == best)
