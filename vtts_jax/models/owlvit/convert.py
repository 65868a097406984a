"""OWL-ViT and OWLv2, from transformers' `OwlViTForObjectDetection`, `Owlv2ForObjectDetection`."""

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.owlvit import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

BASE = r'owlv(?:it|2)\.'
VISION, TEXT = BASE + r'vision_model\.', BASE + r'text_model\.'
LAYER = r'encoder\.layers\.\*\.'
NAMES = {
  'norm_attn': 'layer_norm1', 'norm_ffn': 'layer_norm2', 'qkv': 'self_attn.qkv',
  'out': 'self_attn.out_proj', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip


def _linear_rules(theirs, ours):
  return [
    (rf'{theirs}\.weight', f'{ours}.kernel', transpose_kernel),
    (rf'{theirs}\.bias', f'{ours}.bias', ''),
  ]


def _head_rules(theirs, ours):
  layers = {'dense0': 'first', 'dense1': 'second', 'dense2': 'last'}
  return [
    rule for a, b in layers.items() for rule in _linear_rules(rf'{theirs}\.{a}', f'{ours}.{b}')
  ]


RULES = [
  (VISION + r'embeddings\.class_embedding', 'vision.token', ''),
  (VISION + r'embeddings\.patch_embedding\.weight', 'vision.embed.kernel', vit.patch_kernel),
  (VISION + r'embeddings\.position_embedding\.weight', 'vision.position', ''),
  (VISION + r'pre_layernorm\.(weight|bias)', r'vision.norm_pre.\1', ''),
  *vit.trunk_rules(VISION + LAYER, 'vision.trunk.', NAMES),
  (VISION + r'post_layernorm\.(weight|bias)', r'vision.norm.\1', ''),
  (TEXT + r'embeddings\.token_embedding\.weight', 'text.embed.embedding', ''),
  (TEXT + r'embeddings\.position_embedding\.weight', 'text.position', ''),
  *vit.trunk_rules(TEXT + LAYER, 'text.trunk.', NAMES),
  (TEXT + r'final_layer_norm\.(weight|bias)', r'text.norm.\1', ''),
  (BASE + r'text_projection\.weight', 'text.project.kernel', transpose_kernel),
  (r'layer_norm\.(weight|bias)', r'norm.\1', ''),
  *_linear_rules(r'class_head\.dense0', 'classes'),
  *_linear_rules(r'class_head\.logit_shift', 'shift'),
  *_linear_rules(r'class_head\.logit_scale', 'scale'),
  *_head_rules('box_head', 'box'),
  *_head_rules('objectness_head', 'object'),
  # not needed: the comparison of whole pictures with texts (untrained in OWLv2), and old buffers
  (BASE + r'(visual_projection\.weight|logit_scale)', None, ''),
  (r'.*\.position_ids|box_bias', None, ''),
]
SHARDING = vit.SHARDING


def _tower_config(source, lead, options):
  layer = f'{lead}encoder.layers.0.'
  hidden, width = source.shape_of(f'{layer}mlp.fc1.weight')
  blocks = [n for n in source.tensor_names() if n.startswith(f'{lead}encoder.')]
  # counted and not read from a config: files without one load too
  numbers = {int(n[len(lead) :].split('.')[2]) for n in blocks}
  return vit.Config(
    width, 1 + max(numbers), options.get('num_attention_heads', width // 64), hidden,
    options.get('hidden_act', 'quick_gelu'), options.get('layer_norm_eps', 1e-5),
  )  # fmt: skip


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Reads the config of a checkpoint off the shapes of its tensors.

  `text_config` and `vision_config` tell heads, activation and epsilon. They come from the
  checkpoint's `config.json` or from `options`.

  Raises:
    ValueError: the checkpoint is no such detector.
  """
  del part
  options = {**source.config, **options}
  # the two versions differ in this prefix
  base = next((b for b in ('owlv2.', 'owlvit.') if f'{b}text_projection.weight' in source), '')
  vision, text = (f'{base}{part}_model.' for part in ('vision', 'text'))
  try:
    # a tensor that is missing means that this is another model
    patch = source.shape_of(f'{vision}embeddings.patch_embedding.weight')[-1]
    places = source.shape_of(f'{vision}embeddings.position_embedding.weight')[0]
    vocab = source.shape_of(f'{text}embeddings.token_embedding.weight')[0]
    return modeling.Config(
      vision=_tower_config(source, vision, options.get('vision_config', {})),
      text=_tower_config(source, text, options.get('text_config', {})),
      size=round((places - 1) ** 0.5) * patch,
      patch=patch,
      vocab=vocab,
      context=source.shape_of(f'{text}embeddings.position_embedding.weight')[0],
      embed=source.shape_of(f'{base}text_projection.weight')[0],
      v2='objectness_head.dense0.weight' in source,
    )
  except KeyError as error:
    raise ValueError(f'{source.where} has no OWL-ViT or OWLv2 detector: no {error}') from error


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  whole = fuse_projections(stack_layers(source, 'layers'))
  return convert_weights(whole, RULES, template, dtype, sharding)
