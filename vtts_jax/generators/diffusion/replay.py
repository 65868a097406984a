"""Golden files of the family `schedulers`: diffusers' schedulers, from our paths and steppers.

Every scheduler of the file starts from one sample; call i of the network returns `model_outputs[i]`
whatever it is asked, and step i draws `noise[i]`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import guidance, paths, schedules, steppers

PREDICTORS = {
  'epsilon': guidance.NoisePredictor(),
  'sample': guidance.DataPredictor(),
  'v_prediction': guidance.AnglePredictor(),
  'trigflow': guidance.AnglePredictor(),
}


@dataclasses.dataclass(frozen=True)
class _FlowPredictor:
  """diffusers' flow networks predict noise - data."""

  def split_output(self, path, x, t, output):
    return guidance.VelocityPredictor().split_output(path, x, t, -output)


LINEAR, FLOW = paths.LinearPath(), _FlowPredictor()


@dataclasses.dataclass(frozen=True)
class _Setup:
  """A scheduler in our parts; `told` are the timesteps that the network sees, `scale` what the
  sample and the noise are multiplied by, `unit` what x is in units of."""

  stepper: Any
  times: np.ndarray
  told: np.ndarray
  path: Any = LINEAR
  predictor: Any = FLOW
  landings: np.ndarray | None = None
  scale: float = 1.0
  unit: float = 1.0


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{output name: array} of one golden file; arguments as `testing.replay` passes them."""
  del source  # there are no weights
  found = {}
  for name, given in config['schedulers'].items():
    kind = given['cls']
    if kind not in _SETUPS:
      raise ConfigError(f'scheduler {kind!r}: allowed are {", ".join(_SETUPS)}')
    setup = _SETUPS[kind](given['init'], given['set_timesteps'], given.get('step', {}))
    found |= {f'{name}_{key}': value for key, value in _run_setup(kind, setup, inputs).items()}
  return found


def _run_setup(kind, setup, inputs):
  """Everything that the file may hold of one scheduler."""
  times, path, told = setup.times, setup.path, setup.told
  landings = times[1:] if setup.landings is None else setup.landings
  x = jnp.asarray(inputs['sample']) * setup.scale / setup.unit
  outputs, before, asked, samples, denoised = iter(inputs['model_outputs']), None, [], [], []

  def split(x, t):
    asked.append(x)
    return setup.predictor.split_output(path, x, t, jnp.asarray(next(outputs)) / setup.unit)

  for i, after in enumerate(landings):
    fresh = jnp.asarray(inputs['noise'][i]) if setup.stepper.is_stochastic else None
    before = before or steppers.Before(jnp.zeros_like(x), jnp.float32(-1))
    first = len(asked)
    t = jnp.float32(times[i])
    x, data = setup.stepper.take_step(split, path, x, t, jnp.float32(after), fresh, before)
    before = steppers.Before(data, t)
    # diffusers' Heun counts its two calls as two steps: the first ends where the second one asks
    samples += [*asked[first + 1 :], x]
    denoised.append(data)
  if isinstance(setup.stepper, steppers.HeunStepper):
    samples.pop(-2)  # the last step is Euler's, and our second call there has no effect
  alpha, sigma = (np.asarray(a) for a in paths.VariancePreservingPath().alpha_sigma(times))
  sigmas = 1 - times if isinstance(path, paths.LinearPath) else sigma / np.maximum(alpha, 1e-20)
  repeats = 2 if isinstance(setup.stepper, steppers.HeunStepper) else 1
  told = np.repeat(told, repeats)[repeats - 1 :]
  sigmas = np.append(np.repeat(sigmas[:-1], repeats)[repeats - 1 :], sigmas[-1])
  stack = lambda rows: np.stack([np.asarray(row) * setup.unit for row in rows])
  found = {'timesteps': told, 'sigmas': sigmas}
  found |= {'samples': stack(samples), 'denoised': stack(denoised)}
  if kind == 'EulerDiscreteScheduler':
    found['init_noise_sigma'] = np.asarray(setup.scale)
    found['model_inputs'] = np.stack([np.asarray(x) * a for x, a in zip(asked, alpha)])
  return found


# ----------------------------------------------------------------- diffusers' settings in our words


def _trained_levels(init):
  kind = init.get('beta_schedule', 'linear')
  if kind not in ('linear', 'scaled_linear'):
    raise ConfigError(f'beta_schedule={kind!r}: allowed are linear, scaled_linear')
  return schedules.TrainedLevels(
    init.get('beta_start', 1e-4), init.get('beta_end', 0.02), init.get('num_train_timesteps', 1000),
    kind == 'scaled_linear', init.get('rescale_betas_zero_snr', False),
  )  # fmt: skip


def _diffusion_setup(init, stepper, times, whole=True, **more):
  """A scheduler of a DDPM, whose network is told the number of a level."""
  told = np.asarray(_trained_levels(init).timestep_at(times[:-1], whole))
  path = more.pop('path', paths.VariancePreservingPath())
  predictor = PREDICTORS[init.get('prediction_type', 'epsilon')]
  told = told.astype(np.int64) if whole else told
  return _Setup(stepper, times, told, path, predictor, **more)


def _setup_flow(init, given, step, stepper=None):
  shift = init.get('shift', 1.0)
  if 'sigmas' in given:
    if init.get('use_dynamic_shifting'):
      exponential = init.get('time_shift_type', 'exponential') == 'exponential'
      shift = np.exp(given['mu']) if exponential else given['mu']
    times = schedules.flow_times(schedules.shift_sigmas(np.float64(given['sigmas']), shift))
  else:
    times = schedules.sd3_times(given['num_inference_steps'], shift)
  return _Setup(stepper or steppers.EulerStepper(), times, (1 - times[:-1]) * 1000)


def _setup_flow_heun(init, given, step):
  return _setup_flow(init, given, step, steppers.HeunStepper())


def _setup_ddim(init, given, step):
  times, landings = schedules.ddim_times(
    _trained_levels(init), given['num_inference_steps'], init.get('timestep_spacing', 'leading'),
    init.get('steps_offset', 0), init.get('set_alpha_to_one', True),
  )  # fmt: skip
  stepper = steppers.AncestralStepper(step.get('eta', 0.0))
  return _diffusion_setup(init, stepper, times, landings=landings)


def _setup_ddpm(init, given, step):
  times = _times_to_data(init, given, 'leading')
  return _diffusion_setup(init, steppers.AncestralStepper(1.0), times)


def _setup_dpm(init, given, step):
  stochastic = init.get('algorithm_type', 'dpmsolver++') == 'sde-dpmsolver++'
  stepper = steppers.AncestralStepper(float(stochastic), init.get('solver_order', 2))
  steps = given['num_inference_steps']
  if init.get('use_flow_sigmas'):
    times = schedules.sana_times(steps, init.get('flow_shift', 1.0))
    told = np.asarray(schedules.floor_timestep(times[:-1])).astype(np.int64)
    return _Setup(stepper, times, told)
  if init.get('use_karras_sigmas'):
    times = schedules.karras_times(_trained_levels(init), steps)
  else:
    times = _times_to_data(init, given, 'linspace', multistep=True)
  return _diffusion_setup(init, stepper, times)


def _setup_euler(init, given, step):
  spacing = init.get('timestep_spacing', 'linspace')
  if spacing == 'linspace':
    raise ConfigError("timestep_spacing='linspace': allowed are leading, trailing (whole levels)")
  times = _times_to_data(init, given, spacing)
  largest = np.tan((1 - times[0]) * np.pi / 2)
  # diffusers takes the largest sigma alone where the first level is the last of training
  scale = np.hypot(largest, 1) if spacing == 'leading' else largest
  return _diffusion_setup(
    init, steppers.EulerStepper(), times, whole=False, path=paths.EDMPath(), scale=float(scale)
  )


def _setup_scm(init, given, step):
  steps, first = given['num_inference_steps'], given.get('max_timesteps', schedules.SPRINT[0])
  angles = np.linspace(first, 0, steps + 1)[:-1]
  if steps == 2 and given.get('intermediate_timesteps'):
    angles = first, given['intermediate_timesteps']
  times = schedules.sprint_times(angles)
  # the scheduler's list ends with the data, at which no network is called
  return _Setup(
    steppers.EulerStepper(eta=1.0), times, (1 - times) * np.pi / 2, paths.VariancePreservingPath(),
    PREDICTORS['trigflow'], unit=init.get('sigma_data', 0.5),
  )  # fmt: skip


def _times_to_data(init, given, spacing, multistep=False):
  return schedules.ddpm_times(
    _trained_levels(init), given['num_inference_steps'], init.get('timestep_spacing', spacing),
    init.get('steps_offset', 0), multistep,
  )  # fmt: skip


_SETUPS = {
  'FlowMatchEulerDiscreteScheduler': _setup_flow,
  'FlowMatchHeunDiscreteScheduler': _setup_flow_heun,
  'DDIMScheduler': _setup_ddim,
  'DDPMScheduler': _setup_ddpm,
  'DPMSolverMultistepScheduler': _setup_dpm,
  'EulerDiscreteScheduler': _setup_euler,
  'SCMScheduler': _setup_scm,
}
