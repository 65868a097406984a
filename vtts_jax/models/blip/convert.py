"""BLIP with the head of ImageReward or CycleReward, from two layouts.

One has their own names (`blip.visual_encoder`, `blip.text_encoder`, `mlp`). The other names the
towers as transformers' `BlipForImageTextRetrieval` does (`vision_model`, `text_encoder`). README.md
says how the pickles become safetensors.
"""

import dataclasses
import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.blip import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

# the last linear layer of `mlp.layers` in CycleReward, whose heads have an activation after each;
# ImageReward's linear layers are 0, 2, 4, 6, 7, and the others are dropout
CYCLE_END = 8
_TIMM = {
  'norm_attn': 'norm1', 'norm_ffn': 'norm2', 'qkv': 'attn.qkv', 'out': 'attn.proj',
  'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
_HUB = {
  'norm_attn': 'layer_norm1', 'norm_ffn': 'layer_norm2', 'qkv': 'self_attn.qkv',
  'out': 'self_attn.projection', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
_TEXT = r'text_encoder\.'


_HEAD = re.compile(r'mlp\.layers\.(\d+)\.(weight|bias)')


def _head_numbers(names):
  """Returns the numbers of the linear layers of `mlp.layers`, in order."""
  return sorted({int(m[1]) for n in names if (m := _HEAD.fullmatch(n))})


def _linear_rules(theirs, ours):
  return [
    (rf'{theirs}\.weight', f'{ours}.kernel', transpose_kernel),
    (rf'{theirs}\.bias', f'{ours}.bias', ''),
  ]


def _norm_rules(theirs, ours):
  return [(rf'{theirs}\.(weight|bias)', rf'{ours}.\1', '')]


def _attention_rules(theirs, ours):
  return [
    *_linear_rules(rf'{theirs}\.self\.(qkv|q|kv)', rf'{ours}.\1'),
    *_linear_rules(rf'{theirs}\.output\.dense', f'{ours}.out'),
    *_norm_rules(rf'{theirs}\.output\.LayerNorm', f'{ours}.norm'),
  ]


def _fusion_rules(theirs, ours):
  return [
    *_attention_rules(rf'{theirs}\.crossattention', f'{ours}.cross'),
    *_linear_rules(rf'{theirs}\.intermediate\.dense', f'{ours}.ffn.up'),
    *_linear_rules(rf'{theirs}\.output\.dense', f'{ours}.ffn.down'),
    *_norm_rules(rf'{theirs}\.output\.LayerNorm', f'{ours}.norm'),
  ]


def _flatten_token(array):
  return array.reshape(array.shape[-1])


def _flatten_positions(array):
  return array.reshape(array.shape[-2:])


# for a source that went through `arrange_layers`
RULES = [
  (r'(visual_encoder\.cls_token|vision_model\.embeddings\.class_embedding)',
   'vision.token', _flatten_token),
  (r'(visual_encoder\.pos_embed|vision_model\.embeddings\.position_embedding)',
   'vision.positions', _flatten_positions),
  (r'(visual_encoder\.patch_embed\.proj|vision_model\.embeddings\.patch_embedding)\.weight',
   'vision.embed.kernel', vit.patch_kernel),
  (r'(visual_encoder\.patch_embed\.proj|vision_model\.embeddings\.patch_embedding)\.bias',
   'vision.embed.bias', ''),
  *vit.trunk_rules(r'visual_encoder\.blocks\.\*\.', 'vision.trunk.', _TIMM),
  *vit.trunk_rules(r'vision_model\.encoder\.layers\.\*\.', 'vision.trunk.', _HUB),
  (r'(?:visual_encoder\.norm|vision_model\.post_layernorm)\.(weight|bias)', r'vision.norm.\1', ''),
  (_TEXT + r'embeddings\.word_embeddings\.weight', 'words.embedding', ''),
  (_TEXT + r'embeddings\.position_embeddings\.weight', 'positions.embedding', ''),
  *_norm_rules(_TEXT + r'embeddings\.LayerNorm', 'norm'),
  *_attention_rules(_TEXT + r'encoder\.first\.attention', 'first'),
  *_attention_rules(_TEXT + r'encoder\.layer\.\*\.attention', 'pairs.attn'),
  *_fusion_rules(_TEXT + r'encoder\.layer\.\*', 'pairs.fusion'),
  *_fusion_rules(_TEXT + r'encoder\.last', 'last'),
  *_linear_rules(r'head\.(\d+)', r'head.\1'),
  # not needed: the contrastive and matching heads, and a buffer of old files
  (r'(vision_proj|text_proj|itm_head)\.(weight|bias)', None, ''),
  (_TEXT + r'embeddings\.position_ids', None, ''),
]  # fmt: skip
# only the picture's trunk is split: it is two thirds of the model
SHARDING = vit.SHARDING


def arrange_layers(source):
  """Returns the source that `RULES` need.

  Layers are stacked as `modeling.Pair` holds them, projections are fused, the prefix `blip.` is
  gone.
  """
  layer = re.compile(r'(text_encoder\.encoder\.)layer\.(\d+)\.(.*)')
  bare = {n: n.removeprefix('blip.') for n in source.tensor_names()}
  found = [layer.fullmatch(n) for n in bare.values()]
  last = max((int(m[2]) for m in found if m), default=0)
  heads = _head_numbers(bare.values())

  def rename(name):
    linear = _HEAD.fullmatch(name)
    if linear:
      return f'head.{heads.index(int(linear[1]))}.{linear[2]}'
    match = layer.fullmatch(name)
    if not match:
      return name
    number, rest = int(match[2]), match[3]
    # self-attention of layer i belongs to pair i - 1, the rest of layer i to pair i
    if rest.startswith('attention.'):
      place = f'layer.{number - 1}' if number else 'first'
    else:
      place = 'last' if number == last else f'layer.{number}'
    # cross-attention fuses k and v only: its queries are of another input
    if rest.startswith('crossattention.self.'):
      short = {'query': 'q', 'key': 'k', 'value': 'v'}
      rest = re.sub(r'self\.(query|key|value)', lambda m: f'self.{short[m[1]]}', rest)
    return f'{match[1]}{place}.{rest}'

  back = {rename(n): old for old, n in bare.items()}
  header = {n: source.header[old] for n, old in back.items()}
  renamed = dataclasses.replace(
    source, header=header, read=lambda name: source.read_tensor(back[name])
  )
  # self-attention first, so that 'k' and 'v' are left in cross-attention only
  joined = fuse_projections(renamed, ('query', 'key', 'value'), 'qkv')
  joined = fuse_projections(joined, ('k', 'v'), 'kv')
  return stack_layers(joined, 'blocks|layers?')


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Reads the config of a checkpoint off its shapes.

  Heads are 64 wide and norms have their published eps, unless the checkpoint's config.json
  (`vision_config`, `text_config`) or `options` say otherwise. The numbers of the head's layers tell
  CycleReward from ImageReward.

  Args:
    source: `checkpoints.Source`.
    part: not used, as the model has no parts.
    options: fields of `Config`, and `vision_heads`, `vision_eps`.

  Raises:
    ValueError: there is no BLIP in the checkpoint.
  """
  del part
  s = arrange_layers(source)
  # ImageReward's file names its ViT as timm does
  timm = any(n.startswith('visual_encoder.') for n in s.tensor_names())
  where = 'visual_encoder.' if timm else 'vision_model.embeddings.'
  block = 'visual_encoder.blocks.*.' if timm else 'vision_model.encoder.layers.*.'
  text = 'text_encoder.embeddings.'
  try:
    patch = s.shape_of(where + ('patch_embed.proj.weight' if timm else 'patch_embedding.weight'))
    tokens = s.shape_of(where + ('pos_embed' if timm else 'position_embedding'))[-2]
    layers, hidden, width = s.shape_of(block + 'mlp.fc1.weight')
    vocab, inner = s.shape_of(text + 'word_embeddings.weight')
    positions = s.shape_of(text + 'position_embeddings.weight')[0]
    pairs, outer, _ = s.shape_of('text_encoder.encoder.layer.*.intermediate.dense.weight')
    head = tuple(s.shape_of(f'head.{i}.weight')[0] for i in range(_count_layers(s, 'head')))
  except KeyError as error:
    raise ValueError(f'{source.where} has no BLIP with a reward head: no {error}') from error
  seen, read = (source.config.get(f'{name}_config') or {} for name in ('vision', 'text'))
  trunk = vit.Config(
    width, layers,
    options.pop('vision_heads', seen.get('num_attention_heads', max(1, width // 64))), hidden,
    eps=options.pop('vision_eps', seen.get('layer_norm_eps', 1e-6 if timm else 1e-5)),
  )  # fmt: skip
  found = {
    'size': round((tokens - 1) ** 0.5) * patch[-1], 'patch': patch[-1], 'vocab': vocab,
    'positions': positions, 'width': inner, 'layers': pairs + 1, 'hidden': outer,
    'heads': read.get('num_attention_heads', max(1, inner // 64)),
    'eps': read.get('layer_norm_eps', 1e-12), 'length': 35, 'head': head,
  }  # fmt: skip
  found |= modeling.CYCLE if CYCLE_END in _head_numbers(source.tensor_names()) else {}
  found['length'] = min(found['length'], positions)
  return modeling.Config(vision=trunk, **(found | options))


def _count_layers(source, lead):
  return len({n.split('.')[1] for n in source.tensor_names() if n.startswith(lead + '.')})


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(arrange_layers(source), RULES, template, dtype, sharding)
