"""Parameters: NNX modules split once into plain dicts, and safetensors files of flat dotted keys.

The one place where a module becomes (graphdef, params) and back, where a foreign checkpoint becomes
params (`convert`, through a table of rules) and where the converted copy is kept (`cached`). Files
never hold pickles; a key that is missing, unused, or of the wrong shape or kind is an error that
names both sides.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from vtts_jax import checkpoints
from vtts_jax.checkpoints import arrays as arrays
from vtts_jax.checkpoints import open_source as open_source

OPS = {  # how a torch tensor becomes ours: the axes in our order
  '': None,
  'T': (1, 0),  # Linear [out, in] -> [in, out]
  'conv': (2, 3, 1, 0),  # OIHW -> HWIO
  'convT': (2, 3, 0, 1),  # transposed convolution: IOHW -> HWIO
}
Rule = tuple[str, str | None, str | Callable]


def split(model):
  """`nnx.split` with the parameters as a plain nested dict: (graphdef, params)."""
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def merge(graphdef, params):
  """The module again; free inside `jax.jit`."""
  return nnx.merge(graphdef, params)


def model(build, config, params):
  """The module `build(config)` with these parameters; its structure is made once."""
  return merge(_graph(build, config), params)


@functools.cache
def _graph(build, config):
  return abstract(lambda: build(config))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def drawn(build, config, dtype):
  """Random parameters of `build(config)`, always the same; compiled once for each."""
  return jax.tree.map(lambda x: x.astype(dtype), split(build(config))[1])


def abstract(build):
  """(graphdef, params as ShapeDtypeStructs) of the module that `build()` returns."""
  return split(nnx.eval_shape(build))


def flatten(params):
  """Nested dict -> {'blocks.0.up.kernel': leaf}."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {'.'.join(str(k.key) for k in path): leaf for path, leaf in leaves}


def save(path, params, metadata=None, dtype=None):
  """Writes `params` (nested dict) to a safetensors file, through a temporary file and a rename.

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
  folder = os.path.dirname(os.path.abspath(path))
  os.makedirs(folder, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=folder, suffix='.tmp')
  os.close(handle)
  try:
    save_file(plain, temporary, metadata=text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def metadata(path):
  """The metadata of a safetensors file, {str: str}; errors as in `load`."""
  with checkpoints.open_file(path) as file:
    return dict(file.metadata() or {})


def load(path, template):
  """Reads a file into the structure, shapes and dtypes of `template` (arrays or ShapeDtypeStructs).

  Raises:
    FileNotFoundError: no such file.
    ValueError: truncated or foreign file; keys missing from the file or unused by the template; a
      wrong shape; floats where integers belong or the other way round. Every offender is listed.
  """
  want = flatten(template)
  with checkpoints.open_file(path) as file:
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


def size(params):
  """Number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


# --------------------------------------------------------------------------------------- conversion


