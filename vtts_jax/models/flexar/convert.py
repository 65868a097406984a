"""Converts the reference checkpoint to parameters of `modeling.FlexAR`, and reads its options.

Layers are stacked first (`stack_layers`: `blocks.*`). T5 and the image tokenizer have checkpoints
and converters of their own; a file that holds them too has them left out here.
"""

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.flexar import modeling
from vtts_jax.models.flexar.modeling import Config
from vtts_jax.models.stacked import stack_layers, transpose_kernel

# channels of a head, where neither a per-head norm nor the config tells
HEAD = 64
_AR = r'models\.ar_image_model\.'
_BLOCK = _AR + r'trunk\.blocks\.\*\.'

_SHARED = [
  (_AR + r'preprocessor\.embedding\.weight', 'embedding', ''),
  (_AR + r'preprocessor\.positional_embedding', 'positions', ''),
  (_AR + r'preprocessor\.sos_token_embed', 'start', lambda x: x.reshape(-1)),
  (_AR + r'preprocessor\.cls_embedding\.weight', 'classes', ''),
  (_AR + r'head\.linear\.weight', 'head.kernel', 'T'),
  (_AR + r'trunk\.post_trunk_norm\.(weight|bias)', r'norm.\1', ''),
  (r'models\.text_encoder\.mlp\.(fc[12])\.weight', r'text_mlp.\1.kernel', 'T'),
  # T5 and the tokenizer are loaded from checkpoints of their own
  (r'models\.text_encoder\.t5_embedder\..*', None, ''),
  (r'models\.image_tokenizer\..*', None, ''),
  (_BLOCK + r'(?:self_)?attn\.(qkv|proj)\.weight', r'blocks.self_attn.\1.kernel', transpose_kernel),
  (_BLOCK + r'(?:self_)?attn\.(qkv|proj)\.bias', r'blocks.self_attn.\1.bias', ''),
  (_BLOCK + r'(?:self_)?attn\.([qk]_norm)\.weight', r'blocks.self_attn.\1.weight', ''),
  (_BLOCK + r'cross_attn\.Wq\.weight', 'blocks.cross_attn.q.kernel', transpose_kernel),
  (_BLOCK + r'cross_attn\.Wk\.weight', 'blocks.cross_attn.k.kernel', transpose_kernel),
  (_BLOCK + r'cross_attn\.Wv\.weight', 'blocks.cross_attn.v.kernel', transpose_kernel),
  (_BLOCK + r'cross_attn\.W([qkv])\.bias', r'blocks.cross_attn.\1.bias', ''),
  (_BLOCK + r'cross_attn\.proj\.weight', 'blocks.cross_attn.proj.kernel', transpose_kernel),
  (_BLOCK + r'cross_attn\.proj\.bias', 'blocks.cross_attn.proj.bias', ''),
  (_BLOCK + r'cross_attn\.([qk]_norm)\.weight', r'blocks.cross_attn.\1.weight', ''),
  (_BLOCK + r'mlp\.(fc[123])\.weight', r'blocks.ffn.\1.kernel', transpose_kernel),
  (_BLOCK + r'mlp\.(fc[123])\.bias', r'blocks.ffn.\1.bias', ''),
  (_BLOCK + r'norm_1\.(weight|bias)', r'blocks.norm_self.\1', ''),
]
RULES_TEXT = [
  *_SHARED,
  (_BLOCK + r'norm_2\.(weight|bias)', r'blocks.norm_cross.\1', ''),
  (_BLOCK + r'norm_3\.(weight|bias)', r'blocks.norm_ffn.\1', ''),
]
# without cross-attention the reference's second norm belongs to the feed-forward
RULES_CLASS = [*_SHARED, (_BLOCK + r'norm_2\.(weight|bias)', r'blocks.norm_ffn.\1', '')]
# the blocks are stacked [L, D, ...]; heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/(self_attn/qkv|cross_attn/[qkv]|ffn/fc[13])/kernel',
   PartitionSpec(None, None, 'model')),
  (r'blocks/(self_attn/qkv|cross_attn/[qkv]|ffn/fc[13])/bias', PartitionSpec(None, 'model')),
  (r'blocks/(self_attn/proj|cross_attn/proj|ffn/fc2)/kernel', PartitionSpec(None, 'model', None)),
]  # fmt: skip


def rules_for(config: Config):
  """Returns the rules for a config: class models have no cross-attention."""
  return RULES_CLASS if config.classes else RULES_TEXT


def config_of(source, part: str = '', **options) -> Config:
  """Reads the config of a checkpoint.

  Names and shapes decide. The checkpoint's config says what they do not tell (`num_heads` without
  per-head norms).

  Args:
    source: `checkpoints.Source`, layers not stacked.
    part: not used: T5 and the tokenizer are other checkpoints.
    options: fields of `Config` that override what is read, or that nothing tells (`eps`).

  Raises:
    ValueError: this is no FlexTok AR checkpoint.
  """
  del part
  source, ar = stack_layers(source), 'models.ar_image_model.'
  block = f'{ar}trunk.blocks.*.'
  table, places = f'{ar}preprocessor.embedding.weight', f'{ar}preprocessor.positional_embedding'
  classes = f'{ar}preprocessor.cls_embedding.weight'
  attention = f'{block}attn.' if classes in source else f'{block}self_attn.'
  needed = [table, places, f'{attention}qkv.weight', f'{block}mlp.fc1.weight']
  missing = [name for name in needed if name not in source]
  if missing:
    raise ValueError(f'{source.where} is no FlexTok AR checkpoint: no {", ".join(missing)}')
  (codes, width), tokens = source.shape_of(table), source.shape_of(places)[0]
  qk_norm = f'{attention}q_norm.weight' in source
  # a per-head norm is as wide as a head
  if qk_norm:
    heads = width // source.shape_of(f'{attention}q_norm.weight')[1]
  else:
    heads = source.find_option('num_heads', default=width // HEAD)
  text = 'models.text_encoder.mlp.fc1.weight'
  found = {
    'width': width,
    'layers': source.shape_of(f'{block}mlp.fc1.weight')[0],
    'heads': heads,
    'tokens': tokens,
    'codes': codes,
    'classes': source.shape_of(classes)[0] if classes in source else 0,
    'text_width': source.shape_of(text)[1] if text in source else Config.text_width,
    'hidden': source.shape_of(f'{block}mlp.fc1.weight')[1],
    'norm': 'layernorm' if f'{block}norm_1.bias' in source else 'rmsnorm',
    'qk_norm': qk_norm,
    'ffn': 'swiglu' if f'{block}mlp.fc3.weight' in source else 'mlp_gelu',
    'qkv_bias': f'{attention}qkv.bias' in source,
    'bias': f'{attention}proj.bias' in source,
    'post_norm': f'{ar}trunk.post_trunk_norm.weight' in source,
  }
  return Config(**(found | options))


def load_weights(source, config: Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(stack_layers(source), rules_for(config), template, dtype, sharding)
