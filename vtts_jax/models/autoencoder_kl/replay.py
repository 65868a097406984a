"""Golden files of the family `autoencoderkl`: their arrays are NCHW, ours NHWC."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import convert, modeling


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every output of a fixture: `decoded` and `decoded_scaled` of `latents`, the posterior of
  `images`, its scaled mode and its divergence."""
  options = {'_class_name': 'AutoencoderKL', **config['params']}  # constructor arguments
  settings = convert.config_of(source, options=options)
  params = convert.load(source, settings)
  bind = lambda params: modules.bind_module(modeling.build, settings, params)
  encode = jax.jit(lambda params, x: bind(params).encode(x))
  decode = jax.jit(lambda params, x: bind(params).decode(x))
  inside = lambda x: x.transpose(0, 2, 3, 1)
  outside = lambda x: np.asarray(x).transpose(0, 3, 1, 2)
  latents = inside(inputs['latents'])
  mean, log_variance = encode(params, inside(inputs['images']))
  model = bind(params)
  return {
    'decoded': outside(decode(params, latents)),
    'decoded_scaled': outside(decode(params, model.unscale(latents))),
    'posterior_mean': outside(mean),
    'posterior_logvar': outside(log_variance),
    'mode_scaled': outside(model.scale(mean)),
    'kl': np.asarray(modeling.divergence(mean, log_variance)),
  }
