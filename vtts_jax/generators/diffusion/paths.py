"""Gaussian paths between noise and data: x_t = alpha(t) data + sigma(t) noise.

Time runs from 0 (noise: alpha = 0, sigma = 1) to 1 (data: alpha = 1, sigma = 0); a family that
counts the other way turns its time where it calls its network. What a network says at (x, t) fixes
both the data and the noise that it believes in (`predictors`), a step puts them together again at
another time (`steppers`). Lipman et al. 2022 (arXiv 2210.02747); Ma et al. 2024 (SiT, 2401.08740),
section 2. Times broadcast against x: `[..., 1, 1, 1]`.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LinearPath:
  """alpha = t, sigma = 1 - t: rectified flow; the velocity is data - noise."""

  def coefficients(self, t):
    """(alpha, sigma) at t."""
    return t, 1 - t

  def derivatives(self, t):
    """Their derivatives by t."""
    return jnp.ones_like(t), -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class VariancePreservingPath:
  """alpha = sin(pi t / 2), sigma = cos(pi t / 2): data of variance 1 keep it on the way."""

  def coefficients(self, t):
    return jnp.sin(t * jnp.pi / 2), jnp.cos(t * jnp.pi / 2)

  def derivatives(self, t):
    alpha, sigma = self.coefficients(t)
    return sigma * jnp.pi / 2, -alpha * jnp.pi / 2


def mix(path, data: jax.Array, noise: jax.Array, t) -> jax.Array:
  """x_t of data and noise."""
  alpha, sigma = path.coefficients(t)
  return alpha * data + sigma * noise


def return_to(path, x: jax.Array, t, earlier, fresh: jax.Array) -> jax.Array:
  """x_t taken back to the time `earlier` <= t with fresh standard normal noise.

  The transition of the path itself: scaled so that the data weigh alpha(earlier), and with as much
  noise as is missing. Whatever data x_t is made of, the result has the marginal of `earlier`, mean
  alpha(earlier) data and variance sigma(earlier)^2. At t = 0 there is nothing to take back.
  """
  alpha, sigma = path.coefficients(t)
  alpha_back, sigma_back = path.coefficients(earlier)
  share = jnp.where(alpha > 0, alpha_back / jnp.where(alpha > 0, alpha, 1), 1)
  missing = jnp.maximum(sigma_back**2 - (share * sigma) ** 2, 0)
  return share * x + jnp.sqrt(missing) * fresh
