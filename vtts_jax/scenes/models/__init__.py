"""The embedded scene models, trained by `vtts_jax.train` and shipped in `vtts_jax/scenes/assets`.

A weights file names its module (`kind`), the module's `Config`, and its card, so loading needs no
registry: `load('prior_1d')` reads `prior_1d.safetensors` and calls `prior.build(Config(...))`.
"""

import functools
import importlib
import json

from etils import epath

from vtts_jax.checkpoints import files as weight_files
from vtts_jax.models import modules

ASSETS = epath.resource_path('vtts_jax') / 'scenes' / 'assets'


def names():
  """The shipped models, sorted."""
  return sorted(p.name.removesuffix('.safetensors') for p in ASSETS.glob('*.safetensors'))


def card(name):
  """What the file of model `name` says of itself: kind, config, metrics, seed, command, defaults.

  Raises:
    ValueError: no such model; the shipped ones are listed.
  """
  if name not in names():
    raise ValueError(f'name={name!r} is no shipped scene model; allowed are {", ".join(names())}')
  text = weight_files.metadata(ASSETS / f'{name}.safetensors')
  plain = ('kind', 'command', 'tokenizer', 'verifier')  # strings; the rest is JSON
  return {k: v if k in plain else json.loads(v) for k, v in text.items()}


def cards():
  """{name: card} of every shipped model."""
  return {name: card(name) for name in names()}


def config(name):
  """The `Config` of model `name`."""
  said = card(name)
  module = importlib.import_module(f'vtts_jax.scenes.models.{said["kind"]}')
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in said['config'].items()}
  return module.Config(**values)


@functools.cache
def load(name):
  """(graphdef, params) of model `name`, float32, cached per process; do not modify the arrays."""
  module = importlib.import_module(f'vtts_jax.scenes.models.{card(name)["kind"]}')
  made = config(name)
  graphdef, template = modules.abstract(lambda: module.build(made))
  return graphdef, weight_files.load(ASSETS / f'{name}.safetensors', template)
