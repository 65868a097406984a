"""DINO and DINOv2, from the layouts of transformers and of the original repositories.

One table serves all of them. Those of transformers are `ViTModel`, `Dinov2Model`,
`Dinov2WithRegistersModel` and the classifiers of the latter two (as files hold them, and as
transformers 5 names them in memory). The original one, `blocks.0.attn.qkv.weight`, is that of
facebookresearch/dino, facebookresearch/dinov2, timm and DreamSim.
"""

import math
import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.dino import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers

_LEAD = r'(?:(?:dinov2|dinov2_with_registers|vit)\.)?'
# our name: the names that it has in a block of any layout, as a regular expression
_TRUNK = {
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
# for a source that went through `arrange_layers`
RULES = [
  *vit.trunk_rules(_LEAD + r'(?:blocks|encoder\.layer|layers)\.\*\.', 'trunk.', _TRUNK),
  (_LEAD + _PATCH + 'weight', 'patch.kernel', vit.patch_kernel),
  (_LEAD + _PATCH + 'bias', 'patch.bias', ''),
  (_LEAD + r'(?:embeddings\.)?cls_token', 'cls', ''),
  (_LEAD + r'(?:embeddings\.position_embeddings|pos_embed)', 'positions', ''),
  (_LEAD + r'(?:embeddings\.)?register_tokens', 'registers', ''),
  # DreamSim keeps CLIP's norm before the blocks under this name
  (r'pos_drop\.(weight|bias)', r'embed_norm.\1', ''),
  (_LEAD + r'(?:layernorm|norm)\.(weight|bias)', r'norm.\1', ''),
  (r'proj', 'project', ''),
  (r'classifier\.weight', 'head.kernel', 'T'),
  (r'classifier\.bias', 'head.bias', ''),
  # not needed: the mask token of training, and a pooler that DINO's files do not fill
  (_LEAD + r'(?:(?:embeddings\.)?mask_token|pooler\.dense\.(?:weight|bias))', None, ''),
]
SHARDING = vit.SHARDING


def arrange_layers(source):
  """Returns the source that `RULES` need: layers are stacked, q, k, v and gate, up are fused."""
  source = stack_layers(source, r'blocks|layers?')
  for parts, name in (
    (('query', 'key', 'value'), 'qkv'),
    (('q_proj', 'k_proj', 'v_proj'), 'qkv'),
    (('gate_proj', 'up_proj'), 'up'),
  ):
    source = fuse_projections(source, parts, name)
  return source


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Reads the config of a checkpoint off its names, shapes and `config.json`.

  Heads are 64 wide where no config says how many there are. Positions are resized as the code of
  the layout does it: the original code, whose names are `blocks.0...`, adds 0.1 to the size.

  Args:
    source: `checkpoints.Source`.
    part: 'encoder' leaves a linear head out.
    options: fields of `Config` that override what is read.

  Raises:
    ValueError: there is no such model in the checkpoint.
    ConfigError: an activation that the port does not know.
  """
  shapes = _our_shapes(source)
  lost = {'cls', 'positions', 'patch.kernel', 'trunk.blocks.ffn.down.kernel'} - shapes.keys()
  if lost:
    raise ValueError(f'{source.where} has no DINO or DINOv2: nothing for {", ".join(sorted(lost))}')
  width, patch = shapes['cls'][-1], shapes['patch.kernel'][-1]
  layers, _, hidden = shapes['trunk.blocks.ffn.down.kernel']
  # SwiGLU doubles the first layer
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
    # the models with registers are released with `interpolate_antialias=True`
    'antialias': registers > 0,
    'offset': 0.1 if original and not registers else 0.0,
    'embed_norm': 'embed_norm.weight' in shapes,
    'project': shapes.get('project', (0, 0))[1],
    'classes': shapes.get('head.kernel', (0,))[0],
  }
  config = modeling.Config(**{**found, **options})
  return modeling.part_of(config, part) if part else config


def _our_shapes(source) -> dict:
  """Returns {our name: the shape that the checkpoint has for it}."""
  whole, shapes = arrange_layers(source), {}
  for name in whole.tensor_names():
    for pattern, target, _ in RULES:
      match = re.fullmatch(pattern, name)
      if match:
        if target:
          shapes[match.expand(target)] = whole.shape_of(name)
        break
  return shapes


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; with `classes=0` a linear head is left out.

  Errors are those of `convert_weights`.
  """
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  rules = RULES if config.classes else [(r'classifier\..*', None, ''), *RULES]
  return convert_weights(arrange_layers(source), rules, template, dtype, sharding)
