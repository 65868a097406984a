"""Layers of the scene models: RMS norm, MLP, and token-major mixers.

The mixers (Tolstikhin et al., MLP-Mixer, 2021) keep tokens on the leading axis: with `[T, R, D]`,
token mixing and channel mixing are plain two-dimensional matrix products, which CPUs run fast. The
activation is relu, because the backward pass of gelu costs twice as much.

Letters: T tokens · R rows (images) · D width · H W image.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def learned_array(rngs, *shape, scale=0.02):
  """A learned array `shape`, normal with standard deviation `scale`."""
  return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


class RMSNorm(nnx.Module):
  """Root mean square norm over the last axis, with a learned scale."""

  def __init__(self, width):
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x):  # [..., D]
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * self.scale[...]


class MLP(nnx.Module):
  """Two linear layers with a relu between them."""

  def __init__(self, inner, hidden, outer, *, rngs):
    self.up = nnx.Linear(inner, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, outer, rngs=rngs)

  def __call__(self, x):  # [..., inner] -> [..., outer]
    return self.down(jax.nn.relu(self.up(x)))


class Mixer(nnx.Module):
  """Token mixing T -> hidden -> T, then channel MLP, both residual."""

  def __init__(self, tokens, hidden, width, *, expand=2, rngs):
    self.norm_tokens, self.norm_channels = RMSNorm(width), RMSNorm(width)
    self.up = learned_array(rngs, hidden, tokens, scale=tokens**-0.5)
    self.down = learned_array(rngs, tokens, hidden, scale=0.5 * hidden**-0.5)
    self.mlp = MLP(width, expand * width, width, rngs=rngs)

  def __call__(self, x, gain=None):  # [T, R, D], gain: (scale, shift) [R, D] of the channel half
    h = self.norm_tokens(x)
    # plain matrices run at 1.5 x the speed of the einsums on a CPU
    h = h.reshape(x.shape[0], -1)
    x = x + (self.down[...] @ jax.nn.relu(self.up[...] @ h)).reshape(x.shape)
    h = self.norm_channels(x)
    if gain is not None:
      # the condition scales and shifts channels; at gain 0 it changes nothing
      h = h * (1 + gain[0]) + gain[1]
    return x + self.mlp(h.reshape(-1, x.shape[-1])).reshape(x.shape)


class Near(nnx.Module):
  """A 3 x 3 convolution over a square grid of cells as one product, `[T, R, D]` to `[T, R, E]`.

  All cells share the weights, so a shape is learned once and not once per place.
  """

  def __init__(self, inner, outer, *, rngs):
    self.mix = nnx.Linear(9 * inner, outer, rngs=rngs)

  def __call__(self, x):
    T, R, D = x.shape
    side = round(T**0.5)
    x = jnp.pad(x.reshape(side, side, R, D), ((1, 1), (1, 1), (0, 0), (0, 0)))
    # nine shifted copies side by side: one matrix product instead of a convolution
    around = [x[i:i + side, j:j + side] for i in range(3) for j in range(3)]
    return self.mix(jnp.concatenate(around, -1).reshape(T * R, 9 * D)).reshape(T, R, -1)


def split_patches(images, height, width):
  """Images `[R, H, W, 3]` to patches `[T, R, height * width * 3]`, in raster order."""
  r, h, w, c = images.shape
  x = images.reshape(r, h // height, height, w // width, width, c)
  return x.transpose(1, 3, 0, 2, 4, 5).reshape(-1, r, height * width * c)


def join_patches(x, height, width, size):
  """Inverse of `split_patches`: `[T, R, height * width * 3]` to `[R, size, size, 3]`."""
  r = x.shape[1]
  x = x.reshape(size // height, size // width, r, height, width, 3)
  return x.transpose(2, 0, 3, 1, 4, 5).reshape(r, size, size, 3)
