"""Meshes and parameter placement: prompts over 'data', weights over 'model' by regex rules."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vtts_jax.errors import ConfigError

AXES = ('data', 'model')


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh ('data', 'model') over `devices` (this process's by default) with `model` of them per
  replica.

  Raises:
    ConfigError: `model` does not divide the number of devices.
  """
  devices = list(devices or jax.local_devices())
  if model < 1 or len(devices) % model:
    raise ConfigError(f'mesh.model={model}: must divide the {len(devices)} devices')
  return Mesh(np.array(devices).reshape(-1, model), AXES, axis_types=(AxisType.Auto,) * 2)


def place(params, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = ()):
  """Shardings for a parameter tree: the first rule whose regex is found in the path 'a/b/c' wins,
  else replicated."""

  def one(path, leaf):
    name = '/'.join(str(getattr(p, 'key', getattr(p, 'idx', p))) for p in path)
    spec = next((s for pattern, s in rules if re.search(pattern, name)), PartitionSpec())
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, params)