def convert(source, rules: Sequence[Rule], template, dtype=None, sharding=None):
  """Reads a foreign checkpoint into the structure of `template`, one tensor at a time.

  Each tensor is read, reordered, cast and placed before the next one is read, so that the host
  holds one tensor and not a second model. Names, shapes and kinds are compared before any is read.

  Args:
    source: a `checkpoints.Source`.
    rules: `(pattern, target, op)`, first full match of the source's name wins. `target` is a dotted
      path of `template` with `\\1` groups, or None for a tensor that is knowingly not used; `op` is
      a key of `OPS` or a function of a numpy array. Two names may feed one target (tied weights) if
      their values are equal.
    template: nested dict of ShapeDtypeStructs, from `abstract`.
    dtype: of the floating leaves; the template's by default.
    sharding: one `jax.sharding.Sharding`, or a tree of them like `template` (`sharding.place`).

  Raises:
    ValueError: names missing from the source or unused by the model, a wrong shape, floats where
      integers belong or the other way round, tied tensors that differ. Every offender is listed.
  """
  want, feeds, unused = flatten(template), {}, []
  for name in source.names():
    target, op = _match(name, rules)
    if target == '':
      unused.append(f'{name} {source.shape(name)}')
    elif target is not None and target not in want:
      unused.append(f'{name} {source.shape(name)}, for {target}, which the model does not have')
    elif target is not None:
      feeds.setdefault(target, []).append((name, op))
  missing = [f'{k} {tuple(v.shape)}' for k, v in want.items() if k not in feeds]
  problems = [f'missing from the checkpoint, wanted by the model: {k}' for k in missing]
  problems += [f'in the checkpoint, unused by the model: {k}' for k in unused]
  for target, names in feeds.items():
    for name, op in names:
      shape, kind = source.header[name]
      shape = _reordered(shape, op)
      if shape is not None and shape != tuple(want[target].shape):
        turned = f'{source.shape(name)}, {shape} after {op!r}' if op else shape
        problems.append(_misfit(name, 'shape', turned, target, want[target].shape))
      if _floating(kind) != _floating(want[target].dtype):
        problems.append(_misfit(name, 'dtype', kind, target, want[target].dtype))
  if problems:
    wrong = len(missing) > len(want) // 2
    kind = ' (it looks like another model)' if wrong else ''
    raise ValueError('\n  '.join([f'{source.where} does not fit{kind}:', *problems]))
  places = _places(want, sharding)
  leaves = [
    _leaf(source, feeds[target], target, leaf, dtype, places[target])
    for target, leaf in want.items()
  ]
  return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(template), leaves)


def _places(want, sharding):
  return flatten(sharding) if isinstance(sharding, dict) else dict.fromkeys(want, sharding)


def _match(name, rules):
  """(target, op); target '' if no rule knows the name, None if it is knowingly left."""
  for pattern, target, op in rules:
    found = re.fullmatch(pattern, name)
    if found:
      return (None if target is None else found.expand(target)), op
  return '', ''


def _reordered(shape, op):
  """The shape after `op`; None if only reading will tell, or if the rank is wrong for it."""
  if callable(op):
    return None
  axes = OPS[op]
  if axes is None:
    return shape
  return tuple(shape[a] for a in axes) if len(axes) == len(shape) else shape


def _misfit(name, what, have, target, want):
  want = tuple(want) if what == 'shape' else want
  return f'{name}: the checkpoint has {what} {have}, {target} of the model wants {want}'


def _floating(dtype):
  return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def _leaf(source, names, target, leaf, dtype, place):
  value = None
  for name, op in names:
    new = source.get(name)
    if callable(op):
      try:
        new = np.asarray(op(new))
      except Exception as error:
        raise ValueError(
          f'{source.where} does not fit: {name} of shape {new.shape} for {target}: {error}'
        ) from error
      if new.shape != tuple(leaf.shape):
        raise ValueError(
          f'{source.where} does not fit: {_misfit(name, "shape", new.shape, target, leaf.shape)}'
        )
    elif OPS[op] is not None:
      new = new.transpose(OPS[op])
    if value is not None and not np.array_equal(value, new):
      raise ValueError(
        f'{source.where} does not fit: {names[0][0]} and {name} both go to {target} and differ'
      )
    value = new
  value = np.asarray(value, dtype=_kind(leaf, dtype))
  if place is None:
    return jnp.asarray(value)
  return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


# -------------------------------------------------------------------------------------------- cache


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


def _kind(leaf, dtype):
  return jnp.dtype(dtype if dtype is not None and _floating(leaf.dtype) else leaf.dtype)


def _fingerprint(source, rules, want, dtype):
  ops = [(p, t, op if isinstance(op, str) else op.__qualname__) for p, t, op in rules]
  made_of = [
    source.identity,
    ops,
    [(k, tuple(v.shape), str(_kind(v, dtype))) for k, v in want.items()],
  ]
  return hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
