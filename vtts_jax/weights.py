"""Parameters: NNX module <-> plain nested dict <-> safetensors file. The only nnx helper of the
project.

A module is split once; after that its parameters are a plain nested dict of arrays (lists become
dicts with integer keys) that is passed explicitly, and `merge(graphdef, params)` inside `jit`
gives the module back for free. Modules keep no Rngs and no caches, so parameters are all there is.
Files are safetensors with flat dotted keys (`blocks.0.mlp.up`); no pickle is ever read.
"""

import os
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as _to_bytes


class WeightsError(ValueError):
  """A weights file that does not fit; the message names both sides."""


def split(model):
  """Splits an `nnx.Module` into `(graphdef, params)`, params a plain nested dict of arrays.

  `graphdef` is hashable (a static argument of `jax.jit`). Works under `nnx.eval_shape` as well,
  which gives a template of `jax.ShapeDtypeStruct` without allocating anything.

  Raises:
    TypeError: the module holds state other than `nnx.Param` (Rngs, caches, batch statistics).
  """
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  if extra := ['.'.join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]:
    raise TypeError(
      f'{type(model).__name__} keeps state that is not nnx.Param: {", ".join(extra[:8])}; '
      'a module of this project holds parameters only'
    )
  return graphdef, nnx.to_pure_dict(params)


def merge(graphdef, params):
  """The module with these parameters; call it inside `jit`: `merge(graphdef,
  params).decode(ids)`.
  """
  return nnx.merge(graphdef, params)


def flatten(params, prefix=''):
  """Nested dict -> `{'blocks.0.w': leaf}` in the order of the dicts."""
  flat = {}
  for name, value in params.items():
    key = f'{prefix}{name}'
    flat |= flatten(value, f'{key}.') if isinstance(value, dict) else {key: value}
  return flat


def unflatten(flat, template):
  """`{'blocks.0.w': leaf}` -> the nested dict with the structure (and key types) of `template`."""

  def build(node, prefix):
    return {
      name: build(value, f'{prefix}{name}.') if isinstance(value, dict) else flat[f'{prefix}{name}']
      for name, value in node.items()
    }

  return build(template, '')


def save(path, params, metadata=None):
  """Writes a nested dict of arrays; `metadata` is a dict of strings. A reader never sees half a
  file.
  """
  path = pathlib.Path(path)
  metadata = dict(metadata or {})
  if bad := [k for k, v in metadata.items() if not isinstance(v, str)]:
    raise TypeError(f'metadata of {path.name}: {bad} are not strings; encode them as JSON')
  tensors = {k: np.ascontiguousarray(v) for k, v in flatten(params).items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(_to_bytes(tensors, metadata))
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def _open(path):
  try:
    return safe_open(os.fspath(path), framework='flax')
  except FileNotFoundError:
    raise FileNotFoundError(f'no weights file {path}') from None
  except (SafetensorError, OSError) as error:
    raise WeightsError(f'{path} is not a complete safetensors file: {error}') from None


def metadata(path):
  """The file's metadata, a dict of strings."""
  with _open(path) as file:
    return file.metadata() or {}


def load(path, template):
  """Reads a file into the structure of `template`, cast to the template's dtypes.

  Args:
    path: a safetensors file.
    template: nested dict of arrays or `jax.ShapeDtypeStruct`, the second result of `split`.

  Raises:
    WeightsError: truncated or foreign file; missing, unused, wrongly shaped keys, or integers
    where floats are
      wanted (a float of another precision is cast). Every message lists both sides.
  """
  want = flatten(template)
  with _open(path) as file:
    names = set(file.keys())
    missing, unused = sorted(want.keys() - names), sorted(names - want.keys())
    if missing or unused:
      raise WeightsError(
        f'{path} does not hold this model: missing from the file: {_some(missing)}; '
        f'in the file and unused: {_some(unused)}'
      )
    flat, wrong = {}, []
    for key, leaf in want.items():
      got = file.get_tensor(key)
      floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in (got, leaf)]
      same_kind = floats[0] == floats[1]
      if got.shape != tuple(leaf.shape) or not same_kind:
        wrong.append(f'{key}: file {got.dtype}{got.shape}, model {leaf.dtype}{tuple(leaf.shape)}')
      else:
        flat[key] = jnp.asarray(got, leaf.dtype)
  if wrong:
    raise WeightsError(f'{path} has other shapes or types than the model: {_some(wrong, "; ")}')
  return unflatten(flat, template)


def _some(names, comma=', '):
  shown = comma.join(names[:12]) or 'none'
  return f'{shown} and {len(names) - 12} more' if len(names) > 12 else shown
