"""NNX modules split once into plain dictionaries of parameters, and bound again inside jit.

The one place where a module becomes (graphdef, params) and back. Parameters are nested dicts of
arrays, so that an optimizer, a checkpoint or a sharding rule sees names such as
'trunk/blocks/attn/qkv/kernel' and nothing of NNX.
"""

import functools
import math
import re
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def split_module(model: nnx.Module):
  """(graphdef, params): the structure of a module, and its parameters as a plain nested dict."""
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def abstract_module(build):
  """(graphdef, params as ShapeDtypeStructs) of the module that `build()` returns; no memory."""
  return split_module(nnx.eval_shape(build))


def bind(graphdef, params) -> nnx.Module:
  """The module with these parameters; free inside `jax.jit`."""
  return nnx.merge(graphdef, params)


def bind_module(build, config, params) -> nnx.Module:
  """The module `build(config)` with these parameters; its structure is made once."""
  return bind(structure_of(build, config)[0], params)


@functools.cache
def structure_of(build, config):
  """`abstract_module` of `build(config)`, made once."""
  return abstract_module(lambda: build(config))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_parameters(build, config, dtype):
  """Random parameters of `build(config)`, always the same; compiled once for each."""
  return jax.tree.map(lambda x: x.astype(dtype), split_module(build(config))[1])


def count_parameters(params) -> int:
  """Number of parameters."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def shardings_by_rule(params, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = ()):
  """A tree of `NamedSharding` like `params` (arrays or ShapeDtypeStructs).

  The first rule whose regex is found in the path 'a/b/c' wins; what no rule names, and what the
  mesh does not divide evenly, is on every device.
  """

  def choose(path, leaf):
    name = '/'.join(str(getattr(p, 'key', getattr(p, 'idx', p))) for p in path)
    spec = next((s for pattern, s in rules if re.search(pattern, name)), PartitionSpec())
    parts = [math.prod(mesh.shape[a] for a in _axes(entry)) for entry in spec]
    even = all(side % n == 0 for side, n in zip(leaf.shape, parts))
    return NamedSharding(mesh, spec if even else PartitionSpec())

  return jax.tree_util.tree_map_with_path(choose, params)


def _axes(entry) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)
