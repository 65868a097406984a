"""BLIP with ImageReward's head, from ImageReward's own names (`blip.visual_encoder`,
`blip.text_encoder`, `mlp`) or with the towers as transformers' `BlipForImageTextRetrieval` names
them (`vision_model`, `text_encoder`); see README.md for how ImageReward.pt becomes safetensors."""

import dataclasses
import re

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules, vit
from vtts_jax.models.blip import modeling
from vtts_jax.models.stacked import fused, stacked, transposed

HEAD = (0, 2, 4, 6, 7)  # between them is dropout
_TIMM = {
  'norm_attn': 'norm1', 'norm_ffn': 'norm2', 'qkv': 'attn.qkv', 'out': 'attn.proj',
  'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
_HUB = {
  'norm_attn': 'layer_norm1', 'norm_ffn': 'layer_norm2', 'qkv': 'self_attn.qkv',
  'out': 'self_attn.projection', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
_TEXT = r'text_encoder\.'


def _linear(theirs, ours):
  return [
    (rf'{theirs}\.weight', f'{ours}.kernel', transposed),
    (rf'{theirs}\.bias', f'{ours}.bias', ''),
  ]


def _norm(theirs, ours):
  return [(rf'{theirs}\.(weight|bias)', rf'{ours}.\1', '')]


def _attention(theirs, ours):
  return [
    *_linear(rf'{theirs}\.self\.(qkv|q|kv)', rf'{ours}.\1'),
    *_linear(rf'{theirs}\.output\.dense', f'{ours}.out'),
    *_norm(rf'{theirs}\.output\.LayerNorm', f'{ours}.norm'),
  ]


def _fusion(theirs, ours):
  return [
    *_attention(rf'{theirs}\.crossattention', f'{ours}.cross'),
    *_linear(rf'{theirs}\.intermediate\.dense', f'{ours}.ffn.up'),
    *_linear(rf'{theirs}\.output\.dense', f'{ours}.ffn.down'),
    *_norm(rf'{theirs}\.output\.LayerNorm', f'{ours}.norm'),
  ]


def _first(array):
  return array.reshape(array.shape[-1])


def _table(array):
  return array.reshape(array.shape[-2:])


RULES = [  # of a source made by `paired`
  (r'(visual_encoder\.cls_token|vision_model\.embeddings\.class_embedding)',
   'vision.token', _first),
  (r'(visual_encoder\.pos_embed|vision_model\.embeddings\.position_embedding)',
   'vision.positions', _table),
  (r'(visual_encoder\.patch_embed\.proj|vision_model\.embeddings\.patch_embedding)\.weight',
   'vision.embed.kernel', vit.patch_kernel),
  (r'(visual_encoder\.patch_embed\.proj|vision_model\.embeddings\.patch_embedding)\.bias',
   'vision.embed.bias', ''),
  *vit.rules(r'visual_encoder\.blocks\.\*\.', 'vision.trunk.', _TIMM),
  *vit.rules(r'vision_model\.encoder\.layers\.\*\.', 'vision.trunk.', _HUB),
  (r'(?:visual_encoder\.norm|vision_model\.post_layernorm)\.(weight|bias)', r'vision.norm.\1', ''),
  (_TEXT + r'embeddings\.word_embeddings\.weight', 'words.embedding', ''),
  (_TEXT + r'embeddings\.position_embeddings\.weight', 'positions.embedding', ''),
  *_norm(_TEXT + r'embeddings\.LayerNorm', 'norm'),
  *_attention(_TEXT + r'encoder\.first\.attention', 'first'),
  *_attention(_TEXT + r'encoder\.layer\.\*\.attention', 'pairs.attn'),
  *_fusion(_TEXT + r'encoder\.layer\.\*', 'pairs.fusion'),
  *_fusion(_TEXT + r'encoder\.last', 'last'),
  *_linear(r'head\.(\d+)', r'head.\1'),
  # contrastive and matching heads, a buffer of old files
  (r'(vision_proj|text_proj|itm_head)\.(weight|bias)', None, ''),
  (_TEXT + r'embeddings\.position_ids', None, ''),
]  # fmt: skip
SHARDING = vit.SHARDING  # of the picture's trunk, which is two thirds of the model


def paired(source):
  """The source with layers put together as `modeling.Pair` holds them, q, k and v in one, without
  the prefix `blip.`."""
  layer = re.compile(r'(text_encoder\.encoder\.)layer\.(\d+)\.(.*)')
  bare = {n: n.removeprefix('blip.') for n in source.names()}
  found = [layer.fullmatch(n) for n in bare.values()]
  last = max((int(m[2]) for m in found if m), default=0)
  heads = [f'mlp.layers.{n}.' for n in HEAD]

  def new(name):
    for i, lead in enumerate(heads):
      if name.startswith(lead):
        return f'head.{i}.{name.removeprefix(lead)}'
    match = layer.fullmatch(name)
    if not match:
      return name
    number, rest = int(match[2]), match[3]
    if rest.startswith('attention.'):
      place = f'layer.{number - 1}' if number else 'first'
    else:
      place = 'last' if number == last else f'layer.{number}'
    if rest.startswith('crossattention.self.'):
      short = {'query': 'q', 'key': 'k', 'value': 'v'}
      rest = re.sub(r'self\.(query|key|value)', lambda m: f'self.{short[m[1]]}', rest)
    return f'{match[1]}{place}.{rest}'

  back = {new(n): old for old, n in bare.items()}
  header = {n: source.header[old] for n, old in back.items()}
  renamed = dataclasses.replace(source, header=header, read=lambda name: source.get(back[name]))
  joined = fused(fused(renamed, ('query', 'key', 'value'), 'qkv'), ('k', 'v'), 'kv')
  return stacked(joined, 'blocks|layers?')


def config_of(source, part: str = '', **options) -> modeling.Config:
  """The config of a checkpoint, from shapes; heads are 64 wide and norms have their published eps
  unless the checkpoint's config.json (`vision_config`, `text_config`) or `options` (fields of
  `Config`, and `vision_heads`, `vision_eps`) say otherwise.

  Raises:
    ValueError: there is no BLIP in it.
  """
  del part
  s = paired(source)
  timm = any(n.startswith('visual_encoder.') for n in s.names())
  where = 'visual_encoder.' if timm else 'vision_model.embeddings.'
  block = 'visual_encoder.blocks.*.' if timm else 'vision_model.encoder.layers.*.'
  text = 'text_encoder.embeddings.'
  try:
    patch = s.shape(where + ('patch_embed.proj.weight' if timm else 'patch_embedding.weight'))
    tokens = s.shape(where + ('pos_embed' if timm else 'position_embedding'))[-2]
    layers, hidden, width = s.shape(block + 'mlp.fc1.weight')
    vocab, inner = s.shape(text + 'word_embeddings.weight')
    positions = s.shape(text + 'position_embeddings.weight')[0]
    pairs, outer, _ = s.shape('text_encoder.encoder.layer.*.intermediate.dense.weight')
    head = tuple(s.shape(f'head.{i}.weight')[0] for i in range(_count(s, 'head')))
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
    'eps': read.get('layer_norm_eps', 1e-12), 'length': min(35, positions), 'head': head,
  }  # fmt: skip
  return modeling.Config(vision=trunk, **(found | options))


def _count(source, lead):
  return len({n.split('.')[1] for n in source.names() if n.startswith(lead + '.')})


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `conversion.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build(config))
  return conversion.convert(paired(source), RULES, template, dtype, sharding)
