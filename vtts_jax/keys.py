"""Keys and candidate axes: what makes a candidate independent of how it is batched.

key(prompt p, candidate i) = fold_in(fold_in(root, p), i), p the global prompt id. Sampling at stage
t folds t in; the children of a candidate fold in CHILD + t and then their number, except child 0,
which *is* its parent: so a beam with one child per candidate draws exactly what best-of-N draws.

Letters: B prompts, N candidates, K children, M gathered.
"""

import jax
import jax.numpy as jnp

CHILD = 1 << 30


def fold(keys: jax.Array, data) -> jax.Array:
  """`fold_in` elementwise: keys `[...]`, data broadcastable to them; returns keys `[...]`."""
  data = jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape)
  flat = jax.vmap(jax.random.fold_in)(keys.reshape(-1), data.reshape(-1))
  return flat.reshape(keys.shape)


def prompt_keys(root: jax.Array, ids: jax.Array) -> jax.Array:
  """Keys `[B]` of the prompts with global ids `[B]`."""
  return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(ids, jnp.uint32))


def candidate_keys(keys: jax.Array, ids: jax.Array) -> jax.Array:
  """Keys `[B, N]` of the candidates with ids `[N]` under prompt keys `[B]`."""
  ids = jnp.asarray(ids, jnp.uint32)
  return fold(jnp.broadcast_to(keys[:, None], (keys.shape[0], ids.shape[0])), ids)


def child_keys(keys: jax.Array, stage, k: int) -> jax.Array:
  """Keys `[B, N, K]` of the children that candidates with keys `[B, N]` get at `stage`; child 0 is
  its parent."""
  # child 0 keeps its parent's key: a beam with one child each draws what best-of-N draws
  parents = keys[:, :, None]
  if k == 1:
    return parents
  base = jnp.broadcast_to(fold(keys, CHILD + stage)[:, :, None], (*keys.shape, k - 1))
  return jnp.concatenate([parents, fold(base, jnp.arange(1, k))], axis=2)


def child_key(keys: jax.Array, stage, number: jax.Array) -> jax.Array:
  """Keys `[...]` of child `number [...]` that candidates with keys `[...]` get at `stage`: an entry
  of `child_keys`, where each candidate has its own stage and asks for one child."""
  fresh = fold(fold(keys, CHILD + jnp.asarray(stage)), number)
  return jnp.where(number == 0, keys, fresh)


# ---------------------------------------------------------------------------------- candidate axes


def take(tree, index: jax.Array):
  """Gathers candidates: leaves `[B, N, ...]`, index `[B, M]` into N; returns leaves `[B, M,
  ...]`."""
  return jax.tree.map(jax.vmap(lambda x, i: x[i]), tree, _like(tree, index))


def repeat(tree, k: int):
  """Each candidate k times in a row: leaves `[B, N, ...]` to `[B, N * K, ...]`."""
  return jax.tree.map(lambda x: jnp.repeat(x, k, axis=1), tree)


def where(pick: jax.Array, tree, other):
  """Per prompt, `tree` where `pick [B]` holds, else `other`; leaves `[B, ...]`, keys allowed."""

  def one(a, b):
    return jnp.where(pick.reshape(pick.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(one, tree, other)


def run_stages(one, state, stage, count: int, end: int):
  """`state = one(state, t)` for t = stage .. stage + count - 1, compiled as a loop.

  `stage` is a scalar or `[B, N]`; of the latter a candidate whose t reaches `end` stays as it is.
  """

  def body(state, i):
    t = stage + i
    # one stage for all: nothing can be past the end, and nothing has to be masked
    if not jnp.ndim(t):
      return one(state, t), None
    grown, going = one(state, jnp.minimum(t, end - 1)), t < end
    keep = lambda a, b: jnp.where(going.reshape(going.shape + (1,) * (a.ndim - 2)), a, b)
    return jax.tree.map(keep, grown, state), None

  return jax.lax.scan(body, state, jnp.arange(count))[0]


def _like(tree, index):
  return jax.tree.map(lambda _: index, tree)
