"""Transformer blocks whose parameters are stacked over layers, so that `lax.scan` runs them.

One compiled block instead of 28 or 36: compile time and program size do not grow with depth. The
block is written for one layer; `stack` gives every parameter a leading layer axis, `scan` takes it
off again, and `stacked` presents `blocks.0.x ... blocks.27.x` of a checkpoint as one `blocks.*.x`.
`fused` joins the projections that a checkpoint keeps apart.

Letters: L layers.
"""

import dataclasses
import re

import jax
import numpy as np
from flax import nnx


def stack(build, layers: int, rngs: nnx.Rngs) -> nnx.Module:
  """`layers` modules made by `build(rngs)` as one whose parameters are `[L, ...]`."""
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
  one = lambda key: nnx.split(build(nnx.Rngs(params=key)))[1]
  return nnx.merge(graphdef, jax.vmap(one)(jax.random.split(rngs.params(), layers)))


def scan(blocks: nnx.Module, body, carry, xs=None):
  """`carry, y = body(block, carry, x)` for each layer in turn; returns carry, ys `[L, ...]`."""
  graphdef, state = nnx.split(blocks)

  def layer(carry, inputs):
    state, x = inputs
    return body(nnx.merge(graphdef, state), carry, x)

  return jax.lax.scan(layer, carry, (state, xs))


def stacked(source, word='blocks'):
  """The source in which the layers of each `...blocks.<i>.<name>` are one tensor `[L, ...]`.

  Its name has `*` for the number. One such tensor at a time is held twice, never the model.

  Args:
    source: `checkpoints.Source`.
    word: what stands before the number, a regular expression ('layers?', 'resblocks').

  Raises:
    ValueError: layer numbers with a gap, or layers that differ in shape or dtype.
  """
  layer, header, layers = re.compile(rf'\b({word})\.(\d+)\.'), {}, {}
  for name in source.names():
    match = layer.search(name)
    if match:
      whole = f'{name[: match.end(1)]}.*.{name[match.end() :]}'
      layers.setdefault(whole, {})[int(match[2])] = name
    else:
      header[name] = source.header[name]
  for name, numbers in layers.items():
    trunk = [max(n) + 1 for other, n in layers.items() if other.startswith(name.split('*')[0])]
    gap = sorted(set(range(max(trunk))) - numbers.keys())
    if gap:
      raise ValueError(f'{source.where} has no {name} for layers {gap}')
    first = source.header[numbers[0]]
    odd = [numbers[i] for i in numbers if source.header[numbers[i]] != first]
    if odd:
      raise ValueError(f'{source.where}: {odd[0]} is {source.header[odd[0]]}, layer 0 is {first}')
    header[name] = ((len(numbers), *first[0]), first[1])

  def read(name):
    if name not in layers:
      return source.get(name)
    return np.stack([source.get(layers[name][i]) for i in range(len(layers[name]))])

  return dataclasses.replace(source, header=header, read=read)


def fused(source, parts=('q_proj', 'k_proj', 'v_proj'), name='qkv'):
  """The source in which `X.q_proj.Y`, `X.k_proj.Y`, `X.v_proj.Y` are one `X.qkv.Y`: torch's rows
  (the second last axis of a matrix, the last of a bias) put one below the other.

  Args:
    source: `checkpoints.Source`, stacked or not.
    parts: names as they stand between two dots, in order; `name`: what they become.

  Raises:
    ValueError: one of the parts is missing, or they do not fit each other.
  """
  first, header, whole = re.compile(rf'(^|\.){re.escape(parts[0])}\.'), dict(source.header), {}
  for found in source.names():
    match = first.search(found)
    if not match:
      continue
    put = lambda part, n=found, m=match: f'{n[: m.start()]}{m[1]}{part}.{n[m.end() :]}'
    names = [put(part) for part in parts]
    missing = [n for n in names if n not in source]
    if missing:
      raise ValueError(f'{source.where} has {found} and no {", ".join(missing)}')
    shapes, axis = [source.shape(n) for n in names], -2 if found.endswith('weight') else -1
    kinds = {(s[:axis], s[len(s) + axis + 1 :], source.header[n][1]) for s, n in zip(shapes, names)}
    if len(kinds) > 1:
      raise ValueError(f'{source.where}: {", ".join(names)} have the shapes {shapes}')
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    for n in names:
      header.pop(n)
    whole[put(name)] = names, axis
    header[put(name)] = tuple(shape), source.header[found][1]

  def read(key):
    if key not in whole:
      return source.get(key)
    names, axis = whole[key]
    return np.concatenate([source.get(n) for n in names], axis)

  return dataclasses.replace(source, header=header, read=read)


def transposed(array):
  """torch Linear weights `[..., out, in]` -> kernels `[..., in, out]`."""
  return np.swapaxes(array, -1, -2)
