"""SANA: from the `transformer` folder of diffusers, to `modeling.Sana`.

NVlabs' own files are pickles, which are never read.
"""

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.sana import modeling
from vtts_jax.models.sd3.convert import linear_rules
from vtts_jax.models.stacked import fuse_projections, stack_layers

HEAD = 32  # channels of a head of the self-attention in every released model
CROSS_HEADS = {1152: 72, 2240: 112}  # channels of a head of the cross-attention, by width


def pointwise_kernel(weight):
  """1 x 1 convolution `[..., out, in, 1, 1]` -> kernel `[..., in, out]`."""
  return weight[..., 0, 0].swapaxes(-1, -2)


def depthwise_filters(weight):
  """Depthwise convolution `[..., F, 1, s, s]` -> filters `[..., s, s, F]`."""
  # torch's second axis is the channel within a group, of which there is one
  weight = weight[..., 0, :, :]
  return weight.swapaxes(-3, -2).swapaxes(-2, -1)  # F s s -> s F s -> s s F


_BLOCK = r'transformer_blocks\.\*\.'
_TIMES = r'time_embed\.(?:emb\.)?'  # plain models have one word more
RULES = [  # after `fuse_projections` and `stack_layers`
  (r'patch_embed\.proj\.weight', 'patch.kernel', vit.patch_kernel),
  (r'patch_embed\.proj\.bias', 'patch.bias', ''),
  *linear_rules(_TIMES + r'timestep_embedder\.linear_1', 'time.enter'),
  *linear_rules(_TIMES + r'timestep_embedder\.linear_2', 'time.leave'),
  *linear_rules(_TIMES + r'guidance_embedder\.linear_1', 'guidance.enter'),
  *linear_rules(_TIMES + r'guidance_embedder\.linear_2', 'guidance.leave'),
  *linear_rules(r'time_embed\.linear', 'modulation'),
  *linear_rules(r'caption_projection\.linear_1', 'caption.enter'),
  *linear_rules(r'caption_projection\.linear_2', 'caption.leave'),
  (r'caption_norm\.weight', 'caption.norm.weight', ''),
  ('scale_shift_table', 'table', ''),
  *linear_rules('proj_out', 'to_patch'),
  (_BLOCK + 'scale_shift_table', 'blocks.table', ''),
  *linear_rules(_BLOCK + r'attn1\.qkv', 'blocks.attn.qkv'),
  *linear_rules(_BLOCK + r'attn1\.to_out\.0', 'blocks.attn.out'),
  (_BLOCK + r'attn1\.norm_([qk])\.weight', r'blocks.attn.\1_norm.weight', ''),
  *linear_rules(_BLOCK + r'attn2\.to_q', 'blocks.cross.q'),
  *linear_rules(_BLOCK + r'attn2\.kv', 'blocks.cross.kv'),
  *linear_rules(_BLOCK + r'attn2\.to_out\.0', 'blocks.cross.out'),
  (_BLOCK + r'attn2\.norm_([qk])\.weight', r'blocks.cross.\1_norm.weight', ''),
  (_BLOCK + r'ff\.conv_inverted\.weight', 'blocks.ffn.enter.kernel', pointwise_kernel),
  (_BLOCK + r'ff\.conv_inverted\.bias', 'blocks.ffn.enter.bias', ''),
  (_BLOCK + r'ff\.conv_depth\.weight', 'blocks.ffn.filters', depthwise_filters),
  (_BLOCK + r'ff\.conv_depth\.bias', 'blocks.ffn.offset', ''),
  (_BLOCK + r'ff\.conv_point\.weight', 'blocks.ffn.leave.kernel', pointwise_kernel),
]
SHARDING = [  # of the blocks [L, D, ...]: heads and hidden channels over 'model'
  (r'blocks/(attn/qkv|cross/(q|kv)|ffn/enter)/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/(attn/qkv|cross/(q|kv)|ffn/enter)/bias', PartitionSpec(None, 'model')),
  (r'blocks/ffn/filters', PartitionSpec(None, None, None, 'model')),
  (r'blocks/ffn/offset', PartitionSpec(None, 'model')),
  (r'blocks/(attn/out|cross/out|ffn/leave)/kernel', PartitionSpec(None, 'model', None)),
]


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file, a folder of weights, or the folder `transformer` of a pipeline; errors as in
  `open_source`."""
  del part  # it has no parts
  return open_pipeline_part(weights, 'transformer')


def config_of(source, part: str = '') -> modeling.Config:
  """The config of a checkpoint: shapes decide; its `config.json` gives heads, positions and scales.

  Without a `config.json` heads are those of the released widths, and no positions are added.

  Raises:
    ValueError: there is no SANA.
    ConfigError: an option that the port does not know, or heads that do not divide the width.
  """
  del part  # there is one
  options = source.config
  for name, allowed in (
    ('_class_name', ('SanaTransformer2DModel',)),
    ('norm_elementwise_affine', (False,)),
    ('norm_eps', (1e-6,)),
    ('qk_norm', (None, 'rms_norm_across_heads')),
  ):
    if options.get(name, allowed[0]) not in allowed:
      raise ConfigError(
        f'{name}={options[name]!r}: must be one of {", ".join(map(repr, allowed))}'
      )
  # stacked, so that the first axis of a block's tensor counts the layers
  source, block = stack_layers(source, 'transformer_blocks'), 'transformer_blocks.*.'
  try:
    width, channels, side, _ = source.shape_of('patch_embed.proj.weight')
    layers, inner, _ = source.shape_of(f'{block}attn2.to_q.weight')
    hidden = source.shape_of(f'{block}ff.conv_point.weight')[2]
    words = source.shape_of('caption_projection.linear_1.weight')[1]
    out = source.shape_of('proj_out.weight')[0] // side**2
  except KeyError as error:
    raise ValueError(f'{source.where} has no SANA: no {error}') from error
  head = options.get('attention_head_dim') or HEAD
  # the two attentions cut the same width into different heads
  cross = options.get('cross_attention_head_dim') or CROSS_HEADS.get(width, head)
  for name, size, whole in (
    ('attention_head_dim', head, width),
    ('cross_attention_head_dim', cross, inner),
  ):
    if whole % size:
      raise ConfigError(f'{name}={size}: must divide {whole}, the width of its attention')
  found = {
    'in_channels': channels,
    'out_channels': out,
    'num_attention_heads': width // head,
    'attention_head_dim': head,
    'num_layers': layers,
    'num_cross_attention_heads': inner // cross,
    'cross_attention_head_dim': cross,
    'caption_channels': words,
    'hidden': hidden,
    'patch_size': side,
    'qk_norm': f'{block}attn1.norm_q.weight' in source,
    'attention_bias': f'{block}attn1.to_q.bias' in source,
    'guidance_embeds': 'time_embed.guidance_embedder.linear_1.weight' in source,
  }
  # what leaves no trace in the shapes
  for name in (
    'sample_size', 'interpolation_scale', 'guidance_embeds_scale', 'timestep_scale'
  ):  # fmt: skip
    if options.get(name) is not None:
      found[name] = options[name]
  return modeling.Config(**found)


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  # the cross-attention's queries come from another place than its keys: they stay apart
  source = fuse_projections(source, ('attn1.to_q', 'attn1.to_k', 'attn1.to_v'), 'attn1.qkv')
  source = fuse_projections(source, ('attn2.to_k', 'attn2.to_v'), 'attn2.kv')
  source = stack_layers(source, 'transformer_blocks')
  return convert_weights(source, RULES, template, dtype, sharding)
