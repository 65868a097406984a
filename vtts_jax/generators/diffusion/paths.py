"""Gaussian paths between noise and data: x_t = alpha(t) data + sigma(t) noise.

Time runs from 0 (noise) to 1 (data: alpha = 1, sigma = 0); a family that counts the other way
converts its time where it calls its network. A network's output at (x, t) determines both the data
and the noise that it predicts (`guidance`); a step mixes them again at another time (`steppers`);
which times are visited is the schedule's matter (`schedules`). A discrete DDPM schedule is no path
of its own: it is a list of times on the variance-preserving path. Lipman et al. 2022 (arXiv
2210.02747); Ma et al. 2024 (SiT, 2401.08740), section 2; Karras et al. 2022 (EDM, 2206.00364).
Times have axes that broadcast against x: `[..., 1, 1, 1]`.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LinearPath:
  """alpha = t, sigma = 1 - t: rectified flow; the velocity is data - noise."""

  def alpha_sigma(self, t):
    """The weights (alpha, sigma) of data and noise at t."""
    return t, 1 - t

  def alpha_sigma_slopes(self, t):
    """Their derivatives with respect to t."""
    return jnp.ones_like(t), -jnp.ones_like(t)

  def time_at(self, alpha, sigma):
    """The time at which data and noise have the ratio of these weights."""
    return alpha / (alpha + sigma)


@dataclasses.dataclass(frozen=True)
class VariancePreservingPath:
  """alpha = sin(pi t / 2), sigma = cos(pi t / 2): x_t keeps the variance of data with
  variance 1. SiT calls it GVP and Sana TrigFlow; DDPM's x lie on it, too."""

  def alpha_sigma(self, t):
    # the cosine as a sine, because float32 has cos(pi / 2) = -4e-8: sigma is exactly 0 at the data
    return jnp.sin(t * jnp.pi / 2), jnp.sin((1 - t) * jnp.pi / 2)

  def alpha_sigma_slopes(self, t):
    alpha, sigma = self.alpha_sigma(t)
    return sigma * jnp.pi / 2, -alpha * jnp.pi / 2

  def time_at(self, alpha, sigma):
    return jnp.arctan2(alpha, sigma) * 2 / jnp.pi


@dataclasses.dataclass(frozen=True)
class EDMPath:
  """alpha = 1, sigma = cot(pi t / 2): the variance-preserving x divided by its alpha, so that one
  list of times serves both. sigma has no bound at t = 0, so times must start above 0."""

  def alpha_sigma(self, t):
    # the tangent of what is left to 1 is exactly 0 at the data
    return jnp.ones_like(t), jnp.tan((1 - t) * jnp.pi / 2)

  def alpha_sigma_slopes(self, t):
    _, sigma = self.alpha_sigma(t)
    return jnp.zeros_like(t), -(1 + sigma**2) * jnp.pi / 2

  def time_at(self, alpha, sigma):
    return jnp.arctan2(alpha, sigma) * 2 / jnp.pi


def mix_noise(path, data: jax.Array, noise: jax.Array, t) -> jax.Array:
  """The point x_t on the path between this noise and these data."""
  alpha, sigma = path.alpha_sigma(t)
  return alpha * data + sigma * noise


def change_path(x: jax.Array, t, path, other) -> tuple[jax.Array, jax.Array]:
  """The point of `other` that holds the same mix as x at t of `path`, and its time."""
  alpha, sigma = path.alpha_sigma(t)
  there = other.time_at(alpha, sigma)
  alpha_there, sigma_there = other.alpha_sigma(there)
  # both weights change by one factor; their sum is 0 nowhere
  return x * (alpha_there + sigma_there) / (alpha + sigma), there


def return_to(path, x: jax.Array, t, earlier, fresh: jax.Array) -> jax.Array:
  """Takes x_t back to the time `earlier` <= t, using fresh standard normal noise.

  This is the forward transition of the path: it scales x_t until its data weigh alpha(earlier) and
  adds the noise that is then missing. For any data inside x_t the result has the marginal of
  `earlier`: mean alpha(earlier) data, variance sigma(earlier)^2. A point at t = 0 stays as it is.
  """
  alpha, sigma = path.alpha_sigma(t)
  alpha_back, sigma_back = path.alpha_sigma(earlier)
  # the inner `where` keeps 0 / 0 out of the gradient at t = 0
  share = jnp.where(alpha > 0, alpha_back / jnp.where(alpha > 0, alpha, 1), 1)
  # rounding may push the difference slightly below 0
  missing = jnp.maximum(sigma_back**2 - (share * sigma) ** 2, 0)
  return share * x + jnp.sqrt(missing) * fresh
