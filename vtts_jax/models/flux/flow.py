"""Sampling with FLUX: the shifted times and Euler steps.

Rectified flow from t = 1 (noise) to t = 0 (picture): x <- x + (t_next - t) v(x, t). The times of
[dev] are shifted towards noise, the more the more patches a picture has; those of [schnell] are
even. Guidance is an input of the network, so a step is one pass. Checked against the golden files.

Letters: R rows · H W C latents · P patches.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

SHIFTS = (256, 0.5), (4096, 1.15)  # patches and the shift at them; a straight line between and past


def time_shift(patches: int) -> float:
  """The shift for a picture of P patches, an exponent."""
  (p0, s0), (p1, s1) = SHIFTS
  return s0 + (s1 - s0) * (patches - p0) / (p1 - p0)


def sampling_times(steps: int, patches: int, shifted: bool = True) -> np.ndarray:
  """Times `[steps + 1]` float32 from 1 to 0."""
  t = np.linspace(1, 0, steps + 1)
  if shifted:
    # e / (e + 1 / t - 1), multiplied out so that t = 0 divides by no zero
    e = math.exp(time_shift(patches))
    t = e * t / (e * t + 1 - t)
  return t.astype(np.float32)


def sample_latents(model, noise, text, pooled, times, guidance=None):
  """Latents of the pictures that the prompts describe.

  Args:
    model: `modeling.Flux`.
    noise: `[R, H, W, C]` standard normal.
    text: T5 states `[R, S, E]`.
    pooled: CLIP's pooled text `[R, V]`.
    times: `[steps + 1]`, from `sampling_times`.
    guidance: as in `modeling.Flux`; None where the model has none.

  Returns:
    `[R, H, W, C]` float32, as the autoencoder's `unscale_latents` takes them.
  """
  times = jnp.asarray(times)  # an index that is traced needs an array

  def step(i, x):
    t, after = times[i], times[i + 1]
    # one time for all rows: the network embeds it once
    return x + (after - t) * model(x, t[None], text, pooled, guidance)

  return jax.lax.fori_loop(0, len(times) - 1, step, noise.astype(jnp.float32))
