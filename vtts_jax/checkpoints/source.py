"""Checkpoints of other projects: safetensors from a folder or the hub, one tensor at a time.

A `Source` knows the names, shapes and dtypes of its tensors from the headers alone. It reads a
tensor when it is asked to, and it carries the config that was found beside or inside the files.
Nothing here ever opens a pickle. Checked against the safetensors format description and the index
layout (`weight_map`) that transformers and diffusers write.
"""

import ast
import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging

# stems that transformers and diffusers load, where a folder has several files
PREFERRED = ('model', 'diffusion_pytorch_model')
CONFIGS = ('config.yaml', 'config.json', 'open_clip_config.json')
# other files beside the weights that a family may read: how pictures become the network's input
SIBLINGS = ('preprocessor_config.json', 'processor_config.json')
# what is downloaded of a repository: never its pickles
PATTERNS = ('*.safetensors', '*.safetensors.index.json', *CONFIGS, *SIBLINGS)
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
# 'owner/name', then perhaps a file or a folder there, then perhaps '@revision'
REPOSITORY = re.compile(r'([\w.-]+/[\w.-]+)(?:/([\w./-]+))?(?:@([\w./-]+))?')
# safetensors' names of dtypes
_DTYPES = {
  'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64',
  'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'U16': 'uint16', 'U32': 'uint32',
  'U64': 'uint64', 'BOOL': 'bool',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
  """Named tensors that are read on demand.

  Attributes:
    where: what error messages call the checkpoint.
    header: {name: (shape, dtype name)}.
    read: function of a name that returns the array.
    config: options found in the checkpoint; `{}` if there are none.
    identity: a string that changes whenever the content may have changed (sizes and times of the
      files, or the hub's commit); converted copies are kept under it. '' for arrays in memory.
    folder: the local folder of the files; '' for arrays in memory and for a part of a file.
  """

  where: str
  header: Mapping[str, tuple[tuple[int, ...], str]]
  read: Callable[[str], np.ndarray]
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  identity: str = ''
  folder: str = ''

  def tensor_names(self) -> list[str]:
    """Returns every tensor's name, in the order of the files."""
    return list(self.header)

  def __contains__(self, name):
    return name in self.header

  def shape_of(self, name) -> tuple[int, ...]:
    """Returns a tensor's shape from the header; `KeyError` if there is no such name."""
    return self.header[name][0]

  def read_tensor(self, name) -> np.ndarray:
    """Reads one tensor.

    Raises:
      KeyError: there is no such name; the message says where it was looked for.
    """
    if name not in self.header:
      raise KeyError(f'{self.where} has no tensor {name!r}')
    return self.read(name)

  def select_prefix(self, prefix: str, config: Mapping | None = None) -> 'Source':
    """Returns the tensors under `prefix` without it: `source.select_prefix('vae.')`.

    The options of the whole checkpoint are not those of a part, so the new source has `config` or
    none.
    """
    header = {n[len(prefix) :]: v for n, v in self.header.items() if n.startswith(prefix)}
    return dataclasses.replace(
      self,
      where=f'{self.where} ({prefix}*)',
      header=header,
      read=lambda name: self.read(prefix + name),
      config=config or {},
      identity=f'{self.identity}/{prefix}',
      folder='',
    )

  def read_sibling(self, name: str) -> dict:
    """Reads a JSON file that lies beside the weights; `{}` if there is none.

    Raises:
      ValueError: the file does not parse to a mapping.
    """
    path = os.path.join(self.folder, name)
    return _read_mapping(path) if self.folder and os.path.isfile(path) else {}

  def find_option(self, *names: str, default=None):
    """Returns the first of `names` that the config holds at any depth, shallow levels first."""
    # breadth first: 'num_heads' of the model counts before that of a nested text encoder
    level = [self.config]
    while level:
      for name in names:
        for node in level:
          if isinstance(node, Mapping) and node.get(name) is not None:
            return node[name]
      level = [
        child
        for node in level
        for child in (node.values() if isinstance(node, Mapping) else node)
        if isinstance(child, Mapping | list | tuple)
      ]
    return default


def source_of_arrays(values: Mapping[str, np.ndarray], config=None, where='arrays') -> Source:
  """Returns a `Source` over a dict of arrays (golden files, tests)."""
  header = {k: (tuple(np.shape(v)), str(np.asarray(v).dtype)) for k, v in values.items()}
  return Source(where, header, lambda name: np.asarray(values[name]), config or {})


def open_source(
  place: str | os.PathLike,
  revision: str | None = None,
  subfolder: str | None = None,
  file: str | None = None,
) -> Source:
  """Opens a safetensors file, a local folder, or a repository of the hub.

  Args:
    place: `x.safetensors`, a folder (one file, or shards with an index), `owner/name`,
      `owner/name@revision`, or a file or folder there: `owner/name/x.safetensors@revision`,
      `owner/name/vae@revision`. The local cache is searched first, so a pinned repository works
      without a network. `x.safetensors#prefix.` is the model whose names begin so in a file of
      several; it has no config.
    revision: commit, tag or branch; an unpinned repository logs the commit to pin.
    subfolder: folder inside `place`, for example `vae`.
    file: the file to take where a folder has several, for example `ae.safetensors`.

  Raises:
    FileNotFoundError: there is no such file, folder or repository; a shard that the index names is
      missing; the folder holds only pickles.
    ValueError: the file is truncated or no safetensors; a folder has several weights; the shards
      lack tensors that the index promises.
  """
  place, identity = os.fspath(place), ''
  if '.safetensors' in place and '#' in place and not os.path.exists(place):
    whole, _, prefix = place.rpartition('#')
    return open_source(whole, revision, subfolder, file).select_prefix(prefix)
  repository = REPOSITORY.fullmatch(place)
  # a local folder 'a/b' wins over the repository of that name
  if repository and not os.path.exists(place):
    name, inside, pinned = repository.groups()
    if inside and inside.endswith('.safetensors'):
      file = inside
    elif inside:
      subfolder = os.path.join(inside, subfolder or '')
    place, identity = _fetch_snapshot(name, revision or pinned, subfolder or '', file)
  for part in (subfolder, file):
    place = os.path.join(place, part) if part else place
  if os.path.isdir(place):
    files, index = _find_files(place)
  elif os.path.isfile(place):
    if place.endswith(PICKLES):
      raise ValueError(_pickle_message(place))
    files, index = [place], None
  else:
    raise FileNotFoundError(f'no weights at path={place!r}: no such file or folder')
  return _open_files(place, files, index, identity)


def open_pipeline_part(place: str, subfolder: str) -> Source:
  """Opens one model of a diffusers pipeline: `subfolder` of a repository or of a local folder.

  A file, a folder that is named inside a repository, and what has no such subfolder are opened as
  they are. Errors as in `open_source`.
  """
  if os.path.exists(place):
    inside = os.path.isdir(os.path.join(place, subfolder))
    return open_source(place, subfolder=subfolder if inside else None)
  repository = REPOSITORY.fullmatch(place)
  if repository is None or repository[2]:
    return open_source(place)
  try:
    # the subfolder first: the pattern of a root's files would fetch the whole pipeline
    return open_source(place, subfolder=subfolder)
  except FileNotFoundError:
    return open_source(place)


def name_pipeline_part(place: str, subfolder: str) -> str:
  """Returns the name of a model or tokenizer beside others in a pipeline: `owner/name@revision` and
  `vae` give `owner/name/vae@revision`.

  Random weights ('random:tiny') keep their name. A single file has nothing beside it and gives ''.
  """
  # a revision holds no ':', and a local path may hold an '@'
  name, at, revision = (place, '', '') if os.path.exists(place) else place.partition('@')
  if name.endswith('.safetensors'):
    return ''
  return place if place.startswith('random:') else f'{name.rstrip("/")}/{subfolder}{at}{revision}'


def read_pipeline_config(place: str, subfolder: str, file: str) -> dict:
  """Reads a JSON file of a pipeline, such as `scheduler_config.json` in `scheduler`; `{}` where
  there is none: for random weights, a single file, a model without a pipeline.

  Raises:
    FileNotFoundError: the hub does not give the file of a repository.
    ValueError: the file does not parse to a mapping.
  """
  folder, repository = place, REPOSITORY.fullmatch(place)
  if repository and not os.path.exists(place):
    name, inside, revision = repository.groups()
    if inside:
      return {}
    folder, _ = _fetch_snapshot(name, revision, subfolder, file)
  path = os.path.join(folder, subfolder, file)
  return _read_mapping(path) if os.path.isfile(path) else {}


# ----------------------------------------------------------------------------------------- the hub


def _fetch_snapshot(name, revision, subfolder, file):
  """Returns (local folder, identity) of a snapshot, from the cache or else from the network."""
  import huggingface_hub

  wanted = PATTERNS if file is None else (file, *CONFIGS, *SIBLINGS)
  allow = [os.path.join(subfolder, pattern) for pattern in wanted]
  options = {'revision': revision, 'allow_patterns': allow}
  try:
    folder = huggingface_hub.snapshot_download(name, local_files_only=True, **options)
  # nothing is cached yet: the hub raises errors of many classes for that
  except Exception:
    folder = None
  if folder is None or not _is_complete(os.path.join(folder, subfolder), file):
    try:
      folder = huggingface_hub.snapshot_download(name, **options)
    except Exception as error:
      at = f'@{revision}' if revision else ''
      raise FileNotFoundError(
        f'no weights at path={name + at!r}: no such folder, not in the local hub cache, and the '
        f'hub did not give it ({type(error).__name__}: {str(error).splitlines()[0]})'
      ) from error
  # the cache names a snapshot's folder by its commit
  commit = os.path.basename(os.path.normpath(folder))
  if revision is None:
    logging.warning('%s is not pinned: write %s@%s', name, name, commit)
  return folder, f'{name}@{commit}'


def _is_complete(folder, file):
  """Returns whether a cached snapshot has all weights; the hub also caches a config alone."""
  if file is not None:
    return os.path.isfile(os.path.join(folder, file))
  try:
    return all(os.path.isfile(path) for path in _find_files(folder)[0])
  except FileNotFoundError:
    return False


# -------------------------------------------------------------------------------- files and headers


def _pickle_message(place):
  return (
    f'path={place!r} is a pickle, and pickles are never loaded: save its state dict with '
    'safetensors.torch.save_file first'
  )


def _find_files(folder):
  """Returns (files, weight map or None) of a folder."""
  names = sorted(os.listdir(folder))
  indices = [n for n in names if n.endswith('.safetensors.index.json')]
  singles = [n for n in names if n.endswith('.safetensors') and not re.search(r'-of-\d+\.', n)]
  # an index comes before single files: its shards are single files as well
  for kind, stems, end in (
    ('index', indices, '.safetensors.index.json'),
    ('file', singles, '.safetensors'),
  ):
    # a preferred stem if there is one, else there must be one file only
    chosen = [f'{p}{end}' for p in PREFERRED if f'{p}{end}' in stems][:1] or stems
    if len(chosen) > 1:
      raise ValueError(f'path={folder!r} has several weights, name one: {", ".join(chosen)}')
    if chosen and kind == 'index':
      with open(os.path.join(folder, chosen[0]), encoding='utf-8') as handle:
        index = json.load(handle)['weight_map']
      shards = sorted(set(index.values()))
      # interrupted downloads leave shards out: better to say so than to miss names later
      gone = [s for s in shards if s not in names]
      if gone:
        raise FileNotFoundError(
          f'path={folder!r}: {len(gone)} of {len(shards)} shards are missing: {", ".join(gone)}'
        )
      return [os.path.join(folder, s) for s in shards], index
    if chosen:
      return [os.path.join(folder, chosen[0])], None
  shards = [n for n in names if n.endswith('.safetensors')]
  if shards:
    raise FileNotFoundError(
      f'path={folder!r} has shards but no *.safetensors.index.json: {", ".join(shards)}'
    )
  pickles = [n for n in names if n.endswith(PICKLES)]
  if pickles:
    raise FileNotFoundError(_pickle_message(os.path.join(folder, pickles[0])))
  raise FileNotFoundError(f'path={folder!r} has no *.safetensors; it has: {", ".join(names)}')


def open_file(path):
  """Opens a safetensors file without reading its tensors.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is truncated or no safetensors.
  """
  from safetensors import SafetensorError, safe_open

  if not os.path.isfile(path):
    raise FileNotFoundError(f'no weights at path={str(path)!r}')
  try:
    return safe_open(path, framework='numpy')
  except (SafetensorError, struct.error, OSError) as error:
    raise ValueError(f'path={str(path)!r} is truncated or no safetensors file: {error}') from error


def _open_files(place, files, index, identity):
  header, owner, found, stamp = {}, {}, {}, []
  for path in files:
    with open_file(path) as file:
      for name in sorted(file.keys()):
        view = file.get_slice(name)
        kind = _DTYPES.get(view.get_dtype())
        if kind is None:
          raise ValueError(
            f'path={path!r}: {name} has dtype {view.get_dtype()}; allowed are {", ".join(_DTYPES)}'
          )
        header[name] = (tuple(view.get_shape()), kind)
        owner[name] = path
      found.update(parse_metadata(file.metadata() or {}))
    # sizes and times: a digest of the content would read every byte
    stat = os.stat(path)
    stamp.append(f'{os.path.abspath(path)}:{stat.st_size}:{stat.st_mtime_ns}')
  lost = [n for n, shard in (index or {}).items() if os.path.basename(owner.get(n, '')) != shard]
  if lost:
    raise ValueError(
      f'path={place!r}: the index promises tensors that its shards do not hold: {_list_some(lost)}'
    )

  def read_tensor(name):
    # opened anew for each tensor, so that no handle of a shard outlives the read
    with open_file(owner[name]) as file:
      return file.get_tensor(name)

  folder = place if os.path.isdir(place) else os.path.dirname(os.path.abspath(place))
  # what a file says of itself wins over a config beside it
  config = {**read_config(folder), **found}
  return Source(place, header, read_tensor, config, identity or ';'.join(stamp), folder)


def _list_some(names: Iterable[str], limit=40) -> str:
  names = list(names)
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more


# ------------------------------------------------------------------------------------------ config


def parse_metadata(metadata: Mapping[str, str]) -> dict:
  """Returns the options in safetensors metadata.

  A value that reads as JSON, a Python literal or a YAML mapping becomes what it says. Torch's tag
  `format` is left out.
  """
  return {k: _parse_literal(v) for k, v in metadata.items() if k != 'format'}


def _parse_literal(text):
  for parse in (json.loads, ast.literal_eval):
    try:
      return parse(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      continue
  # nearly every text is valid YAML, so only what looks like a mapping is tried
  if '\n' in text and ':' in text:
    import yaml

    try:
      return yaml.safe_load(text)
    except yaml.YAMLError:
      pass
  return text


def read_config(folder) -> dict:
  """Reads the first of `CONFIGS` that a folder has; `{}` if it has none.

  Raises:
    ValueError: the file does not parse to a mapping.
  """
  for name in CONFIGS:
    path = os.path.join(folder, name)
    if os.path.isfile(path):
      return _read_mapping(path)
  return {}


def _read_mapping(path):
  with open(path, encoding='utf-8') as handle:
    text = handle.read()
  try:
    if path.endswith('json'):
      config = json.loads(text)
    else:
      import yaml

      config = yaml.safe_load(text)
  except Exception as error:
    raise ValueError(f'path={path!r} does not parse: {error}') from error
  if not isinstance(config, dict):
    raise ValueError(f'path={path!r} holds a {type(config).__name__}, a mapping is needed')
  return config
