"""Golden files of the family `dino` (tests/golden): normalised pictures in, tokens and logits
out."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.dino import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """For each picture batch `images_<size>`: `embed_`, `block<i>_`, `tokens_`, `features_` and, with
  a head, `logits_`."""
  sizes = convert.config_of(source, heads=config['params']['num_attention_heads'])
  params = convert.load(source, sizes)

  @jax.jit
  def run(params, images):
    model = modules.bind_module(modeling.build, sizes, params)
    first = model.embed(images)
    out = {'embed': first, 'tokens': model(images), 'features': model.features(images)}
    out |= {f'block{i}': x for i, x in enumerate(model.trunk.states(first))}
    return out | ({'logits': model.logits(images)} if model.config.classes else {})

  found = {}
  for name, images in inputs.items():
    size = name.removeprefix('images_')
    found |= {f'{k}_{size}': np.asarray(v) for k, v in run(params, images).items()}
  return found
