"""SiT: from the layout of willisma/SiT, whose `.pt` file is saved as safetensors first.

A training checkpoint's 'ema' is what is released; `model.*` or `module.*` in front is not known.
"""

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.sit import modeling
from vtts_jax.models.stacked import stack_layers, transpose_kernel

HEAD_WIDTHS = {1152: 72}  # XL; all others 64


def _linear_rules(name, target, op=transpose_kernel):
  return [(name + r'\.weight', target + '.kernel', op), (name + r'\.bias', target + '.bias', '')]


BLOCK = r'blocks\.\*\.'
RULES = [  # after `stack_layers`
  (r'pos_embed', 'position', lambda table: table[0]),
  *_linear_rules(r'x_embedder\.proj', 'patch', vit.patch_kernel),
  *_linear_rules(r't_embedder\.mlp\.0', 'time_in'),
  *_linear_rules(r't_embedder\.mlp\.2', 'time_out'),
  (r'y_embedder\.embedding_table\.weight', 'classes.embedding', ''),
  *_linear_rules(BLOCK + r'attn\.qkv', 'blocks.qkv'),
  *_linear_rules(BLOCK + r'attn\.proj', 'blocks.out'),
  *_linear_rules(BLOCK + r'mlp\.fc1', 'blocks.up'),
  *_linear_rules(BLOCK + r'mlp\.fc2', 'blocks.down'),
  *_linear_rules(BLOCK + r'adaLN_modulation\.1', 'blocks.adaln'),
  *_linear_rules(r'final_layer\.adaLN_modulation\.1', 'last'),
  *_linear_rules(r'final_layer\.linear', 'to_patch'),
]
# Megatron's split of a block [L, ...]: one all-reduce for each branch
SHARDING = [
  (r'blocks/(qkv|up|adaln)/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/(qkv|up|adaln)/bias', PartitionSpec(None, 'model')),
  (r'blocks/(out|down)/kernel', PartitionSpec(None, 'model', None)),
]


def config_of(source, part: str = '', **options) -> modeling.Config:
  """The config of a checkpoint. Shapes decide everything but the heads, which are as wide as in
  the released sizes unless the checkpoint's options (`num_heads`) or `options`, fields of `Config`,
  say otherwise.

  Raises:
    ValueError: there is no SiT, or one without a null class, or of pictures that are not square.
  """
  del part
  try:
    width, channels, patch, _ = source.shape_of('x_embedder.proj.weight')
    tokens = source.shape_of('pos_embed')[1]
    rows = source.shape_of('y_embedder.embedding_table.weight')[0]
    outputs = source.shape_of('final_layer.linear.weight')[0] // patch**2
    layers = stack_layers(source).shape_of('blocks.*.attn.qkv.weight')[0]
  except KeyError as error:
    raise ValueError(f'{source.where} has no SiT: no {error}') from error
  side = round(tokens**0.5)
  if side**2 != tokens:
    raise ValueError(f'{source.where}: {tokens} positions are not those of a square picture')
  found = {
    'width': width, 'layers': layers, 'channels': channels, 'patch': patch, 'size': side * patch,
    'heads': source.find_option('num_heads', default=width // HEAD_WIDTHS.get(width, 64)),
    'classes': rows - 1, 'learn_sigma': outputs == 2 * channels,
  }  # fmt: skip
  return modeling.Config(**(found | options))


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `checkpoints.convert.convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(stack_layers(source), RULES, template, dtype, sharding)
