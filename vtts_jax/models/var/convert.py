"""VAR: from the state dict of the reference, saved as safetensors.

The released files are pickles, which are never opened here; README.md says how to save them anew.
"""

import math
from collections.abc import Mapping

import numpy as np
from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.stacked import stack_layers, transpose_kernel
from vtts_jax.models.var import modeling
from vtts_jax.models.var.attention import split_qkv
from vtts_jax.models.var.modeling import Config

BLOCK = r'blocks\.\*\.'
# Megatron's split of the stacked blocks: heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/attn/qkv/kernel', PartitionSpec(None, None, None, 'model')),
  (r'blocks/attn/([qv]_bias|log_scale)', PartitionSpec(None, 'model')),
  (r'blocks/ffn/up/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/ffn/up/bias', PartitionSpec(None, 'model')),
  (r'blocks/(attn/out|ffn/down)/kernel', PartitionSpec(None, 'model', None)),
]


def _split_parts(parts):
  """Weight `[..., parts * D, in]` -> kernel `[..., in, parts, D]`."""

  def split(weight):
    kernel = transpose_kernel(weight)
    return kernel.reshape(*kernel.shape[:-1], parts, -1)

  return split


def _split_bias(parts):
  return lambda bias: bias.reshape(*bias.shape[:-1], parts, -1)


RULES = [
  (r'class_emb\.weight', 'classes', ''),
  (r'pos_start', 'start', lambda x: x[0]),
  (r'pos_1LC', 'positions', lambda x: x[0]),
  (r'lvl_embed\.weight', 'levels', ''),
  (r'word_embed\.weight', 'embedding.kernel', 'T'),
  (r'word_embed\.bias', 'embedding.bias', ''),
  (BLOCK + r'attn\.mat_qkv\.weight', 'blocks.attn.qkv.kernel', split_qkv),
  (BLOCK + r'attn\.(q_bias|v_bias)', r'blocks.attn.\1', ''),
  (BLOCK + r'attn\.scale_mul_1H11', 'blocks.attn.log_scale', lambda x: x.reshape(len(x), -1)),
  (BLOCK + r'attn\.proj\.weight', 'blocks.attn.out.kernel', transpose_kernel),
  (BLOCK + r'attn\.proj\.bias', 'blocks.attn.out.bias', ''),
  (BLOCK + r'ffn\.fc1\.weight', 'blocks.ffn.up.kernel', transpose_kernel),
  (BLOCK + r'ffn\.fc1\.bias', 'blocks.ffn.up.bias', ''),
  (BLOCK + r'ffn\.fc2\.weight', 'blocks.ffn.down.kernel', transpose_kernel),
  (BLOCK + r'ffn\.fc2\.bias', 'blocks.ffn.down.bias', ''),
  # a file has either one modulation a layer, or a shared one and offsets
  (BLOCK + r'ada_lin\.1\.weight', 'blocks.adaln.kernel', _split_parts(6)),
  (BLOCK + r'ada_lin\.1\.bias', 'blocks.adaln.bias', _split_bias(6)),
  (BLOCK + r'ada_gss', 'blocks.offset', lambda x: x[:, 0, 0]),
  (r'shared_ada_lin\.1\.weight', 'adaln.kernel', _split_parts(6)),
  (r'shared_ada_lin\.1\.bias', 'adaln.bias', _split_bias(6)),
  (r'head_nm\.ada_lin\.1\.weight', 'head_adaln.kernel', _split_parts(2)),
  (r'head_nm\.ada_lin\.1\.bias', 'head_adaln.bias', _split_bias(2)),
  (r'head\.weight', 'head.kernel', 'T'),
  (r'head\.bias', 'head.bias', ''),
  # buffers: which token is of which scale, the mask of training, the bias that keys do not have
  (r'lvl_1L|attn_bias_for_masking', None, ''),
  (BLOCK + r'attn\.zero_k_bias', None, ''),
]


def config_of(source, part: str = '', options: Mapping | None = None) -> Config:
  """Reads the config of a checkpoint.

  Shapes decide, and the buffer `lvl_1L` gives the scales. What is not there is in `options` (the
  checkpoint's config by default), under the reference's names: `patch_nums` where a file has no
  buffers, and `num_heads` where attention is not cosine (a head is 64 wide by default); `norm_eps`.

  Raises:
    ValueError: this is no VAR, or its scales are told by nothing.
  """
  del part
  options = dict(source.config if options is None else options)
  source = stack_layers(source)
  block, scale = 'blocks.*.', 'blocks.*.attn.scale_mul_1H11'
  names = (
    'word_embed.weight', f'{block}attn.mat_qkv.weight', f'{block}ffn.fc1.weight',
    'class_emb.weight', 'head.weight',
  )  # fmt: skip
  missing = [name for name in names if name not in source]
  if missing:
    raise ValueError(f'{source.where} is no VAR: no {", ".join(missing)}')
  (width, channels), (layers, *_), (_, hidden, _), (classes, _), (codes, _) = map(
    source.shape_of, names
  )
  # the scale of a head is learned with cosine attention only
  cosine = scale in source
  heads = math.prod(source.shape_of(scale)[1:]) if cosine else options.get('num_heads', width // 64)
  if 'lvl_1L' in source:
    sides = np.sqrt(np.bincount(source.read_tensor('lvl_1L').reshape(-1)))
    patch_nums = sides.round().astype(int).tolist()
  elif 'patch_nums' in options:
    patch_nums = options['patch_nums']
  else:
    raise ValueError(f'{source.where}: neither lvl_1L nor the config tells patch_nums')
  return Config(
    width=width, layers=layers, heads=heads, hidden=hidden, codes=codes, channels=channels,
    classes=classes - 1, patch_nums=tuple(patch_nums), cosine=cosine,
    shared_adaln='shared_ada_lin.1.weight' in source, eps=float(options.get('norm_eps', 1e-6)),
  )  # fmt: skip


def load_weights(source, config: Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  return convert_weights(stack_layers(source), RULES, template, dtype, sharding)
