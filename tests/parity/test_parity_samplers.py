"""Steppers and schedules against diffusers' schedulers, with their settings of each release."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from reference import diffusers, torch

from vtts_jax.generators.diffusion import replay

LEVELS = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
LEADING = LEVELS | {'timestep_spacing': 'leading', 'steps_offset': 1}
RELEASES = {  # name -> (class, settings, arguments of step)
  'sd3': ('FlowMatchEulerDiscreteScheduler', {'shift': 3.0}, {}),
  'heun': ('FlowMatchHeunDiscreteScheduler', {'shift': 3.0}, {}),
  'sd15_ddim': ('DDIMScheduler', LEADING | {'clip_sample': False, 'set_alpha_to_one': False}, {}),
  'sd15_ddim_eta': (
    'DDIMScheduler', LEADING | {'clip_sample': False, 'set_alpha_to_one': False}, {'eta': 0.7},
  ),
  'sd15_ddpm': ('DDPMScheduler', LEADING | {'clip_sample': False}, {}),
  'sd15_dpm': ('DPMSolverMultistepScheduler', LEADING, {}),
  'sd15_karras': ('DPMSolverMultistepScheduler', LEADING | {'use_karras_sigmas': True}, {}),
  'sd15_sde': ('DPMSolverMultistepScheduler', LEADING | {'algorithm_type': 'sde-dpmsolver++'}, {}),
  'sdxl': ('EulerDiscreteScheduler', LEADING, {}),
  'sana': (
    'DPMSolverMultistepScheduler',
    {'prediction_type': 'flow_prediction', 'use_flow_sigmas': True, 'flow_shift': 3.0}, {},
  ),
}  # fmt: skip
SHAPE = (2, 3, 4, 4)
# diffusers hands torch tensors to numpy, whose version 2 warns of it
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')


def run_theirs(scheduler, kind, sample, outputs, noise, step, monkeypatch):
  """The result of every call, with our noise in place of what diffusers would draw."""
  module, drawn = importlib.import_module(type(scheduler).__module__), iter(noise)
  if hasattr(module, 'randn_tensor'):
    draw = lambda *shape, **options: torch.from_numpy(next(drawn))
    monkeypatch.setattr(module, 'randn_tensor', draw)
  # schedulers of flow matching start at noise as it is, and have no such number
  x = torch.from_numpy(sample) * getattr(scheduler, 'init_noise_sigma', 1.0)
  found = []
  for t, output in zip(scheduler.timesteps, outputs):
    scheduler.scale_model_input(x, t) if hasattr(scheduler, 'scale_model_input') else None
    x = scheduler.step(torch.from_numpy(output), t, x, **step).prev_sample
    found.append(x.numpy())
  return np.stack(found)


@pytest.mark.parametrize('steps', [4, 7, 20])
@pytest.mark.parametrize('name', RELEASES)
def test_schedulers(name, steps, monkeypatch):
  kind, init, step = RELEASES[name]
  rng = np.random.default_rng(steps)
  sample, *rest = rng.normal(size=(1 + 4 * steps, *SHAPE)).astype(np.float32)
  outputs, noise = np.stack(rest[: 2 * steps]), np.stack(rest[2 * steps :])
  scheduler = getattr(diffusers, kind)(**init)
  scheduler.set_timesteps(steps)
  # the last noise of a DDPM is not drawn where its level is 0
  want = run_theirs(scheduler, kind, sample, outputs, noise, step, monkeypatch)
  given = {'cls': kind, 'init': init, 'set_timesteps': {'num_inference_steps': steps}, 'step': step}
  inputs = {'sample': sample, 'model_outputs': outputs, 'noise': noise}
  have = replay.replay_outputs({'schedulers': {'a': given}}, None, inputs)
  told = scheduler.timesteps.numpy()
  np.testing.assert_allclose(have['a_timesteps'], told, atol=2e-4)
  size = max(1.0, float(np.abs(want).max()))
  np.testing.assert_allclose(have['a_samples'], want, atol=1e-5 * size)


def test_levels_of_training():
  """The variance-preserving levels and the one with noise alone at its end."""
  for zero in (False, True):
    theirs = diffusers.DDIMScheduler(**LEVELS, rescale_betas_zero_snr=zero)
    ours = replay.schedules.TrainedLevels(zero_snr=zero)
    np.testing.assert_allclose(ours.alphas_squared, theirs.alphas_cumprod.numpy(), atol=2e-6)
    assert jnp.all(ours.timestep_at(ours.times.astype(np.float32)) == np.arange(1000))
