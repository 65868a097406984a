"""Visual test-time scaling via search, in JAX/Flax."""

__version__ = '0.1.0'
