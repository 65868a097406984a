"""Transformer blocks whose parameters are stacked over layers, so that `lax.scan` runs them.

One compiled block instead of 28 or 36: compile time and program size do not grow with depth. The
block is written for one layer; `stack` gives every parameter a leading layer axis, `scan` takes it
off again, and `stacked` presents `blocks.0.x ... blocks.27.x` of a checkpoint as one `blocks.*.x`.

Letters: L layers.
"""

import dataclasses
import re

import jax
import numpy as np
from flax import nnx

LAYER = re.compile(r'\bblocks\.(\d+)\.')


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


def stacked(source):
  """The source in which the layers of each `...blocks.<i>.<name>` are one tensor `[L, ...]`.

  Its name has `*` for the number. One such tensor at a time is held twice, never the model.

  Raises:
    ValueError: layer numbers with a gap, or layers that differ in shape or dtype.
  """
  header, layers = {}, {}
  for name in source.names():
    match = LAYER.search(name)
    if match:
      layers.setdefault(LAYER.sub('blocks.*.', name), {})[int(match[1])] = name
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


def transposed(array):
  """torch Linear weights `[..., out, in]` -> kernels `[..., in, out]`."""
  return np.swapaxes(array, -1, -2)
