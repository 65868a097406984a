"""DC-AE: from diffusers' `AutoencoderDC` and from MIT's own file, to `modeling.DCAE`."""

import dataclasses
import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.dcae import modeling
from vtts_jax.models.sana.convert import depthwise_filters, pointwise_kernel
from vtts_jax.models.sd3.convert import rename_tensors
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

MIT = [  # parts of names in MIT's file -> diffusers, one after the other
  (r'main\.|op_list\.', ''),
  (r'context_module', 'attn'),
  (r'local_module', 'conv_out'),
  (r'aggreg\.(\d+)\.0\.', r'to_qkv_multiscale.\1.proj_in.'),
  (r'aggreg\.(\d+)\.1\.', r'to_qkv_multiscale.\1.proj_out.'),
  (r'attn\.qkv\.conv\.', 'attn.qkv.'),
  (r'attn\.proj\.conv\.', 'attn.to_out.'),
  (r'attn\.proj\.norm\.', 'attn.norm_out.'),
  (r'(depth|inverted|point)_conv\.conv\.', r'conv_\1.'),
  (r'point_conv\.norm\.', 'norm.'),
  (r'(conv[12])\.conv\.', r'\1.'),
  (r'conv2\.norm\.', 'norm.'),
  (r'project_in\.conv\.conv\.', 'conv_in.conv.'),
  (r'project_in\.conv\.', 'conv_in.'),
  (r'project_out\.2\.conv\.conv\.', 'conv_out.conv.'),
  (r'encoder\.project_out\.0\.conv\.', 'encoder.conv_out.'),
  (r'decoder\.project_out\.0\.', 'decoder.norm_out.'),
  (r'decoder\.project_out\.2\.conv\.', 'decoder.conv_out.'),
  (r'conv\.conv\.', 'conv.'),
  (r'encoder\.stages', 'encoder.down_blocks'),
  (r'decoder\.stages', 'decoder.up_blocks'),
]


def _conv_kernel(weight):
  """`[..., out, in, s, s]` -> `[..., s, s, in, out]`."""
  return weight.swapaxes(-4, -1).swapaxes(-3, -2).swapaxes(-4, -3)  # o i a b -> b a i o -> a b i o


def _any_kernel(weight):
  """A matrix `[..., out, in]`, or MIT's 1 x 1 convolution, -> `[..., in, out]`."""
  return pointwise_kernel(weight) if weight.shape[-2:] == (1, 1) else transpose_kernel(weight)


def _group_kernels(head):
  def split(weight):  # [..., g o, i, 1, 1] -> [..., g, i, o]
    weight = weight[..., 0, 0]
    return weight.reshape(*weight.shape[:-2], -1, head, head).swapaxes(-1, -2)

  return split


def make_rules(config: modeling.Config):
  """The table; groups of a 1 x 1 convolution have the config's channels of a head."""
  end = r'((?:en|de)coder)\.'
  stage = end + r'stages\.(\d+)\.'
  block, ours = stage + r'blocks\.\*\.', r'\1.stages.\2.blocks.'
  scale = r'attn\.to_qkv_multiscale\.(\d+)\.'
  norm = [  # weight, bias, and what batch norm stores
    (r'\.(weight|bias)', r'.\3'),
    (r'\.running_mean', '.mean'),
    (r'\.running_var', '.variance'),
  ]
  return [
    (end + r'(conv_(?:in|out)(?:\.conv)?)\.weight', r'\1.\2.kernel', 'conv'),
    (end + r'(conv_(?:in|out)(?:\.conv)?)\.bias', r'\1.\2.bias', ''),
    (r'decoder\.norm_out\.(weight|bias)', r'decoder.norm_out.\1', ''),
    (stage + r'resample\.conv\.weight', r'\1.stages.\2.resample.conv.kernel', 'conv'),
    (stage + r'resample\.conv\.bias', r'\1.stages.\2.resample.conv.bias', ''),
    (block + r'(conv[12])\.weight', ours + r'\3.kernel', _conv_kernel),
    (block + r'conv1\.bias', ours + 'conv1.bias', ''),
    *[(block + 'norm' + theirs, ours + 'norm' + our, '') for theirs, our in norm],
    *[(block + r'attn\.norm_out' + theirs, ours + 'attn.norm' + our, '') for theirs, our in norm],
    (block + r'.*norm(?:_out)?\.num_batches_tracked', None, ''),
    (block + r'attn\.qkv\.weight', ours + 'attn.qkv.kernel', _any_kernel),
    (block + r'attn\.to_out\.weight', ours + 'attn.out.kernel', _any_kernel),
    (block + scale + r'proj_in\.weight', ours + r'attn.scales.\3.filters', depthwise_filters),
    (block + scale + r'proj_out\.weight', ours + r'attn.scales.\3.mix',
     _group_kernels(config.attention_head_dim)),
    (block + r'conv_out\.norm\.(weight|bias)', ours + r'norm.\3', ''),
    (block + r'conv_out\.conv_inverted\.weight', ours + 'ffn.enter.kernel', pointwise_kernel),
    (block + r'conv_out\.conv_inverted\.bias', ours + 'ffn.enter.bias', ''),
    (block + r'conv_out\.conv_depth\.weight', ours + 'ffn.filters', depthwise_filters),
    (block + r'conv_out\.conv_depth\.bias', ours + 'ffn.offset', ''),
    (block + r'conv_out\.conv_point\.weight', ours + 'ffn.leave.kernel', pointwise_kernel),
  ]  # fmt: skip


