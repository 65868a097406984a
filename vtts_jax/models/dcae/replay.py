"""Golden files of the family `dcae`: their arrays are NCHW, ours NHWC."""

import dataclasses

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.dcae import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every output of a fixture: `image` encoded, `latents` decoded, both scaled, and there and
  back."""
  # the constructor arguments have the names of a released config.json
  settings = convert.config_of(dataclasses.replace(source, config=config['params']))
  params = convert.load_weights(source, settings)
  bind = lambda params: modules.bind_module(modeling.build_model, settings, params)
  encode = jax.jit(lambda params, x: bind(params).encode(x))
  decode = jax.jit(lambda params, x: bind(params).decode(x))
  image, latents = (inputs[name].transpose(0, 2, 3, 1) for name in ('image', 'latents'))
  model, encoded = bind(params), encode(params, image)
  found = {
    'encoded': encoded,
    'encoded_scaled': model.scale_latents(encoded),
    'decoded': decode(params, latents),
    'decoded_scaled': decode(params, model.unscale_latents(latents)),
    'roundtrip': decode(params, encoded),
  }
  return {name: np.asarray(value).transpose(0, 3, 1, 2) for name, value in found.items()}
