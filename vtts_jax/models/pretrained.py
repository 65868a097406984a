"""A model of `models/` and its weights: one holder for every checkpoint and for random weights.

`Pretrained('clip', 'openai/clip-vit-base-patch16')`; `weights` says where they come from:

  'owner/name@revision'   a repository of the hub; 'owner/name/x.safetensors@revision': a file there
  'path/to/folder'        a folder of safetensors
  'path/to/x.safetensors' one file
  'random:SIZE'           random weights of a size that the family knows, such as 'random:tiny';
                          no file is read, and they are the same at every call

A family is a folder of `models/`, or a package of yours under its dotted name, with two modules:

  modeling  SIZES {name: Config} · build(config) -> module
            where parts load alone: PARTS, part_of(config, part) -> Config
            where the initialisers compile too long: random_parameters(config, dtype) -> params
  convert   config_of(source, part='') -> Config
            load(source, config, *, dtype=None, sharding=None) -> params
            SHARDING [(regex on 'a/b/c', PartitionSpec)], the weights' places on a mesh
            where a checkpoint is more than one file: open_weights(weights, part) -> source

Parts: clip 'image', 'text'; dino 'encoder' (no linear head); flextok 'encoder', 'decoder';
autoencoder_kl 'decoder'; dreamsim the name of a released model.
"""

import dataclasses
import functools
import importlib
import re

import jax

from vtts_jax.checkpoints import source as source_files
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules

RANDOM = 'random:'
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model and where its weights come from; nothing is read before it is asked for.

  Attributes:
    family: folder of `models/`.
    weights: see above.
    dtype: of the parameters, 'float32' or 'bfloat16'.
    part: what is loaded of the model, '' for all.
    setting: the setting that an error names.

  Raises:
    ConfigError: no weights, an unknown random size, dtype or part.
  """

  family: str
  weights: str
  dtype: str = 'float32'
  part: str = ''
  setting: str = 'verifier.weights'

  def __post_init__(self):
    if self.dtype not in DTYPES:
      setting = f'{self.setting.rpartition(".")[0]}.dtype'.removeprefix('.')
      raise ConfigError(f'{setting}={self.dtype!r}: must be one of {", ".join(DTYPES)}')
    if not self.weights:
      raise ConfigError(
        f"{self.setting}='': must be owner/name@revision, a folder or a file of safetensors, or "
        f'{RANDOM}SIZE with SIZE one of {", ".join(self.modeling.SIZES)}'
      )
    if self.is_random and self.size not in self.modeling.SIZES:
      allowed = ', '.join(RANDOM + name for name in self.modeling.SIZES)
      raise ConfigError(
        f'{self.setting}={self.weights!r}: must be a checkpoint or one of {allowed}'
      )
    parts = getattr(self.modeling, 'PARTS', ())
    if self.part and self.part not in parts:
      raise ConfigError(f'{self.setting}: part={self.part!r} of {self.family}: must be in {parts}')

  @property
  def modeling(self):
    """The family's module with the model."""
    return _module(self.family, 'modeling')

  @property
  def convert(self):
    """The family's module that reads checkpoints."""
    return _module(self.family, 'convert')

  @property
  def is_random(self) -> bool:
    return self.weights.startswith(RANDOM)

  @property
  def size(self) -> str:
    """The name of a random size, '' for a checkpoint."""
    return self.weights.removeprefix(RANDOM) if self.is_random else ''

  @property
  def name(self) -> str:
    """For the name of a score: the checkpoint's own name, or 'tiny_random'."""
    return f'{self.size}_random' if self.is_random else short_name(self.weights)

  @property
  def config(self):
    """Sizes and options of the model; of a checkpoint the headers are read, once.

    Raises:
      ConfigError: there is no such checkpoint, or it holds another model.
    """
    try:
      return _config(self.family, self.weights, self.part)
    except (FileNotFoundError, ValueError) as error:
      raise self._error(error) from error

  def load(self, mesh: jax.sharding.Mesh | None = None):
    """Parameters, a nested dict of arrays; on a mesh they are placed as `shardings` says.

    Raises:
      ConfigError: as `config`, and names or shapes that do not fit the model; it lists them all.
    """
    config, places = self.config, None if mesh is None else self.shardings(mesh)
    if self.is_random:
      params = self._random_parameters(config)
      return params if places is None else jax.device_put(params, places)
    try:
      source = open_weights(self.family, self.weights, self.part)
      return self.convert.load(source, config, dtype=self.dtype, sharding=places)
    except (FileNotFoundError, ValueError) as error:
      raise self._error(error) from error

  def bind(self, params):
    """The module with these parameters; free inside `jax.jit`."""
    return modules.bind_module(self.modeling.build, self.config, params)

  def shardings(self, mesh: jax.sharding.Mesh):
    """A tree of `NamedSharding` like the parameters, by the family's table."""
    _, template = modules.structure_of(self.modeling.build, self.config)
    return modules.shardings_by_rule(template, mesh, self.convert.SHARDING)

  def _random_parameters(self, config):
    own = getattr(self.modeling, 'random_parameters', None)
    if own is not None:
      return own(config, self.dtype)
    return modules.random_parameters(self.modeling.build, config, self.dtype)

  def _error(self, error):
    return ConfigError(f'{self.setting}={self.weights!r}: {error}')


def short_name(weights: str) -> str:
  """What a checkpoint is called in a score's name: its own name, without owner and revision."""
  place = re.split(r'@|\+(?=\w)', weights)[0]  # of 'a+b' the first is the model's own
  name = place.rstrip('/').rpartition('/')[2].removesuffix('.safetensors')
  return re.sub(r'\W', '_', name)


def open_weights(family: str, weights: str, part: str = '') -> source_files.Source:
  """The tensors of a checkpoint as the family's `convert` reads them; errors as `open_source`."""
  own = getattr(_module(family, 'convert'), 'open_weights', None)
  return own(weights, part) if own is not None else source_files.open_source(weights)


def _module(family, name):
  package = family if '.' in family else f'vtts_jax.models.{family}'
  return importlib.import_module(f'{package}.{name}')


@functools.cache
def _config(family, weights, part):
  if not weights.startswith(RANDOM):
    return _module(family, 'convert').config_of(open_weights(family, weights, part), part)
  modeling = _module(family, 'modeling')
  config = modeling.SIZES[weights.removeprefix(RANDOM)]
  return modeling.part_of(config, part) if part else config
