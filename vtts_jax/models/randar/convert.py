"""RandAR: from the released safetensors, whose names are LlamaGen's and one more."""

import numpy as np

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.llamagen import convert as llamagen
from vtts_jax.models.randar import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers

SHARDING = llamagen.SHARDING
VECTOR = 'pos_instruct_embeddings'
# every released model draws 256 pixels of 16 a token
TOKENS = 256


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint as `models.llamagen` does; `block_size` is 256 by default.

  Raises:
    ValueError: this is no RandAR.
  """
  if VECTOR not in source:
    raise ValueError(f'{source.where} is no RandAR: no {VECTOR}')
  return llamagen.config_of(source, part, {'block_size': TOKENS} | dict(source.config))


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  source = fuse_projections(stack_layers(source, 'layers'), ('w1', 'w3'), 'up')
  rules = [(VECTOR, 'instruction', np.ravel), *llamagen.make_rules(config)]
  return convert_weights(source, rules, template, dtype, sharding)
