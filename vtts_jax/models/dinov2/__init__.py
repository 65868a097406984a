"""DINOv2 is the model of `models/dino` with layer scale, registers and a larger grid."""

from vtts_jax.models.dino import convert as convert
from vtts_jax.models.dino import modeling as modeling
