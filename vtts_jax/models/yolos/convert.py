"""YOLOS, from transformers' `YolosForObjectDetection`."""

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel
from vtts_jax.models.yolos import modeling

NAMES = {
  'norm_attn': 'layernorm_before', 'norm_ffn': 'layernorm_after', 'qkv': 'attention.attention.qkv',
  'out': 'attention.output.dense', 'up': 'intermediate.dense', 'down': 'output.dense',
}  # fmt: skip
# the name in transformers 5, and the one before
MIDDLE = r'vit\.encoder\.(interpolation\.)?mid_position_embeddings'


def _drop_axis(array):
  """Drops the batch axis of one from `[L, 1, T, D]` or `[1, T, D]`."""
  return array.squeeze(-3)


def _head_rules(theirs, ours):
  for i, layer in enumerate(('first', 'second', 'last')):
    yield rf'{theirs}\.layers\.{i}\.weight', f'{ours}.{layer}.kernel', transpose_kernel
    yield rf'{theirs}\.layers\.{i}\.bias', f'{ours}.{layer}.bias', ''


RULES = [
  (r'vit\.embeddings\.cls_token', 'token', _drop_axis),
  (r'vit\.embeddings\.detection_tokens', 'detectors', _drop_axis),
  (r'vit\.embeddings\.position_embeddings', 'position', _drop_axis),
  (r'vit\.embeddings\.patch_embeddings\.projection\.weight', 'embed.kernel', vit.patch_kernel),
  (r'vit\.embeddings\.patch_embeddings\.projection\.bias', 'embed.bias', ''),
  (MIDDLE, 'middle', _drop_axis),
  *vit.trunk_rules(r'vit\.encoder\.layer\.\*\.', 'trunk.', NAMES),
  (r'vit\.layernorm\.(weight|bias)', r'norm.\1', ''),
  *_head_rules('class_labels_classifier', 'classes'),
  *_head_rules('bbox_predictor', 'box'),
]
SHARDING = vit.SHARDING


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Reads the config of a checkpoint off the shapes of its tensors.

  Its `config.json`, or `options`, must tell the image size of the positions: their number alone
  does not say how they lie.

  Raises:
    ValueError: the checkpoint is no such detector, or nothing tells the image size.
  """
  del part
  options = {**source.config, **options}
  try:
    width, _, _, patch = source.shape_of('vit.embeddings.patch_embeddings.projection.weight')
    hidden = source.shape_of('vit.encoder.layer.0.intermediate.dense.weight')[0]
    lead = 'vit.encoder.layer.'
    blocks = [n for n in source.tensor_names() if n.startswith(lead)]
    layers = {int(n[len(lead) :].split('.')[0]) for n in blocks}
    trunk = vit.Config(
      width, 1 + max(layers), options.get('num_attention_heads', width // 64), hidden,
      options.get('hidden_act', 'gelu'), options.get('layer_norm_eps', 1e-12),
    )  # fmt: skip
    config = modeling.Config(
      trunk,
      # positions lie on a grid of this size; a KeyError below says that it is missing
      tuple(options['image_size']),
      options.get('shortest', 512 if width == 192 else 800),
      any('mid_position_embeddings' in name for name in source.tensor_names()),
      patch,
      source.shape_of('vit.embeddings.detection_tokens')[1],
      source.shape_of('class_labels_classifier.layers.2.bias')[0],
    )
  except KeyError as error:
    raise ValueError(f'{source.where} has no YOLOS detector: no {error}') from error
  return config


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  # transformers keeps q, k and v apart
  whole = fuse_projections(stack_layers(source, 'layer'), ('query', 'key', 'value'))
  return convert_weights(whole, RULES, template, dtype, sharding)
