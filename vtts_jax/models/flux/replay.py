"""Replays golden files of the family `flux`: latents are NCHW there, patches as here."""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.flux import convert, flow, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Positions, rotations, schedules, velocities and sampled latents of one golden file."""
  settings = convert.config_of(source)
  params = convert.load_weights(source, settings)

  def run(params, inputs):
    return _run_model(config, modules.bind_module(modeling.build_model, settings, params), inputs)

  found = jax.jit(run)(params, inputs) | _tables(config, settings, inputs)
  return {name: np.asarray(value) for name, value in found.items()}


def _run_model(config, model, inputs):
  latents, text, pooled, t = (inputs[name] for name in ('latent', 'txt', 'vec', 't'))
  latents = latents.transpose(0, 2, 3, 1)
  patches, steps = modeling.pack_latents(latents), config['steps']
  # a fixture of a model without guidance writes 0
  guidance = config['guidance'] if model.config.has_guidance else None
  # the reference works on patches all the way; Euler steps do not care
  velocity = lambda scale: modeling.pack_latents(model(latents, t, text, pooled, scale))
  out = {
    'img_packed': patches,
    'velocity': velocity(guidance),
    'timestep_embedding': modeling.time_features(t),
  }
  if model.config.has_guidance:
    out['velocity_guidance1'] = velocity(1.0)
  for name, shifted in (('denoised', True), ('denoised_noshift', False)):
    times = flow.sampling_times(steps, patches.shape[1], shifted)
    found = flow.sample_latents(model, latents, text, pooled, times, guidance)
    out[f'{name}_packed'] = modeling.pack_latents(found)
    if shifted:
      out['denoised_latent'] = jnp.transpose(found, (0, 3, 1, 2))
  return out


def _tables(config, settings, inputs):
  """What depends on shapes alone."""
  rows, text = inputs['txt'].shape[:2]
  height, width = (side // modeling.PATCH for side in inputs['latent'].shape[2:])
  positions = modeling.token_positions(text, height, width)
  cos, sin = modeling.rotary_tables(settings, positions)
  matrices = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
  ids = np.broadcast_to(positions, (rows, *positions.shape))
  return {
    'txt_ids': ids[:, :text],
    'img_ids': ids[:, text:],
    'rope_pe': matrices[None, None],  # [1, 1, T, d / 2, 2, 2]
    'schedule_shift': flow.sampling_times(config['steps'], height * width),
    'schedule_noshift': flow.sampling_times(config['steps'], height * width, shifted=False),
    'schedule_4096_8': flow.sampling_times(8, 4096),
  }
