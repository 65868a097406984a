"""The array tree against mctx: simulations per second, and bytes per node.

    python benchmarks/tree.py [--repeats=3]

Both sides search the same random trees (64 rows, 16 slots, states of 8 numbers) from the same key
with the same recurrent function, one leaf a step, each as one compiled program; repeats take turns
and the fastest counts. The searches agree visit for visit, which is asserted on the way: the trees
have no ties. Then the array tree alone with several leaves a step.

Bytes per node: 256 int32 tokens and a key with 16 slots, from the shapes of the arrays, against
mctx over the vocabulary of FlexAR-3B with its KV cache as the embedding.

Prints a table and, last, one line of JSON.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import mctx
import numpy as np
from rich.console import Console
from rich.table import Table
from timing import fastest

from vtts_jax.games import trees as games
from vtts_jax.search.mcts import simulate, tree
from vtts_jax.search.mcts.rules import PUCT, Gumbel

ROWS, SLOTS, WIDTH = 64, 16, 8
TOKENS = 256
VOCABULARY = 64_000
# FlexAR-3B in bfloat16: keys and values of two streams (guidance), 36 layers, width 2304
CACHE = (2, 2, 36, TOKENS, 2304)
POLICIES = {
  'puct': (PUCT(), mctx.muzero_policy),
  'gumbel': (Gumbel(), mctx.gumbel_muzero_policy),
}


def searches(name, simulations, params, start, leaves):
  """Calls of mctx and of the array tree with each of `leaves` leaves a step."""
  rule, policy = POLICIES[name]
  root = mctx.RootFnOutput(**start._asdict())
  key = jax.random.key(1)

  def recurrent(params, key, action, state):
    reply, state = games.random_step(params, key, action, state)
    return mctx.RecurrentFnOutput(**reply._asdict()), state

  def ours(count):
    call = jax.jit(
      lambda params, root, key: simulate.run_search(
        root, recurrent, rule, simulations, key, params=params, leaves=count
      )
    )
    return lambda: call(params, root, key)

  theirs = jax.jit(lambda params, root, key: policy(params, key, root, recurrent, simulations))
  return (lambda: theirs(params, root, key)), [ours(count) for count in leaves]


def bytes_per_node():
  """Bytes of a node of the array tree, and of mctx's statistics and embedding."""
  nodes = 8

  def ours():
    prefix = (jnp.zeros((ROWS, TOKENS), jnp.int32), jax.random.key_data(jax.random.key(0)))
    prefix = (prefix[0], jnp.broadcast_to(prefix[1], (ROWS, *prefix[1].shape)))
    return tree.init_tree(prefix, jnp.zeros((ROWS, SLOTS)), jnp.zeros(ROWS), nodes)

  def theirs():
    root = mctx.RootFnOutput(
      prior_logits=jnp.zeros((1, VOCABULARY)),
      value=jnp.zeros(1),
      embedding=jnp.zeros((1, *CACHE), jnp.bfloat16),
    )

    def recurrent(params, key, action, state):
      reply = mctx.RecurrentFnOutput(
        reward=jnp.zeros(1),
        discount=jnp.ones(1),
        prior_logits=root.prior_logits,
        value=jnp.zeros(1),
      )
      return reply, state

    found = mctx.muzero_policy((), jax.random.key(0), root, recurrent, nodes - 1)
    return found.search_tree

  other = jax.eval_shape(theirs)
  size = lambda part: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) / nodes
  cache = size(other.embeddings)
  return simulate.node_bytes(jax.eval_shape(ours)), size(other) - cache, cache


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=3, help='timed repeats of each (default 3)')
  parser.add_argument('--leaves', type=int, nargs='*', default=[8, 32], help='leaves a step')
  args = parser.parse_args()
  params, start = games.random_tree(jax.random.key(0), ROWS, SLOTS, WIDTH)
  table = Table('rule', 'simulations', 'mctx', 'one leaf', 'times', box=None)
  for count in args.leaves:
    table.add_column(f'{count} leaves (distinct)')
  result = {}
  for name in POLICIES:
    for simulations in (128, 512):
      theirs, ours = searches(name, simulations, params, start, [1, *args.leaves])
      visits = theirs().search_tree.summary().visit_counts
      same = float((np.asarray(ours[0]()[1].visits) == np.asarray(visits)).all(1).mean())
      assert same == 1, f'{name}, {simulations} simulations: only {same:.3f} of the rows agree'
      # mctx takes seconds, so the array tree alone is repeated more often
      slow, fast = fastest([theirs, ours[0]], args.repeats)
      several = fastest(ours[1:], args.repeats)
      rate = lambda s, n=simulations: f'{ROWS * n / s:,.0f}/s'
      distinct = [float(call()[0].used.mean() - 1) / simulations for call in ours[1:]]
      table.add_row(
        name,
        str(simulations),
        rate(slow),
        rate(fast),
        f'{slow / fast:.1f}',
        *(f'{rate(s)} ({d:.2f})' for s, d in zip(several, distinct)),
      )
      result[f'{name}_{simulations}'] = round(slow / fast, 2)
  own, statistics, cache = bytes_per_node()
  Console(width=120).print(table)
  print(
    f'bytes per node: {own:.0f}; mctx over {VOCABULARY} tokens: {statistics / 1e6:.2f} MB of '
    f'statistics, {cache / 2**20:.0f} MiB of cache'
  )
  print(json.dumps(result | {'bytes_per_node': round(own)}))


if __name__ == '__main__':
  main()
