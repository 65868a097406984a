"""Sampling of the flow decoder: Euler steps, classifier-free guidance, adaptive projected guidance.

Rectified flow from t = 1 (noise) to t = 0 (picture): x <- x - v(x, t) / steps. Guidance is plain
(Ho & Salimans 2022, arXiv 2207.12598) or projected (Sadat et al. 2024, arXiv 2410.02416): the
guidance direction with negative momentum, cut to a largest norm, and only its part orthogonal to
the conditional prediction. Checked against the golden files.

Letters: R images · H W C latents.
"""

import jax
import jax.numpy as jnp

MOMENTUM = -0.5
LARGEST = 2.5  # norm of the direction over H, W and C
AXES = (1, 2, 3)


def cfg(cond, null, scale):
  """Plain guidance; `[R, H, W, C]` each."""
  return null + scale * (cond - null)


def apg(cond, null, scale, momentum):
  """Projected guidance; returns the guided velocity and the new momentum, `[R, H, W, C]` each.

  The momentum starts at 0 and lives through the steps of one image. float32 throughout.
  """
  cond, null = cond.astype(jnp.float32), null.astype(jnp.float32)
  momentum = cond - null + MOMENTUM * momentum
  norm = jnp.sqrt(jnp.sum(momentum**2, AXES, keepdims=True))
  direction = momentum * jnp.minimum(1, LARGEST / jnp.maximum(norm, 1e-12))
  along = jnp.sum(direction * cond, AXES, keepdims=True)
  along = along / jnp.maximum(jnp.sum(cond**2, AXES, keepdims=True), 1e-24)
  return cond + (scale - 1) * (direction - along * cond), momentum


def sample(decoder, registers, noise, steps: int, guidance: float = 7.5, projected: bool = True):
  """Latents of the pictures that `registers` describe.

  Args:
    decoder: `modeling.Decoder`.
    registers: `[R, K, D]`, from `decoder.condition`.
    noise: `[R, H, W, C]` standard normal, or `[1, H, W, C]` for the same noise in every row.
    steps: Euler steps. One is a legitimate, blurred look at what the tokens say.
    guidance: scale; 1 runs the conditional pass only.
    projected: APG, else plain guidance.

  Returns:
    `[R, H, W, C]` float32, in the scale of the VAE's scaled latents.
  """
  rows = registers.shape[0]
  noise = jnp.broadcast_to(noise.astype(jnp.float32), (rows, *noise.shape[1:]))
  guided = guidance != 1
  if guided:
    null = jnp.broadcast_to(decoder.null(), registers.shape)
    registers = jnp.concatenate([registers, null.astype(registers.dtype)])

  def step(i, carry):
    x, momentum = carry
    t = ((steps - i) / steps)[None]
    if not guided:
      v = decoder(x, t, registers)
    else:
      cond, null = jnp.split(decoder(jnp.concatenate([x, x]), t, registers), 2)
      if projected:
        v, momentum = apg(cond, null, guidance, momentum)
      else:
        v = cfg(cond, null, guidance)
    return x - v / steps, momentum

  momentum = jnp.zeros_like(noise) if guided and projected else ()
  return jax.lax.fori_loop(0, steps, step, (noise, momentum))[0]
