"""CLIP-FlanT5 from its own names (`encoder`, `decoder`, `lm_head`, `mm_projector`, the tower under
`vision_tower.vision_tower`), or from those of RE-N-Y/clip-t5-xxl (`t5`, `mm_projector`, `v`)."""

import dataclasses
import os
import re

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.checkpoints import source as source_files
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import convert as clip_convert
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.clip_flant5 import modeling
from vtts_jax.models.stacked import fused, stacked
from vtts_jax.models.t5 import convert as t5_convert
from vtts_jax.models.t5 import decoder as t5_decoder

SETTINGS = {  # of config.json, and what the port does
  'mm_vision_select_layer': -2,
  'mm_vision_select_feature': 'patch',
  'mm_projector_type': 'mlp2x_gelu',
  'image_aspect_ratio': 'pad',
}
TOKENIZED = 32100  # ids of T5's tokenizer; its table has 32128
_TOWER = r'vision\.vision_model\.'
RULES = [  # of a source made by `whole`, then `prepared`
  (_TOWER + r'post_layernorm\..*', None, ''),  # what is behind the blocks that are read
  *clip_convert.image_rules(_TOWER),
  (r'mm_projector\.0\.weight', 'projector.up.kernel', 'T'),
  (r'mm_projector\.0\.bias', 'projector.up.bias', ''),
  (r'mm_projector\.2\.weight', 'projector.down.kernel', 'T'),
  (r'mm_projector\.2\.bias', 'projector.down.bias', ''),
  (r'(?:decoder\.)?embed_tokens\.weight', 'encoder.embed.embedding', ''),  # tied
  (r'decoder\.block\.\*\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight', None, ''),
  *((p, f'decoder.{t}', op) for p, t, op in t5_decoder.RULES),
  *((p, t and f'encoder.{t}', op) for p, t, op in t5_convert.RULES if t),
]  # fmt: skip
SHARDING = [
  *vit.SHARDING,
  *t5_convert.SHARDING,
  *t5_decoder.SHARDING,
]


def open_weights(weights: str, part: str = '') -> source_files.Source:
  """A checkpoint, or 'LANGUAGE+VISION': one without its tower and the CLIP that it is to take.

  Raises:
    FileNotFoundError, ValueError: as `source.open_source`; there is no tower in either.
  """
  del part
  text, plus, vision = (weights, '', '') if os.path.exists(weights) else weights.partition('+')
  tower = source_files.open_source(vision) if plus else None
  return whole(source_files.open_source(text), tower)


def _renamed(source, new, config=None):
  """The source whose names are `new(name)`; without those of which that is ''."""
  back = {new(n): n for n in source.names() if new(n)}
  header = {n: source.header[old] for n, old in back.items()}
  read = lambda name: source.get(back[name])
  config = source.config if config is None else config
  return dataclasses.replace(source, header=header, read=read, config=config)


def whole(source, vision=None):
  """One source of T5's names, `mm_projector.*` and `vision.vision_model.*`.

  Args:
    vision: a CLIP of its own in transformers' layout; by default the tower inside `source`.

  Raises:
    ValueError: neither has a tower.
  """
  leads = [
    (r't5\.', ''),
    (r'(?:vision_tower\.vision_tower|v)\.vision_model\.', 'vision.vision_model.'),
  ]

  def new(name):
    for lead, ours in leads:
      name = re.sub('^' + lead, ours, name)
    return '' if vision is not None and name.startswith('vision.') else name

  text = _renamed(source, new)
  if 'shared.weight' not in text:  # of tied names a safetensors file may keep any one
    tied = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'embed_tokens.weight')
    first = next((n for n in tied if n in text), '')
    text = _renamed(text, lambda n: 'shared.weight' if n == first else n)
  if vision is not None:
    tower = _renamed(vision, lambda n: f'vision.{n}' if n.startswith('vision_model.') else '')
    options = vision.config.get('vision_config') or vision.config
    text = dataclasses.replace(
      text,
      where=f'{text.where} with {tower.where}',
      header={**text.header, **tower.header},
      read=lambda name, text=text: (tower if name in tower else text).get(name),
      config={**text.config, 'vision_config': options},
      identity=f'{text.identity};{tower.identity}',
    )
  if not any(n.startswith('vision.') for n in text.names()):
    raise ValueError(
      f'{text.where} has no vision_model: name a CLIP of its own, the published one is '
      'openai/clip-vit-large-patch14-336'
    )
  return text


def prepared(source):
  """What `RULES` read: layers put together as the model has them, the tower's last left out."""
  numbers = re.compile(_TOWER + r'encoder\.layers\.(\d+)\.')
  last = max(int(m[1]) for m in map(numbers.match, source.names()) if m)
  unread = f'vision.vision_model.encoder.layers.{last}.'
  kept = _renamed(source, lambda n: '' if n.startswith(unread) else n)
  return fused(stacked(t5_decoder.layered(kept), 'layers'))


def config_of(source, part: str = '') -> modeling.Config:
  """The config of a source made by `whole`: sizes from shapes, the rest from its `config.json`.

  Raises:
    ValueError: there is no CLIP-FlanT5 in it.
    ConfigError: an option that the port does not know.
  """
  del part
  for name, value in SETTINGS.items():
    if source.config.get(name, value) != value:
      raise ConfigError(f'{source.where}: {name}={source.config[name]!r}: allowed is {value!r}')
  embeddings, blocks = (f'vision.vision_model.{n}' for n in ('embeddings.', 'encoder.layers'))
  options = source.config.get('vision_config') or {}
  try:
    width, _, _, patch = source.shape(embeddings + 'patch_embedding.weight')
    tokens = source.shape(embeddings + 'position_embedding.weight')[0]
    trunk = clip_convert.trunk_of(source, blocks, options, 'mlp.fc1', 'quick_gelu')
    taken, given = source.shape('mm_projector.0.weight')[::-1]
  except KeyError as error:
    raise ValueError(f'{source.where} has no CLIP-FlanT5: no {error}') from error
  encoder = t5_convert.config_of(source)
  if (taken, given) != (width, encoder.d_model):
    raise ValueError(
      f'{source.where}: the projector is {taken} to {given}, the tower {width} wide and T5 '
      f'{encoder.d_model}'
    )
  trunk = dataclasses.replace(trunk, layers=trunk.layers - 1)
  side = round((tokens - 1) ** 0.5) * patch
  vision = clip.Config(trunk, None, 1, image_size=side, patch=patch)
  decoder = t5_decoder.config_of(source, encoder)
  return modeling.Config(vision, encoder, decoder, min(decoder.vocab_size, TOKENIZED))


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters of a source made by `whole`; errors as in `conversion.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build(config))
  return conversion.convert(prepared(source), RULES, template, dtype, sharding)
