"""Visual test-time scaling via search, in JAX/Flax. Importing this imports nothing else."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from vtts_jax import testing
  from vtts_jax.components import load
  from vtts_jax.core import Cost, Prompt
  from vtts_jax.engine.result import SearchResult
  from vtts_jax.engine.search import bill, search
  from vtts_jax.engine.sharding import make_mesh
  from vtts_jax.errors import ConfigError

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
