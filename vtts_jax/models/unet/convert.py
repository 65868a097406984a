"""UNet: from the diffusers layout and from original single files (`model.diffusion_model.*`)."""

import dataclasses
import re
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel
from vtts_jax.models.unet import modeling


def _projection_kernel(weight):
  """`[out, in]`, or SD 1.5's 1 x 1 convolution `[out, in, 1, 1]`, -> `[in, out]`."""
  return weight.reshape(weight.shape[:2]).T


def _split_kernel(parts):
  """`[L, parts * out, in]` -> `[L, in, parts, out]`."""

  def split(weight):
    L, rows, inner = weight.shape
    return transpose_kernel(weight).reshape(L, inner, parts, rows // parts)

  return split


def _split_bias(bias):
  """`[L, 2 * out]` -> `[L, 2, out]`."""
  return bias.reshape(len(bias), 2, -1)


ATTENTION, RESNET = r'(\w+(?:\.\d+)?\.attentions\.\d+)\.', r'(\w+(?:\.\d+)?\.resnets\.\d+\.'
BLOCK = ATTENTION + r'transformer_blocks\.\*\.'
RULES = [  # after `_join_tensors`
  (r'(conv_in|conv_out)\.weight', r'\1.kernel', 'conv'),
  (r'(conv_in|conv_out|conv_norm_out)\.bias', r'\1.bias', ''),
  (r'conv_norm_out\.weight', 'conv_norm_out.scale', ''),
  (r'((?:time|add)_embedding\.linear_[12])\.weight', r'\1.kernel', 'T'),
  (r'((?:time|add)_embedding\.linear_[12])\.bias', r'\1.bias', ''),
  (RESNET + r'norm[12])\.weight', r'\1.scale', ''),
  (RESNET + r'(?:conv1|conv2|conv_shortcut))\.weight', r'\1.kernel', 'conv'),
  (RESNET + r'time_emb_proj)\.weight', r'\1.kernel', 'T'),
  (RESNET + r'\w+)\.bias', r'\1.bias', ''),
  (r'(\w+\.\d+)\.(down|up)samplers\.0\.conv\.weight', r'\1.\2sample.kernel', 'conv'),
  (r'(\w+\.\d+)\.(down|up)samplers\.0\.conv\.bias', r'\1.\2sample.bias', ''),
  (ATTENTION + r'norm\.weight', r'\1.norm.scale', ''),
  (ATTENTION + r'proj_(in|out)\.weight', r'\1.proj_\2.kernel', _projection_kernel),
  (ATTENTION + r'(norm|proj_in|proj_out)\.bias', r'\1.\2.bias', ''),
  (BLOCK + r'(norm[123])\.(weight|bias)', r'\1.blocks.\2.\3', ''),
  (BLOCK + r'attn1\.qkv\.weight', r'\1.blocks.attn1.qkv.kernel', _split_kernel(3)),
  (BLOCK + r'attn2\.to_q\.weight', r'\1.blocks.attn2.q.kernel', transpose_kernel),
  (BLOCK + r'attn2\.kv\.weight', r'\1.blocks.attn2.kv.kernel', _split_kernel(2)),
  (BLOCK + r'(attn[12])\.to_out\.0\.weight', r'\1.blocks.\2.out.kernel', transpose_kernel),
  (BLOCK + r'(attn[12])\.to_out\.0\.bias', r'\1.blocks.\2.out.bias', ''),
  (BLOCK + r'ff\.net\.0\.proj\.weight', r'\1.blocks.ff.up.kernel', _split_kernel(2)),
  (BLOCK + r'ff\.net\.0\.proj\.bias', r'\1.blocks.ff.up.bias', _split_bias),
  (BLOCK + r'ff\.net\.2\.weight', r'\1.blocks.ff.down.kernel', transpose_kernel),
  (BLOCK + r'ff\.net\.2\.bias', r'\1.blocks.ff.down.bias', ''),
]
# Megatron's split: heads, hidden channels and the channels between a residual block's two
# convolutions lie on 'model', so that a branch needs one all-reduce
SHARDING = [
  (r'blocks/(attn1/qkv|attn2/kv|ff/up)/kernel', PartitionSpec(None, None, None, 'model')),
  (r'blocks/attn2/q/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/ff/up/bias', PartitionSpec(None, None, 'model')),
  (r'blocks/(attn\d/out|ff/down)/kernel', PartitionSpec(None, 'model', None)),
  (r'resnets/\d+/conv1/kernel', PartitionSpec(None, None, None, 'model')),
  (r'resnets/\d+/conv2/kernel', PartitionSpec(None, None, 'model', None)),
  (r'resnets/\d+/time_emb_proj/kernel', PartitionSpec(None, 'model')),
  (r'resnets/\d+/(conv1/bias|time_emb_proj/bias|norm2/(scale|bias))', PartitionSpec('model')),
]
# what the port knows of options that no tensor shows; None and a missing option are allowed, too
KNOWN = {
  '_class_name': ('UNet2DConditionModel',),
  'act_fn': ('silu', 'swish'),
  'addition_embed_type': ('text_time',),
  'attention_type': ('default',),
  'center_input_sample': (False,),
  'class_embed_type': (),
  'conv_in_kernel': (3,),
  'conv_out_kernel': (3,),
  'downsample_padding': (1,),
  'dual_cross_attention': (False,),
  'encoder_hid_dim_type': (),
  'flip_sin_to_cos': (True,),
  'freq_shift': (0,),
  'mid_block_scale_factor': (1,),
  'mid_block_type': ('UNetMidBlock2DCrossAttn',),
  'num_attention_heads': (),
  'only_cross_attention': (False,),
  'resnet_out_scale_factor': (1,),
  'resnet_skip_time_act': (False,),
  'resnet_time_scale_shift': ('default',),
  'time_cond_proj_dim': (),
  'time_embedding_act_fn': (),
  'time_embedding_type': ('positional',),
  'timestep_post_act': (),
}


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file, a folder of weights, or the folder `unet` of a pipeline; errors as in
  `open_source`."""
  del part  # it has no parts
  return open_pipeline_part(weights, 'unet')


def config_of(source, part: str = '', options: Mapping | None = None) -> modeling.Config:
  """The config of a checkpoint: sizes are read off the tensors, and what no tensor shows (heads,
  groups, epsilon) is what `options` say (its `config.json` by default).

  A file without a config is an original single file: with text of 768 it is SD 1 and has 8 heads,
  the others have heads of 64 channels.

  Raises:
    ValueError: there is no UNet.
    ConfigError: an option that the port does not know.
  """
  del part
  options = dict(source.config if options is None else options)
  for name, allowed in KNOWN.items():
    value = options.get(name)
    if value is not None and value not in allowed:
      raise ConfigError(f'{name}={value!r}: allowed is {" or ".join(map(repr, (None, *allowed)))}')
  source = translate_names(source)
  names, shape = source.tensor_names(), source.shape_of
  try:
    levels = range(_count_blocks(names, r'down_blocks\.(\d+)\..*'))
    widths = tuple(shape(f'down_blocks.{i}.resnets.0.conv1.weight')[0] for i in levels)
    layers = _count_blocks(names, r'down_blocks\.0\.resnets\.(\d+)\..*')
    depths = [
      _count_blocks(names, rf'{at}\.attentions\.0\.transformer_blocks\.(\d+)\..*')
      for at in (*(rf'down_blocks\.{i}' for i in levels), 'mid_block')
    ]
    text = shape('mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight')[1]
    added = 'add_embedding.linear_1.weight'
    found = {
      'in_channels': shape('conv_in.weight')[1],
      'out_channels': shape('conv_out.weight')[0],
      'projection_class_embeddings_input_dim': shape(added)[1] if added in source else 0,
    }
  except KeyError as error:
    raise ValueError(f'{source.where} has no UNet: it lacks {error.args[0]}') from error
  if found['projection_class_embeddings_input_dim']:
    found['addition_time_embed_dim'] = options.get('addition_time_embed_dim') or 256
  for name in ('sample_size', 'norm_num_groups', 'norm_eps'):
    if options.get(name) is not None:
      found[name] = options[name]
  # diffusers' own default is 8, whatever the width
  heads = options.get('attention_head_dim', 8 if '_class_name' in options else None)
  if heads is None:
    heads = (8,) * len(widths) if text == 768 else tuple(width // 64 for width in widths)
  return modeling.Config(
    block_out_channels=widths,
    has_attention=tuple(depth > 0 for depth in depths[:-1]),
    attention_head_dim=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
    # a resolution without transformers has 1, the default; the last one speaks for the middle
    transformer_layers_per_block=(*(depth or 1 for depth in depths[:-2]), depths[-1]),
    layers_per_block=layers,
    cross_attention_dim=text,
    **found,
  )


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  source = _join_tensors(translate_names(source))
  return convert_weights(source, RULES, template, dtype, sharding)


def _join_tensors(source):
  """Transformer layers stacked, projections of one input fused."""
  source = stack_layers(source, 'transformer_blocks')
  own = tuple(f'attn1.to_{x}' for x in 'qkv')
  source = fuse_projections(source, own, 'attn1.qkv')
  return fuse_projections(source, ('attn2.to_k', 'attn2.to_v'), 'attn2.kv')


def _count_blocks(names, pattern):
  return 1 + max((int(m[1]) for n in names if (m := re.fullmatch(pattern, n))), default=-1)


# ---------------------------------------------------------------------------- original single files

LEAD = 'model.diffusion_model.'
ENDS = {
  'input_blocks.0.0': 'conv_in', 'time_embed.0': 'time_embedding.linear_1',
  'time_embed.2': 'time_embedding.linear_2', 'label_emb.0.0': 'add_embedding.linear_1',
  'label_emb.0.2': 'add_embedding.linear_2', 'out.0': 'conv_norm_out', 'out.2': 'conv_out',
}  # fmt: skip
PARTS_OF_RESNET = {
  'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'time_emb_proj',
  'out_layers.0': 'norm2', 'out_layers.3': 'conv2', 'skip_connection': 'conv_shortcut',
}  # fmt: skip


def translate_names(source):
  """Returns an original checkpoint under the names of diffusers, any other as it is."""
  if f'{LEAD}input_blocks.0.0.weight' in source:
    source = source.select_prefix(LEAD)  # beside it are the autoencoder and the text encoders
  if 'input_blocks.0.0.weight' not in source:
    return source
  # the first downsampling follows conv_in and the pairs of one resolution
  ends = [int(m[1]) for n in source.header if (m := re.match(r'input_blocks\.(\d+)\.0\.op\.', n))]
  numbers = [int(m[1]) for n in source.header if (m := re.match(r'input_blocks\.(\d+)\.', n))]
  layers = min(ends) - 1 if ends else max(numbers)
  old = {_translate_name(name, layers): name for name in source.header}
  header = {name: source.header[was] for name, was in old.items()}
  read = source.read
  return dataclasses.replace(source, header=header, read=lambda name: read(old[name]))


def _translate_name(name, layers):
  """An unknown name is returned as it is, so that the conversion reports it."""
  stem, _, kind = name.rpartition('.')
  if stem in ENDS:
    return f'{ENDS[stem]}.{kind}'
  match = re.fullmatch(r'middle_block\.([012])\.(.+)', stem)
  if match:
    at = int(match[1])
    what = 'attentions.0' if at == 1 else f'resnets.{at // 2}'
    return f'mid_block.{what}.{PARTS_OF_RESNET.get(match[2], match[2])}.{kind}'
  match = re.fullmatch(r'(in|out)put_blocks\.(\d+)\.\d\.(.+)', stem)
  if not match:
    return name
  down, rest = match[1] == 'in', match[3]
  # conv_in is block 0 on the way down; a downsampling is a block of its own, an upsampling is not
  level, i = divmod(int(match[2]) - down, layers + 1)
  if rest in ('op', 'conv'):
    rest = f'{"down" if down else "up"}samplers.0.conv'
  elif rest in PARTS_OF_RESNET:
    rest = f'resnets.{i}.{PARTS_OF_RESNET[rest]}'
  else:
    rest = f'attentions.{i}.{rest}'
  return f'{"down" if down else "up"}_blocks.{level}.{rest}.{kind}'
