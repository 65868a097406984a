"""VAR's tokenizer: from the state dict of the reference, saved as safetensors.

The released file is a pickle, which is never opened here; README.md says how to save it anew.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.var_vq import modeling


def _linear_kernel(weight):
  """1 x 1 convolution `[out, in, 1, 1]` -> `[in, out]`."""
  return weight[:, :, 0, 0].T


SIDE = r'((?:en|de)coder)\.'
ATTENTION = r'((?:en|de)coder\.(?:conv_blocks\.\d+\.attn\.\d+|mid\.1))\.'
RESNET = r'((?:en|de)coder\.(?:conv_blocks\.\d+\.res\.\d+|mid\.[02]))\.'
PHI = r'quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.'
RULES = [  # after `_name_as_ours`
  (ATTENTION + r'norm\.weight', r'\1.group_norm.scale', ''),
  (ATTENTION + r'norm\.bias', r'\1.group_norm.bias', ''),
  (ATTENTION + r'([qkv])\.weight', r'\1.\2.kernel', _linear_kernel),
  (ATTENTION + r'([qkv])\.bias', r'\1.\2.bias', ''),
  (ATTENTION + r'proj_out\.weight', r'\1.out.kernel', _linear_kernel),
  (ATTENTION + r'proj_out\.bias', r'\1.out.bias', ''),
  (RESNET + r'(norm[12])\.weight', r'\1.\2.scale', ''),
  (RESNET + r'(conv[12])\.weight', r'\1.\2.kernel', 'conv'),
  (RESNET + r'(norm[12]|conv[12])\.bias', r'\1.\2.bias', ''),
  (RESNET + r'nin_shortcut\.weight', r'\1.conv_shortcut.kernel', 'conv'),
  (RESNET + r'nin_shortcut\.bias', r'\1.conv_shortcut.bias', ''),
  (SIDE + r'conv_blocks\.(\d+)\.(?:down|up)sample\.conv\.weight', r'\1.samplers.\2.kernel', 'conv'),
  (SIDE + r'conv_blocks\.(\d+)\.(?:down|up)sample\.conv\.bias', r'\1.samplers.\2.bias', ''),
  (SIDE + r'norm_out\.weight', r'\1.norm_out.scale', ''),
  (SIDE + r'(conv_in|conv_out)\.weight', r'\1.\2.kernel', 'conv'),
  (SIDE + r'(conv_in|conv_out|norm_out)\.bias', r'\1.\2.bias', ''),
  (r'((?:post_)?quant_conv)\.weight', r'\1.kernel', 'conv'),
  (r'((?:post_)?quant_conv)\.bias', r'\1.bias', ''),
  (PHI + 'weight', r'phis.\1.kernel', 'conv'),
  (PHI + 'bias', r'phis.\1.bias', ''),
  # one for all scales
  (r'quantize\.quant_resi\.qresi\.weight', 'phis.0.kernel', 'conv'),
  (r'quantize\.quant_resi\.qresi\.bias', 'phis.0.bias', ''),
  (r'quantize\.embedding\.weight', 'codebook', ''),
  # counts of training
  (r'quantize\.ema_vocab_hit_SV', None, ''),
]
# the decoder alone knows these names and leaves them
ENCODER = (r'(encoder\..*|quant_conv\..*)', None, '')
SHARDING = []


def config_of(source, part: str = '', options: Mapping | None = None) -> modeling.Config:
  """Reads the config of a checkpoint.

  Shapes decide. What they do not tell is in `options` (the checkpoint's config by default), under
  the reference's names: `patch_nums` and `quant_resi`; without them they are the released ones of
  256 pixels.

  Raises:
    ValueError: this is no such tokenizer.
  """
  options = dict(source.config if options is None else options)
  names, shape = source.tensor_names(), source.shape_of
  try:
    levels = range(_count_parts(names, r'decoder\.up\.(\d+)\..*'))
    widths = [shape(f'decoder.up.{i}.block.0.conv1.weight')[0] for i in levels]
    ch = shape('decoder.conv_out.weight')[1]
    codes, latents = shape('quantize.embedding.weight')
    size = shape('post_quant_conv.weight')[-1]
  except KeyError as error:
    raise ValueError(f'{source.where} is no tokenizer of VAR: no {error.args[0]}') from error
  found = {'quant_resi': float(options['quant_resi'])} if 'quant_resi' in options else {}
  if 'patch_nums' in options:
    found['patch_nums'] = tuple(options['patch_nums'])
  return modeling.Config(
    codebook_size=codes, z_channels=latents, ch=ch, ch_mult=tuple(width // ch for width in widths),
    num_res_blocks=_count_parts(names, r'decoder\.up\.0\.block\.(\d+)\..*') - 1,
    phis=_count_parts(names, PHI + 'weight') or 1, quant_conv_size=size, encoder=part != 'decoder',
    **found,
  )  # fmt: skip


def _count_parts(names, pattern):
  # numbers start at 0; -1 where no name matches counts 0
  return 1 + max((int(m[1]) for n in names if (m := re.fullmatch(pattern, n))), default=-1)


def _name_as_ours(source, levels):
  """Returns a source with the names of `models.llamagen_vq`, q, k and v apart."""
  places, header = {}, {}

  def add(name, origin, thirds=None):
    (rows, *rest), dtype = source.header[origin]
    header[name] = ((rows if thirds is None else rows // 3, *rest), dtype)
    places[name] = origin, thirds

  for origin in source.tensor_names():
    name = re.sub(r'\.mid\.(block_1|attn_1|block_2)\.', _middle_name, origin)
    name = re.sub(r'^encoder\.down\.', 'encoder.conv_blocks.', name)
    # their decoder counts resolutions from the finest, ours from the coarsest
    name = re.sub(r'^decoder\.up\.(\d+)\.', lambda m: _level_name(m, levels), name)
    name = re.sub(r'(conv_blocks\.\d+)\.block\.', r'\1.res.', name)
    if '.qkv.' not in name:
      add(name, origin)
      continue
    for i, letter in enumerate('qkv'):
      add(name.replace('.qkv.', f'.{letter}.'), origin, i)

  def read(name):
    origin, thirds = places[name]
    array = source.read_tensor(origin)
    return array if thirds is None else np.split(array, 3)[thirds]

  return dataclasses.replace(source, header=header, read=read)


def _middle_name(match):
  return f'.mid.{("block_1", "attn_1", "block_2").index(match[1])}.'


def _level_name(match, levels):
  return f'decoder.conv_blocks.{levels - 1 - int(match[1])}.'


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  rules = RULES if config.encoder else [ENCODER, *RULES]
  source = _name_as_ours(source, len(config.ch_mult))
  return convert_weights(source, rules, template, dtype, sharding)
