"""FLUX.1: from the original single file (`flux1-dev.safetensors`) or diffusers'
`FluxTransformer2DModel` folder.

A diffusers source is shown under the original's names; both then go the same way. Layers are
stacked, q, k, v are one tensor, and the single blocks' fused layers are cut into attention and
feed-forward, whose places on a mesh differ.
"""

import dataclasses
import re

import numpy as np
from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.models import modules
from vtts_jax.models.flux import modeling
from vtts_jax.models.flux.modeling import Config
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

RELEASED_AXES = {128: (16, 56, 56)}  # of a file without a config, by the width of its heads
SHARDING = [  # of the blocks [L, ...]: heads and hidden channels over 'model'
  (r'_blocks/.*qkv/kernel', PartitionSpec(None, None, None, 'model')),  # [L, D, 3, D]
  (r'_blocks/.*qkv/bias', PartitionSpec(None, None, 'model')),
  # modulations are a quarter of the weights; split by their inputs, they leave the tokens whole,
  # where shifts that are split by channels would have every norm gather its tokens
  (r'_blocks/.*project/kernel', PartitionSpec(None, 'model', None, None)),
  (r'_blocks/.*up/kernel', PartitionSpec(None, None, 'model')),
  (r'_blocks/.*up/bias', PartitionSpec(None, 'model')),
  (r'_blocks/.*(out|down)/kernel', PartitionSpec(None, 'model', None)),
]

