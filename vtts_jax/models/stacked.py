"""Transformer blocks whose parameters are stacked over layers, so that `lax.scan` runs them.

XLA compiles one block instead of 28 or 36: compile time and program size do not grow with depth. A
block is written for one layer. `stack_blocks` gives every parameter a leading layer axis, and
`scan_blocks` takes it off again. On the side of the checkpoint, `stack_layers` shows
`blocks.0.x ... blocks.27.x` as one tensor `blocks.*.x`, and `fuse_projections` joins projections
that the checkpoint keeps apart.

Letters: L layers.
"""

import dataclasses
import re

import jax
import numpy as np
from flax import nnx


def stack_blocks(build, layers: int, rngs: nnx.Rngs) -> nnx.Module:
  """Makes `layers` modules by `build(rngs)` and returns them as one with parameters `[L, ...]`."""
  # every layer has the same structure, and the one trace that all share says it
  structures = []

  def init_layer(key):
    graphdef, state = nnx.split(build(nnx.Rngs(params=key)))
    structures.append(graphdef)
    return state

  state = jax.vmap(init_layer)(jax.random.split(rngs.params(), layers))
  return nnx.merge(structures[0], state)


def scan_blocks(blocks: nnx.Module, body, carry, xs=None):
  """Runs `carry, y = body(block, carry, x)` layer by layer; returns carry and ys `[L, ...]`."""
  graphdef, state = nnx.split(blocks)

  def run_layer(carry, inputs):
    state, x = inputs
    return body(nnx.merge(graphdef, state), carry, x)

  return jax.lax.scan(run_layer, carry, (state, xs))


def stack_layers(source, word='blocks'):
  """Returns a source in which the layers of each `...blocks.<i>.<name>` are one tensor `[L, ...]`.

  The new name has `*` for the number. Stacking happens when a tensor is read, so the host holds one
  such tensor twice, never the whole model.

  Args:
    source: `checkpoints.Source`.
    word: a regular expression for what stands before the number ('layers?', 'resblocks').

  Raises:
    ValueError: the layer numbers have a gap, or layers differ in shape or dtype.
  """
  # from the headers alone: nothing is read before a tensor is asked for
  layer, header, layers = re.compile(rf'\b({word})\.(\d+)\.'), {}, {}
  for name in source.tensor_names():
    match = layer.search(name)
    if match:
      whole = f'{name[: match.end(1)]}.*.{name[match.end() :]}'
      layers.setdefault(whole, {})[int(match[2])] = name
    else:
      header[name] = source.header[name]
  for name, numbers in layers.items():
    # depth is that of the whole trunk: a tensor missing from its last layer is a gap as well
    trunk = [max(n) + 1 for other, n in layers.items() if other.startswith(name.split('*')[0])]
    gap = sorted(set(range(max(trunk))) - numbers.keys())
    if gap:
      raise ValueError(f'{source.where} has no {name} for layers {gap}')
    first = source.header[numbers[0]]
    odd = [numbers[i] for i in numbers if source.header[numbers[i]] != first]
    if odd:
      raise ValueError(f'{source.where}: {odd[0]} is {source.header[odd[0]]}, layer 0 is {first}')
    header[name] = ((len(numbers), *first[0]), first[1])

  def read_stack(name):
    if name not in layers:
      return source.read_tensor(name)
    # by number: files list layer 10 before layer 2
    return np.stack([source.read_tensor(layers[name][i]) for i in range(len(layers[name]))])

  return dataclasses.replace(source, header=header, read=read_stack)


def fuse_projections(source, parts=('q_proj', 'k_proj', 'v_proj'), name='qkv'):
  """Returns a source in which `X.q_proj.Y`, `X.k_proj.Y`, `X.v_proj.Y` are one `X.qkv.Y`.

  The parts are concatenated along torch's output axis: the second last of a weight, the last of a
  bias.

  Args:
    source: `checkpoints.Source`, stacked or not.
    parts: the names between two dots, in the order in which they are joined.
    name: what the joined part is called.

  Raises:
    ValueError: one of the parts is missing, or their shapes do not fit each other.
  """
  first, header, whole = re.compile(rf'(^|\.){re.escape(parts[0])}\.'), dict(source.header), {}
  for found in source.tensor_names():
    match = first.search(found)
    if not match:
      continue
    before, after = f'{found[: match.start()]}{match[1]}', found[match.end() :]
    joined, names = f'{before}{name}.{after}', [f'{before}{part}.{after}' for part in parts]
    # each group is found by its first part; a lone second part is left for the rules to report
    missing = [n for n in names if n not in source]
    if missing:
      raise ValueError(f'{source.where} has {found} and no {", ".join(missing)}')
    shapes, axis = [source.shape_of(n) for n in names], -2 if found.endswith('weight') else -1
    # parts may differ in the axis that is joined (grouped queries) and in no other
    kinds = {(s[:axis], s[len(s) + axis + 1 :], source.header[n][1]) for s, n in zip(shapes, names)}
    if len(kinds) > 1:
      raise ValueError(f'{source.where}: {", ".join(names)} have the shapes {shapes}')
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    for n in names:
      header.pop(n)
    whole[joined] = names, axis
    header[joined] = tuple(shape), source.header[found][1]

  def read_joined(key):
    if key not in whole:
      return source.read_tensor(key)
    names, axis = whole[key]
    return np.concatenate([source.read_tensor(n) for n in names], axis)

  return dataclasses.replace(source, header=header, read=read_joined)


def transpose_kernel(array):
  """Turns torch's Linear weights `[..., out, in]` into kernels `[..., in, out]`."""
  return np.swapaxes(array, -1, -2)
