"""YOLOS: from the transformers layout (`YolosForObjectDetection`)."""

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules, vit
from vtts_jax.models.stacked import fused, stacked, transposed
from vtts_jax.models.yolos import modeling

NAMES = {
  'norm_attn': 'layernorm_before', 'norm_ffn': 'layernorm_after', 'qkv': 'attention.attention.qkv',
  'out': 'attention.output.dense', 'up': 'intermediate.dense', 'down': 'output.dense',
}  # fmt: skip
MIDDLE = r'vit\.encoder\.(interpolation\.)?mid_position_embeddings'  # transformers 5, and before


def _only(array):
  """`[L, 1, T, D]`, `[1, T, D]` -> without the axis of one."""
  return array.squeeze(-3)


def _head(theirs, ours):
  for i, layer in enumerate(('first', 'second', 'last')):
    yield rf'{theirs}\.layers\.{i}\.weight', f'{ours}.{layer}.kernel', transposed
    yield rf'{theirs}\.layers\.{i}\.bias', f'{ours}.{layer}.bias', ''


RULES = [
  (r'vit\.embeddings\.cls_token', 'token', _only),
  (r'vit\.embeddings\.detection_tokens', 'detectors', _only),
  (r'vit\.embeddings\.position_embeddings', 'position', _only),
  (r'vit\.embeddings\.patch_embeddings\.projection\.weight', 'embed.kernel', vit.patch_kernel),
  (r'vit\.embeddings\.patch_embeddings\.projection\.bias', 'embed.bias', ''),
  (MIDDLE, 'middle', _only),
  *vit.rules(r'vit\.encoder\.layer\.\*\.', 'trunk.', NAMES),
  (r'vit\.layernorm\.(weight|bias)', r'norm.\1', ''),
  *_head('class_labels_classifier', 'classes'),
  *_head('bbox_predictor', 'box'),
]
SHARDING = vit.SHARDING


def config_of(source, part: str = '', **options) -> modeling.Config:
  """The config of a checkpoint: its `config.json` (or options given here) must tell the image size
  of the positions, the rest is read off the shapes.

  Raises:
    ValueError: it is no such detector, or says no image size.
  """
  del part
  options = {**source.config, **options}
  try:
    width, _, _, patch = source.shape('vit.embeddings.patch_embeddings.projection.weight')
    hidden = source.shape('vit.encoder.layer.0.intermediate.dense.weight')[0]
    lead = 'vit.encoder.layer.'
    layers = {int(n[len(lead) :].split('.')[0]) for n in source.names() if n.startswith(lead)}
    trunk = vit.Config(
      width, 1 + max(layers), options.get('num_attention_heads', width // 64), hidden,
      options.get('hidden_act', 'gelu'), options.get('layer_norm_eps', 1e-12),
    )  # fmt: skip
    config = modeling.Config(
      trunk,
      tuple(options['image_size']),
      options.get('shortest', 512 if width == 192 else 800),
      any('mid_position_embeddings' in name for name in source.names()),
      patch,
      source.shape('vit.embeddings.detection_tokens')[1],
      source.shape('class_labels_classifier.layers.2.bias')[0],
    )
  except KeyError as error:
    raise ValueError(f'{source.where} has no YOLOS detector: no {error}') from error
  return config


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `conversion.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build(config))
  whole = fused(stacked(source, 'layer'), ('query', 'key', 'value'))
  return conversion.convert(whole, RULES, template, dtype, sharding)
