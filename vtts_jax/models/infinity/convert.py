"""Infinity: from the state dict of the reference, saved as safetensors.

The released files are pickles (2B) and shards (8B); pickles are never opened here, and README.md
says how to save them anew.
"""

import dataclasses
import math
import re

import numpy as np
from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.infinity import modeling
from vtts_jax.models.infinity.modeling import Config
from vtts_jax.models.stacked import stack_layers, transpose_kernel
from vtts_jax.models.var.attention import split_qkv

BLOCK = r'blocks\.\*\.'
CHUNK = re.compile(r'block_chunks\.(\d+)\.module\.(\d+)\.')
SCALE = 'blocks.*.sa.scale_mul_1H11'
# Megatron's split of the stacked blocks: heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/(attn/qkv|cross/kv)/kernel', PartitionSpec(None, None, None, 'model')),
  (r'blocks/(attn/[qv]_bias|attn/log_scale|cross/v_bias)', PartitionSpec(None, 'model')),
  (r'blocks/(cross/query|ffn/up)/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/(cross/query|ffn/up)/bias', PartitionSpec(None, 'model')),
  (r'blocks/(attn/out|cross/out|ffn/down)/kernel', PartitionSpec(None, 'model', None)),
]


def _split_parts(parts):
  """Weight `[..., parts * D, in]` -> kernel `[..., in, parts, D]`."""

  def split(weight):
    kernel = transpose_kernel(weight)
    return kernel.reshape(*kernel.shape[:-1], parts, -1)

  return split


def _split_bias(parts):
  return lambda bias: bias.reshape(parts, -1)


def _gather_pairs(heads):
  """Puts the channels that the reference rotates as pairs (0, 1), (2, 3) .. at i and i + d / 2 of
  their head, in the last axis. Scores do not change, and halves are cheaper to take than pairs."""

  def gather(x):
    pairs = x.reshape(*x.shape[:-1], heads, -1, 2)
    return pairs.swapaxes(-1, -2).reshape(x.shape)

  return gather


def _split_rotated(heads):
  """The fused kernel with the channels of queries and keys gathered, those of values not."""
  gather = _gather_pairs(heads)

  def split(weight):
    q, k, v = np.moveaxis(split_qkv(weight), 2, 0)
    return np.stack([gather(q), gather(k), v], 2)

  return split


