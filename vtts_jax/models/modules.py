"""NNX modules are split once into plain dictionaries of parameters, and bound again inside jit.

This is the one place where a module becomes (graphdef, params) and back. Parameters are nested
dicts of arrays: an optimizer, a checkpoint or a sharding rule sees names such as
'trunk/blocks/attn/qkv/kernel' and nothing of NNX. `nnx.jit` is not used, because it flattens the
module at every call: 30 ms for 48 blocks, where a plain dict takes 0.4 ms.
"""

import functools
import math
import re
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def split_module(model: nnx.Module):
  """Returns (graphdef, params): a module's structure and its parameters as a nested dict."""
  # a plain dict, which jax flattens far faster than NNX's own state
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def abstract_module(build):
  """Returns (graphdef, params) of the module that `build()` makes, without using any memory.

  The parameters are ShapeDtypeStructs.
  """
  return split_module(nnx.eval_shape(build))


def bind_graph(graphdef, params) -> nnx.Module:
  """Returns a module of this structure with these parameters; costs nothing inside `jax.jit`."""
  return nnx.merge(graphdef, params)


def bind_module(build, config, params) -> nnx.Module:
  """Returns the module `build(config)` with these parameters; its structure is made once."""
  return bind_graph(structure_of(build, config)[0], params)


@functools.cache
def structure_of(build, config):
  """Returns `abstract_module` of `build(config)`; it is made once for each config."""
  return abstract_module(lambda: build(config))


# jitted, because hundreds of initialisers compile faster as one program than one by one
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_parameters(build, config, dtype):
  """Returns random parameters of `build(config)`; they are the same at every call."""
  return jax.tree.map(lambda x: x.astype(dtype), split_module(build(config))[1])


def count_parameters(params) -> int:
  """Returns the number of parameters in a tree of arrays or ShapeDtypeStructs."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def shardings_by_rule(params, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = ()):
  """Returns a tree of `NamedSharding` like `params` (arrays or ShapeDtypeStructs).

  The first rule whose regex is found in the path 'a/b/c' decides. A leaf is replicated on every
  device if no rule names it or if the mesh does not divide it evenly.
  """

  def leaf_sharding(path, leaf):
    name = '/'.join(str(getattr(p, 'key', getattr(p, 'idx', p))) for p in path)
    spec = next((s for pattern, s in rules if re.search(pattern, name)), PartitionSpec())
    # an axis may be split over several mesh axes at once
    parts = [math.prod(mesh.shape[a] for a in _axis_names(entry)) for entry in spec]
    # heads that the mesh does not divide are replicated: uneven shards would be padded
    even = all(side % n == 0 for side, n in zip(leaf.shape, parts))
    return NamedSharding(mesh, spec if even else PartitionSpec())

  return jax.tree_util.tree_map_with_path(leaf_sharding, params)


def _axis_names(entry) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)
