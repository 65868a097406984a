"""CLIP-FlanT5, from two layouts.

One has the model's own names (`encoder`, `decoder`, `lm_head`, `mm_projector`, and the tower under
`vision_tower.vision_tower`), the other those of RE-N-Y/clip-t5-xxl (`t5`, `mm_projector`, `v`).
"""

import dataclasses
import os
import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_source
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import convert as clip_convert
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.clip_flant5 import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers
from vtts_jax.models.t5 import convert as t5_convert
from vtts_jax.models.t5 import decoder as t5_decoder

# what the port does, in the words of config.json
SETTINGS = {
  'mm_vision_select_layer': -2,
  'mm_vision_select_feature': 'patch',
  'mm_projector_type': 'mlp2x_gelu',
  'image_aspect_ratio': 'pad',
}
# ids of T5's tokenizer; the embedding table has 32128 rows
TOKENIZED = 32100
_TOWER = r'vision\.vision_model\.'
# for a source of `join_tower` that went through `arrange_layers`
RULES = [
  # the norm behind the tower's blocks is never reached: features come from the second last one
  (_TOWER + r'post_layernorm\..*', None, ''),
  *clip_convert.image_rules(_TOWER),
  (r'mm_projector\.0\.weight', 'projector.up.kernel', 'T'),
  (r'mm_projector\.0\.bias', 'projector.up.bias', ''),
  (r'mm_projector\.2\.weight', 'projector.down.kernel', 'T'),
  (r'mm_projector\.2\.bias', 'projector.down.bias', ''),
  # tied with T5's `shared.weight`: a file may keep all of these names
  (r'(?:decoder\.)?embed_tokens\.weight', 'encoder.embed.embedding', ''),
  (r'decoder\.block\.\*\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight', None, ''),
  *((p, f'decoder.{t}', op) for p, t, op in t5_decoder.RULES),
  *((p, t and f'encoder.{t}', op) for p, t, op in t5_convert.RULES if t),
]  # fmt: skip
SHARDING = [
  *vit.SHARDING,
  *t5_convert.SHARDING,
  *t5_decoder.SHARDING,
]


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a checkpoint, or 'LANGUAGE+VISION': one without its tower, and a CLIP for it.

  Raises:
    FileNotFoundError, ValueError: as `open_source`; neither has a tower.
  """
  del part
  # a path may contain a plus sign
  text, plus, vision = (weights, '', '') if os.path.exists(weights) else weights.partition('+')
  tower = open_source(vision) if plus else None
  return join_tower(open_source(text), tower)


def _rename_tensors(source, new, config=None):
  """Returns a source whose names are `new(name)`; a tensor whose new name is '' is left out."""
  back = {new(n): n for n in source.tensor_names() if new(n)}
  header = {n: source.header[old] for n, old in back.items()}
  config = source.config if config is None else config
  return dataclasses.replace(
    source, header=header, read=lambda name: source.read_tensor(back[name]), config=config
  )


def join_tower(source, vision=None):
  """Returns one source with T5's names, `mm_projector.*` and `vision.vision_model.*`.

  Args:
    source: the checkpoint.
    vision: a CLIP in transformers' layout; by default the tower inside `source`.

  Raises:
    ValueError: neither has a tower.
  """
  leads = [
    (r't5\.', ''),
    (r'(?:vision_tower\.vision_tower|v)\.vision_model\.', 'vision.vision_model.'),
  ]

  def rename(name):
    for lead, ours in leads:
      name = re.sub('^' + lead, ours, name)
    return '' if vision is not None and name.startswith('vision.') else name

  text = _rename_tensors(source, rename)
  # a safetensors file keeps any one of several tied names
  if 'shared.weight' not in text:
    tied = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'embed_tokens.weight')
    first = next((n for n in tied if n in text), '')
    text = _rename_tensors(text, lambda n: 'shared.weight' if n == first else n)
  if vision is not None:
    # of a whole CLIP only the image tower is taken
    tower = _rename_tensors(
      vision, lambda n: f'vision.{n}' if n.startswith('vision_model.') else ''
    )
    options = vision.config.get('vision_config') or vision.config
    text = dataclasses.replace(
      text,
      where=f'{text.where} with {tower.where}',
      header={**text.header, **tower.header},
      read=lambda name, text=text: (tower if name in tower else text).read_tensor(name),
      config={**text.config, 'vision_config': options},
      identity=f'{text.identity};{tower.identity}',
    )
  if not any(n.startswith('vision.') for n in text.tensor_names()):
    raise ValueError(
      f'{text.where} has no vision_model: name a CLIP of its own, the published one is '
      'openai/clip-vit-large-patch14-336'
    )
  return text


def arrange_layers(source):
  """Returns the source that `RULES` need: stacked layers, without the tower's last one."""
  numbers = re.compile(_TOWER + r'encoder\.layers\.(\d+)\.')
  last = max(int(m[1]) for m in map(numbers.match, source.tensor_names()) if m)
  unread = f'vision.vision_model.encoder.layers.{last}.'
  kept = _rename_tensors(source, lambda n: '' if n.startswith(unread) else n)
  return fuse_projections(stack_layers(t5_decoder.arrange_layers(kept), 'layers'))


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a source of `join_tower`: sizes from shapes, the rest from `config.json`.

  Raises:
    ValueError: there is no CLIP-FlanT5 in the source.
    ConfigError: an option that the port does not know.
  """
  del part
  for name, value in SETTINGS.items():
    if source.config.get(name, value) != value:
      raise ConfigError(f'{source.where}: {name}={source.config[name]!r}: allowed is {value!r}')
  embeddings, blocks = (f'vision.vision_model.{n}' for n in ('embeddings.', 'encoder.layers'))
  options = source.config.get('vision_config') or {}
  try:
    width, _, _, patch = source.shape_of(embeddings + 'patch_embedding.weight')
    tokens = source.shape_of(embeddings + 'position_embedding.weight')[0]
    trunk = clip_convert.trunk_of(source, blocks, options, 'mlp.fc1', 'quick_gelu')
    taken, given = source.shape_of('mm_projector.0.weight')[::-1]
  except KeyError as error:
    raise ValueError(f'{source.where} has no CLIP-FlanT5: no {error}') from error
  encoder = t5_convert.config_of(source)
  if (taken, given) != (width, encoder.d_model):
    raise ValueError(
      f'{source.where}: the projector is {taken} to {given}, the tower {width} wide and T5 '
      f'{encoder.d_model}'
    )
  # features come from the second last block, so the last one is not built
  trunk = dataclasses.replace(trunk, layers=trunk.layers - 1)
  side = round((tokens - 1) ** 0.5) * patch
  vision = clip.Config(trunk, None, 1, image_size=side, patch=patch)
  decoder = t5_decoder.config_of(source, encoder)
  return modeling.Config(vision, encoder, decoder, min(decoder.vocab_size, TOKENIZED))


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters of a source of `join_tower`; errors as in `convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(arrange_layers(source), RULES, template, dtype, sharding)