def make_rules(config: Config):
  """Returns the key rules, which depend on the number of heads."""
  return [  # after `_join_chunks`
    (r'cfg_uncond', 'null_text', ''),
    (r'text_norm\.weight', 'text_norm', ''),
    (r'text_proj_for_sos\.ca\.mat_q', 'pool.query', lambda x: x.reshape(-1)),
    (r'text_proj_for_sos\.ca\.mat_kv\.weight', 'pool.kv.kernel', _split_parts(2)),
    (r'text_proj_for_sos\.ca\.v_bias', 'pool.v_bias', ''),
    (r'text_proj_for_sos\.ca\.proj\.weight', 'pool.out.kernel', 'T'),
    (r'text_proj_for_sos\.ca\.proj\.bias', 'pool.out.bias', ''),
    (r'text_proj_for_ca\.0\.weight', 'text_in.kernel', 'T'),
    (r'text_proj_for_ca\.0\.bias', 'text_in.bias', ''),
    (r'text_proj_for_ca\.2\.weight', 'text_out.kernel', 'T'),
    (r'text_proj_for_ca\.2\.bias', 'text_out.bias', ''),
    (r'pos_start', 'start', lambda x: x.reshape(-1)),
    (r'lvl_embed\.weight', 'levels', ''),
    (r'word_embed\.weight', 'embedding.kernel', 'T'),
    (r'word_embed\.bias', 'embedding.bias', ''),
    # six parts in the order gates, scales, shifts, each for attention and feed-forward
    (r'shared_ada_lin\.1\.weight', 'adaln.kernel', _split_parts(6)),
    (r'shared_ada_lin\.1\.bias', 'adaln.bias', _split_bias(6)),
    (r'head_nm\.ada_lin\.1\.weight', 'head_adaln.kernel', _split_parts(2)),
    (r'head_nm\.ada_lin\.1\.bias', 'head_adaln.bias', _split_bias(2)),
    (r'head\.weight', 'head.kernel', 'T'),
    (r'head\.bias', 'head.bias', ''),
    (BLOCK + r'ada_gss', 'blocks.offset', lambda x: x[:, 0, 0]),
    (BLOCK + r'sa\.mat_qkv\.weight', 'blocks.attn.qkv.kernel', _split_rotated(config.heads)),
    # keys have no bias; that of queries turns with its channels
    (BLOCK + r'sa\.q_bias', 'blocks.attn.q_bias', _gather_pairs(config.heads)),
    (BLOCK + r'sa\.v_bias', 'blocks.attn.v_bias', ''),
    (BLOCK + r'sa\.scale_mul_1H11', 'blocks.attn.log_scale', lambda x: x.reshape(len(x), -1)),
    (BLOCK + r'sa\.proj\.weight', 'blocks.attn.out.kernel', transpose_kernel),
    (BLOCK + r'sa\.proj\.bias', 'blocks.attn.out.bias', ''),
    (BLOCK + r'ca_norm\.(weight|bias)', r'blocks.cross_norm.\1', ''),
    (BLOCK + r'ca\.mat_q\.weight', 'blocks.cross.query.kernel', transpose_kernel),
    (BLOCK + r'ca\.mat_q\.bias', 'blocks.cross.query.bias', ''),
    (BLOCK + r'ca\.mat_kv\.weight', 'blocks.cross.kv.kernel', _split_parts(2)),
    (BLOCK + r'ca\.v_bias', 'blocks.cross.v_bias', ''),
    (BLOCK + r'ca\.proj\.weight', 'blocks.cross.out.kernel', transpose_kernel),
    (BLOCK + r'ca\.proj\.bias', 'blocks.cross.out.bias', ''),
    (BLOCK + r'ffn\.fc1\.weight', 'blocks.ffn.up.kernel', transpose_kernel),
    (BLOCK + r'ffn\.fc1\.bias', 'blocks.ffn.up.bias', ''),
    (BLOCK + r'ffn\.fc2\.weight', 'blocks.ffn.down.kernel', transpose_kernel),
    (BLOCK + r'ffn\.fc2\.bias', 'blocks.ffn.down.bias', ''),
    # the bias that keys do not have
    (r'.*\.zero_k_bias', None, ''),
  ]


def _join_chunks(source):
  """Returns a source in which the blocks have one number, and layers are stacked.

  The reference keeps blocks in chunks of equal length, `block_chunks.0.module.3`.
  """
  found = [m for name in source.tensor_names() if (m := CHUNK.match(name))]
  length = 1 + max((int(m[2]) for m in found), default=0)

  def our_name(name):
    return CHUNK.sub(lambda m: f'blocks.{int(m[1]) * length + int(m[2])}.', name)

  places = {our_name(name): name for name in source.tensor_names()}
  header = {name: source.header[origin] for name, origin in places.items()}
  read = lambda name: source.read_tensor(places[name])
  return stack_layers(dataclasses.replace(source, header=header, read=read))


def config_of(source, part: str = '') -> Config:
  """Reads the config of a checkpoint off its tensors.

  Raises:
    ValueError: this is no Infinity.
  """
  del part
  source = _join_chunks(source)
  names = (
    'word_embed.weight', 'cfg_uncond', 'lvl_embed.weight', 'text_proj_for_sos.ca.mat_q', SCALE,
    'blocks.*.ffn.fc1.weight',
  )  # fmt: skip
  missing = [name for name in names if name not in source]
  if missing:
    raise ValueError(f'{source.where} is no Infinity: no {", ".join(missing)}')
  (width, bits), (words, text_width), (levels, _), (_, pool_heads, _), scale, ffn = map(
    source.shape_of, names
  )
  return Config(
    width=width, layers=ffn[0], heads=math.prod(scale[1:]), hidden=ffn[1], bits=bits, words=words,
    text_width=text_width, pool_heads=pool_heads, levels=levels,
  )  # fmt: skip


def load_weights(source, config: Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  return convert_weights(_join_chunks(source), make_rules(config), template, dtype, sharding)
