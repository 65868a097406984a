"""AutoencoderKL, from the diffusers layout with the old and the new names of the attention, and
from the original layout of CompVis and FLUX (`original`)."""

import re
from collections.abc import Mapping

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import modeling, original


def _attention_kernel(weight):
  """Turns `[out, in]`, or a 1 x 1 convolution `[out, in, 1, 1]` of old files, into `[in, out]`."""
  return weight.reshape(weight.shape[:2]).T


MIDDLE = r'((?:en|de)coder\.mid_block)\.attentions\.0'
RULES = [
  *[
    rule
    for name, ours in (('to_q|query', 'q'), ('to_k|key', 'k'), ('to_v|value', 'v'),
                       (r'to_out\.0|proj_attn', 'out'))
    for rule in (
      (rf'{MIDDLE}\.(?:{name})\.weight', rf'\1.attention.{ours}.kernel', _attention_kernel),
      (rf'{MIDDLE}\.(?:{name})\.bias', rf'\1.attention.{ours}.bias', ''),
    )
  ],
  (MIDDLE + r'\.group_norm\.weight', r'\1.attention.group_norm.scale', ''),
  (MIDDLE + r'\.group_norm\.bias', r'\1.attention.group_norm.bias', ''),
  (r'(.*)\.(down|up)samplers\.0\.conv\.weight', r'\1.\2sample.kernel', 'conv'),
  (r'(.*)\.(down|up)samplers\.0\.conv\.bias', r'\1.\2sample.bias', ''),
  (r'(.*(?:norm1|norm2|conv_norm_out))\.weight', r'\1.scale', ''),
  (r'(.*(?:conv1|conv2|conv_shortcut|conv_in|conv_out|quant_conv))\.weight', r'\1.kernel', 'conv'),
  (r'((?:(?:en|de)coder\..*)|(?:post_)?quant_conv)\.bias', r'\1.bias', ''),
]  # fmt: skip
# the decoder alone knows these names and leaves them
ENCODER = (r'(encoder\..*|quant_conv\..*)', None, '')
# convolutions of a VAE are small: every device holds them all
SHARDING = []


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file (of the autoencoder, or of a whole Stable Diffusion), a folder of weights, or the
  folder `vae` of a pipeline; errors as in `open_source`."""
  del part  # the encoder is read or left by `load_weights`
  return original.select_autoencoder(open_pipeline_part(weights, 'vae'))


def config_of(source, part: str = '', options: Mapping | None = None) -> modeling.Config:
  """Reads the config of a checkpoint.

  `scaling_factor` is no tensor. A diffusers config without one means 0.18215, and a checkpoint
  without a config leaves it None.

  Args:
    source: `checkpoints.Source`.
    part: '' or 'decoder'.
    options: the checkpoint's `config.json` by default; they decide, and tensors tell the rest.

  Raises:
    ValueError: there is no AutoencoderKL.
    ConfigError: an option that the port does not know.
  """
  options = original.known_factors(source) | dict(source.config if options is None else options)
  source = original.diffusers_names(source)
  kind = options.get('_class_name', 'AutoencoderKL')
  if kind != 'AutoencoderKL':
    raise ConfigError(f'_class_name={kind!r}: allowed is AutoencoderKL')
  if '_class_name' in options:
    options.setdefault('scaling_factor', 0.18215)
  # other kinds of blocks have other parameters: they must not be read as these
  for name, allowed in (
    ('act_fn', 'silu'), ('down_block_types', 'DownEncoderBlock2D'),
    ('up_block_types', 'UpDecoderBlock2D'),
  ):  # fmt: skip
    value = options.get(name, allowed)
    if {value} - {allowed} if isinstance(value, str) else set(value) - {allowed}:
      raise ConfigError(f'{name}={value!r}: allowed is {allowed!r}')
  shape, names, encoder = source.shape_of, source.tensor_names(), part != 'decoder'
  try:
    ups = _count_blocks(names, r'decoder\.up_blocks\.(\d+)\..*')
    found = {
      'latent_channels': shape('decoder.conv_in.weight')[1],
      'block_out_channels': tuple(
        shape(f'decoder.up_blocks.{i}.resnets.0.conv1.weight')[0] for i in reversed(range(ups))
      ),
      # the decoder has one layer more than the encoder, of which the config tells
      'layers_per_block': _count_blocks(names, r'decoder\.up_blocks\.0\.resnets\.(\d+)\..*') - 1,
      'out_channels': shape('decoder.conv_out.weight')[0],
      'use_quant_conv': 'quant_conv.weight' in names,
      'use_post_quant_conv': 'post_quant_conv.weight' in names,
      'mid_block_add_attention': any('mid_block.attentions' in n for n in names),
    }
    if encoder:
      found['in_channels'] = shape('encoder.conv_in.weight')[1]
  except KeyError as error:
    raise ValueError(f'{source.where} has no AutoencoderKL: it lacks {error.args[0]}') from error
  known = set(modeling.Config.__dataclass_fields__) - {'encoder'}
  found |= {k: v for k, v in options.items() if k in known and v is not None}
  found['block_out_channels'] = tuple(found['block_out_channels'])
  return modeling.Config(**found, encoder=encoder)


def _count_blocks(names, pattern):
  # numbers start at 0; -1 where no name matches counts 0
  return 1 + max((int(m[1]) for n in names if (m := re.fullmatch(pattern, n))), default=-1)


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`.

  `source.select_prefix(prefix)` cuts an autoencoder out of a larger model.
  """
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  rules = RULES if config.encoder else [ENCODER, *RULES]
  return convert_weights(original.diffusers_names(source), rules, template, dtype, sharding)
