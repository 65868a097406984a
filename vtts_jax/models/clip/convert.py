"""CLIP, from two layouts: that of transformers (`CLIPModel`, or one tower with its projection) and
that of open_clip, which OpenAI's own files and HPSv2 have too."""

import dataclasses
import re

from absl import logging

from vtts_jax.checkpoints.convert import KeyRule, convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import modeling
from vtts_jax.models.preprocessing import read_preprocessing
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

# shapes do not tell heads: how wide they are in the image trunks of H, g and bigG; elsewhere 64
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
# sizes that OpenAI released with quick-GELU
OPENAI_SIZES = ('b32', 'b16', 'l14', 'l14_336')
# transformers' names for what is one function
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}
BLOCK = {
  'norm_attn': 'layer_norm1', 'norm_ffn': 'layer_norm2', 'qkv': 'self_attn.qkv',
  'out': 'self_attn.out_proj', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
}  # fmt: skip
OPEN_BLOCK = {
  'norm_attn': 'ln_1', 'norm_ffn': 'ln_2', 'out': 'attn.out_proj', 'up': 'mlp.c_fc',
  'down': 'mlp.c_proj',
}  # fmt: skip


def image_rules(lead: str = r'vision_model\.', target: str = 'image.') -> list[KeyRule]:
  """Returns the rules of transformers' image tower under the regular expression `lead`.

  The projection is not among them.
  """
  return [
    (lead + r'embeddings\.patch_embedding\.weight', target + 'patch.kernel', vit.patch_kernel),
    (lead + r'embeddings\.class_embedding', target + 'cls', ''),
    (lead + r'embeddings\.position_embedding\.weight', target + 'position', ''),
    # transformers misspells it in CLIP
    (lead + r'pre_lay(?:r|er)norm\.(weight|bias)', target + r'norm_pre.\1', ''),
    (lead + r'post_layernorm\.(weight|bias)', target + r'norm_post.\1', ''),
    (lead + r'embeddings\.position_ids', None, ''),  # a buffer of old files
    *vit.trunk_rules(lead + r'encoder\.layers\.\*\.', target + 'trunk.', BLOCK),
  ]


def text_rules(lead: str = r'text_model\.', target: str = 'text.') -> list[KeyRule]:
  """Returns the rules of transformers' text tower under the regular expression `lead`.

  The projection is not among them.
  """
  return [
    (lead + r'embeddings\.token_embedding\.weight', target + 'token.embedding', ''),
    (lead + r'embeddings\.position_embedding\.weight', target + 'position', ''),
    (lead + r'final_layer_norm\.(weight|bias)', target + r'norm.\1', ''),
    (lead + r'embeddings\.position_ids', None, ''),
    *vit.trunk_rules(lead + r'encoder\.layers\.\*\.', target + 'trunk.', BLOCK),
  ]


def _open_trunk(lead, target):
  blocks = lead + r'transformer\.resblocks\.\*\.'
  qkv = target + 'trunk.blocks.attn.qkv.'
  return [
    (blocks + r'attn\.in_proj_weight', qkv + 'kernel', transpose_kernel),
    (blocks + r'attn\.in_proj_bias', qkv + 'bias', ''),
    *vit.trunk_rules(blocks, target + 'trunk.', OPEN_BLOCK),
  ]