ENCODER = (r'encoder\..*', None, '')  # known, and left by the decoder alone
SHARDING = []  # a picture's cells are many and its weights few: every device holds them all


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file, a folder of weights (MIT's repositories), or the folder `vae` of a pipeline;
  errors as in `open_source`."""
  del part  # the encoder is read or left by `load_weights`
  return open_pipeline_part(weights, 'vae')


def config_of(source, part: str = '') -> modeling.Config:
  """The config of a checkpoint, or of its 'decoder' alone.

  Levels are read off the tensors. The `config.json` of diffusers gives channels of a head where no
  second scale shows them, activations and the scaling factor, which is 1 if such a config lacks it
  and None if there is no config.

  Raises:
    ValueError: there is no DC-AE.
    ConfigError: an option that the port does not know.
  """
  options = dict(source.config)
  for name, allowed in (
    ('_class_name', 'AutoencoderDC'), ('encoder_out_shortcut', True), ('decoder_in_shortcut', True),
    ('decoder_conv_act_fn', 'relu'),
  ):  # fmt: skip
    if options.get(name, allowed) != allowed:
      raise ConfigError(f'{name}={options[name]!r}: allowed is {allowed!r}')
  # a layer norm has the tensors of an RMS norm: the config alone tells
  norms = options.get('decoder_norm_types') or 'rms_norm'
  if {norms} - NORMS if isinstance(norms, str) else set(norms) - NORMS:
    raise ConfigError(f'decoder_norm_types={norms!r}: allowed are {", ".join(sorted(NORMS))}')
  source = _open_layout(source)
  try:
    latents = source.shape_of('decoder.conv_in.weight')[1]
    encoder = () if part == 'decoder' else _read_levels(source, 'encoder', options)
    decoder = _read_levels(source, 'decoder', options)
    pixels, shuffle = _read_pixels(source, decoder)
    unshuffle = bool(encoder) and _read_unshuffle(source, encoder)
  except (KeyError, IndexError) as error:
    raise ValueError(f'{source.where} has no DC-AE: no {error}') from error
  mixtures = [n for n in source.tensor_names() if n.endswith('to_qkv_multiscale.0.proj_out.weight')]
  head = options.get('attention_head_dim') or modeling.Config.attention_head_dim
  known = 'decoder_block_out_channels' in options or '_class_name' in options
  return modeling.Config(
    latent_channels=latents,
    encoder=encoder,
    decoder=decoder,
    # a group of the 1 x 1 convolution is a head
    attention_head_dim=source.shape_of(mixtures[0])[1] if mixtures else head,
    in_channels=pixels,
    unshuffle=unshuffle,
    shuffle=shuffle,
    scaling_factor=options.get('scaling_factor', 1.0 if known else None),
  )


NORMS = {'rms_norm', 'batch_norm'}
BLOCKS = {'encoder': 'down_blocks', 'decoder': 'up_blocks'}


def _read_levels(source, side, options):
  """The levels of one half, from the names of its blocks."""
  lead, names = f'{side}.{BLOCKS[side]}', source.tensor_names()
  found = {int(m[1]) for n in names if (m := re.match(rf'{lead}\.(\d+)\.', n))}
  # encoders have no such option: they all have SiLU
  acts, levels = options.get(f'{side}_act_fns'), []
  for i in range(1 + max(found, default=-1)):
    inside = [n[len(f'{lead}.{i}.') :] for n in names if n.startswith(f'{lead}.{i}.')]
    # a block is what has a branch; the resampling has one convolution named `conv`
    numbers = sorted({int(n.split('.')[0]) for n in inside if '.conv.' not in f'.{n}'})
    if not numbers:
      # nothing shows how wide an empty level would be, and nothing depends on it
      levels.append(modeling.Level(width=0, layers=0))
      continue
    first, where = f'{numbers[0]}.', f'{lead}.{i}.{numbers[0]}.'
    attention = any(n.startswith(f'{first}attn.') for n in inside)
    # the norm's weight is as wide as the level in both kinds of block
    normed = f'{where}attn.norm_out' if attention else f'{where}norm'
    norm = 'batch_norm' if f'{normed}.running_mean' in source else 'rms_norm'
    # by number: a file may list scale 10 before scale 2
    scales = {int(m[1]): source.shape_of(f'{lead}.{i}.{n}')[-1] for n in inside
              if (m := re.match(re.escape(first) + r'attn\.to_qkv_multiscale\.(\d+)\.proj_in', n))}
    act = acts if isinstance(acts, str) else acts[i] if acts else None
    levels.append(
      modeling.Level(
        width=source.shape_of(f'{normed}.weight')[0],
        layers=len(numbers),
        attention=attention,
        scales=tuple(scales[k] for k in sorted(scales)),
        norm=norm,
        # without a config: released decoders have ReLU where they have batch norm
        act=act or ('relu' if norm == 'batch_norm' else 'silu'),
      )
    )  # fmt: skip
  return tuple(levels)


def _read_unshuffle(source, levels):
  """Whether the encoder's convolutions give a quarter of the next level's channels."""
  outer, before = levels[1].width, levels[0].layers
  name = f'encoder.down_blocks.0.{before}.conv.weight' if before else 'encoder.conv_in.conv.weight'
  return source.shape_of(name)[0] != outer


def _read_pixels(source, levels):
  """(channels of a picture, whether the decoder's convolutions give four times as many)."""
  first = levels[0]
  up = source.shape_of(f'decoder.up_blocks.{0 if first.layers else 1}.0.conv.weight')[0]
  shuffle = up != (first if first.layers else levels[1]).width
  if first.layers:
    return source.shape_of('decoder.conv_out.weight')[0], shuffle
  return source.shape_of('decoder.conv_out.conv.weight')[0] // (4 if shuffle else 1), shuffle


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  source = _name_stages(_open_layout(source), config)
  source = stack_layers(fuse_projections(source, ('to_q', 'to_k', 'to_v')))
  rules = make_rules(config)
  return convert_weights(
    source, rules if config.encoder else [ENCODER, *rules], template, dtype, sharding
  )


def _open_layout(source) -> Source:
  """MIT's file under the names of diffusers, q, k and v in one; other sources as they are."""
  if not any('.stages.' in name for name in source.tensor_names()):
    return source

  def rename(name):
    for pattern, target in MIT:
      name = re.sub(pattern, target, name)
    return name

  return rename_tensors(source, rename)


def _name_stages(source, config):
  """`down_blocks.i.j` -> `stages.r.blocks.j` or `stages.r.resample`; empty levels do not count."""
  # the encoder's stages cannot be named without its levels
  if not config.encoder:
    source = dataclasses.replace(
      source, header={n: v for n, v in source.header.items() if not n.startswith('encoder.')}
    )

  def rename(name):
    found = re.match(r'(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.', name)
    if not found:
      return name
    side, level, place = found[1], int(found[2]), int(found[3])
    levels, rest = getattr(config, side), name[found.end() :]
    stage = f'{side}.stages.{level - (levels[0].layers == 0)}'
    if rest.startswith('conv.'):
      return f'{stage}.resample.{rest}'
    # a decoder's level begins with its resampling, except the deepest, which has none
    before = side == 'decoder' and level < len(levels) - 1
    return f'{stage}.blocks.{place - before}.{rest}'

  return rename_tensors(source, rename)
