"""Replays golden files of the family `dino` (tests/golden): tokens and logits of pictures."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.dino import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture.

  For each batch `images_<size>` these are `embed_<size>`, `block<i>_<size>`, `tokens_<size>`,
  `features_<size>` and, with a head, `logits_<size>`.
  """
  sizes = convert.config_of(source, heads=config['params']['num_attention_heads'])
  params = convert.load_weights(source, sizes)

  @jax.jit
  def run_model(params, images):
    model = modules.bind_module(modeling.build_model, sizes, params)
    first = model.embed_patches(images)
    out = {'embed': first, 'tokens': model(images), 'features': model.image_features(images)}
    out |= {f'block{i}': x for i, x in enumerate(model.trunk.layer_states(first))}
    return out | ({'logits': model.class_logits(images)} if model.config.classes else {})

  found = {}
  for name, images in inputs.items():
    size = name.removeprefix('images_')
    found |= {f'{k}_{size}': np.asarray(v) for k, v in run_model(params, images).items()}
  return found
