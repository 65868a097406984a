"""DreamSim: base weights of the branches, with the adapters merged into them.

The tensors of branch i are read as `<i>.<name>`. A released model is one of two things:

- a folder with the safetensors of each branch, `<branch>_pretrain.safetensors` in any layout that
  `models/dino` reads, and with the adapters as PEFT writes them, in `ensemble_lora/` or, for a
  single model, `<branch>_single_lora/`;
- one file whose adapters are merged already, with the names of `PerceptualModel`.
"""

import dataclasses
import json
import os
import re

import numpy as np

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_source
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.dino import convert as dino
from vtts_jax.models.dreamsim import modeling

SHARDING = dino.SHARDING
# PEFT writes its own prefix once or twice, and the adapter's name or not
ADAPTER = re.compile(
  r'(?:base_model\.model\.)*extractor_list\.(\d+)\.model\.blocks\.(\d+)\.attn\.qkv\.'
  r'lora_(A|B)(?:\.default)?\.weight'
)


def open_weights(weights: str, part: str = '') -> Source:
  """Opens the branches of the released model `part` ('' for the ensemble).

  Adapters are merged when a tensor is read.

  Raises:
    FileNotFoundError: there is no such folder or file.
    ValueError: an adapter or a branch is missing, or is not of this model.
  """
  name = part or 'ensemble'
  members = modeling.MEMBERS[name]
  if not os.path.isdir(weights):
    source = open_source(weights)
    return join_branches([_branch_of(source, i) for i in range(len(members))])
  folder = f'{name}_lora' if name == 'ensemble' else f'{name}_single_lora'
  adapters = open_source(weights, subfolder=folder, file='adapter_model.safetensors')
  bases = [open_source(weights, file=f'{member}_pretrain.safetensors') for member in members]
  return join_branches(merge_adapters(bases, adapters, scale_of(weights, folder)))


def join_branches(branches) -> Source:
  """Joins the branches to one source, with the names of branch i under `<i>.`."""

  def read_tensor(name):
    i, _, own = name.partition('.')
    return branches[int(i)].read_tensor(own)

  return dataclasses.replace(
    branches[0],
    where=' and '.join(dict.fromkeys(branch.where for branch in branches)),
    header={f'{i}.{n}': v for i, branch in enumerate(branches) for n, v in branch.header.items()},
    read=read_tensor,
    identity=';'.join(branch.identity for branch in branches),
  )


def _split_branches(source):
  """Returns the sources that `join_branches` put together."""
  # a joined source does not say how many there were
  count = 1 + max(int(name.partition('.')[0]) for name in source.tensor_names())
  return [source.select_prefix(f'{i}.', source.config) for i in range(count)]


def scale_of(place: str, folder: str) -> float:
  """Returns alpha / r of the adapters, from `adapter_config.json` beside them.

  Raises:
    FileNotFoundError: there is no such file.
    ConfigError: the adapters are not plain LoRA.
  """
  path = os.path.join(place, folder, 'adapter_config.json')
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no adapter_config.json at path={path!r}: it holds r and lora_alpha')
  with open(path, encoding='utf-8') as handle:
    config = json.load(handle)
  # each of these changes what is added to the weights
  for option in ('use_rslora', 'use_dora', 'fan_in_fan_out'):
    if config.get(option):
      raise ConfigError(f'{path}: {option}={config[option]!r}: only plain LoRA is known')
  return config['lora_alpha'] / config['r']


def _branch_of(source, i):
  """Returns branch i of a file of the whole model; DINO's training head is left out."""
  lead = f'extractor_list.{i}.'
  inside = [n for n in source.tensor_names() if n.startswith(lead)]
  names = {n[len(lead) :].removeprefix('model.'): n for n in inside}
  names = {own: n for own, n in names.items() if not own.startswith('proj.')}
  # unmerged adapters beside base weights would be ignored silently
  if not names or any('lora' in n for n in names):
    what = 'no tensor' if not names else 'adapters that are not merged'
    raise ValueError(f'{source.where} has {what} under {lead}; see models/dreamsim/README.md')
  return dataclasses.replace(
    source,
    where=f'{source.where} ({lead}*)',
    header={own: source.header[n] for own, n in names.items()},
    read=lambda own: source.read_tensor(names[own]),
  )


def merge_adapters(bases, adapters, scale: float) -> list[Source]:
  """Adds scale B A of the adapters to the queries, keys and values of the bases.

  Returns:
    The merged sources, after dino's `arrange_layers`.

  Raises:
    ValueError: a name is no adapter, a block has none, or a rank or width does not fit.
  """
  found = {}
  for name in adapters.tensor_names():
    match = ADAPTER.fullmatch(name)
    if not match or int(match[1]) >= len(bases):
      raise ValueError(f'{adapters.where}: {name} is no adapter of queries, keys and values here')
    found[int(match[1]), int(match[2]), match[3]] = name
  return [
    _merge_branch(dino.arrange_layers(base), adapters, found, i, scale)
    for i, base in enumerate(bases)
  ]


def _merge_branch(base, adapters, found, i, scale):
  (target,) = [n for n in base.tensor_names() if n.endswith('qkv.weight')]
  layers, rows, width = base.shape_of(target)
  pairs = [(found.get((i, n, 'A')), found.get((i, n, 'B'))) for n in range(layers)]
  # every block must have both matrices, or the merge would be partial
  own = sum(branch == i for branch, _, _ in found)
  if own != 2 * layers or any(None in pair for pair in pairs):
    raise ValueError(f'{adapters.where} has {own} matrices for the {layers} blocks of {base.where}')
  for a, b in pairs:
    (rank, inner), outer = adapters.shape_of(a), adapters.shape_of(b)
    if inner != width or outer != (rows, rank):
      raise ValueError(f'{adapters.where}: {b} {outer} after {a} {(rank, inner)} does not fit')

  def read_float32(name):
    return adapters.read_tensor(name).astype(np.float32)

  def read_merged(name):
    value = base.read_tensor(name)
    if name != target:
      return value
    # in float32 whatever the file's dtype: small updates would vanish in half precision
    updates = np.stack([read_float32(b) @ read_float32(a) for a, b in pairs])
    return value.astype(np.float32) + scale * updates

  # a kept copy belongs to these adapters at this scale
  identity = f'{base.identity};{adapters.identity};{scale}'
  return dataclasses.replace(base, read=read_merged, identity=identity)


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Reads the config off the branches.

  What names and shapes do not tell is that of the released model `part`. `options` are fields of
  dino's `Config` that override what is read.
  """
  known = [modeling.BRANCHES[member] for member in modeling.MEMBERS[part or 'ensemble']]
  return modeling.Config(
    tuple(
      dino.config_of(branch, **{'act': c.act, 'eps': c.eps, 'offset': c.offset, **options})
      for branch, c in zip(_split_branches(source), known)
    )
  )


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  # branch by branch, as each may come in another layout
  template = modules.abstract_module(lambda: modeling.build_model(config))[1]['branches']
  if isinstance(sharding, dict):
    places = sharding['branches']
  else:
    places = dict.fromkeys(template, sharding)
  found = {}
  for i, branch in zip(template, _split_branches(source)):
    branch = dino.arrange_layers(branch)
    found[i] = convert_weights(branch, dino.RULES, template[i], dtype, places[i])
  return {'branches': found}