# For a source that went through `stack_layers` and `fuse_projections`. One table serves both
# layouts, because they share no name but logit_scale.
RULES = [
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
  """Reads the config of the trunk whose blocks are `<block>.<i>.`.

  Args:
    source: `checkpoints.Source`, layers not stacked.
    block: the blocks' name, which shapes are read of.
    options: what shapes do not tell, in the names of transformers.
    layout: the name of the feed-forward's first layer in a block.
    act, head, eps: activation, width of a head and epsilon where `options` say nothing.
  """
  hidden, width = source.shape_of(f'{block}.0.{layout}.weight')
  numbers = re.compile(re.escape(block) + r'\.(\d+)\.')
  layers = 1 + max(int(found[1]) for found in map(numbers.match, source.tensor_names()) if found)
  act = options.get('hidden_act', act)
  return vit.Config(
    width, layers, options.get('num_attention_heads', max(width // head, 1)), hidden,
    ACTIVATIONS.get(act, act), options.get('layer_norm_eps', eps),
  )  # fmt: skip


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint.

  Sizes are read off the shapes. Heads, activation, epsilon and the end of text are those of its
  `config.json`. What the file does not say is as in the layout's own library: quick-GELU in
  transformers, GELU in open_clip unless the file is OpenAI's. Heads are as wide as in the released
  sizes. Pictures are preprocessed as the files beside the weights say (models/preprocessing), else
  as in OpenAI's.

  Args:
    source: `checkpoints.Source`.
    part: '' for both towers, 'image' or 'text' for one; the other tower of the file is left out.

  Raises:
    ValueError: there is no such CLIP.
    ConfigError: an option or a preprocessing that the port does not know.
  """
  source = _name_bare_tower(source)
  try:
    image = _image_sizes(source) if part != 'text' else {'image': None}
    text = _text_sizes(source) if part != 'image' else {'text': None}
  except KeyError as error:
    raise ValueError(f'{source.where} has no CLIP ({part or "both towers"}): no {error}') from error
  if not part and image['projection'] != text['projection']:
    raise ValueError(
      f'{source.where}: pictures are projected to {image["projection"]}, texts to '
      f'{text["projection"]}'
    )
  config = modeling.Config(**(image | text))
  _warn_of_act(source, config)
  return config


def _name_bare_tower(source):
  """A text tower as transformers 5 saves it, without a name in front, under its older names; any
  other source as it is."""
  if 'embeddings.token_embedding.weight' not in source:
    return source
  lead = 'text_model.'
  header = {f'{lead}{name}': value for name, value in source.header.items()}
  read = lambda name: source.read_tensor(name.removeprefix(lead))
  return dataclasses.replace(source, header=header, read=read)


def _tower_options(source, tower):
  # a file of one tower has that tower's options at the top
  return source.config.get(f'{tower}_config') or source.config


def _open_act(source):
  # only OpenAI's own files hold the buffer `input_resolution`
  openai = 'input_resolution' in source or _says_quick(source)
  return 'quick_gelu' if openai else 'gelu'


def _says_quick(source):
  """Returns open_clip's option `quick_gelu`, None where no file says it."""
  said = source.find_option('quick_gelu')
  # a folder may have transformers' config too, which is read before open_clip's
  beside = dataclasses.replace(source, config=source.read_sibling('open_clip_config.json'))
  return said if said is not None else beside.find_option('quick_gelu')


def _warn_of_act(source, config):
  """Warns where open_clip's GELU is a guess: OpenAI's sizes, which others trained with GELU too.

  open_clip itself knows it by the model's name (`ViT-B-32-quickgelu`), which no tensor holds.
  """
  acts = {tower.act for tower in (config.image, config.text) if tower}
  if acts != {'gelu'} or _says_quick(source) is not None or source.find_option('hidden_act'):
    return
  # transformers' layout has its own default, which is OpenAI's
  if not any('resblocks' in name for name in source.tensor_names()):
    return
  name = next((n for n in OPENAI_SIZES if _is_gelu_twin(config, modeling.SIZES[n])), None)
  if name:
    logging.warning(
      '%s has the sizes of CLIP %s of OpenAI and no file says quick_gelu: GELU is used, as '
      'open_clip does. If these are weights of OpenAI (or of another -quickgelu model), put '
      '"quick_gelu": true into open_clip_config.json beside them; false ends this warning.',
      source.where, name,
    )  # fmt: skip


def _is_gelu_twin(config, known):
  """Returns whether a config is one of OpenAI's but for the activation."""
  # a file of one tower says nothing of the other
  pairs = ((config.image, known.image), (config.text, known.text))
  if any(c is not None and c != dataclasses.replace(like, act='gelu') for c, like in pairs):
    return False
  sides = lambda c: (c.patch, c.image_size)
  return config.image is None or sides(config) == sides(known)


def _image_sizes(source):
  options = _tower_options(source, 'vision')
  if 'visual.conv1.weight' in source:
    width, _, _, patch = source.shape_of('visual.conv1.weight')
    tokens = source.shape_of('visual.positional_embedding')[0]
    trunk = ('visual.transformer.resblocks', options, 'mlp.c_fc', _open_act(source))
    projection = source.shape_of('visual.proj')[1]
  else:
    width, _, _, patch = source.shape_of('vision_model.embeddings.patch_embedding.weight')
    tokens = source.shape_of('vision_model.embeddings.position_embedding.weight')[0]
    trunk = ('vision_model.encoder.layers', options, 'mlp.fc1', 'quick_gelu')
    projection = source.shape_of('visual_projection.weight')[0]
  side = round((tokens - 1) ** 0.5)
  size = options.get('image_size', side * patch)
  if side**2 + 1 != tokens or size // patch != side:
    raise ValueError(
      f'{source.where}: {tokens} positions do not fit pictures of {size} in patches of {patch}'
    )
  return {
    'image': trunk_of(source, *trunk, HEAD_WIDTHS.get(width, 64)),
    'image_size': size, 'patch': patch, 'projection': projection,
    'preprocessing': read_preprocessing(
      source, modeling.PREPROCESSING, size, 'CLIPImageProcessor'
    ),
  }  # fmt: skip


def _text_sizes(source):
  options = _tower_options(source, 'text')
  lead = 'text.' if 'text.token_embedding.weight' in source else ''
  if f'{lead}token_embedding.weight' in source:
    vocab = source.shape_of(f'{lead}token_embedding.weight')[0]
    length = source.shape_of(f'{lead}positional_embedding')[0]
    trunk = (f'{lead}transformer.resblocks', options, 'mlp.c_fc', _open_act(source))
    projection, eos = source.shape_of(f'{lead}text_projection')[1], None
  else:
    vocab, width = source.shape_of('text_model.embeddings.token_embedding.weight')
    length = source.shape_of('text_model.embeddings.position_embedding.weight')[0]
    # files of one tower have no config: OpenAI's texts are at most 768 wide, OpenCLIP's H and bigG
    # have another activation
    act = 'quick_gelu' if width <= 768 else 'gelu'
    trunk = ('text_model.encoder.layers', options, 'mlp.fc1', act)
    # FLUX and Stable Diffusion 1 keep a tower without its projection
    projected = 'text_projection.weight' in source
    projection = source.shape_of('text_projection.weight')[0] if projected else 0
    eos = options.get('eos_token_id', 49407)
    # old configs say 2, which is wrong; transformers then reads at the highest id, and so do we
    eos = None if eos == 2 else eos
  return {
    'text': trunk_of(source, *trunk), 'vocab': vocab, 'length': length, 'eos': eos,
    'projection': projection,
  }  # fmt: skip


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters of the towers that `config` has; errors as in `convert_weights`.

  `dtype` is that of all parameters but the temperature, which stays float32.
  """
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  # a file may hold an aesthetic head beside CLIP, which verifiers/aesthetic reads itself
  header = {k: v for k, v in source.header.items() if not re.match(r'layers\.\d', k)}
  source = _name_bare_tower(dataclasses.replace(source, header=header))
  source = fuse_projections(stack_layers(source, 'layers|resblocks'))
  # a rule of a tower that is not loaded knowingly leaves its tensors
  table = [(p, t if t and t.split('.')[0] in template else None, op) for p, t, op in RULES]
  params = convert_weights(source, table, template, dtype, sharding)
  return params | read_exactly(source, template, sharding, ('scale',))


def read_exactly(source, template, sharding, names):
  """Reads the parameters `names` (as `logit_<name>`) that `template` has, in the template's dtype.

  A temperature is an exponent: rounded to bfloat16 it would scale every score.
  """
  found = {}
  for name in names:
    if name in template:
      rules = [(f'logit_{name}', name, ''), ('.*', None, '')]
      place = {name: sharding[name]} if isinstance(sharding, dict) else sharding
      found |= convert_weights(source, rules, {name: template[name]}, None, place)
  return found
