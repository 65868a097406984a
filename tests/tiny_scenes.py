"""Scene models of the smallest sizes, with random weights, in place of the shipped ones.

The generators of the scene world are the same code at any size; at these sizes their laws compile
four times faster. What the shipped weights know is tested on the shipped weights.
"""

import contextlib
import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

from vtts_jax.checkpoints.files import write_weights
from vtts_jax.models import modules
from vtts_jax.scenes import models
from vtts_jax.scenes.models import flow, prior, tokenizer, value

TOKENS, CODES = 8, 16
TRUNK = {
  'codes': CODES, 'width': 8, 'layers': 1, 'heads': 2, 'expand': 1, 'text_width': 8,
  'text_layers': 1,
}  # fmt: skip


def tiny_configs(order):
  """{name of a shipped model: (its module, a small config, the rest of its card)}."""
  images = tokenizer.Config(
    order=order, tokens=TOKENS, levels=(4, 4), near=8, width=8, hidden=8, encoder=1, decoder=1
  )
  drawn = prior.Config(tokens=TOKENS, **TRUNK)
  valued = value.Config(tokens=TOKENS + 1, **TRUNK, dim=8, of_words=8, of_hidden=8)
  return {
    f'tokenizer_{order}': (tokenizer, images, {}),
    f'prior_{order}': (prior, drawn, {'guidance': 1.5}),
    f'rollout_{order}': (prior, drawn, {}),
    f'value_{order}': (value, valued, {}),
    'flow': (flow, flow.Config(width=8, hidden=8, blocks=1, embed=8), {'guidance': 1.5}),
  }


@contextlib.contextmanager
def tiny_models(folder, order='1d'):
  """The models of one order and the flow are tiny inside this context; the others stay shipped."""
  folder, shipped = pathlib.Path(folder), models.ASSETS
  caches = (models.read_card, models.read_config, models.load_model)
  small = tiny_configs(order)
  for path in shipped.glob('*.safetensors'):
    if path.name.removesuffix('.safetensors') not in small:
      os.symlink(path, folder / path.name)
  rng = np.random.default_rng(3)
  for name, (module, config, card) in small.items():
    _, params = modules.abstract_module(lambda m=module, c=config: m.build_model(c))
    # no leaf is 0, as the initialisation of some is: everything must count
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), params)
    metadata = {'kind': module.__name__.rpartition('.')[2], 'config': dataclasses.asdict(config)}
    write_weights(str(folder / f'{name}.safetensors'), params, metadata | card)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(models, 'ASSETS', folder)
    for cache in caches:
      cache.cache_clear()
    yield
  for cache in caches:
    cache.cache_clear()
