"""Our own safetensors files: nested dictionaries of arrays under flat dotted keys.

Files never hold pickles; a key that is missing, unused, or of the wrong shape or kind is an error
that names both sides.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints import source
from vtts_jax.media.files import atomic_path


def flatten(params):
  """Nested dict -> {'blocks.0.up.kernel': leaf}."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {'.'.join(str(k.key) for k in path): leaf for path, leaf in leaves}


def save(path, params, metadata=None, dtype=None):
  """Writes `params` (nested dict) to a safetensors file, whole or not at all.

  `metadata` maps names to strings (anything else becomes JSON); `dtype` rounds floating leaves, for
  example `jnp.float16`.
  """
  from safetensors.numpy import save_file

  plain = {}
  for key, leaf in flatten(params).items():
    array = np.asarray(leaf)
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
      array = array.astype(dtype)
    plain[key] = np.asarray(array, order='C')  # keeps 0-d
  text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
  with atomic_path(path) as temporary:
    save_file(plain, os.fspath(temporary), metadata=text)


def metadata(path):
  """The metadata of a safetensors file, {str: str}; errors as in `load`."""
  with source.open_file(path) as file:
    return dict(file.metadata() or {})


def load(path, template):
  """Reads a file into the structure, shapes and dtypes of `template` (arrays or ShapeDtypeStructs).

  Raises:
    FileNotFoundError: no such file.
    ValueError: truncated or foreign file; keys missing from the file or unused by the template; a
      wrong shape; floats where integers belong or the other way round. Every offender is listed.
  """
  want = flatten(template)
  with source.open_file(path) as file:
    have = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
  problems = [f'missing from the file: {k}' for k in sorted(want.keys() - have.keys())]
  problems += [f'in the file but unused: {k}' for k in sorted(have.keys() - want.keys())]
  for key in sorted(want.keys() & have.keys()):
    if want[key].shape != have[key].shape:
      problems.append(f'{key}: file has shape {have[key].shape}, model wants {want[key].shape}')
    elif jnp.issubdtype(want[key].dtype, jnp.floating) != jnp.issubdtype(
      have[key].dtype, jnp.floating
    ):
      problems.append(f'{key}: file has dtype {have[key].dtype}, model wants {want[key].dtype}')
  if problems:
    raise ValueError('\n  '.join([f'weights at path={str(path)!r} do not fit:', *problems]))
  leaves, structure = jax.tree_util.tree_flatten(template)
  new = [jnp.asarray(have[k], leaf.dtype) for k, leaf in zip(want, leaves)]
  return jax.tree_util.tree_unflatten(structure, new)
