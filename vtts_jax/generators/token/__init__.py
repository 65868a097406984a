"""Autoregressive generators: a stage is a token."""

from vtts_jax.generators.token.base import State as State
from vtts_jax.generators.token.base import TokenGenerator as TokenGenerator
