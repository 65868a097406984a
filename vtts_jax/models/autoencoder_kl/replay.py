"""Replays golden files of `autoencoderkl` and `fluxae`; their arrays are NCHW, ours are NHWC."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture.

  These are `decoded` and `decoded_scaled` of `latents`, the posterior of `images`, its scaled mode
  and its divergence; of `fluxae`, what FLUX's class computes, whose latents are always scaled.
  """
  if config['model'] == 'fluxae':
    return _replay_flux(config, source, inputs)
  # a fixture holds constructor arguments; the class name makes a config.json of them
  options = {'_class_name': 'AutoencoderKL', **config['params']}
  settings = convert.config_of(source, options=options)
  params = convert.load_weights(source, settings)
  model = modules.bind_module(modeling.build_model, settings, params)

  @jax.jit
  def encode(params, x):
    return modules.bind_module(modeling.build_model, settings, params).encode(x)

  @jax.jit
  def decode(params, x):
    return modules.bind_module(modeling.build_model, settings, params).decode(x)

  latents = _channels_last(inputs['latents'])
  mean, log_variance = encode(params, _channels_last(inputs['images']))
  outputs = {
    'decoded': decode(params, latents),
    'decoded_scaled': decode(params, model.unscale_latents(latents)),
    'posterior_mean': mean,
    'posterior_logvar': log_variance,
    'mode_scaled': model.scale_latents(mean),
  }
  found = {name: _channels_first(value) for name, value in outputs.items()}
  return found | {'kl': np.asarray(modeling.kl_divergence(mean, log_variance))}


def _replay_flux(config, source, inputs):
  factors = {'scaling_factor': 'scale_factor', 'shift_factor': 'shift_factor'}
  options = {ours: config['params'][theirs] for ours, theirs in factors.items()}
  settings = convert.config_of(source, options=options)
  params = convert.load_weights(source, settings)

  @jax.jit
  def run(params, z, image):
    model = modules.bind_module(modeling.build_model, settings, params)
    mean = model.scale_latents(model.encode(image)[0])
    return {
      'decoded': model.decode(model.unscale_latents(z)),
      'encoder_moments': model.encoder(image),
      'encoded_mean': mean,
      'roundtrip': model.decode(model.unscale_latents(mean)),
    }

  outputs = run(params, _channels_last(inputs['z']), _channels_last(inputs['image']))
  return {name: _channels_first(value) for name, value in outputs.items()}


def _channels_last(x):
  return x.transpose(0, 2, 3, 1)


def _channels_first(x):
  return np.asarray(x).transpose(0, 3, 1, 2)
