"""Schedules: the times that a sampler visits, computed on the host.

A schedule is a float32 array `[steps + 1]` of times of a path (`paths`), from noise to data. On the
linear path a time is 1 - sigma of the flow-matching papers. A DDPM model was trained at 1000 noise
levels; each is the time of the variance-preserving path that has its ratio of data to noise
(`TrainedLevels.times`), and `timestep_at` tells the network its number. All agree with diffusers'
schedulers (golden file `schedulers`, see `replay`). What a release takes:

  SiT           linear       velocity    even_times                 Heun, or the SDE
  SD3, SD3.5    linear       - velocity  sd3_times                  Euler
  FLUX.1        linear       - velocity  flux_times, shifted_times  Euler
  SD1.5         VP           noise       ddim_times, ddpm_times     Ancestral, of order 2 for DPM++
  SDXL          VP or EDM    noise       ddpm_times                 Euler
  Sana          linear       - velocity  sana_times                 Ancestral of order 2
  Sana Sprint   VP           angle       sprint_times               Euler with eta = 1

Letters: S steps, L levels of training.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import paths

SPACINGS = ('leading', 'trailing', 'linspace')
SPRINT = (1.57080, 1.3)  # angles of Sana Sprint's two steps
KARRAS_RHO = 7.0  # exponent of Karras et al. 2022, equation 5


# -------------------------------------------------------------------------------- the linear path


def even_times(steps: int) -> np.ndarray:
  """Equal steps: SiT."""
  return np.arange(steps + 1, dtype=np.float32) / np.float32(steps)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """Moves steps towards the noise, as larger pictures need (Esser et al. 2024, 2403.03206)."""
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def sd3_times(steps: int, shift: float = 3.0, levels: int = 1000) -> np.ndarray:
  """Stable Diffusion 3 and 3.5 (shift 3), and every other user of diffusers' FlowMatchEuler that
  gives it a number of steps.

  The shift is applied twice: diffusers spaces the steps between the ends of its training levels,
  which are shifted already, and shifts the result again. So the last step starts above 1 / levels.
  """
  last = shift_sigmas(np.float64(1 / levels), shift)
  return flow_times(shift_sigmas(np.linspace(1, last, steps), shift))


def flux_times(
  steps: int, tokens: int, ends: tuple = ((256, 0.5), (4096, 1.15))
) -> np.ndarray:
  """FLUX.1 dev: the shift grows with the picture. `ends` are two pairs of tokens and log shift."""
  (few, low), (many, high) = ends
  mu = low + (high - low) * (tokens - few) / (many - few)
  return shifted_times(steps, np.exp(mu))


def shifted_times(steps: int, shift: float = 1.0) -> np.ndarray:
  """sigma = 1, 1 - 1/S ... 1/S shifted once; FLUX.1 schnell with shift 1."""
  return flow_times(shift_sigmas(np.linspace(1, 1 / steps, steps), shift))


def sana_times(steps: int, shift: float = 3.0, levels: int = 1000) -> np.ndarray:
  """Sana with DPM-Solver++: S of S + 1 points between 1 - 1/1000 and 0, shifted. Its network is
  told `floor_timestep`."""
  # of S + 1 points the last is dropped, so that the first is .9997 and not 1 after the shift
  return flow_times(shift_sigmas(1 - np.linspace(1, 1 / levels, steps + 1)[::-1], shift)[:-1])


def floor_timestep(t: jax.Array, levels: int = 1000) -> jax.Array:
  """The whole number below 1000 sigma, which DPM-Solver++ gives a flow network; float32."""
  # half a unit of the last place: a sigma that stands for .75 must give 750
  return jnp.floor((1 - t) * levels + 1e-4)


def flow_times(sigmas: np.ndarray) -> np.ndarray:
  """Steps that start at these sigmas of the linear path; the last one ends at the data."""
  # subtracted in float64, so that a sigma near 0 keeps its digits
  return np.append(1 - np.asarray(sigmas, np.float64), 1).astype(np.float32)


# ------------------------------------------------------------------------ DDPM's levels of training


@dataclasses.dataclass(frozen=True)
class TrainedLevels:
  """The noise levels of a DDPM; the defaults are those of Stable Diffusion 1.5 and SDXL.

  Attributes:
    beta_start, beta_end: the variance that the first and the last level add.
    levels: L.
    roots_linear: whether the square roots of the betas grow linearly ('scaled_linear'), or the
      betas themselves ('linear').
    zero_snr: rescaled so that the last level is noise alone (Lin et al. 2023, 2305.08891).
  """

  beta_start: float = 0.00085
  beta_end: float = 0.012
  levels: int = 1000
  roots_linear: bool = True
  zero_snr: bool = False

  @functools.cached_property
  def alphas_squared(self) -> np.ndarray:
    """alpha^2 of each level, `[L]` float64 ('alphas_cumprod')."""
    power = 2 if self.roots_linear else 1
    ends = np.float64([self.beta_start, self.beta_end]) ** (1 / power)
    # rounded to float32 where the reference holds float32, so that the product agrees to 1e-7
    betas = np.linspace(*ends, self.levels).astype(np.float32) ** power
    found = np.cumprod(1 - betas, dtype=np.float64)
    if self.zero_snr:
      # the square roots are moved and stretched: the last becomes 0, the first stays
      root = np.sqrt(found)
      root = (root - root[-1]) * root[0] / (root[0] - root[-1])
      found = root**2
    return found

  @functools.cached_property
  def times(self) -> np.ndarray:
    """The time of each level on the variance-preserving path, `[L]` float64, falling."""
    return time_of_ratio(np.sqrt(1 - self.alphas_squared), np.sqrt(self.alphas_squared))

  def timestep_at(self, t: jax.Array, whole: bool = True) -> jax.Array:
    """The number of the level at time t, float32; between two levels `whole` takes the nearer in
    log sigma and False interpolates linearly there."""
    # over log(sigma / alpha); the ends are clipped, also where noise alone makes it infinite
    alpha, sigma = paths.VariancePreservingPath().alpha_sigma(jnp.asarray(t))
    known = np.log(np.tan((1 - self.times) * np.pi / 2))
    numbers = np.arange(self.levels, dtype=np.float32)
    found = jnp.interp(jnp.log(sigma) - jnp.log(alpha), known, numbers)
    return jnp.round(found) if whole else found


def time_of_ratio(sigma, alpha=1.0) -> np.ndarray:
  """The time at which noise and data have the ratio sigma / alpha, float64."""
  return np.arctan2(alpha, sigma) * 2 / np.pi


def spaced_levels(
  levels: int, steps: int, spacing: str, offset: int = 0, multistep: bool = False
) -> np.ndarray:
  """The levels at which the network is called, `[S]`, falling.

  Args:
    spacing: one of `SPACINGS` (Lin et al. 2023, table 2).
    offset: added to 'leading' levels; 1 in Stable Diffusion.
    multistep: as DPM-Solver++ spaces them: S of S + 1 points, the last one dropped.

  Raises:
    ConfigError: an unknown spacing, or more steps than levels.
  """
  if spacing not in SPACINGS:
    raise ConfigError(f'spacing={spacing!r}: must be one of {", ".join(SPACINGS)}')
  points = steps + multistep
  if not 1 <= steps <= levels or points > levels:
    raise ConfigError(f'steps={steps}: must be in 1 .. {levels - multistep}')
  if spacing == 'leading':
    return (np.arange(points) * (levels // points))[::-1][:steps] + offset
  if spacing == 'linspace':
    return np.linspace(0, levels - 1, points).round()[::-1][:steps].astype(int)
  # np.arange would give one step too many where rounding leaves a rest
  return np.round(levels - np.arange(steps) * (levels / steps)).astype(int) - 1


def ddim_times(
  trained: TrainedLevels, steps: int, spacing: str = 'leading', offset: int = 1,
  ends_at_data: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Stable Diffusion 1.5 with DDIM: times `[S + 1]` where steps start and `[S]` where they land.

  A step lands L // S levels below its start, which is where the next one starts, except with
  'trailing' and an S that does not divide L. The last step lands at level 0, or at the data.
  """
  called = spaced_levels(trained.levels, steps, spacing, offset)
  below = called - trained.levels // steps
  end = 1.0 if ends_at_data else trained.times[0]
  landings = np.where(below >= 0, trained.times[np.maximum(below, 0)], end)
  return _to_float32(trained.times[called], landings[-1]), landings.astype(np.float32)


