"""What the tests of the tree share: one jitted search, and a quiet rule."""

import functools

import jax

from vtts_jax.games import trees as games
from vtts_jax.search.mcts import simulate
from vtts_jax.search.mcts.rules import PUCT

KEY = jax.random.key(5)
QUIET = PUCT(fraction=0.0)


@functools.partial(jax.jit, static_argnames=('recurrent', 'rule', 'simulations', 'leaves', 'depth'))
def search(start, params, key, *, recurrent, rule, simulations, leaves=1, invalid=None, depth=None):
  return simulate.run_search(
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
