"""What a network's output means, and how outputs with and without the prompt become one.

Predictors turn the output at (x, t) into the data and the noise that it stands for, see `paths`.
Letters: B prompts, N candidates, C streams.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class VelocityPredictor:
  """The output is the velocity dx/dt = alpha' data + sigma' noise (flow matching, SiT, FLUX)."""

  def split(self, path, x: jax.Array, t, output: jax.Array):
    """(data, noise): two linear equations in two unknowns, x and the velocity."""
    alpha, sigma = path.coefficients(t)
    d_alpha, d_sigma = path.derivatives(t)
    determinant = alpha * d_sigma - d_alpha * sigma
    data = (d_sigma * x - sigma * output) / determinant
    return data, (alpha * output - d_alpha * x) / determinant


@dataclasses.dataclass(frozen=True)
class NoisePredictor:
  """The output is the noise (DDPM). It says nothing of the data at t = 0, where alpha is 0: the
  times of such a generator start above."""

  def split(self, path, x: jax.Array, t, output: jax.Array):
    alpha, sigma = path.coefficients(t)
    return (x - sigma * output) / alpha, output


@dataclasses.dataclass(frozen=True)
class DataPredictor:
  """The output is the data, x0 in the papers; not for t = 1, where sigma is 0 and nothing is left
  to do."""

  def split(self, path, x: jax.Array, t, output: jax.Array):
    alpha, sigma = path.coefficients(t)
    return output, (x - alpha * output) / sigma


@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance:
  """null + scale (prompt - null) of outputs (Ho & Salimans 2022, arXiv 2207.12598); a single stream
  is as it is."""

  scale: float = 1.0

  def combine(self, outputs: jax.Array) -> jax.Array:
    """Outputs by stream `[B, C, N, ...]` to `[B, N, ...]`."""
    if outputs.shape[1] == 1:
      return outputs[:, 0]
    prompt, null = outputs[:, 0], outputs[:, 1]
    return null + self.scale * (prompt - null)
