"""Steppers move a sample from one time to the next, given the predicted data and noise.

All of them step in the plane of (alpha, sigma): a step adds (alpha' - alpha) data + (sigma' -
sigma) noise. On the linear path that is the step of the ODE in time, on the variance-preserving one
DDIM, on EDM's Karras's. So a stepper knows neither schedule nor prediction type. It has

  evaluations      network calls of one step
  shares_first     whether the first of them reads x alone, not the noise: copies of x share it
  is_stochastic    whether it draws noise
  is_multistep     whether it reads the data that the step before predicted
  deterministic    the stepper without noise, for greedy sampling
  take_step        see `EulerStepper`
  transition       (mean, standard deviation, data) of a step that is Gaussian given x

Checked against diffusers' schedulers and SiT's samplers by golden files (`replay`, `models.sit`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import paths


class Before(NamedTuple):
  """What a multistep method reads of the step before.

  Attributes:
    data: the data it predicted, shaped like x.
    t: the time at which it predicted them; below 0 where no step was taken yet.
  """

  data: jax.Array
  t: jax.Array


class _GaussianStepper:
  """Takes its step from `transition`."""

  evaluations = 1
  shares_first = True
  is_multistep = False

  def take_step(
    self, split, path, x: jax.Array, t, after, fresh=None, before: Before | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """The pair (x at the time `after`, data predicted at t).

    Args:
      split: `(x, t) -> (data, noise)`; one call evaluates the network once.
      x: `[B, N, ...]`. t, after: times that broadcast against it.
      fresh: standard normal noise shaped like x, if the stepper is stochastic.
      before: the step before, if the stepper is a multistep one.
    """
    mean, deviation, data = self.transition(split, path, x, t, after, before)
    return (mean if fresh is None else mean + deviation * fresh), data


@dataclasses.dataclass(frozen=True)
class EulerStepper(_GaussianStepper):
  """Mixes the predicted data and noise again at the next time.

  On the linear path this is Euler's step of the ODE, on other paths DDIM (Song et al. 2020, arXiv
  2010.02502). `eta` replaces a share of the noise by fresh noise. With 0 the initial noise
  determines the candidate; above 0 candidates diverge during sampling, as particle methods need.
  Fresh noise has variance 1, predicted noise has less. So `eta` is a means of exploration and does
  not integrate the reverse SDE (DDIM's own sigma, that of `AncestralStepper`, shrinks as the number
  of steps grows). With eta = 1 all noise is fresh, as in consistency models (Sana Sprint's SCM).
  """

  eta: float = 0.0

  @property
  def is_stochastic(self) -> bool:
    return self.eta > 0

  @property
  def deterministic(self):
    return EulerStepper()

  def transition(self, split, path, x, t, after, before=None):
    data, noise = split(x, t)
    _, sigma = path.alpha_sigma(after)
    # square roots of shares, so that variances add up to 1
    kept = 1.0 if self.eta == 0 else (1 - self.eta**2) ** 0.5
    return paths.mix_noise(path, data, kept * noise, after), self.eta * sigma, data


@dataclasses.dataclass(frozen=True)
class AncestralStepper(_GaussianStepper):
  """The posterior of x at the next time, given x and the predicted data: DDIM with `eta`, DDPM with
  its small variance at eta = 1 (Ho et al. 2020, arXiv 2006.11239), and DPM-Solver++ (Lu et al.
  2022, 2211.01095) at order 2: 2M at eta = 0, SDE-2M at eta = 1.

  Attributes:
    eta: share of the posterior's standard deviation that is drawn.
    order: 2 extrapolates the data from those of the step before, in log(alpha / sigma).
  """

  eta: float = 0.0
  order: int = 1

  @property
  def is_stochastic(self) -> bool:
    return self.eta > 0

  @property
  def is_multistep(self) -> bool:
    return self.order == 2

  @property
  def deterministic(self):
    return dataclasses.replace(self, eta=0.0)

  def transition(self, split, path, x, t, after, before=None):
    data, noise = split(x, t)
    (alpha, sigma), (alpha_after, sigma_after) = path.alpha_sigma(t), path.alpha_sigma(after)
    # `data` are what is shown and remembered, `mixed` what the step takes
    mixed = data
    if self.is_multistep:
      mixed = data + self._slope(path, t, after, before) * (data - before.data)
      noise = noise + alpha / sigma * (data - mixed)  # x stays what it is
    if self.eta == 0:
      return paths.mix_noise(path, mixed, noise, after), 0.0, data
    # the share of the noise at `after` that x at t does not determine
    drawn = self.eta**2 * (1 - (alpha * sigma_after / (alpha_after * sigma)) ** 2)
    mean = paths.mix_noise(path, mixed, jnp.sqrt(1 - drawn) * noise, after)
    return mean, jnp.sqrt(drawn) * sigma_after, data

  def _slope(self, path, t, after, before):
    """The weight of the last difference of data: half of this step over the last one, in log(alpha
    / sigma); 0, which is order 1, without a step before and where the step ends at the data, whose
    log ratio is infinite."""
    usable = before.t >= 0
    known = jnp.where(usable, before.t, t)
    levels = []
    for time in (known, t, after):
      alpha, sigma = path.alpha_sigma(time)
      usable = usable & (sigma > 0)
      # no 0 in a logarithm, so that no gradient is NaN
      levels.append(jnp.log(alpha) - jnp.log(jnp.where(sigma > 0, sigma, 1)))
    last, step = levels[1] - levels[0], levels[2] - levels[1]
    return jnp.where(usable, 0.5 * step / jnp.where(usable, last, 1), 0)


class _SecondOrderStepper:
  """Takes a step along the data and noise that `direction` finds with two network calls."""

  evaluations = 2
  shares_first = True
  is_stochastic = is_multistep = False

  @property
  def deterministic(self):
    return self

  def take_step(self, split, path, x, t, after, fresh=None, before=None):
    """As `_GaussianStepper.take_step`; the data are where the same direction meets sigma = 0."""
    data, noise = self.direction(split, path, x, t, after)
    alpha, sigma = path.alpha_sigma(t)
    end = x + (1 - alpha) * data - sigma * noise
    return _follow(path, x, data, noise, t, after), end

  def transition(self, split, path, x, t, after, before=None):
    moved, data = self.take_step(split, path, x, t, after)
    return moved, 0.0, data


@dataclasses.dataclass(frozen=True)
class HeunStepper(_SecondOrderStepper):
  """Heun's method: the mean of the directions at both ends.

  Attributes:
    euler_at_end: the step that reaches the data is Euler's, as in diffusers and EDM, whose networks
      have not seen sigma = 0 (the second call's result is not used). SiT's is not.
  """

  euler_at_end: bool = True

  def direction(self, split, path, x, t, after):
    data, noise = split(x, t)
    at_end = (path.alpha_sigma(after)[1] <= 0) & self.euler_at_end
    # the call that is not used stays where it started, as the network may be infinite at the data
    after = jnp.where(at_end, t, after)
    second = split(_follow(path, x, data, noise, t, after), after)
    return [jnp.where(at_end, a, 0.5 * (a + b)) for a, b in zip((data, noise), second)]


@dataclasses.dataclass(frozen=True)
class MidpointStepper(_SecondOrderStepper):
  """The direction in the middle of the step's time."""

  def direction(self, split, path, x, t, after):
    middle = 0.5 * (t + after)
    return split(_follow(path, x, *split(x, t), t, middle), middle)


# the diffusion w of (path, t, norm), most by SiT's names; the SDE is
# dx = (v + w score) dt + sqrt(2 w) dW
DIFFUSIONS = {
  'sigma': lambda path, t, norm: norm * path.alpha_sigma(t)[1],
  'linear': lambda path, t, norm: norm * (1 - t),
  'decreasing': lambda path, t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
  'increasing-decreasing': lambda path, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
  # RBF's g = 3 (1 - t)^2 (Kim et al. 2025, arXiv 2503.19385)
  'quartic': lambda path, t, norm: norm * 4.5 * (1 - t) ** 4,
  'sbdm': lambda path, t, norm: norm * _sbdm_diffusion(path, t),
}


@dataclasses.dataclass(frozen=True)
class EulerMaruyamaStepper(_GaussianStepper):
  """The SDE that has the marginals of the ODE at every time, by Euler and Maruyama (Ma et al. 2024,
  SiT, arXiv 2401.08740, section 3): the score pulls back what the noise spreads.

  Attributes:
    diffusion: a name of `DIFFUSIONS`; 'sbdm' (the reverse of the forward SDE) is infinite at t = 0
      on the linear path.
    norm: factor of the diffusion; in 'decreasing' of its cosine.
    last: what the step to t = 1 takes: 'mean' of the SDE's step (SiT's default), 'data' that are
      predicted (its 'Tweedie', and on the linear path its 'Euler'), or a 'sample' as any step.
  """

  diffusion: str = 'sigma'
  norm: float = 1.0
  last: str = 'mean'

  is_stochastic = True

  def __post_init__(self):
    for name, allowed in (('diffusion', tuple(DIFFUSIONS)), ('last', ('mean', 'data', 'sample'))):
      if getattr(self, name) not in allowed:
        raise ConfigError(f'{name}={getattr(self, name)!r}: must be one of {", ".join(allowed)}')

  @property
  def deterministic(self):
    return EulerStepper()

  def strength(self, path, t):
    """w(t)."""
    return DIFFUSIONS[self.diffusion](path, t, self.norm)

  def drift(self, path, data, noise, t):
    """Velocity plus w times the score, which is - noise / sigma."""
    (_, sigma), (d_alpha, d_sigma) = path.alpha_sigma(t), path.alpha_sigma_slopes(t)
    return d_alpha * data + (d_sigma - self.strength(path, t) / sigma) * noise

  def transition(self, split, path, x, t, after, before=None):
    data, noise = split(x, t)
    # Euler's step of the drift, then noise whose variance grows with the time
    mean = x + (after - t) * self.drift(path, data, noise, t)
    deviation = jnp.sqrt(2 * self.strength(path, t) * (after - t))
    if self.last == 'sample':
      return mean, deviation, data
    at_end = path.alpha_sigma(after)[1] <= 0
    mean = jnp.where(at_end, data, mean) if self.last == 'data' else mean
    return mean, jnp.where(at_end, 0, deviation), data


@dataclasses.dataclass(frozen=True)
class HeunMaruyamaStepper(EulerMaruyamaStepper):
  """SiT's second-order SDE step: noise first, then Heun's step of the drift. Its result is not
  Gaussian, so it has no `transition`. The step to t = 1 is that of `EulerMaruyamaStepper`."""

  evaluations = 2
  shares_first = False

  def take_step(self, split, path, x, t, after, fresh=None, before=None):
    size = after - t
    at_end = (path.alpha_sigma(after)[1] <= 0) & (self.last != 'sample')
    start = x + jnp.where(at_end, 0, jnp.sqrt(2 * self.strength(path, t) * size)) * fresh
    data, noise = split(start, t)
    first = self.drift(path, data, noise, t)
    # the score is 0 / 0 at the data, where the last step is of first order
    inner = jnp.where(at_end, t, after)
    second = self.drift(path, *split(start + size * first, inner), inner)
    last = data if self.last == 'data' else start + size * first
    return jnp.where(at_end, last, start + 0.5 * size * (first + second)), data

  def transition(self, split, path, x, t, after, before=None):
    raise ConfigError('HeunMaruyamaStepper: its step is not Gaussian and has no log-probability')


def posterior_deviation(path, t, after):
  """Standard deviation of the point at `after` given the one at t and the data: the noise that a
  step of `AncestralStepper(eta=1)` draws."""
  (alpha, sigma), (alpha_after, sigma_after) = path.alpha_sigma(t), path.alpha_sigma(after)
  known = alpha * sigma_after / (alpha_after * sigma)
  return sigma_after * jnp.sqrt(jnp.maximum(1 - known**2, 0))


@dataclasses.dataclass(frozen=True)
class GlassStepper:
  """Samples the transition of a flow by an ODE inside its step (GLASS Flows, Holderrieth et al.
  2025, arXiv 2509.25170): noise as in an SDE, few steps as with an ODE.

  Given the data, x at t and at `after` have the noises' `correlation`. So x at `after` is a known
  share of x plus a rest that is `weight` data + `spread` noise: a flow of its own from fresh noise
  to that rest. x and a point of the inner flow are two noisy views of the same data; their best mix
  is one view at a later time, which the network reads. All marginals are those of the flow,
  whatever the correlation.

  Attributes:
    inner_steps: Euler steps of the inner ODE, one network call each. One step is DDPM's, with its
      correlation that of `AncestralStepper(eta=1)`.
    correlation: of the noises at t and `after`, in [0, 1): 0 forgets x, near 1 the step is the
      ODE's; the paper steers with 0.4. -1 takes the one that DDPM has.
  """

  inner_steps: int = 4
  correlation: float = 0.4

  shares_first = is_stochastic = True
  is_multistep = False

  @property
  def evaluations(self) -> int:
    return self.inner_steps

  @property
  def deterministic(self):
    return EulerStepper()

  def take_step(self, split, path, x, t, after, fresh=None, before=None):
    """As `_GaussianStepper.take_step`; the data are those that the last inner step predicted."""
    kept, weight, spread = self._rest(path, t, after)

    def level(i):
      share = i / self.inner_steps
      return share * weight, 1 - share + share * spread

    def inner_step(i, point, data, noise):
      (alpha, sigma), (alpha_after, sigma_after) = level(i), level(i + 1)
      return point + (alpha_after - alpha) * data + (sigma_after - sigma) * noise

    def later_step(carry, i):
      point, (alpha, sigma) = carry[0], level(i)
      data = self._data_of_both(split, path, x, t, point, alpha, sigma)
      return (inner_step(i, point, data, (point - alpha * data) / sigma), data), None

    # at its start the inner point is noise and says nothing: the network reads x alone
    data, _ = split(x, t)
    carry = inner_step(0, fresh, data, fresh), data
    if self.inner_steps > 1:
      carry, _ = jax.lax.scan(later_step, carry, jnp.arange(1.0, self.inner_steps))
    return kept * x + carry[0], carry[1]

  def transition(self, split, path, x, t, after, before=None):
    if self.inner_steps > 1:
      raise ConfigError(
        f'generator.inner_steps={self.inner_steps}: the step is Gaussian, and has a '
        'log-probability, with 1 only'
      )
    kept, weight, spread = self._rest(path, t, after)
    data, _ = split(x, t)
    return kept * x + weight * data, spread, data

  def _rest(self, path, t, after):
    """The share of x, and the weights of data and noise in the rest."""
    (alpha, sigma), (alpha_after, sigma_after) = path.alpha_sigma(t), path.alpha_sigma(after)
    common = self.correlation
    if common < 0:
      common = alpha * sigma_after / (alpha_after * sigma)
    kept = common * sigma_after / sigma
    return kept, alpha_after - kept * alpha, sigma_after * jnp.sqrt(1 - jnp.square(common))

  def _data_of_both(self, split, path, x, t, point, alpha, sigma):
    """The data predicted from x at t and a point that is alpha data + sigma noise."""
    alpha_x, sigma_x = path.alpha_sigma(t)
    ratio_x, ratio = alpha_x / sigma_x, alpha / sigma
    # both over their sigma have noise of variance 1; weights in proportion to their ratios keep it
    both = jnp.sqrt(ratio_x**2 + ratio**2)
    mixed = (ratio_x * x / sigma_x + ratio * point / sigma) / both
    later = path.time_at(both, jnp.ones_like(both))
    return split(path.alpha_sigma(later)[1] * mixed, later)[0]


def gaussian_log_prob(x: jax.Array, mean, deviation, axes) -> jax.Array:
  """Log-density of a step's result under its `transition`, summed over `axes`, float32; 0 where the
  step draws no noise."""
  x, mean, deviation = (jnp.asarray(a, jnp.float32) for a in (x, mean, deviation))
  drawn = deviation > 0
  scale = jnp.where(drawn, deviation, 1)
  density = -0.5 * ((x - mean) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)
  return jnp.sum(jnp.where(drawn, density, 0), axes)


def _follow(path, x, data, noise, t, after):
  """x moved along data and noise; unlike `paths.mix_noise` it keeps what they leave of x."""
  (alpha, sigma), (alpha_after, sigma_after) = path.alpha_sigma(t), path.alpha_sigma(after)
  return x + (alpha_after - alpha) * data + (sigma_after - sigma) * noise


def _sbdm_diffusion(path, t):
  """Half the squared noise of the forward SDE: sigma (sigma alpha' / alpha - sigma')."""
  (alpha, sigma), (d_alpha, d_sigma) = path.alpha_sigma(t), path.alpha_sigma_slopes(t)
  return sigma * (sigma * d_alpha / alpha - d_sigma)
