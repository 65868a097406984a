"""The layout of CompVis' latent diffusion, as in FLUX's `ae.safetensors` and in the single files of
Stable Diffusion.

It is the same network as diffusers' `AutoencoderKL` under other names.
"""

import dataclasses
import re

# a name that only this layout has
MARK = 'decoder.mid.block_1.conv1.weight'
# constants of FLUX's code, which no file holds
FLUX = {'scaling_factor': 0.3611, 'shift_factor': 0.1159}
LEAD, NETWORK = 'first_stage_model.', 'model.diffusion_model.'
BESIDE = [  # a tensor of the network in a single file, and the factors of its autoencoder
  ('joint_blocks.0.x_block.attn.qkv.weight', {'scaling_factor': 1.5305, 'shift_factor': 0.0609}),
  ('label_emb.0.0.weight', {'scaling_factor': 0.13025}),  # SDXL
  ('input_blocks.0.0.weight', {'scaling_factor': 0.18215}),
]
_SIDE = r'((?:en|de)coder)\.'
NAMES = [  # name in the original -> in diffusers
  (_SIDE + r'(down|up)\.(\d+)\.block\.(\d+)\.(.*)', r'\1.\2_blocks.\3.resnets.\4.\5'),
  (_SIDE + r'(down|up)\.(\d+)\.(?:down|up)sample\.(.*)', r'\1.\2_blocks.\3.\2samplers.0.\4'),
  (_SIDE + r'mid\.block_1\.(.*)', r'\1.mid_block.resnets.0.\2'),
  (_SIDE + r'mid\.block_2\.(.*)', r'\1.mid_block.resnets.1.\2'),
  (_SIDE + r'mid\.attn_1\.norm\.(.*)', r'\1.mid_block.attentions.0.group_norm.\2'),
  (_SIDE + r'mid\.attn_1\.([qkv])\.(.*)', r'\1.mid_block.attentions.0.to_\2.\3'),
  (_SIDE + r'mid\.attn_1\.proj_out\.(.*)', r'\1.mid_block.attentions.0.to_out.0.\2'),
  (_SIDE + r'norm_out\.(.*)', r'\1.conv_norm_out.\2'),
]


def select_autoencoder(source):
  """Returns the autoencoder inside a single file of Stable Diffusion, with its factors; any other
  source as it is."""
  if f'{LEAD}{MARK}' not in source:
    return source
  factors = next((found for name, found in BESIDE if f'{NETWORK}{name}' in source), {})
  return source.select_prefix(LEAD, factors)


def known_factors(source) -> dict:
  """Returns FLUX's factors for an original file without quant convs; else none are known."""
  return FLUX if MARK in source and 'quant_conv.weight' not in source else {}


def diffusers_names(source):
  """Returns an original source under the names of diffusers, and any other source as it is."""
  if MARK not in source:
    return source
  ups = [int(m[1]) for m in (re.match(r'decoder\.up\.(\d+)\.', n) for n in source.header) if m]

  # the original counts the decoder's blocks from the pixels inwards, diffusers in their order
  def count_from_latents(match):
    return f'up_blocks.{max(ups) - int(match[1])}.'

  def rename(name):
    for pattern, target in NAMES:
      match = re.fullmatch(pattern, name)
      if match:
        name = match.expand(target).replace('nin_shortcut', 'conv_shortcut')
        break
    return re.sub(r'up_blocks\.(\d+)\.', count_from_latents, name)

  theirs = {rename(name): name for name in source.tensor_names()}
  header = {name: source.header[old] for name, old in theirs.items()}
  return dataclasses.replace(
    source, header=header, read=lambda name: source.read_tensor(theirs[name])
  )
