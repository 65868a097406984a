"""TiTok: from the released safetensors or the state dict of the reference, saved as such."""

import math

import numpy as np

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.maskgit_vq import convert as maskgit_vq
from vtts_jax.models.stacked import stack_layers, transpose_kernel
from vtts_jax.models.titok import modeling

SHARDING = vit.SHARDING
# all sizes have heads of 64
HEAD = 64
BLOCK = {
  'norm_attn': 'ln_1', 'norm_ffn': 'ln_2', 'out': 'attn.out_proj', 'up': 'mlp.c_fc',
  'down': 'mlp.c_proj',
}  # fmt: skip


def _pointwise_kernel(weight):
  """1 x 1 convolution `[out, in, 1, 1]` -> `[in, out]`."""
  return weight[:, :, 0, 0].T


def _linear_rules(theirs, ours, op):
  return [(theirs + r'\.weight', f'{ours}.kernel', op), (theirs + r'\.bias', f'{ours}.bias', '')]


def _body_rules(side):
  lead, body = side + r'\.', f'{side}.body.'
  block = lead + r'transformer\.\*\.'
  return [
    (lead + 'class_embedding', body + 'token', np.ravel),
    (lead + 'positional_embedding', body + 'positions', ''),
    (lead + 'latent_token_positional_embedding', body + 'latent_positions', ''),
    (lead + r'ln_pre\.(weight|bias)', body + r'norm_before.\1', ''),
    (lead + r'ln_post\.(weight|bias)', body + r'norm_after.\1', ''),
    *vit.trunk_rules(block, body + 'trunk.', BLOCK),
    # torch's MultiheadAttention holds q, k, v as one tensor without a layer's name
    (block + r'attn\.in_proj_weight', body + 'trunk.blocks.attn.qkv.kernel', transpose_kernel),
    (block + r'attn\.in_proj_bias', body + 'trunk.blocks.attn.qkv.bias', ''),
  ]


ENCODER = [
  *_body_rules('encoder'),
  *_linear_rules(r'encoder\.patch_embed', 'encoder.embed', vit.patch_kernel),
  *_linear_rules(r'encoder\.conv_out', 'encoder.out', _pointwise_kernel),
  (r'latent_tokens', 'encoder.latents', ''),
]
DECODER = [
  *_body_rules('decoder'),
  *_linear_rules(r'decoder\.decoder_embed', 'decoder.embed', 'T'),
  (r'decoder\.mask_token', 'decoder.mask', np.ravel),
  *_linear_rules(r'decoder\.conv_out', 'decoder.smooth', 'conv'),
  (r'quantize\.embedding\.weight', 'codebook', ''),
  *maskgit_vq.network_rules('pixel_decoder', 'pixels.decoder'),
  (r'pixel_quantize\.embedding\.weight', 'pixels.codebook', ''),
]


def make_rules(config: modeling.Config):
  """Returns the key rules."""
  # the two layers after the trunk, or the one that gives pixels
  heads = {'0': 'up', '2': 'down'} if config.legacy else {'0': 'to_pixels'}
  rules = [
    rule
    for number, ours in heads.items()
    for rule in _linear_rules(rf'decoder\.ffn\.{number}', f'decoder.{ours}', _pointwise_kernel)
  ]
  left = [(r'encoder\..*|latent_tokens', None, '')]
  return [*rules, *DECODER, *(ENCODER if config.encoder else left)]


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint.

  Shapes decide. Whether codes lie on the unit sphere is `use_l2_norm` of the config.json, by
  default that of the released models; `heads` are 64 wide unless it says otherwise.

  Raises:
    ValueError: this is no TiTok, or one without the layers that make pixels.
  """
  option, source = source.find_option, stack_layers(source, 'transformer')
  try:
    # only the later models end in a convolution of pixels
    legacy = 'decoder.conv_out.weight' not in source
    trunks = {}
    for side in ('encoder', 'decoder'):
      layers, hidden, width = source.shape_of(f'{side}.transformer.*.mlp.c_fc.weight')
      # no tensor tells heads, and the released config names a size instead
      heads = option('heads', default=max(1, width // HEAD))
      trunks[f'{side}_trunk'] = vit.Config(width, layers, heads, hidden, 'gelu', modeling.EPS)
    patch = source.shape_of('encoder.patch_embed.weight')[-1]
    grid = math.isqrt(source.shape_of('decoder.positional_embedding')[0] - 1)
    codes, token_size = source.shape_of('quantize.embedding.weight')
    tokens = source.shape_of('latent_tokens')[0]
    pixels = (
      maskgit_vq.decoder_config(source, 'pixel_decoder', 'pixel_quantize') if legacy else None
    )
  except KeyError as error:
    raise ValueError(f'{source.where} is no complete TiTok: no {error.args[0]}') from error
  return modeling.Config(
    **trunks, size=grid * patch, patch=patch, tokens=tokens, token_size=token_size, codes=codes,
    unit_sphere=option('use_l2_norm', default=legacy), legacy=legacy, pixels=pixels,
    encoder=part != 'decoder',
  )  # fmt: skip


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  source = stack_layers(source, 'transformer')
  return convert_weights(source, make_rules(config), template, dtype, sharding)
