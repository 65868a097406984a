"""Sampling of the flow decoder: Euler steps with plain or adaptive projected guidance.

A rectified flow goes from t = 1 (noise) to t = 0 (picture): x <- x - v(x, t) / steps. Plain
guidance is of Ho & Salimans (2022, arXiv 2207.12598). Projected guidance is of Sadat et al. (2024,
arXiv 2410.02416): the guidance direction has negative momentum and a largest norm, and only its
part orthogonal to the conditional prediction is used. Checked against the golden files.

Letters: R images · H W C latents · K registers · D width.
"""

import jax
import jax.numpy as jnp

MOMENTUM = -0.5
LARGEST = 2.5  # largest norm of the direction over H, W and C
AXES = (1, 2, 3)


def plain_guidance(cond, null, scale):
  """Extrapolates from the null to the conditional velocity; all are `[R, H, W, C]`."""
  return null + scale * (cond - null)


def projected_guidance(cond, null, scale, momentum):
  """Applies projected guidance to velocities `[R, H, W, C]`, in float32.

  Returns:
    The guided velocity and the new momentum, both `[R, H, W, C]`. The momentum starts at 0 and is
    carried through the steps of an image.
  """
  cond, null = cond.astype(jnp.float32), null.astype(jnp.float32)
  momentum = cond - null + MOMENTUM * momentum
  norm = jnp.sqrt(jnp.sum(momentum**2, AXES, keepdims=True))
  direction = momentum * jnp.minimum(1, LARGEST / jnp.maximum(norm, 1e-12))
  # the part parallel to the prediction only saturates colours, so it is taken out
  along = jnp.sum(direction * cond, AXES, keepdims=True)
  along = along / jnp.maximum(jnp.sum(cond**2, AXES, keepdims=True), 1e-24)
  return cond + (scale - 1) * (direction - along * cond), momentum


def sample_latents(
  decoder, registers, noise, steps: int, guidance: float = 7.5, projected: bool = True
):
  """Samples the latents of the pictures that `registers` describe.

  Args:
    decoder: `modeling.Decoder`.
    registers: `[R, K, D]`, from `decoder.embed_registers`.
    noise: `[R, H, W, C]` standard normal, or `[1, H, W, C]` for the same noise in every row.
    steps: Euler steps; one step gives a blurred picture of what the tokens say.
    guidance: guidance scale; 1 runs the conditional pass only.
    projected: whether guidance is projected; else it is plain.

  Returns:
    `[R, H, W, C]` float32, in the scale of the VAE's scaled latents.
  """
  rows = registers.shape[0]
  # the state stays float32: many small steps in bfloat16 would not add up
  noise = jnp.broadcast_to(noise.astype(jnp.float32), (rows, *noise.shape[1:]))
  guided = guidance != 1
  # both passes run as one batch of 2 R rows: the weights are read once
  if guided:
    null = jnp.broadcast_to(decoder.null_registers(), registers.shape)
    registers = jnp.concatenate([registers, null.astype(registers.dtype)])

  def euler_step(i, carry):
    x, momentum = carry
    t = ((steps - i) / steps)[None]
    if not guided:
      v = decoder(x, t, registers)
    else:
      cond, null = jnp.split(decoder(jnp.concatenate([x, x]), t, registers), 2)
      if projected:
        v, momentum = projected_guidance(cond, null, guidance, momentum)
      else:
        v = plain_guidance(cond, null, guidance)
    return x - v / steps, momentum

  momentum = jnp.zeros_like(noise) if guided and projected else ()
  return jax.lax.fori_loop(0, steps, euler_step, (noise, momentum))[0]
