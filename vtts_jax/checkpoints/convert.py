"""Turns a foreign checkpoint into parameters, by a table of rules from its names to ours."""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints.files import flatten_tree

# torch puts the output axis first and JAX puts it last: the torch axes in our order
AXIS_ORDERS = {
  '': None,
  'T': (1, 0),  # Linear [out, in] -> [in, out]
  'conv': (2, 3, 1, 0),  # OIHW -> HWIO
  'convT': (2, 3, 0, 1),  # transposed convolution: IOHW -> HWIO
}
KeyRule = tuple[str, str | None, str | Callable]


def convert_weights(source, rules: Sequence[KeyRule], template, dtype=None, sharding=None):
  """Reads a foreign checkpoint into the structure of `template`, one tensor at a time.

  Each tensor is read, reordered, cast and placed before the next one is read, so that the host
  holds one tensor and not a second model. Names, shapes and kinds of dtype are compared before any
  tensor is read.

  Args:
    source: a `checkpoints.Source`.
    rules: `(pattern, target, op)`; the first pattern that matches the source's full name decides.
      `target` is a dotted path of `template` with `\\1` groups, or None for a tensor that is
      knowingly not used. `op` is a key of `AXIS_ORDERS` or a function of a numpy array. Two names
      may feed one target (tied weights) if their values are equal.
    template: nested dict of ShapeDtypeStructs, from `modules.abstract_module`.
    dtype: dtype of the floating leaves; the template's by default.
    sharding: one `jax.sharding.Sharding`, or a tree of them like `template`, as from
      `modules.shardings_by_rule`.

  Returns:
    The parameters, a nested dict of arrays.

  Raises:
    ValueError: names missing from the source or unused by the model, a wrong shape, floats where
      integers belong or the other way round, tied tensors that differ. Every offender is listed. Or
      a tensor that holds NaN.
  """
  # both sides are compared first: a rule's target must exist, and every leaf must be fed
  want, feeds, unused = flatten_tree(template), {}, []
  for name in source.tensor_names():
    target, op = _match_rule(name, rules)
    if target == '':
      unused.append(f'{name} {source.shape_of(name)}')
    elif target is not None and target not in want:
      unused.append(f'{name} {source.shape_of(name)}, for {target}, which the model does not have')
    elif target is not None:
      feeds.setdefault(target, []).append((name, op))
  missing = [f'{k} {tuple(v.shape)}' for k, v in want.items() if k not in feeds]
  problems = [f'missing from the checkpoint, wanted by the model: {k}' for k in missing]
  problems += [f'in the checkpoint, unused by the model: {k}' for k in unused]
  for target, names in feeds.items():
    for name, op in names:
      shape, kind = source.header[name]
      shape = _shape_after(shape, op)
      if shape is not None and shape != tuple(want[target].shape):
        turned = f'{source.shape_of(name)}, {shape} after {op!r}' if op else shape
        problems.append(_misfit_message(name, 'shape', turned, target, want[target].shape))
      if _is_floating(kind) != _is_floating(want[target].dtype):
        problems.append(_misfit_message(name, 'dtype', kind, target, want[target].dtype))
  if problems:
    # a table rarely misses half of its own model: then the file is of another one
    wrong = len(missing) > len(want) // 2
    kind = ' (it looks like another model)' if wrong else ''
    raise ValueError('\n  '.join([f'{source.where} does not fit{kind}:', *problems]))
  places = leaf_shardings(want, sharding)
  leaves = [
    _read_leaf(source, feeds[target], target, leaf, dtype, places[target])
    for target, leaf in want.items()
  ]
  return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(template), leaves)


def leaf_shardings(want, sharding):
  return flatten_tree(sharding) if isinstance(sharding, dict) else dict.fromkeys(want, sharding)


def _match_rule(name, rules):
  """Returns (target, op); target is '' if no rule knows the name, None if it is knowingly left."""
  for pattern, target, op in rules:
    found = re.fullmatch(pattern, name)
    if found:
      return (None if target is None else found.expand(target)), op
  return '', ''


def _shape_after(shape, op):
  """Returns the shape after `op`, or None if only reading the tensor will tell.

  A tensor of a wrong rank keeps its shape, so that the comparison reports it.
  """
  if callable(op):
    return None
  axes = AXIS_ORDERS[op]
  if axes is None:
    return shape
  return tuple(shape[a] for a in axes) if len(axes) == len(shape) else shape


def _misfit_message(name, what, have, target, want):
  want = tuple(want) if what == 'shape' else want
  return f'{name}: the checkpoint has {what} {have}, {target} of the model wants {want}'


def _is_floating(dtype):
  return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def _read_leaf(source, names, target, leaf, dtype, place):
  value = None
  for name, op in names:
    new = source.read_tensor(name)
    # a broken download or a diverged training would else show as scores that are all NaN
    if _has_nan(new):
      raise ValueError(f'{source.where}: {name} holds NaN; the weights are broken')
    if callable(op):
      try:
        new = np.asarray(op(new))
      except Exception as error:
        raise ValueError(
          f'{source.where} does not fit: {name} of shape {new.shape} for {target}: {error}'
        ) from error
      if new.shape != tuple(leaf.shape):
        misfit = _misfit_message(name, 'shape', new.shape, target, leaf.shape)
        raise ValueError(f'{source.where} does not fit: {misfit}')
    elif AXIS_ORDERS[op] is not None:
      new = new.transpose(AXIS_ORDERS[op])
    # tied weights: both names must hold the same numbers, else one would be lost
    if value is not None and not np.array_equal(value, new):
      raise ValueError(
        f'{source.where} does not fit: {names[0][0]} and {name} both go to {target} and differ'
      )
    value = new
  value = np.asarray(value, dtype=leaf_dtype(leaf, dtype))
  if place is None:
    return jnp.asarray(value)
  # each device takes its own slice of the host's array; no device ever holds all of it
  return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def _has_nan(array):
  """Returns whether an array holds NaN, without a second array of its size."""
  if not array.size or not _is_floating(array.dtype):
    return False
  if array.dtype.itemsize != 2:
    # the smallest is NaN if any is
    return bool(np.isnan(array.min()))
  # numpy compares bits far faster than half floats: NaN is what lies above infinity
  bits, infinity = array.view(np.uint16), np.array(np.inf, array.dtype).view(np.uint16)
  return any(
    int((part & np.uint16(0x7FFF)).max()) > int(infinity)
    for part in np.array_split(bits.reshape(-1), max(1, bits.size // 2**24))
  )


def leaf_dtype(leaf, dtype):
  # integers (token ids, buffers) keep their dtype
  return jnp.dtype(dtype if dtype is not None and _is_floating(leaf.dtype) else leaf.dtype)
