"""Predictors read a network's output; guidance joins the outputs with and without the prompt.

A predictor converts the output at (x, t) into a pair (data, noise); `paths` defines the two. A
distilled model (FLUX dev, Sana Sprint) takes its scale as an input: its generator has one stream
and no rule here.
Letters: B prompts, N candidates, C streams.
"""

import dataclasses

import jax
import jax.numpy as jnp

# -------------------------------------------------------------------------------------- predictors


@dataclasses.dataclass(frozen=True)
class VelocityPredictor:
  """The output is the velocity dx/dt = alpha' data + sigma' noise (flow matching, SiT, FLUX)."""

  def split_output(self, path, x: jax.Array, t, output: jax.Array):
    """The pair (data, noise) that the output implies, both shaped like x."""
    # x and the velocity are two linear equations in data and noise: Cramer's rule solves them
    alpha, sigma = path.alpha_sigma(t)
    d_alpha, d_sigma = path.alpha_sigma_slopes(t)
    determinant = alpha * d_sigma - d_alpha * sigma
    data = (d_sigma * x - sigma * output) / determinant
    return data, (alpha * output - d_alpha * x) / determinant


@dataclasses.dataclass(frozen=True)
class NoisePredictor:
  """The output is the noise (DDPM). At t = 0 alpha is 0 and the data are undefined, so the times of
  such a generator must start above 0."""

  def split_output(self, path, x: jax.Array, t, output: jax.Array):
    alpha, sigma = path.alpha_sigma(t)
    return (x - sigma * output) / alpha, output


@dataclasses.dataclass(frozen=True)
class DataPredictor:
  """The output is the data (x0 in the papers). At t = 1 sigma is 0 and the noise is undefined; no
  step starts there."""

  def split_output(self, path, x: jax.Array, t, output: jax.Array):
    alpha, sigma = path.alpha_sigma(t)
    return output, (x - alpha * output) / sigma


@dataclasses.dataclass(frozen=True)
class AnglePredictor:
  """The output is v = alpha noise - sigma data of a variance-preserving path (Salimans & Ho 2022,
  arXiv 2202.00512; 'v_prediction', 'trigflow'). Defined at every t."""

  def split_output(self, path, x: jax.Array, t, output: jax.Array):
    alpha, sigma = path.alpha_sigma(t)
    return alpha * x - sigma * output, sigma * x + alpha * output


# ---------------------------------------------------------------------------------------- guidance


@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance:
  """Extrapolates from the unconditional output: null + scale (prompt - null). Ho & Salimans 2022,
  arXiv 2207.12598. A single stream passes unchanged.

  Attributes:
    interval: times (from, until) at which the scale holds; it is 1 at others (Kynkaanniemi et al.
      2024, 2404.07724).
    channels: the first channels that are guided, 0 for all; the others are those of the prompt.
  """

  scale: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  channels: int = 0

  momentum = 0.0  # no memory of earlier steps

  def combine_streams(self, outputs: jax.Array, t=0.0, memory=()) -> tuple[jax.Array, tuple]:
    """Joins the streams.

    Args:
      outputs: by stream, `[B, C, N, ...]`.
      t: times that broadcast against `[B, N, ...]`.
      memory: what the rule returned at the step before; () if it has no `momentum`.

    Returns:
      The guided output `[B, N, ...]` and the new memory.
    """
    if outputs.shape[1] == 1:
      return outputs[:, 0], memory
    prompt, null = outputs[:, 0], outputs[:, 1]
    # a scale of 1 outside the interval is the prompt's output; both streams run all the same
    scale = self.scale
    if self.interval != (0.0, 1.0):
      start, end = self.interval
      scale = jnp.where((t >= start) & (t <= end), scale, 1.0)
    guided = null + scale * (prompt - null)
    if self.channels:
      guided = jnp.where(jnp.arange(guided.shape[-1]) < self.channels, guided, prompt)
    return guided, memory


@dataclasses.dataclass(frozen=True)
class ProjectedGuidance:
  """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416): the difference of the
  streams with negative momentum, cut to a largest norm; of the part along the prompt's output,
  which oversaturates, only the share `parallel` is kept.

  Attributes:
    largest: norm of the difference of one sample, 0 for no limit.
  """

  scale: float = 1.0
  parallel: float = 0.0
  largest: float = 0.0
  momentum: float = -0.5

  def combine_streams(self, outputs: jax.Array, t=0.0, memory=()) -> tuple[jax.Array, jax.Array]:
    """As `ClassifierFreeGuidance.combine_streams`; the memory starts as zeros `[B, N, ...]`."""
    if outputs.shape[1] == 1:
      return outputs[:, 0], memory
    # small differences of large numbers, so float32 whatever the network computes in
    prompt, null = (outputs[:, c].astype(jnp.float32) for c in (0, 1))
    axes = tuple(range(2, prompt.ndim))
    dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    difference = prompt - null
    # each difference also pushes against what the last ones have moved already
    if self.momentum:
      difference = memory = difference + self.momentum * memory
    if self.largest:
      norm = jnp.sqrt(dot(difference, difference))
      difference = difference * jnp.minimum(1, self.largest / jnp.maximum(norm, 1e-12))
    along = dot(difference, prompt) / jnp.maximum(dot(prompt, prompt), 1e-24) * prompt
    return prompt + (self.scale - 1) * (difference - (1 - self.parallel) * along), memory
