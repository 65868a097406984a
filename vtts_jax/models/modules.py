"""NNX modules split once into plain dictionaries of parameters, and bound again inside jit.

The one place where a module becomes (graphdef, params) and back.
"""

import functools

import jax
import numpy as np
from flax import nnx


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


def size(params):
  """Number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
