"""DINO and DINOv2: from the layouts of transformers and of the original repositories.

One table for all of them: `ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel` and the classifiers
of the latter two (as files hold them, and as transformers 5 names them in memory), and
`blocks.0.attn.qkv.weight` of facebookresearch/dino, /dinov2, timm and DreamSim.
"""

import math
import re

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules, vit
from vtts_jax.models.dino import modeling
from vtts_jax.models.stacked import fused, stacked

_LEAD = r'(?:(?:dinov2|dinov2_with_registers|vit)\.)?'
_TRUNK = {  # ours: the names it has in a block; a dot is a dot
  'norm_attn': '(?:norm1|layernorm_before)',
  'norm_ffn': '(?:norm2|layernorm_after)',
  'qkv': '(?:attn|attention|attention.attention).qkv',
  'out': '(?:attn.proj|attention.o_proj|attention.output.dense)',
  'up': '(?:mlp.(?:fc1|w12|weights_in|up)|intermediate.dense)',
  'down': '(?:mlp.(?:fc2|w3|weights_out|down_proj)|output.dense)',
  'scale_attn': '(?:ls1.gamma|layer_scale1.lambda1)',
  'scale_ffn': '(?:ls2.gamma|layer_scale2.lambda1)',
}
_PATCH = r'(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.'
RULES = [  # for a source that is `joined`
  *vit.rules(_LEAD + r'(?:blocks|encoder\.layer|layers)\.\*\.', 'trunk.', _TRUNK),
  (_LEAD + _PATCH + 'weight', 'patch.kernel', vit.patch_kernel),
  (_LEAD + _PATCH + 'bias', 'patch.bias', ''),
  (_LEAD + r'(?:embeddings\.)?cls_token', 'cls', ''),
  (_LEAD + r'(?:embeddings\.position_embeddings|pos_embed)', 'positions', ''),
  (_LEAD + r'(?:embeddings\.)?register_tokens', 'registers', ''),
  (r'pos_drop\.(weight|bias)', r'embed_norm.\1', ''),  # DreamSim keeps CLIP's norm there
  (_LEAD + r'(?:layernorm|norm)\.(weight|bias)', r'norm.\1', ''),
  (r'proj', 'project', ''),
  (r'classifier\.weight', 'head.kernel', 'T'),
  (r'classifier\.bias', 'head.bias', ''),
  # of training alone, and a pooler that DINO's files do not fill
  (_LEAD + r'(?:(?:embeddings\.)?mask_token|pooler\.dense\.(?:weight|bias))', None, ''),
]
SHARDING = vit.SHARDING


def joined(source):
  """The source with layers stacked, and queries, keys and values, gates and ups in one."""
  source = stacked(source, r'blocks|layers?')
  for parts, name in (
    (('query', 'key', 'value'), 'qkv'),
    (('q_proj', 'k_proj', 'v_proj'), 'qkv'),
    (('gate_proj', 'up_proj'), 'up'),
  ):
    source = fused(source, parts, name)
  return source


def config_of(source, part: str = '', **options) -> modeling.Config:
  """The config of a checkpoint: read off names, shapes and its `config.json`; `options` win. Of the
  part 'encoder' a linear head is left.

  Heads are 64 wide where no config says how many there are. Positions are resized as the code of
  the layout does it: `blocks.0...` belongs to the original code, which adds 0.1.

  Raises:
    ValueError: there is no such model in it.
    ConfigError: an activation that the port does not know.
  """
  shapes = _shapes(source)
  lost = {'cls', 'positions', 'patch.kernel', 'trunk.blocks.ffn.down.kernel'} - shapes.keys()
  if lost:
    raise ValueError(f'{source.where} has no DINO or DINOv2: nothing for {", ".join(sorted(lost))}')
  width, patch = shapes['cls'][-1], shapes['patch.kernel'][-1]
  layers, _, hidden = shapes['trunk.blocks.ffn.down.kernel']
  up = shapes['trunk.blocks.ffn.up.kernel'][1]
  registers = shapes.get('registers', (1, 0))[1]
  original = 'cls_token' in source
  config = source.config
  found = {
    'width': width,
    'layers': layers,
    'heads': config.get('num_attention_heads') or max(width // 64, 1),
    'hidden': hidden,
    'patch': patch,
    'grid': math.isqrt(shapes['positions'][1] - 1),
    'act': 'swiglu' if up == 2 * hidden else config.get('hidden_act', 'gelu'),
    'eps': config.get('layer_norm_eps', 1e-6),
    'layer_scale': 'trunk.blocks.scale_attn' in shapes,
    'registers': registers,
    'antialias': registers > 0,
    'offset': 0.1 if original and not registers else 0.0,
    'embed_norm': 'embed_norm.weight' in shapes,
    'project': shapes.get('project', (0, 0))[1],
    'classes': shapes.get('head.kernel', (0,))[0],
  }
  config = modeling.Config(**{**found, **options})
  return modeling.part_of(config, part) if part else config


def _shapes(source) -> dict:
  """{our name: the shape that the checkpoint has for it}."""
  whole, shapes = joined(source), {}
  for name in whole.names():
    for pattern, target, _ in RULES:
      match = re.fullmatch(pattern, name)
      if match:
        if target:
          shapes[match.expand(target)] = whole.shape(name)
        break
  return shapes


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; with `classes=0` a linear head is knowingly left. Errors as in
  `conversion.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build(config))
  rules = RULES if config.classes else [(r'classifier\..*', None, ''), *RULES]
  return conversion.convert(joined(source), rules, template, dtype, sharding)
