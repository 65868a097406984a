"""A foreign checkpoint becomes parameters, through a table of rules from its names to ours."""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints.files import flatten

OPS = {  # how a torch tensor becomes ours: the axes in our order
  '': None,
  'T': (1, 0),  # Linear [out, in] -> [in, out]
  'conv': (2, 3, 1, 0),  # OIHW -> HWIO
  'convT': (2, 3, 0, 1),  # transposed convolution: IOHW -> HWIO
}
Rule = tuple[str, str | None, str | Callable]


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
    template: nested dict of ShapeDtypeStructs, from `modules.abstract_module`.
    dtype: of the floating leaves; the template's by default.
    sharding: one `jax.sharding.Sharding`, or a tree of them like `template`, as from
      `modules.shardings_by_rule`.

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


def _kind(leaf, dtype):
  return jnp.dtype(dtype if dtype is not None and _floating(leaf.dtype) else leaf.dtype)