_DOUBLE, _SINGLE = r'transformer_blocks\.(\d+)\.', r'single_transformer_blocks\.(\d+)\.'
DIFFUSERS = [  # name of a layer in diffusers -> in the original
  (r'x_embedder', 'img_in'),
  (r'context_embedder', 'txt_in'),
  *[
    (rf'time_text_embed\.{theirs}\.linear_{number}', f'{original}.{layer}')
    for theirs, original in (
      ('timestep_embedder', 'time_in'), ('guidance_embedder', 'guidance_in'),
      ('text_embedder', 'vector_in'),
    )
    for number, layer in ((1, 'in_layer'), (2, 'out_layer'))
  ],
  (_DOUBLE + r'norm1\.linear', r'double_blocks.\1.img_mod.lin'),
  (_DOUBLE + r'norm1_context\.linear', r'double_blocks.\1.txt_mod.lin'),
  (_DOUBLE + r'attn\.to_([qkv])', r'double_blocks.\1.img_attn.\2'),
  (_DOUBLE + r'attn\.add_([qkv])_proj', r'double_blocks.\1.txt_attn.\2'),
  *[
    (rf'{lead}attn\.norm_{added}{letter}', rf'{target}norm.{name}_norm')
    for lead, added, target in (
      (_DOUBLE, '', r'double_blocks.\1.img_attn.'),
      (_DOUBLE, 'added_', r'double_blocks.\1.txt_attn.'),
      (_SINGLE, '', r'single_blocks.\1.'),
    )
    for letter, name in (('q', 'query'), ('k', 'key'))
  ],
  (_DOUBLE + r'attn\.to_out\.0', r'double_blocks.\1.img_attn.proj'),
  (_DOUBLE + r'attn\.to_add_out', r'double_blocks.\1.txt_attn.proj'),
  (_DOUBLE + r'ff\.net\.(0|2)(?:\.proj)?', r'double_blocks.\1.img_mlp.\2'),
  (_DOUBLE + r'ff_context\.net\.(0|2)(?:\.proj)?', r'double_blocks.\1.txt_mlp.\2'),
  (_SINGLE + r'norm\.linear', r'single_blocks.\1.modulation.lin'),
  (_SINGLE + r'attn\.to_([qkv])', r'single_blocks.\1.\2'),
  (_SINGLE + r'proj_mlp', r'single_blocks.\1.mlp_in'),
  (_SINGLE + r'proj_out', r'single_blocks.\1.linear2'),
  (r'proj_out', 'final_layer.linear'),
]  # fmt: skip


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file, a folder of weights, or the folder `transformer` of a pipeline; errors as in
  `open_source`."""
  del part  # it has no parts
  return open_pipeline_part(weights, 'transformer')


def _original_names(source):
  """A diffusers source under the names of the original; any other as it is."""
  if 'x_embedder.weight' not in source:
    return source
  theirs = {}
  for name in source.tensor_names():
    layer, _, kind = name.rpartition('.')
    for pattern, target in DIFFUSERS:
      match = re.fullmatch(pattern, layer)
      if match:
        # the norms of queries and keys call their weight 'scale'
        kind = 'scale' if target.endswith('_norm') and kind == 'weight' else kind
        layer = match.expand(target)
        break
    theirs[f'{layer}.{kind}'] = name
  header = {name: source.header[old] for name, old in theirs.items()}
  read = lambda name: source.read_tensor(theirs[name])
  return dataclasses.replace(source, header=header, read=read)


def _cut_tensors(source, pattern, names, at, axis):
  """A source in which each tensor that matches `pattern` is two, called `names` (templates of the
  match): what lies before `at` along `axis`, and the rest."""
  header, pieces = dict(source.header), {}
  for name in source.tensor_names():
    match = re.fullmatch(pattern, name)
    if not match:
      continue
    shape, kind = header.pop(name)
    for target, where in zip(names, (slice(0, at), slice(at, shape[axis]))):
      piece = match.expand(target)
      pieces[piece] = name, where
      sides = list(shape)
      sides[axis] = where.stop - where.start
      header[piece] = tuple(sides), kind

  def read_piece(name):
    if name not in pieces:
      return source.read_tensor(name)
    whole, where = pieces[name]
    return source.read_tensor(whole)[(slice(None),) * axis + (where,)]

  return dataclasses.replace(source, header=header, read=read_piece)


def _arrange_source(source):
  """A source of either layout, ready for the rules; `KeyError` if it is no FLUX."""
  source = _original_names(source)
  width = source.shape_of('img_in.weight')[0]
  # cut before stacking: one layer's tensor is on the host at a time, not all 38
  first, second = r'(single_blocks\.\d+)\.linear1\.(\w+)', r'(single_blocks\.\d+)\.linear2\.weight'
  source = _cut_tensors(source, first, (r'\1.qkv.\2', r'\1.mlp_in.\2'), 3 * width, 0)
  source = _cut_tensors(source, second, (r'\1.proj.weight', r'\1.linear2.weight'), width, 1)
  source = stack_layers(source, 'double_blocks|single_blocks')
  return fuse_projections(source, ('q', 'k', 'v'))


# ------------------------------------------------------------------------------------------- rules


def _split_outputs(array, count):
  """`[..., count * D]` -> `[..., count, D]`."""
  return array.reshape(*array.shape[:-1], count, -1)


def _pairs_to_halves(array, head):
  """The order of `modeling.Heads`: of each head's pairs, along the last axis, the first elements,
  then the second."""
  pairs = array.reshape(*array.shape[:-1], -1, head // 2, 2)
  return np.swapaxes(pairs, -1, -2).reshape(array.shape)


def _make_rules(c: Config) -> list:
  """The rules for a source that went through `_arrange_source`."""

  def order_qkv(array):  # [..., 3 D] -> [..., 3, D]
    array = _split_outputs(array, 3)
    rotated = _pairs_to_halves(array[..., :2, :], c.head)  # values are not rotated
    return np.concatenate([rotated, array[..., 2:, :]], -2)

  def order_scale(array):
    return _pairs_to_halves(array, c.head)

  def linear(name, target, order=None):
    if order is None:
      return [
        (rf'{name}\.weight', f'{target}.kernel', transpose_kernel),
        (rf'{name}\.bias', f'{target}.bias', ''),
      ]
    return [
      (rf'{name}\.weight', f'{target}.kernel', lambda array: order(transpose_kernel(array))),
      (rf'{name}\.bias', f'{target}.bias', order),
    ]

  def modulation(name, target, count):
    return linear(name, f'{target}.project', lambda array: _split_outputs(array, count))

  def heads(qkv, norm, target):
    return [
      *linear(qkv, f'{target}.qkv', order_qkv),
      (rf'{norm}\.query_norm\.scale', f'{target}.query_scale', order_scale),
      (rf'{norm}\.key_norm\.scale', f'{target}.key_scale', order_scale),
    ]

  def stream(name, target):
    lead, target = rf'double_blocks\.\*\.{name}', f'double_blocks.{target}'
    return [
      *modulation(rf'{lead}_mod\.lin', f'{target}.modulation', 6),
      *heads(rf'{lead}_attn\.qkv', rf'{lead}_attn\.norm', f'{target}.attn'),
      *linear(rf'{lead}_attn\.proj', f'{target}.out'),
      *linear(rf'{lead}_mlp\.0', f'{target}.ffn.up'),
      *linear(rf'{lead}_mlp\.2', f'{target}.ffn.down'),
    ]

  single = r'single_blocks\.\*\.'
  embedders = ('time_in', 'time_in'), ('guidance_in', 'guidance_in'), ('vector_in', 'pooled_in')
  return [
    *linear('img_in', 'image_in'),
    *linear('txt_in', 'text_in'),
    *[
      rule
      for name, target in embedders
      for rule in (
        *linear(rf'{name}\.in_layer', f'{target}.first'),
        *linear(rf'{name}\.out_layer', f'{target}.second'),
      )
    ],
    *stream('img', 'image'),
    *stream('txt', 'text'),
    *modulation(single + r'modulation\.lin', 'single_blocks.modulation', 3),
    *heads(single + 'qkv', single + 'norm', 'single_blocks.attn'),
    (single + r'proj\.weight', 'single_blocks.out.kernel', transpose_kernel),
    *linear(single + 'mlp_in', 'single_blocks.up'),
    (single + r'linear2\.weight', 'single_blocks.down.kernel', transpose_kernel),
    (single + r'linear2\.bias', 'single_blocks.bias', ''),
    *modulation(r'final_layer\.adaLN_modulation\.1', 'last_modulation', 2),
    # diffusers keeps (scale, shift) in the last layer, the original (shift, scale)
    *linear(
      r'norm_out\.linear', 'last_modulation.project',
      lambda array: _split_outputs(array, 2)[..., ::-1, :],
    ),
    *linear(r'final_layer\.linear', 'image_out'),
  ]  # fmt: skip


def config_of(source, part: str = '') -> Config:
  """The config of a checkpoint in either layout.

  Shapes decide all sizes. The axes of the rotation are those of its config (`axes_dims_rope` in
  diffusers), or those of the released models where heads are 128 wide.

  Raises:
    ValueError: there is no FLUX, or nothing says its axes.
  """
  del part  # it has no parts
  names = {
    'image_in': 'img_in.weight',
    'text_in': 'txt_in.weight',
    'pooled_in': 'vector_in.in_layer.weight',
    'head': 'double_blocks.*.img_attn.norm.query_norm.scale',
    'hidden': 'double_blocks.*.img_mlp.0.weight',
    'single': 'single_blocks.*.mlp_in.weight',
    'image_out': 'final_layer.linear.weight',
  }
  try:
    view = _arrange_source(source)
    shape = {key: view.shape_of(name) for key, name in names.items()}
  except KeyError as error:
    raise ValueError(f'{source.where} has no FLUX: it lacks {error.args[0]}') from error
  (width, inputs), head = shape['image_in'], shape['head'][-1]
  axes = source.find_option('axes_dims_rope', 'axes_dim', default=RELEASED_AXES.get(head))
  if axes is None:
    raise ValueError(f'{source.where}: heads of {head} need axes_dims_rope in its config')
  cells = modeling.PATCH**2
  return Config(
    channels=inputs // cells,
    out_channels=shape['image_out'][0] // cells,
    width=width,
    heads=width // head,
    hidden=shape['hidden'][1],
    double_layers=shape['hidden'][0],
    single_layers=shape['single'][0],
    text_width=shape['text_in'][1],
    pooled_width=shape['pooled_in'][1],
    axes=tuple(axes),
    theta=float(source.find_option('theta', default=Config.theta)),
    has_guidance='guidance_in.in_layer.weight' in view,
    qkv_bias='double_blocks.*.img_attn.qkv.bias' in view,
  )


def load_weights(source, config: Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `checkpoints.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(_arrange_source(source), _make_rules(config), template, dtype, sharding)
