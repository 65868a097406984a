"""Visual test-time scaling via search, in JAX/Flax. Importing this imports nothing else."""

import sys as _sys
import types as _types

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from vtts_jax import testing
  from vtts_jax.components import load
  from vtts_jax.core import Cost, Prompt
  from vtts_jax.engine.result import SearchResult
  from vtts_jax.engine.search import bill, search
  from vtts_jax.engine.sharding import make_mesh
  from vtts_jax.errors import ConfigError


class _SearchPackage(_types.ModuleType):
  """The folder `search/`, which can be called: `vtts.search(...)` is `engine.search.search`."""

  def __call__(self, *args, **options):
    from vtts_jax.engine.search import search

    return search(*args, **options)


class _Face(_types.ModuleType):
  """This module. The import system binds the folder `search` here, over the function."""

  def __setattr__(self, name, value):
    if name == 'search' and isinstance(value, _types.ModuleType):
      value.__class__ = _SearchPackage
    super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Face

__version__ = '0.2.0'
__all__ = [
  'ConfigError',
  'Cost',
  'Prompt',
  'SearchResult',
  'bill',
  'load',
  'make_mesh',
  'search',
  'testing',
]
