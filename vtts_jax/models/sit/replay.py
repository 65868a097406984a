"""Golden files of SiT: the network, and its samplers as `generators.diffusion` has them."""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.generators.diffusion import guidance, paths, schedules, steppers
from vtts_jax.models import modules
from vtts_jax.models.sit import convert, dopri5, modeling

GUIDED = 3  # channels; the reference guides no more of the four
LAST_STEP = 0.04  # the reference's size of the SDE's last step
TOLERANCE = 1e-5  # rtol and atol of dopri5 in the files; its defaults, 1e-3 and 1e-6, are 4e-3 off
MARUYAMA, HEUN = steppers.EulerMaruyamaStepper, steppers.HeunMaruyamaStepper
SDES = {  # output -> its stepper; norms 0.7 and 0.5 are not in the files, and no other fits
  'sde_euler_sigma_mean_traj': MARUYAMA('sigma'),
  'sde_euler_linear_none': MARUYAMA('linear', 0.7, last='sample'),
  'sde_euler_sigma_tweedie': MARUYAMA('sigma', 0.5, last='data'),
  # 'Euler' and 'Tweedie' are the same last step on the linear path
  'sde_heun_sigma_euler': HEUN('sigma', last='data'),
  'sde_euler_decreasing_mean': MARUYAMA('decreasing'),
  'sde_euler_incdec_mean': MARUYAMA('increasing-decreasing'),
}


def _channels_last(x):  # [..., C, H, W] -> [..., H, W, C]
  return jnp.moveaxis(jnp.asarray(x), -3, -1)


def _channels_first(x):
  return np.asarray(jnp.moveaxis(x, -1, -3))


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{output name: array} of one golden file; arguments as `testing.replay` passes them."""
  settings = convert.config_of(source, heads=config['num_heads'])
  params = convert.load_weights(source, settings)
  labels, steps = jnp.asarray(inputs['y'], jnp.int32), config['num_steps']
  null = jnp.full_like(labels, settings.classes)
  x, z = _channels_last(inputs['x']), _channels_last(inputs['z'])
  t = jnp.asarray(inputs['t'])
  rule = guidance.ClassifierFreeGuidance(config['cfg_scale'], channels=GUIDED)

  @jax.jit
  def velocity(x, t, labels):
    return modules.bind_module(modeling.build_model, settings, params)(x, t, labels)

  def both_velocities(x, t):  # [R, H, W, C] -> [R, 2, 1, H, W, C]
    twice = lambda a: jnp.concatenate([a, a])
    one = velocity(twice(x), twice(t), jnp.concatenate([labels, null]))
    return one.reshape(2, len(x), 1, *x.shape[1:]).swapaxes(0, 1)

  def guided_velocity(x, t):
    return rule.combine_streams(both_velocities(x, t))[0][:, 0]

  def doubled_velocity(x, t):
    """The reference's batch: the guided channels twice, the others of each stream."""
    guided, streams = guided_velocity(x, t), both_velocities(x, t)[:, :, 0]
    rest = jnp.concatenate([streams[:, 0], streams[:, 1]])[..., GUIDED:]
    return jnp.concatenate([jnp.concatenate([guided, guided])[..., :GUIDED], rest], -1)

  def run_sampler(stepper, times, guided=True, noise=None):
    """The points `[S + 1, R, H, W, C]` of a trajectory from z."""
    predictor, path, x, points = guidance.VelocityPredictor(), paths.LinearPath(), z, [z]

    def split(x, t):
      rows = jnp.broadcast_to(t, (len(x),))
      v = guided_velocity(x, rows) if guided else velocity(x, rows, labels)
      return predictor.split_output(path, x, t, v)

    for i, (start, after) in enumerate(zip(times[:-1], times[1:])):
      # the last step may draw none, and the file holds none for it
      fresh = None if noise is None else noise[i] if i < len(noise) else jnp.zeros_like(x)
      x, _ = stepper.take_step(split, path, x, jnp.float32(start), jnp.float32(after), fresh)
      points.append(x)
    return jnp.stack(points)

  v = velocity(x, t, labels)
  even = schedules.even_times(steps - 1)
  found = {
    'velocity': v,
    'velocity_null': velocity(x, t, null),
    'velocity_cfg': doubled_velocity(x, t),
    'ode_euler_traj': run_sampler(steppers.EulerStepper(), even),
    'ode_heun2_traj': run_sampler(steppers.HeunStepper(euler_at_end=False), even),
    'ode_midpoint_traj': run_sampler(steppers.MidpointStepper(), even),
    'ode_euler_nocfg': run_sampler(steppers.EulerStepper(), even, guided=False)[-1],
  }
  found['ode_dopri5_final'] = _run_dopri5(doubled_velocity, z)
  grid = np.append(np.linspace(0, 1 - LAST_STEP, steps), 1).astype(np.float32)
  noise = _channels_last(inputs['sde_noise'][:, : len(z)])  # drawn for both streams, used for one
  for name, stepper in SDES.items():
    # without a last step of its own, the reference's grid reaches 1
    points = run_sampler(stepper, even if stepper.last == 'sample' else grid, noise=noise)
    found[name] = points[1:] if name.endswith('traj') else points[-1]
  times = t[:, None, None, None]
  for name, path in (('score', paths.LinearPath()), ('gvp_score', paths.VariancePreservingPath())):
    _, noise = guidance.VelocityPredictor().split_output(path, x, times, v)
    found[name] = -noise / path.alpha_sigma(times)[1]
  found = {name: _channels_first(value) for name, value in found.items()}
  for name in ('sbdm', 'sigma'):
    strength = steppers.EulerMaruyamaStepper(name).strength(paths.LinearPath(), times)
    found[f'diffusion_{name.upper() if name == "sbdm" else name}'] = np.asarray(strength)
  return found | {'sde_time_grid': grid[:-1]}


def _run_dopri5(doubled_velocity, z):
  """The end of the reference's default sampler, whose step control sees both streams."""

  def slope(t, y):
    # both halves see the first half; the second one only counts in the size of the error
    x = y[: len(z)]
    return doubled_velocity(x, jnp.full(len(x), t, jnp.float32))

  return dopri5.solve_ode(slope, jnp.concatenate([z, z]), 0.0, 1.0, TOLERANCE, TOLERANCE)[: len(z)]
