"""Our own safetensors files: nested dictionaries of arrays under flat dotted keys.

Files never hold pickles. A key that is missing, unused, or of the wrong shape or kind is an error
that names both sides.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints.source import open_file
from vtts_jax.media.files import atomic_path


def flatten_tree(params):
  """Flattens a nested dict to {'blocks.0.up.kernel': leaf}."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {'.'.join(str(k.key) for k in path): leaf for path, leaf in leaves}


def write_weights(path, params, metadata=None, dtype=None):
  """Writes a nested dict of arrays to a safetensors file, whole or not at all.

  Args:
    path: of the file.
    params: nested dict of arrays.
    metadata: {name: value}; a value that is no string is written as JSON.
    dtype: floating leaves are rounded to it, for example `jnp.float16`; None keeps them.
  """
  from safetensors.numpy import save_file

  plain = {}
  for key, leaf in flatten_tree(params).items():
    array = np.asarray(leaf)
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
      array = array.astype(dtype)
    # safetensors writes the buffer as it lies; `ascontiguousarray` would make 0-d arrays 1-d
    plain[key] = np.asarray(array, order='C')
  text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
  with atomic_path(path) as temporary:
    save_file(plain, os.fspath(temporary), metadata=text)


def read_metadata(path):
  """Returns the metadata of a safetensors file, {str: str}; errors as in `read_weights`."""
  with open_file(path) as file:
    return dict(file.metadata() or {})


def read_weights(path, template):
  """Reads a file into the structure, shapes and dtypes of `template` (arrays or ShapeDtypeStructs).

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is truncated or no safetensors; keys are missing from the file or unused by
      the template; a shape is wrong; there are floats where integers belong or the other way round.
      Every offender is listed.
  """
  want = flatten_tree(template)
  # all at once: our own files are small
  with open_file(path) as file:
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
  # files are shipped in float16; the template says the dtype to compute in
  leaves, structure = jax.tree_util.tree_flatten(template)
  new = [jnp.asarray(have[k], leaf.dtype) for k, leaf in zip(want, leaves)]
  return jax.tree_util.tree_unflatten(structure, new)
