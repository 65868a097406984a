"""OWL-ViT and OWLv2: from the transformers layout (`OwlViTForObjectDetection`, `Owlv2For...`)."""

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules, vit
from vtts_jax.models.owlvit import modeling
from vtts_jax.models.stacked import fused, stacked, transposed

BASE = r'owlv(?:it|2)\.'
VISION, TEXT = BASE + r'vision_model\.', BASE + r'text_model\.'
LAYER = r'encoder\.layers\.\*\.'
NAMES = {
  'norm_attn': 'layer_norm1', 'norm_ffn': 'layer_norm2', 'qkv': 'self_attn.qkv',
  'out': 'self_attn.out_proj', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip


def _linear(theirs, ours):
  return [
    (rf'{theirs}\.weight', f'{ours}.kernel', transposed),
    (rf'{theirs}\.bias', f'{ours}.bias', ''),
  ]


def _head(theirs, ours):
  layers = {'dense0': 'first', 'dense1': 'second', 'dense2': 'last'}
  return [rule for a, b in layers.items() for rule in _linear(rf'{theirs}\.{a}', f'{ours}.{b}')]


RULES = [
  (VISION + r'embeddings\.class_embedding', 'vision.token', ''),
  (VISION + r'embeddings\.patch_embedding\.weight', 'vision.embed.kernel', vit.patch_kernel),
  (VISION + r'embeddings\.position_embedding\.weight', 'vision.position', ''),
  (VISION + r'pre_layernorm\.(weight|bias)', r'vision.norm_pre.\1', ''),
  *vit.rules(VISION + LAYER, 'vision.trunk.', NAMES),
  (VISION + r'post_layernorm\.(weight|bias)', r'vision.norm.\1', ''),
  (TEXT + r'embeddings\.token_embedding\.weight', 'text.embed.embedding', ''),
  (TEXT + r'embeddings\.position_embedding\.weight', 'text.position', ''),
  *vit.rules(TEXT + LAYER, 'text.trunk.', NAMES),
  (TEXT + r'final_layer_norm\.(weight|bias)', r'text.norm.\1', ''),
  (BASE + r'text_projection\.weight', 'text.project.kernel', transposed),
  (r'layer_norm\.(weight|bias)', r'norm.\1', ''),
  *_linear(r'class_head\.dense0', 'classes'),
  *_linear(r'class_head\.logit_shift', 'shift'),
  *_linear(r'class_head\.logit_scale', 'scale'),
  *_head('box_head', 'box'),
  *_head('objectness_head', 'object'),
  # for whole pictures against texts (untrained in OWLv2), and buffers of older files
  (BASE + r'(visual_projection\.weight|logit_scale)', None, ''),
  (r'.*\.position_ids|box_bias', None, ''),
]
SHARDING = vit.SHARDING


def _tower(source, lead, options):
  layer = f'{lead}encoder.layers.0.'
  hidden, width = source.shape(f'{layer}mlp.fc1.weight')
  numbers = {
    int(n[len(lead) :].split('.')[2]) for n in source.names() if n.startswith(f'{lead}encoder.')
  }
  return vit.Config(
    width, 1 + max(numbers), options.get('num_attention_heads', width // 64), hidden,
    options.get('hidden_act', 'quick_gelu'), options.get('layer_norm_eps', 1e-5),
  )  # fmt: skip


def config_of(source, part: str = '', **options) -> modeling.Config:
  """The config of a checkpoint, by the shapes of its tensors; `text_config` and `vision_config` of
  its `config.json`, or given here, tell heads, activation and epsilon.

  Raises:
    ValueError: it is no such detector.
  """
  del part
  options = {**source.config, **options}
  base = next((b for b in ('owlv2.', 'owlvit.') if f'{b}text_projection.weight' in source), '')
  vision, text = (f'{base}{part}_model.' for part in ('vision', 'text'))
  try:
    patch = source.shape(f'{vision}embeddings.patch_embedding.weight')[-1]
    places = source.shape(f'{vision}embeddings.position_embedding.weight')[0]
    vocab = source.shape(f'{text}embeddings.token_embedding.weight')[0]
    return modeling.Config(
      vision=_tower(source, vision, options.get('vision_config', {})),
      text=_tower(source, text, options.get('text_config', {})),
      size=round((places - 1) ** 0.5) * patch,
      patch=patch,
      vocab=vocab,
      context=source.shape(f'{text}embeddings.position_embedding.weight')[0],
      embed=source.shape(f'{base}text_projection.weight')[0],
      v2='objectness_head.dense0.weight' in source,
    )
  except KeyError as error:
    raise ValueError(f'{source.where} has no OWL-ViT or OWLv2 detector: no {error}') from error


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `conversion.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build(config))
  whole = fused(stacked(source, 'layers'))
  return conversion.convert(whole, RULES, template, dtype, sharding)
