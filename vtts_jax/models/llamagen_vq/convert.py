"""LlamaGen's tokenizer: from the state dict of the reference, saved as safetensors."""

import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.llamagen_vq import modeling


def _attention_kernel(weight):
  """1 x 1 convolution `[out, in, 1, 1]` -> `[in, out]`."""
  return weight[:, :, 0, 0].T


SIDE = r'((?:en|de)coder)\.'
ATTENTION = r'((?:en|de)coder\.(?:conv_blocks\.\d+\.attn\.\d+|mid\.1))\.'
RESNET = r'((?:en|de)coder\.(?:conv_blocks\.\d+\.res\.\d+|mid\.[02]))\.'
RULES = [
  (ATTENTION + r'norm\.weight', r'\1.group_norm.scale', ''),
  (ATTENTION + r'norm\.bias', r'\1.group_norm.bias', ''),
  (ATTENTION + r'([qkv])\.weight', r'\1.\2.kernel', _attention_kernel),
  (ATTENTION + r'([qkv])\.bias', r'\1.\2.bias', ''),
  (ATTENTION + r'proj_out\.weight', r'\1.out.kernel', _attention_kernel),
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
  (r'quantize\.embedding\.weight', 'codebook', ''),
  # counts of training
  (r'quantize\.codebook_used', None, ''),
]
SHARDING = []


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint off its shapes.

  Raises:
    ValueError: this is no such tokenizer.
  """
  del part
  names, shape = source.tensor_names(), source.shape_of
  try:
    levels = range(_count_blocks(names, r'encoder\.conv_blocks\.(\d+)\..*'))
    widths = [shape(f'encoder.conv_blocks.{i}.res.0.conv1.weight')[0] for i in levels]
    ch = shape('encoder.conv_in.weight')[0]
    codes, width = shape('quantize.embedding.weight')
    latents = shape('post_quant_conv.weight')[0]
  except KeyError as error:
    raise ValueError(f'{source.where} is no VQ tokenizer: it lacks {error.args[0]}') from error
  return modeling.Config(
    codebook_size=codes, codebook_embed_dim=width, ch=ch,
    ch_mult=tuple(width // ch for width in widths),
    num_res_blocks=_count_blocks(names, r'encoder\.conv_blocks\.0\.res\.(\d+)\..*'),
    z_channels=latents,
  )  # fmt: skip


def _count_blocks(names, pattern):
  return 1 + max((int(m[1]) for n in names if (m := re.fullmatch(pattern, n))), default=-1)


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  return convert_weights(source, RULES, template, dtype, sharding)
