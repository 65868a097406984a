"""A model of `models/` with its weights: one holder for every checkpoint and for random weights.

`Pretrained('clip', 'openai/clip-vit-base-patch16')` holds a CLIP. `weights` says where its numbers
come from:

  'owner/name@revision'   a repository of the hub; 'owner/name/x.safetensors@revision': a file there
  'path/to/folder'        a folder of safetensors
  'path/to/x.safetensors' one file
  'random:SIZE'           random weights of a size that the family knows, such as 'random:tiny';
                          no file is read, and the weights are the same at every call

A family is a folder of `models/`, or a package of yours under its dotted name, with two modules:

  modeling  SIZES {name: Config} · build_model(config) -> module · count_flops(config, ...)
            if parts load alone: PARTS, part_of(config, part) -> Config
            if the initialisers compile too long: random_parameters(config, dtype) -> params
  convert   config_of(source, part='') -> Config
            load_weights(source, config, *, dtype=None, sharding=None) -> params
            SHARDING [(regex on 'a/b/c', PartitionSpec)], the weights' places on a mesh
            if a checkpoint is more than one file: open_weights(weights, part) -> source

Parts: 'image' and 'text' of clip; 'encoder' of dino (no linear head); 'encoder' and 'decoder' of
flextok; 'decoder' of autoencoder_kl, maskgit_vq and titok; 'drawing' of janus (what draws
pictures); the name of a released model of dreamsim.
"""

import dataclasses
import functools
import importlib
import re

import jax

from vtts_jax.checkpoints.source import Source, open_source
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules

RANDOM = 'random:'
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model and where its weights come from; only `config` and `load` read files.

  Attributes:
    family: a folder of `models/`, or a dotted package name.
    weights: where the weights come from, see the docstring of this file.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
    part: which part of the model is loaded; '' for all of it.
    setting: the user's setting that an error names.

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
      # 'verifier.weights' has its dtype in 'verifier.dtype'
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
    # most families load as a whole and have no PARTS
    parts = getattr(self.modeling, 'PARTS', ())
    if self.part and self.part not in parts:
      raise ConfigError(f'{self.setting}: part={self.part!r} of {self.family}: must be in {parts}')

  @property
  def modeling(self):
    """The family's module that defines the model."""
    return _family_module(self.family, 'modeling')

  @property
  def convert(self):
    """The family's module that reads checkpoints."""
    return _family_module(self.family, 'convert')

  @property
  def is_random(self) -> bool:
    return self.weights.startswith(RANDOM)

  @property
  def size(self) -> str:
    """The name of a random size; '' for a checkpoint."""
    return self.weights.removeprefix(RANDOM) if self.is_random else ''

  @property
  def name(self) -> str:
    """The model's part of a score's name: the checkpoint's own name, or 'tiny_random'."""
    return f'{self.size}_random' if self.is_random else short_name(self.weights)

  @property
  def config(self):
    """The model's sizes and options; a checkpoint's headers are read once to find them.

    Raises:
      ConfigError: there is no such checkpoint, or it holds another model.
    """
    try:
      return _read_config(self.family, self.weights, self.part)
    except (FileNotFoundError, ValueError) as error:
      raise self._naming_setting(error) from error

  def load(self, mesh: jax.sharding.Mesh | None = None):
    """Returns the parameters, a nested dict of arrays; on a mesh, `shardings` places them.

    Raises:
      ConfigError: as `config`; names or shapes that do not fit the model, all of them listed.
    """
    # placed while reading: a model larger than one device must never lie on it whole
    config, places = self.config, None if mesh is None else self.shardings(mesh)
    if self.is_random:
      params = self._random_parameters(config)
      return params if places is None else jax.device_put(params, places)
    try:
      source = open_weights(self.family, self.weights, self.part)
      return self.convert.load_weights(source, config, dtype=self.dtype, sharding=places)
    except (FileNotFoundError, ValueError) as error:
      raise self._naming_setting(error) from error

  def bind(self, params):
    """Returns the module with these parameters; it costs nothing inside `jax.jit`."""
    return modules.bind_module(self.modeling.build_model, self.config, params)

  def shardings(self, mesh: jax.sharding.Mesh):
    """Returns a tree of `NamedSharding` like the parameters, by the family's table."""
    _, template = modules.structure_of(self.modeling.build_model, self.config)
    return modules.shardings_by_rule(template, mesh, self.convert.SHARDING)

  def _random_parameters(self, config):
    # Inception has its own: its 94 initialisers take half a minute to compile
    own = getattr(self.modeling, 'random_parameters', None)
    if own is not None:
      return own(config, self.dtype)
    return modules.random_parameters(self.modeling.build_model, config, self.dtype)

  def _naming_setting(self, error):
    return ConfigError(f'{self.setting}={self.weights!r}: {error}')


def repository_of(weights: str) -> str:
  """Returns weights without their revision; a folder of the hub's cache as 'owner/name'."""
  cached = re.search(r'(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$', weights)
  return '/'.join(cached.groups()) if cached else weights.partition('@')[0]


def short_name(weights: str) -> str:
  """Returns a checkpoint's own name, without owner and revision, for the name of a score."""
  # 'language+vision' names two checkpoints, of which the first gives the model its name
  place = re.split(r'@|\+(?=\w)', repository_of(weights))[0]
  name = place.rstrip('/').rpartition('/')[2].removesuffix('.safetensors')
  return re.sub(r'\W', '_', name)


def open_weights(family: str, weights: str, part: str = '') -> Source:
  """Opens a checkpoint as the family's `convert` reads it; errors as in `open_source`."""
  # families of several files (DreamSim, CLIP-FlanT5) put them together themselves
  own = getattr(_family_module(family, 'convert'), 'open_weights', None)
  return own(weights, part) if own is not None else open_source(weights)


def _family_module(family, name):
  # a dotted name is a package outside ours, imported as it is
  package = family if '.' in family else f'vtts_jax.models.{family}'
  return importlib.import_module(f'{package}.{name}')


# read once: sizes are asked for at every trace, and a hub's headers take seconds
@functools.cache
def _read_config(family, weights, part):
  if not weights.startswith(RANDOM):
    return _family_module(family, 'convert').config_of(open_weights(family, weights, part), part)
  modeling = _family_module(family, 'modeling')
  config = modeling.SIZES[weights.removeprefix(RANDOM)]
  return modeling.part_of(config, part) if part else config
