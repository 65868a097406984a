"""The embedded scene models: trained by `scenes/train`, shipped in `scenes/assets`.

A weights file names its module (`kind`) and contains the module's `Config` and a card. So there is
no registry: `load_model('prior_1d')` reads `prior_1d.safetensors` and calls
`prior.build_model(Config(..))`.
"""

import dataclasses
import functools
import importlib
import json

import jax
from etils import epath

from vtts_jax.checkpoints.files import read_metadata, read_weights
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules

ASSETS = epath.resource_path('vtts_jax') / 'scenes' / 'assets'
PLAIN_FIELDS = ('kind', 'command', 'tokenizer', 'verifier')  # text; other fields of a card are JSON


def model_names():
  """Sorted names of the shipped models."""
  return sorted(p.name.removesuffix('.safetensors') for p in ASSETS.glob('*.safetensors'))


@functools.cache
def read_card(name):
  """The card in the file of model `name`: kind, config, metrics, seed, command, defaults.

  Raises:
    ConfigError: an unknown model; the message lists the shipped ones.
  """
  if name not in model_names():
    raise ConfigError(
      f'name={name!r} is no shipped scene model; allowed are {", ".join(model_names())}'
    )
  text = read_metadata(ASSETS / f'{name}.safetensors')
  return {k: v if k in PLAIN_FIELDS else json.loads(v) for k, v in text.items()}


def model_module(name):
  """The module in `scenes.models` that defines model `name`."""
  return importlib.import_module(f'vtts_jax.scenes.models.{read_card(name)["kind"]}')


@functools.cache
def read_config(name):
  """The `Config` of model `name`."""
  # JSON has lists only; a config must be hashable, so they become tuples
  sizes = read_card(name)['config'].items()
  return model_module(name).Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes})


@functools.cache
def load_model(name):
  """(graphdef, float32 params) of model `name`, cached per process; do not modify the arrays."""
  build, config = model_module(name).build_model, read_config(name)
  # only shapes are built; the file fills them and must match them exactly
  graphdef, template = modules.abstract_module(lambda: build(config))
  return graphdef, read_weights(ASSETS / f'{name}.safetensors', template)


@dataclasses.dataclass(frozen=True)
class SceneModel:
  """A shipped model as a part of a generator or verifier; same interface as `Pretrained`."""

  name: str

  @property
  def config(self):
    return read_config(self.name)

  def load(self):
    return load_model(self.name)[1]

  def bind(self, params):
    """The module with these parameters inserted; costs nothing inside `jax.jit`."""
    return modules.bind_graph(load_model(self.name)[0], params)

  def shardings(self, mesh: jax.sharding.Mesh):
    """A tree of `NamedSharding`, from the SHARDING table of the model's module if it has one."""
    rules = getattr(model_module(self.name), 'SHARDING', ())
    return modules.shardings_by_rule(self.load(), mesh, rules)
