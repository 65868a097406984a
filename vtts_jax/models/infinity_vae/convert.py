"""Infinity's tokenizer: from the state dict of the reference, saved as safetensors.

The released files are pickles, which are never opened here; README.md says how to save them anew.
"""

import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.infinity_vae import modeling

# their convolutions and norms are wrapped once: `x.conv.weight`, `x.norm.weight`
LEVEL = r'((?:en|de)coder\.(?:down|up)\.\d+)\.'
BLOCK = LEVEL + r'block\.(\d+)\.'
SIDE = r'((?:en|de)coder)\.'
RULES = [
  (BLOCK + r'(conv[12])\.conv\.weight', r'\1.resnets.\2.\3.kernel', 'conv'),
  (BLOCK + r'(norm[12])\.norm\.weight', r'\1.resnets.\2.\3.scale', ''),
  (BLOCK + r'(conv[12]|norm[12])\.(?:conv|norm)\.bias', r'\1.resnets.\2.\3.bias', ''),
  (BLOCK + r'nin_shortcut\.conv\.weight', r'\1.resnets.\2.conv_shortcut.kernel', 'conv'),
  (BLOCK + r'nin_shortcut\.conv\.bias', r'\1.resnets.\2.conv_shortcut.bias', ''),
  (LEVEL + r'((?:down|up)sample)\.conv\.conv\.weight', r'\1.\2.kernel', 'conv'),
  (LEVEL + r'((?:down|up)sample)\.conv\.conv\.bias', r'\1.\2.bias', ''),
  *[
    rule
    for theirs, ours in (('1', '0'), ('2', '1'))
    for rule in (
      (SIDE + rf'mid\.block_{theirs}\.(conv[12])\.conv\.weight',
       rf'\1.mid.resnets.{ours}.\2.kernel', 'conv'),
      (SIDE + rf'mid\.block_{theirs}\.(norm[12])\.norm\.weight',
       rf'\1.mid.resnets.{ours}.\2.scale', ''),
      (SIDE + rf'mid\.block_{theirs}\.(conv[12]|norm[12])\.(?:conv|norm)\.bias',
       rf'\1.mid.resnets.{ours}.\2.bias', ''),
    )
  ],
  (SIDE + r'(conv_in|conv_out)\.conv\.weight', r'\1.\2.kernel', 'conv'),
  (SIDE + r'norm_out\.norm\.weight', r'\1.norm_out.scale', ''),
  (SIDE + r'(conv_in|conv_out|norm_out)\.(?:conv|norm)\.bias', r'\1.\2.bias', ''),
  # powers of two
  (r'quantizer?\.lfq\.mask', None, ''),
]  # fmt: skip
# the decoder alone knows these names and leaves them
ENCODER = (r'encoder\..*', None, '')
SHARDING = []


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint off its tensors.

  Raises:
    ValueError: this is no such tokenizer.
  """
  names, shape = source.tensor_names(), source.shape_of
  try:
    levels = range(_count_parts(names, r'decoder\.up\.(\d+)\..*'))
    widths = [shape(f'decoder.up.{i}.block.0.conv1.conv.weight')[0] for i in levels]
    base = shape('decoder.conv_out.conv.weight')[1]
    channels = shape('decoder.conv_in.conv.weight')[1]
  except KeyError as error:
    raise ValueError(f'{source.where} is no tokenizer of Infinity: no {error.args[0]}') from error
  return modeling.Config(
    codebook_dim=channels, base_ch=base, ch_mult=tuple(width // base for width in widths),
    num_res_blocks=_count_parts(names, r'decoder\.up\.0\.block\.(\d+)\..*') - 1,
    downscale=2 ** sum(f'decoder.up.{i}.upsample.conv.conv.weight' in names for i in levels),
    encoder=part != 'decoder',
  )  # fmt: skip


def _count_parts(names, pattern):
  # numbers start at 0; -1 where no name matches counts 0
  return 1 + max((int(m[1]) for n in names if (m := re.fullmatch(pattern, n))), default=-1)


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  rules = RULES if config.encoder else [ENCODER, *RULES]
  return convert_weights(source, rules, template, dtype, sharding)
