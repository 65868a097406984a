"""CLIP: from the layout of transformers (`CLIPModel`, or one tower with its projection) and from
that of open_clip, which is OpenAI's own and that of HPSv2."""

import dataclasses
import re

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import modeling
from vtts_jax.models.stacked import fused, stacked, transposed

HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # image trunks of H, g and bigG; all others 64
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}  # transformers' names
BLOCK = {
  'norm_attn': 'layer_norm1', 'norm_ffn': 'layer_norm2', 'qkv': 'self_attn.qkv',
  'out': 'self_attn.out_proj', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
OPEN_BLOCK = {
  'norm_attn': 'ln_1', 'norm_ffn': 'ln_2', 'out': 'attn.out_proj', 'up': 'mlp.c_fc',
  'down': 'mlp.c_proj',
}  # fmt: skip


def image_rules(lead: str = r'vision_model\.', target: str = 'image.') -> list[conversion.Rule]:
  """transformers' image tower under `lead` (a regular expression), without its projection."""
  return [
    (lead + r'embeddings\.patch_embedding\.weight', target + 'patch.kernel', vit.patch_kernel),
    (lead + r'embeddings\.class_embedding', target + 'cls', ''),
    (lead + r'embeddings\.position_embedding\.weight', target + 'position', ''),
    (lead + r'pre_lay(?:r|er)norm\.(weight|bias)', target + r'norm_pre.\1', ''),  # misspelt in CLIP
    (lead + r'post_layernorm\.(weight|bias)', target + r'norm_post.\1', ''),
    (lead + r'embeddings\.position_ids', None, ''),  # a buffer of old files
    *vit.rules(lead + r'encoder\.layers\.\*\.', target + 'trunk.', BLOCK),
  ]


def text_rules(lead: str = r'text_model\.', target: str = 'text.') -> list[conversion.Rule]:
  """transformers' text tower under `lead` (a regular expression), without its projection."""
  return [
    (lead + r'embeddings\.token_embedding\.weight', target + 'token.embedding', ''),
    (lead + r'embeddings\.position_embedding\.weight', target + 'position', ''),
    (lead + r'final_layer_norm\.(weight|bias)', target + r'norm.\1', ''),
    (lead + r'embeddings\.position_ids', None, ''),
    *vit.rules(lead + r'encoder\.layers\.\*\.', target + 'trunk.', BLOCK),
  ]


def _open_trunk(lead, target):
  blocks = lead + r'transformer\.resblocks\.\*\.'
  qkv = target + 'trunk.blocks.attn.qkv.'
  return [
    (blocks + r'attn\.in_proj_weight', qkv + 'kernel', transposed),
    (blocks + r'attn\.in_proj_bias', qkv + 'bias', ''),
    *vit.rules(blocks, target + 'trunk.', OPEN_BLOCK),
  ]


RULES = [  # after `fused` and `stacked`; the two layouts share the name logit_scale only
  *image_rules(),
  *text_rules(),
  (r'visual_projection\.weight', 'image.projection.kernel', 'T'),
  (r'text_projection\.weight', 'text.projection.kernel', 'T'),
  (r'visual\.conv1\.weight', 'image.patch.kernel', vit.patch_kernel),
  (r'visual\.class_embedding', 'image.cls', ''),
  (r'visual\.positional_embedding', 'image.position', ''),
  (r'visual\.ln_(pre|post)\.(weight|bias)', r'image.norm_\1.\2', ''),
  (r'visual\.proj', 'image.projection.kernel', ''),
  *_open_trunk(r'visual\.', 'image.'),
  (r'(?:text\.)?token_embedding\.weight', 'text.token.embedding', ''),
  (r'(?:text\.)?positional_embedding', 'text.position', ''),
  (r'(?:text\.)?ln_final\.(weight|bias)', r'text.norm.\1', ''),
  (r'(?:text\.)?text_projection', 'text.projection.kernel', ''),
  *_open_trunk(r'(?:text\.)?', 'text.'),
  (r'logit_scale', 'scale', ''),
  (r'(input_resolution|context_length|vocab_size|(?:text\.)?attn_mask)', None, ''),  # OpenAI's
]
SHARDING = vit.SHARDING


def trunk_of(source, block, options, layout, act, head=64, eps=1e-5) -> vit.Config:
  """The trunk whose blocks are `<block>.<i>.`: sizes from the shapes, the rest from `options`, in
  the names of transformers.

  Args:
    layout: the name, in a block, of the first layer of the feed-forward.
    act, head, eps: activation, width of a head and epsilon where `options` say nothing.
  """
  hidden, width = source.shape(f'{block}.0.{layout}.weight')
  numbers = re.compile(re.escape(block) + r'\.(\d+)\.')
  layers = 1 + max(int(found[1]) for found in map(numbers.match, source.names()) if found)
  act = options.get('hidden_act', act)
  return vit.Config(
    width, layers, options.get('num_attention_heads', max(width // head, 1)), hidden,
    ACTIVATIONS.get(act, act), options.get('layer_norm_eps', eps),
  )  # fmt: skip


def config_of(source, part: str = '') -> modeling.Config:
  """The config of a checkpoint.

  Sizes are read off the shapes; heads, activation, epsilon and the end of text are those of its
  `config.json`. What that does not say is as the layout's own library has it: quick-GELU in
  transformers, GELU in open_clip unless the file is OpenAI's; heads as wide as in the released
  sizes.

  Args:
    part: '' for both towers, 'image' or 'text' for one; the other tower of the file is left.

  Raises:
    ValueError: there is no such CLIP.
    ConfigError: an option that the port does not know.
  """
  try:
    image = _image(source) if part != 'text' else {'image': None}
    text = _text(source) if part != 'image' else {'text': None}
  except KeyError as error:
    raise ValueError(f'{source.where} has no CLIP ({part or "both towers"}): no {error}') from error
  if not part and image['projection'] != text['projection']:
    raise ValueError(
      f'{source.where}: pictures are projected to {image["projection"]}, texts to '
      f'{text["projection"]}'
    )
  return modeling.Config(**(image | text))


def _options(source, tower):
  return source.config.get(f'{tower}_config') or source.config


def _open_act(source):
  openai = 'input_resolution' in source or source.option('quick_gelu', default=False)
  return 'quick_gelu' if openai else 'gelu'


def _image(source):
  options = _options(source, 'vision')
  if 'visual.conv1.weight' in source:
    width, _, _, patch = source.shape('visual.conv1.weight')
    tokens, projection = source.shape('visual.positional_embedding')[0], source.shape('visual.proj')
    trunk = ('visual.transformer.resblocks', options, 'mlp.c_fc', _open_act(source))
    projection = projection[1]
  else:
    width, _, _, patch = source.shape('vision_model.embeddings.patch_embedding.weight')
    tokens = source.shape('vision_model.embeddings.position_embedding.weight')[0]
    trunk = ('vision_model.encoder.layers', options, 'mlp.fc1', 'quick_gelu')
    projection = source.shape('visual_projection.weight')[0]
  side = round((tokens - 1) ** 0.5)
  size = options.get('image_size', side * patch)
  if side**2 + 1 != tokens or size // patch != side:
    raise ValueError(
      f'{source.where}: {tokens} positions do not fit pictures of {size} in patches of {patch}'
    )
  return {
    'image': trunk_of(source, *trunk, HEAD_WIDTHS.get(width, 64)),
    'image_size': size, 'patch': patch, 'projection': projection,
  }  # fmt: skip


def _text(source):
  options = _options(source, 'text')
  lead = 'text.' if 'text.token_embedding.weight' in source else ''
  if f'{lead}token_embedding.weight' in source:
    vocab = source.shape(f'{lead}token_embedding.weight')[0]
    length = source.shape(f'{lead}positional_embedding')[0]
    trunk = (f'{lead}transformer.resblocks', options, 'mlp.c_fc', _open_act(source))
    projection, eos = source.shape(f'{lead}text_projection')[1], None
  else:
    vocab = source.shape('text_model.embeddings.token_embedding.weight')[0]
    length = source.shape('text_model.embeddings.position_embedding.weight')[0]
    trunk = ('text_model.encoder.layers', options, 'mlp.fc1', 'quick_gelu')
    projection = source.shape('text_projection.weight')[0]
    eos = options.get('eos_token_id', 49407)
    eos = None if eos == 2 else eos  # a wrong number of old configs, which transformers knows
  return {
    'text': trunk_of(source, *trunk), 'vocab': vocab, 'length': length, 'eos': eos,
    'projection': projection,
  }  # fmt: skip


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters of the towers that `config` has; errors as in `conversion.convert`.

  Args:
    dtype: of all but the temperature, which keeps its 24 bits.
  """
  _, template = modules.abstract_module(lambda: modeling.build(config))
  # an aesthetic head beside CLIP, which verifiers/aesthetic reads, has layers of its own
  header = {k: v for k, v in source.header.items() if not re.match(r'layers\.\d', k)}
  source = dataclasses.replace(source, header=header)
  source = fused(stacked(source, 'layers|resblocks'))
  # of a tower that is not there the names are known and left
  table = [(p, t if t and t.split('.')[0] in template else None, op) for p, t, op in RULES]
  params = conversion.convert(source, table, template, dtype, sharding)
  return params | read_exactly(source, template, sharding, ('scale',))


def read_exactly(source, template, sharding, names):
  """Those of the parameters `names` (of `logit_<name>`) that `template` has, in its own dtype."""
  found = {}
  for name in names:
    if name in template:
      rules = [(f'logit_{name}', name, ''), ('.*', None, '')]
      place = {name: sharding[name]} if isinstance(sharding, dict) else sharding
      found |= conversion.convert(source, rules, {name: template[name]}, None, place)
  return found
