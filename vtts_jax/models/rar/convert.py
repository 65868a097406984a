"""RAR: from the state dict of the reference, saved as safetensors.

The released files are pickles, which are never opened here; README.md says how to save them anew.
"""

import numpy as np
from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.rar import modeling
from vtts_jax.models.stacked import stack_layers, transpose_kernel

BLOCK = r'blocks\.\*\.'
# Megatron's split of the stacked blocks: heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/attn/qkv/kernel', PartitionSpec(None, None, None, 'model')),
  (r'blocks/attn/qkv/bias', PartitionSpec(None, None, 'model')),
  (r'blocks/(ffn/up|modulation)/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/(ffn/up|modulation)/bias', PartitionSpec(None, 'model')),
  (r'blocks/(attn/out|ffn/down)/kernel', PartitionSpec(None, 'model', None)),
]


def _drop_batch(array):
  """`[1, rows, D]` -> `[rows, D]`."""
  return array[0]


def _split_kernel(weight):
  """`[L, 3 D, D]` -> `[L, D, 3, D]`."""
  L, _, inner = weight.shape
  return transpose_kernel(weight).reshape(L, inner, 3, -1)


def _split_bias(bias):
  """`[L, 3 D]` -> `[L, 3, D]`."""
  return bias.reshape(len(bias), 3, -1)


def _layer_rules(theirs, ours):
  return [
    (theirs + r'\.weight', ours + '.kernel', transpose_kernel),
    (theirs + r'\.bias', ours + '.bias', ''),
  ]


RULES = [  # after `stack_layers`
  (r'cls_token', 'begin', np.ravel),
  (r'embeddings\.weight', 'embedding', ''),
  (r'pos_embed', 'positions', _drop_batch),
  (r'target_aware_pos_embed', 'next_positions', _drop_batch),
  (r'timesteps_embeddings', 'steps', _drop_batch),
  (BLOCK + r'norm1\.(weight|bias)', r'blocks.norm_attn.\1', ''),
  (BLOCK + r'norm2\.(weight|bias)', r'blocks.norm_ffn.\1', ''),
  (BLOCK + r'attn\.qkv\.weight', 'blocks.attn.qkv.kernel', _split_kernel),
  (BLOCK + r'attn\.qkv\.bias', 'blocks.attn.qkv.bias', _split_bias),
  (BLOCK + r'attn\.([qk])_norm\.(weight|bias)', r'blocks.attn.norm_\1.\2', ''),
  *_layer_rules(BLOCK + r'attn\.proj', 'blocks.attn.out'),
  *_layer_rules(BLOCK + r'mlp\.fc1', 'blocks.ffn.up'),
  *_layer_rules(BLOCK + r'mlp\.fc2', 'blocks.ffn.down'),
  *_layer_rules(BLOCK + r'adaLN_modulation\.1', 'blocks.modulation'),
  *_layer_rules(r'adaln_before_head\.adaLN_modulation\.1', 'head_modulation'),
  *_layer_rules(r'lm_head', 'head'),
  # a table of old files
  (r'attn_mask', None, ''),
]


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint off its shapes.

  Raises:
    ValueError: this is no RAR.
  """
  del part
  source = stack_layers(source)
  try:
    # norms of queries are as wide as a head, so that shapes tell everything
    codes, width = source.shape_of('lm_head.weight')
    layers, hidden, _ = source.shape_of('blocks.*.mlp.fc1.weight')
    _, head = source.shape_of('blocks.*.attn.q_norm.weight')
    rows = source.shape_of('embeddings.weight')[0]
    # the tables have rows that no picture uses
    tokens = source.shape_of('target_aware_pos_embed')[1] - modeling.SPARE_POSITIONS
  except KeyError as error:
    raise ValueError(f'{source.where} is no RAR: no {error.args[0]}') from error
  return modeling.Config(
    width=width, layers=layers, heads=width // head, hidden=hidden, tokens=tokens, codes=codes,
    classes=rows - codes - 2,
  )  # fmt: skip


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  return convert_weights(stack_layers(source), RULES, template, dtype, sharding)
