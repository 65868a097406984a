"""Golden files of the family `sana`, plain and Sprint: their arrays are NCHW, ours NHWC."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.models import modules
from vtts_jax.models.sana import convert, modeling

FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # channels


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every output of a fixture: stages, velocities, guidance; of Sprint its loop."""
  # the constructor arguments have the names of a released config.json
  settings = convert.config_of(dataclasses.replace(source, config=config['params']))
  params = convert.load_weights(source, settings)
  bind = lambda params: modules.bind_module(modeling.build_model, settings, params)
  x, t = inputs['latents'].transpose(LAST), inputs['timestep']
  scale = np.full_like(t, config['guidance_scale']) if settings.guidance_embeds else None

  @jax.jit
  def velocity(params, x, t, text, mask):
    return bind(params)(x, t, bind(params).caption(text), mask, scale)

  prompt = inputs['text'], inputs['text_mask']
  out = jax.jit(lambda params: _stages(bind(params), x, t, *prompt, scale))(params)
  first = velocity(params, x, t, *prompt)
  out['velocity'] = first.transpose(FIRST)
  for i, time in enumerate(config['timesteps']):
    out[f'velocity_t{i}'] = velocity(params, x, np.full_like(t, time), *prompt).transpose(FIRST)
  # Sprint is guided inside, so its files hold no unconditional pass
  if 'uncond_text' in inputs:
    null = velocity(params, x, t, inputs['uncond_text'], inputs['uncond_mask'])
    guided = null + config['guidance_scale'] * (first - null)
    out['velocity_cfg'] = guided.transpose(FIRST)
  if 'scm' in config:
    network = lambda x, t: velocity(params, x, t, *prompt)
    out |= _sample_sprint(network, x, inputs['noise'], **config['scm'])
  return {name: np.asarray(value) for name, value in out.items()}


def _stages(model, x, t, text, mask, scale):
  """What comes before the velocity, and the first block out of the stack."""
  time, modulation = model.embed_time(t, scale)
  caption = model.caption(text)
  graphdef, state = nnx.split(model.blocks)
  block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
  bias = ((1.0 - mask) * modeling.HIDDEN)[:, None, None]
  side = model.config.patch_size
  grid = x.shape[1] // side, x.shape[2] // side
  return {
    'caption': caption,
    'time_embedding': time,
    'time_modulation': modulation.reshape(len(time), -1),
    'block0_hidden': block(model.embed_patches(x), modulation, caption, bias, grid),
  }


def _sample_sprint(network, x, noise, max_timesteps, intermediate_timesteps, sigma_data):
  """Sprint's two steps, from latents of unit variance."""
  angles = (max_timesteps, intermediate_timesteps, 0.0)
  latents, kept = x * sigma_data, {'predictions': [], 'latents': [], 'denoised': []}
  for i, (here, there) in enumerate(zip(angles, angles[1:])):
    angle = jnp.full(len(x), here, jnp.float32)
    prediction = modeling.predict_trigflow(network, latents, angle, sigma_data)
    denoised = jnp.cos(angle[0]) * latents - jnp.sin(angle[0]) * prediction
    # the consistency step: to the data, and back to the noise of the next angle
    fresh = noise[i].transpose(LAST) * sigma_data
    latents = np.cos(np.float32(there)) * denoised + np.sin(np.float32(there)) * fresh
    for name, value in (
      ('predictions', prediction), ('latents', latents), ('denoised', denoised)
    ):  # fmt: skip
      kept[name].append(value.transpose(FIRST))
  return {f'sprint_{name}': np.stack(values) for name, values in kept.items()}
