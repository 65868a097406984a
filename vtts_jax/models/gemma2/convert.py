"""Gemma-2: from transformers' `Gemma2Model`, or `Gemma2ForCausalLM` without its head."""

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.gemma2 import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

_LAYER = r'layers\.\*\.'
NORMS = {  # theirs -> ours; 'post attention' is Gemma's own and not what Llama calls so
  'input_layernorm': 'norm_attn',
  'post_attention_layernorm': 'norm_attn_out',
  'pre_feedforward_layernorm': 'norm_ffn',
  'post_feedforward_layernorm': 'norm_ffn_out',
}
RULES = [  # after `fuse_projections` and `stack_layers`
  (r'embed_tokens\.weight', 'embed.embedding', ''),
  (r'norm\.weight', 'norm.weight', ''),
  *[(rf'{_LAYER}{name}\.weight', f'blocks.{ours}.weight', '') for name, ours in NORMS.items()],
  (_LAYER + r'self_attn\.qkv\.weight', 'blocks.attn.qkv.kernel', transpose_kernel),
  (_LAYER + r'self_attn\.o_proj\.weight', 'blocks.attn.out.kernel', transpose_kernel),
  (_LAYER + r'mlp\.gate_up\.weight', 'blocks.ffn.enter.kernel', transpose_kernel),
  (_LAYER + r'mlp\.down_proj\.weight', 'blocks.ffn.leave.kernel', transpose_kernel),
]
SHARDING = [  # of the blocks [L, D, ...]: heads and hidden channels over 'model'
  (r'blocks/(attn/qkv|ffn/enter)/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/(attn/out|ffn/leave)/kernel', PartitionSpec(None, 'model', None)),
  # by channels: a look-up in a table cut by words would have to search all devices
  (r'embed/embedding', PartitionSpec(None, 'model')),
]


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file, a folder of weights, or the folder `text_encoder` of a pipeline; errors as in
  `open_source`."""
  del part  # it has no parts
  return open_pipeline_part(weights, 'text_encoder')


def config_of(source, part: str = '') -> modeling.Config:
  """The config of a checkpoint: shapes decide; its `config.json` gives heads, window and scales.

  Without a `config.json` these are those of Gemma-2-2b.

  Raises:
    ValueError: there is no Gemma-2.
    ConfigError: an option that the port does not know.
  """
  del part  # there is one
  options = source.config
  layers_of = stack_layers(_without_head(source), 'layers')
  try:
    vocab, width = layers_of.shape_of('embed_tokens.weight')
    layers, inner, _ = layers_of.shape_of('layers.*.self_attn.q_proj.weight')
    shared = layers_of.shape_of('layers.*.self_attn.k_proj.weight')[1]
    hidden = layers_of.shape_of('layers.*.mlp.gate_proj.weight')[1]
    # Gemma 1 passes all of the above, but has two norms in a layer
    layers_of.shape_of('layers.*.post_feedforward_layernorm.weight')
  except KeyError as error:
    raise ValueError(f'{source.where} has no Gemma-2: no {error}') from error
  rotation = options.get('rope_parameters') or {}  # where transformers 5 keeps theta
  windows = [f'{"full" if i % 2 else "sliding"}_attention' for i in range(layers)]
  for name, found, allowed in (
    ('model_type', options.get('model_type'), 'gemma2'),
    ('hidden_activation', options.get('hidden_activation'), 'gelu_pytorch_tanh'),
    ('attention_bias', options.get('attention_bias'), False),
    ('use_bidirectional_attention', options.get('use_bidirectional_attention'), False),
    ('rope_type', rotation.get('rope_type'), 'default'),
    ('layer_types', options.get('layer_types'), windows),
  ):
    if found is not None and found != allowed:
      raise ConfigError(f'{name}={found!r}: allowed is {allowed!r}')
  head = options.get('head_dim') or modeling.Config.head_dim
  for name, size in (('q_proj', inner), ('k_proj', shared)):
    if size % head:
      raise ConfigError(f'head_dim={head}: must divide {size}, the width of {name}')
  found = {
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': hidden,
    'num_hidden_layers': layers,
    'num_attention_heads': inner // head,
    'num_key_value_heads': shared // head,
    'head_dim': head,
  }
  # what leaves no trace in the shapes
  said = {**options, **rotation}
  for name in ('query_pre_attn_scalar', 'sliding_window', 'rope_theta', 'rms_norm_eps'):
    if said.get(name) is not None:
      found[name] = said[name]
  # here None says something: there is no cap
  if 'attn_logit_softcapping' in options:
    found['attn_logit_softcapping'] = options['attn_logit_softcapping']
  return modeling.Config(**found)


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  source = fuse_projections(_without_head(source))
  source = fuse_projections(source, ('gate_proj', 'up_proj'), 'gate_up')
  return convert_weights(stack_layers(source, 'layers'), RULES, template, dtype, sharding)


def _without_head(source):
  """A whole language model has its body under 'model.'; the head beside it is the embedding."""
  if any(name.startswith('model.') for name in source.tensor_names()):
    return source.select_prefix('model.', source.config)
  return source
