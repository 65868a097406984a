"""DreamSim: base weights of the branches, and the adapters that are merged into them.

The tensors of branch i are read as `<i>.<name>`. A released model is (a) a folder with the
safetensors of each branch, `<branch>_pretrain.safetensors` in any layout that `models/dino` reads,
and the adapters in
`ensemble_lora/` (of a single model, `<branch>_single_lora/`) as PEFT writes them, or (b) one file
of the model with the adapters merged already, its names those of `PerceptualModel`.
"""

import dataclasses
import json
import os
import re

import numpy as np

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.checkpoints import source as checkpoints
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.dino import convert as dino
from vtts_jax.models.dreamsim import modeling

SHARDING = dino.SHARDING
ADAPTER = re.compile(
  r'(?:base_model\.model\.)*extractor_list\.(\d+)\.model\.blocks\.(\d+)\.attn\.qkv\.'
  r'lora_(A|B)(?:\.default)?\.weight'
)


def open_weights(weights: str, part: str = '') -> checkpoints.Source:
  """The branches of the released model `part` ('' for the ensemble), adapters merged (when read).

  Raises:
    FileNotFoundError: no such folder or file.
    ValueError: an adapter or a branch is missing, or is none of this model.
  """
  name = part or 'ensemble'
  members = modeling.MEMBERS[name]
  if not os.path.isdir(weights):
    source = checkpoints.open_source(weights)
    return joined([_branch(source, i) for i in range(len(members))])
  folder = f'{name}_lora' if name == 'ensemble' else f'{name}_single_lora'
  open_file = checkpoints.open_source
  adapters = open_file(weights, subfolder=folder, file='adapter_model.safetensors')
  bases = [open_file(weights, file=f'{member}_pretrain.safetensors') for member in members]
  return joined(merged(bases, adapters, scale_of(weights, folder)))


def joined(branches) -> checkpoints.Source:
  """One source of all branches, the names of branch i under `<i>.`."""

  def read(name):
    i, _, own = name.partition('.')
    return branches[int(i)].get(own)

  return dataclasses.replace(
    branches[0],
    where=' and '.join(dict.fromkeys(branch.where for branch in branches)),
    header={f'{i}.{n}': v for i, branch in enumerate(branches) for n, v in branch.header.items()},
    read=read,
    identity=';'.join(branch.identity for branch in branches),
  )


def _branches(source):
  """The sources that `joined` put together."""
  count = 1 + max(int(name.partition('.')[0]) for name in source.names())
  return [source.part(f'{i}.', source.config) for i in range(count)]


def scale_of(place: str, folder: str) -> float:
  """alpha / r of the adapters, from `adapter_config.json` beside them.

  Raises:
    FileNotFoundError: there is none.
    ConfigError: adapters of another kind.
  """
  path = os.path.join(place, folder, 'adapter_config.json')
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no adapter_config.json at path={path!r}: it holds r and lora_alpha')
  with open(path, encoding='utf-8') as handle:
    config = json.load(handle)
  for option in ('use_rslora', 'use_dora', 'fan_in_fan_out'):
    if config.get(option):
      raise ConfigError(f'{path}: {option}={config[option]!r}: only plain LoRA is known')
  return config['lora_alpha'] / config['r']


def _branch(source, i):
  """Branch i of a file of the whole model; DINO's training head is left."""
  lead = f'extractor_list.{i}.'
  names = {n[len(lead) :].removeprefix('model.'): n for n in source.names() if n.startswith(lead)}
  names = {own: n for own, n in names.items() if not own.startswith('proj.')}
  if not names or any('lora' in n for n in names):
    what = 'no tensor' if not names else 'adapters that are not merged'
    raise ValueError(f'{source.where} has {what} under {lead}; see models/dreamsim/README.md')
  return dataclasses.replace(
    source,
    where=f'{source.where} ({lead}*)',
    header={own: source.header[n] for own, n in names.items()},
    read=lambda own: source.get(names[own]),
  )


def merged(bases, adapters, scale: float) -> list[checkpoints.Source]:
  """The bases, `joined`, with scale B A of the adapters added to queries, keys and values.

  Raises:
    ValueError: a name that is no adapter, blocks without one, a rank or width that does not fit.
  """
  found = {}
  for name in adapters.names():
    match = ADAPTER.fullmatch(name)
    if not match or int(match[1]) >= len(bases):
      raise ValueError(f'{adapters.where}: {name} is no adapter of queries, keys and values here')
    found[int(match[1]), int(match[2]), match[3]] = name
  return [_merged(dino.joined(base), adapters, found, i, scale) for i, base in enumerate(bases)]


def _merged(base, adapters, found, i, scale):
  (target,) = [n for n in base.names() if n.endswith('qkv.weight')]
  layers, rows, width = base.shape(target)
  pairs = [(found.get((i, n, 'A')), found.get((i, n, 'B'))) for n in range(layers)]
  own = sum(branch == i for branch, _, _ in found)
  if own != 2 * layers or any(None in pair for pair in pairs):
    raise ValueError(f'{adapters.where} has {own} matrices for the {layers} blocks of {base.where}')
  for a, b in pairs:
    (rank, inner), outer = adapters.shape(a), adapters.shape(b)
    if inner != width or outer != (rows, rank):
      raise ValueError(f'{adapters.where}: {b} {outer} after {a} {(rank, inner)} does not fit')

  def read(name):
    value = base.get(name)
    if name != target:
      return value
    as32 = lambda n: adapters.get(n).astype(np.float32)
    return value.astype(np.float32) + scale * np.stack([as32(b) @ as32(a) for a, b in pairs])

  identity = f'{base.identity};{adapters.identity};{scale}'
  return dataclasses.replace(base, read=read, identity=identity)


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Read off the branches; what names and shapes do not tell is that of the released `part`."""
  known = [modeling.BRANCHES[member] for member in modeling.MEMBERS[part or 'ensemble']]
  return modeling.Config(
    tuple(
      dino.config_of(branch, **{'act': c.act, 'eps': c.eps, 'offset': c.offset, **options})
      for branch, c in zip(_branches(source), known)
    )
  )


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `conversion.convert`."""
  template = modules.abstract_module(lambda: modeling.build(config))[1]['branches']
  if isinstance(sharding, dict):
    places = sharding['branches']
  else:
    places = dict.fromkeys(template, sharding)
  found = {}
  for i, branch in zip(template, _branches(source)):
    branch = dino.joined(branch)
    found[i] = conversion.convert(branch, dino.RULES, template[i], dtype, places[i])
  return {'branches': found}
