"""Converted checkpoints are kept with Orbax, so that a large one is converted once."""

import hashlib
import os
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from vtts_jax.checkpoints.convert import Rule, _kind, _places, convert
from vtts_jax.checkpoints.files import flatten


def cached(folder, source, rules: Sequence[Rule], template, dtype=None, sharding=None):
  """`convert`, or the copy that an earlier call left in `folder` (Orbax; local or `gs://`).

  A copy is found by what it was made of (the source's identity, the rules, the template, `dtype`),
  so that a changed file or table makes a new one. It loads with any `sharding`, each process
  reading its own shards only.

  Raises:
    ValueError: as in `convert`; a source without an identity (arrays in memory).
  """
  if not source.identity:
    raise ValueError(f'{source.where} has no identity to find a kept copy by: use convert')
  import orbax.checkpoint as ocp

  want = flatten(template)
  path = epath.Path(os.fspath(folder)).absolute() / _fingerprint(source, rules, want, dtype)
  with ocp.StandardCheckpointer() as keeper:
    if not path.exists():
      params = convert(source, rules, template, dtype, sharding)
      keeper.save(path, flatten(params))
      keeper.wait_until_finished()
      logging.info('kept a converted copy of %s in %s', source.where, path)
      return params
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = _places(want, sharding)
    abstract = {
      k: jax.ShapeDtypeStruct(v.shape, _kind(v, dtype), sharding=places[k] or local)
      for k, v in want.items()
    }
    have = keeper.restore(path, abstract)
  return jax.tree_util.tree_unflatten(
    jax.tree_util.tree_structure(template), [have[k] for k in want]
  )


def _fingerprint(source, rules, want, dtype):
  ops = [(p, t, op if isinstance(op, str) else op.__qualname__) for p, t, op in rules]
  made_of = [
    source.identity,
    ops,
    [(k, tuple(v.shape), str(_kind(v, dtype))) for k, v in want.items()],
  ]
  return hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