def ddpm_times(
  trained: TrainedLevels, steps: int, spacing: str = 'leading', offset: int = 1,
  multistep: bool = False,
) -> np.ndarray:
  """Times that end at the data: DDPM, SDXL's Euler, and with `multistep` DPM-Solver++."""
  called = spaced_levels(trained.levels, steps, spacing, offset, multistep)
  return _to_float32(trained.times[called], 1.0)


def karras_times(trained: TrainedLevels, steps: int) -> np.ndarray:
  """S steps even in (sigma / alpha)^(1/7) between the highest and the lowest level, then the data
  (Karras et al. 2022); the network is told the nearest level."""
  ratio = np.tan((1 - trained.times[[-1, 0]]) * np.pi / 2)
  sigmas = np.linspace(*(ratio ** (1 / KARRAS_RHO)), steps) ** KARRAS_RHO
  return _to_float32(time_of_ratio(sigmas), 1.0)


def sprint_times(angles: Sequence[float] = SPRINT) -> np.ndarray:
  """Sana Sprint: the angles from the data at which its network is called; two steps."""
  # the published first angle lies 4e-6 beyond the noise
  return _to_float32(1 - np.float64(angles) * 2 / np.pi, 1.0)


def _to_float32(times, end):
  return np.append(times, end).astype(np.float32)
