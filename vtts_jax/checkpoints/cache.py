"""Keeps converted checkpoints with Orbax, so that a large one is converted once."""

import hashlib
import os
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from vtts_jax.checkpoints.convert import KeyRule, convert_weights, leaf_dtype, leaf_shardings
from vtts_jax.checkpoints.files import flatten_tree


def convert_with_cache(
  folder, source, rules: Sequence[KeyRule], template, dtype=None, sharding=None
):
  """Does `convert_weights`, or loads the copy that an earlier call left in `folder`.

  A copy's name is a digest of what it was made of (the source's identity, the rules, the template
  and `dtype`), so a changed file or table makes a new copy. A copy loads with any `sharding`; each
  process reads its own shards only.

  Args:
    folder: where the copies are; local or `gs://`.
    source, rules, template, dtype, sharding: as in `convert_weights`.

  Raises:
    ValueError: as in `convert_weights`; a source without an identity (arrays in memory).
  """
  if not source.identity:
    raise ValueError(f'{source.where} has no identity to find a kept copy by: use convert_weights')
  # imported here, because most runs keep no copies
  import orbax.checkpoint as ocp

  want = flatten_tree(template)
  path = epath.Path(os.fspath(folder)).absolute() / _cache_key(source, rules, want, dtype)
  with ocp.StandardCheckpointer() as keeper:
    if not path.exists():
      params = convert_weights(source, rules, template, dtype, sharding)
      keeper.save(path, flatten_tree(params))
      keeper.wait_until_finished()
      logging.info('kept a converted copy of %s in %s', source.where, path)
      return params
    # Orbax wants a sharding for every leaf; where none is given, one device holds it
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = leaf_shardings(want, sharding)
    abstract = {
      k: jax.ShapeDtypeStruct(v.shape, leaf_dtype(v, dtype), sharding=places[k] or local)
      for k, v in want.items()
    }
    have = keeper.restore(path, abstract)
  return jax.tree_util.tree_unflatten(
    jax.tree_util.tree_structure(template), [have[k] for k in want]
  )


def _cache_key(source, rules, want, dtype):
  # a function is known by its name: editing one without renaming it keeps the old copy
  ops = [(p, t, op if isinstance(op, str) else op.__qualname__) for p, t, op in rules]
  made_of = [
    source.identity,
    ops,
    [(k, tuple(v.shape), str(leaf_dtype(v, dtype))) for k, v in want.items()],
  ]
  return hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
