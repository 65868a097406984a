"""The embedded scene models: trained by `scenes/train`, shipped in `scenes/assets`.

A weights file names its module (`kind`), the module's `Config`, and its card, so there is no
registry: `load_model('prior_1d')` reads `prior_1d.safetensors` and calls `prior.build(Config(..))`.
"""

import dataclasses
import functools
import importlib
import json

import jax
from etils import epath

from vtts_jax.checkpoints import files as weight_files
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules

ASSETS = epath.resource_path('vtts_jax') / 'scenes' / 'assets'
PLAIN_FIELDS = ('kind', 'command', 'tokenizer', 'verifier')  # of a card: text; the rest is JSON


def model_names():
  """The shipped models, sorted."""
  return sorted(p.name.removesuffix('.safetensors') for p in ASSETS.glob('*.safetensors'))


@functools.cache
def read_card(name):
  """What the file of model `name` says of itself: kind, config, metrics, seed, command, defaults.

  Raises:
    ConfigError: no such model; the shipped ones are listed.
  """
  if name not in model_names():
    raise ConfigError(
      f'name={name!r} is no shipped scene model; allowed are {", ".join(model_names())}'
    )
  text = weight_files.metadata(ASSETS / f'{name}.safetensors')
  return {k: v if k in PLAIN_FIELDS else json.loads(v) for k, v in text.items()}


def model_module(name):
  """The module below `scenes.models` that model `name` is of."""
  return importlib.import_module(f'vtts_jax.scenes.models.{read_card(name)["kind"]}')


@functools.cache
def read_config(name):
  """The `Config` of model `name`."""
  sizes = read_card(name)['config'].items()
  return model_module(name).Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes})


@functools.cache
def load_model(name):
  """(graphdef, params) of model `name`, float32, cached per process; do not modify the arrays."""
  build, config = model_module(name).build, read_config(name)
  graphdef, template = modules.abstract_module(lambda: build(config))
  return graphdef, weight_files.load(ASSETS / f'{name}.safetensors', template)


@dataclasses.dataclass(frozen=True)
class SceneModel:
  """A shipped model as a part of a generator or verifier, in the manner of `models.pretrained`."""

  name: str

  @property
  def config(self):
    return read_config(self.name)

  def load(self):
    return load_model(self.name)[1]

  def bind(self, params):
    """The module with these parameters; free inside `jax.jit`."""
    return modules.bind(load_model(self.name)[0], params)

  def shardings(self, mesh: jax.sharding.Mesh):
    """A tree of `NamedSharding`, by the SHARDING table of the model's module where it has one."""
    rules = getattr(model_module(self.name), 'SHARDING', ())
    return modules.shardings_by_rule(self.load(), mesh, rules)
