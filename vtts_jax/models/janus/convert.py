"""Janus, from two layouts of safetensors.

One is DeepSeek's own (deepseek-ai/Janus-1.3B; of Janus-Pro it is released as pickles), the other
that of transformers' `JanusForConditionalGeneration` (deepseek-community/Janus-Pro-1B, -7B).
README.md says how to save the pickles anew.
"""

import dataclasses
import re

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.janus import modeling
from vtts_jax.models.llamagen import convert as llamagen
from vtts_jax.models.llamagen_vq import convert as llamagen_vq
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

# every released model has heads of 128, and 64 in its tower
HEAD, VISION_HEAD = 128, 64
TRUNK = r'language_model\.model\.'
BLOCK = TRUNK + r'layers\.\*\.'
TOWER = r'vision_model\.vision_tower\.'
_TIMM = {
  'norm_attn': 'norm1', 'norm_ffn': 'norm2', 'qkv': 'attn.qkv', 'out': 'attn.proj',
  'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
# transformers' names -> DeepSeek's; and MLPs by the number of the layer in both
_VQ = r'model\.vqmodel\.((?:en|de)coder)\.'
_NAMES = [
  (r'model\.language_model\.(.*)', r'language_model.model.\1'),
  (r'lm_head\.(.*)', r'language_model.lm_head.\1'),
  (_VQ + r'(?:down|up)\.(\d+)\.block\.(.*)', r'gen_vision_model.\1.conv_blocks.\2.res.\3'),
  (_VQ + r'(?:down|up)\.(\d+)\.(.*)', r'gen_vision_model.\1.conv_blocks.\2.\3'),
  (_VQ + r'mid\.block_1\.(.*)', r'gen_vision_model.\1.mid.0.\2'),
  (_VQ + r'mid\.attn_1\.(.*)', r'gen_vision_model.\1.mid.1.\2'),
  (_VQ + r'mid\.block_2\.(.*)', r'gen_vision_model.\1.mid.2.\2'),
  (r'model\.vqmodel\.(.*)', r'gen_vision_model.\1'),
  (r'model\.generation_embeddings\.(.*)', r'gen_embed.\1'),
  (r'model\.generation_head\.proj_out\.(.*)', r'gen_head.output_mlp_projector.\1'),
  (r'model\.generation_head\.vision_head\.(.*)', r'gen_head.vision_head.\1'),
  (r'model\.generation_aligner\.fc1\.(.*)', r'gen_aligner.0.\1'),
  (r'model\.aligner\.fc1\.(.*)', r'aligner.0.\1'),
  (r'model\.vision_model\.embeddings\.patch_embedding\.(.*)',
   r'vision_model.vision_tower.patch_embed.proj.\1'),
  (r'model\.vision_model\.embeddings\.position_embedding\.weight',
   'vision_model.vision_tower.pos_embed'),
  (r'model\.vision_model\.post_layernorm\.(.*)', r'vision_model.vision_tower.norm.\1'),
  (r'model\.vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(.*)',
   r'vision_model.vision_tower.blocks.\1.norm\2.\3'),
  (r'model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection_layer\.(.*)',
   r'vision_model.vision_tower.blocks.\1.attn.proj.\2'),
  (r'model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.(.*)',
   r'vision_model.vision_tower.blocks.\1.attn.\2'),
  (r'model\.vision_model\.encoder\.layers\.(\d+)\.(.*)',
   r'vision_model.vision_tower.blocks.\1.\2'),
]  # fmt: skip


def _rename(name):
  # an MLP has an activation after each linear layer, which takes a number in DeepSeek's names
  mlp = re.fullmatch(r'((?:gen_)?aligner)\.layers\.(\d+)\.(.*)', name)
  if mlp:
    return f'{mlp[1]}.{int(mlp[2]) // 2}.{mlp[3]}'
  mlp = re.fullmatch(r'model\.(generation_)?aligner\.hidden_layers\.(\d+)\.(.*)', name)
  if mlp:
    return f'{"gen_" if mlp[1] else ""}aligner.{int(mlp[2]) + 1}.{mlp[3]}'
  for pattern, target in _NAMES:
    found = re.fullmatch(pattern, name)
    if found:
      return found.expand(target)
  return name


def arrange_layers(source):
  """Returns the source that the rules need: one layout, projections fused, layers stacked."""
  back = {_rename(name): name for name in source.tensor_names()}
  header = {name: source.header[old] for name, old in back.items()}
  renamed = dataclasses.replace(
    source, header=header, read=lambda name: source.read_tensor(back[name])
  )
  joined = fuse_projections(fuse_projections(renamed), ('gate_proj', 'up_proj'), 'up')
  return stack_layers(joined, 'layers|blocks')


def _linear_rules(theirs, ours, op='T'):
  return [(theirs + r'\.weight', f'{ours}.kernel', op), (theirs + r'\.bias', f'{ours}.bias', '')]


def _flatten_positions(array):
  return array.reshape(array.shape[-2:])


DRAWING = [
  (TRUNK + r'embed_tokens\.weight', 'words', ''),
  (BLOCK + r'self_attn\.qkv\.weight', 'blocks.attn.qkv.kernel', llamagen.split_kernel(3)),
  (BLOCK + r'self_attn\.o_proj\.weight', 'blocks.attn.out.kernel', transpose_kernel),
  (BLOCK + r'mlp\.up\.weight', 'blocks.ffn.up.kernel', llamagen.split_kernel(2)),
  (BLOCK + r'mlp\.down_proj\.weight', 'blocks.ffn.down.kernel', transpose_kernel),
  (BLOCK + r'input_layernorm\.weight', 'blocks.norm_attn.weight', ''),
  (BLOCK + r'post_attention_layernorm\.weight', 'blocks.norm_ffn.weight', ''),
  (TRUNK + r'norm\.weight', 'norm.weight', ''),
  # a table of old files
  (r'.*rotary_emb\.inv_freq', None, ''),
  (r'gen_embed\.weight', 'code_table', ''),
  *_linear_rules(r'gen_aligner\.(\d+)', r'code_mlp.layers.\1'),
  *_linear_rules(r'gen_head\.output_mlp_projector', 'head_in'),
  *_linear_rules(r'gen_head\.vision_head', 'head_out'),
  *[
    (rf'gen_vision_model\.{pattern}', None if target is None else f'vq.{target}', op)
    for pattern, target, op in llamagen_vq.RULES
  ],
]
READING = [
  *vit.trunk_rules(TOWER + r'blocks\.\*\.', 'vision.trunk.', _TIMM),
  *_linear_rules(TOWER + r'patch_embed\.proj', 'vision.patch', vit.patch_kernel),
  (TOWER + 'pos_embed', 'vision.position', _flatten_positions),
  (TOWER + r'norm\.(weight|bias)', r'vision.norm.\1', ''),
  # the pool that SigLIP scores with
  (TOWER + r'attn_pool\..*', None, ''),
  *_linear_rules(r'aligner\.(\d+)', r'patch_mlp.layers.\1'),
  (r'language_model\.lm_head\.weight', 'word_head.kernel', 'T'),
]
# what a config without a tower leaves
LEFT = [(r'(vision_model|aligner|language_model\.lm_head)\..*', None, '')]
SHARDING = [
  # the two trunks have blocks of the same names and other shapes
  *[('^' + pattern, spec) for pattern, spec in llamagen.SHARDING],
  *[('vision/trunk/' + pattern, spec) for pattern, spec in vit.SHARDING],
  (r'(word_head|head_out)/kernel', PartitionSpec(None, 'model')),
  (r'^words$', PartitionSpec('model', None)),
]


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint.

  Shapes decide. Heads, `rope_theta` and `rms_norm_eps` are those of the config.json (under
  `language_config` or `text_config`) with the released models' as defaults, and
  `num_image_tokens` is 576 unless it says otherwise.

  Raises:
    ValueError: this is no Janus, or it has grouped queries.
  """
  raw, source = source, arrange_layers(source)
  option = raw.config.get('language_config') or raw.config.get('text_config') or {}
  seen, shape = raw.config.get('vision_config') or {}, source.shape_of
  block, tower = 'language_model.model.layers.*.', 'vision_model.vision_tower.'
  try:
    vocab, width = shape('language_model.model.embed_tokens.weight')
    layers, rows, _ = shape(block + 'self_attn.qkv.weight')
    hidden = shape(block + 'mlp.down_proj.weight')[-1]
    head_width = shape('gen_head.output_mlp_projector.weight')[0]
    aligners = len([n for n in source.tensor_names() if re.match(r'gen_aligner\..*weight', n)])
    vq = llamagen_vq.config_of(source.select_prefix('gen_vision_model.'))
    # the files that hold the drawing half alone have no tower
    vision, more = None, {}
    if part != 'drawing' and tower + 'pos_embed' in source:
      depth, inner, outer = shape(tower + 'blocks.*.mlp.fc1.weight')
      heads = seen.get('num_attention_heads', max(1, outer // VISION_HEAD))
      vision = vit.Config(outer, depth, heads, inner, 'gelu', 1e-6)
      patch, tokens = shape(tower + 'patch_embed.proj.weight')[-1], shape(tower + 'pos_embed')[-2]
      more = {'patch': patch, 'image_size': round(tokens**0.5) * patch}
  except KeyError as error:
    raise ValueError(f'{raw.where} is no Janus: no {error.args[0]}') from error
  # the blocks are LlamaGen's, which know no groups
  if rows != 3 * width:
    raise ValueError(f'{raw.where}: grouped queries ({rows} rows of q, k, v for {width} channels)')
  return modeling.Config(
    width=width, layers=layers, hidden=hidden, vocab=vocab, head_width=head_width,
    heads=option.get('num_attention_heads', max(1, width // HEAD)), aligners=aligners, vq=vq,
    rope_base=float(option.get('rope_theta', 10000.0)), eps=option.get('rms_norm_eps', 1e-6),
    tokens=raw.find_option('num_image_tokens', default=576), vision=vision, **more,
  )  # fmt: skip


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  rules = [*DRAWING, *(LEFT if config.vision is None else READING)]
  return convert_weights(arrange_layers(source), rules, template, dtype, sharding)
