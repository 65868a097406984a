"""Meshes: prompts over 'data', weights over 'model'."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from vtts_jax.errors import ConfigError

AXES = ('data', 'model')


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh ('data', 'model') over `devices` (this process's by default), `model` of them to a
  replica of the weights.

  The axes are Auto: `jax.make_mesh` would make them Explicit, which needs a sharding in every type.

  Raises:
    ConfigError: `model` does not divide the number of devices.
  """
  devices = list(devices or jax.local_devices())
  if not isinstance(model, int) or model < 1 or len(devices) % model:
    raise ConfigError(f'mesh.model={model!r}: must divide the {len(devices)} devices')
  return Mesh(np.array(devices).reshape(-1, model), AXES, axis_types=(AxisType.Auto,) * 2)
