"""Diffusion and flow generators: a stage is a group of denoising steps."""

from vtts_jax.generators.diffusion.base import DiffusionGenerator as DiffusionGenerator
from vtts_jax.generators.diffusion.base import State as State
