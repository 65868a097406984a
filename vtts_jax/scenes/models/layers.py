"""What the scene models share: RMS norm, MLP, and token-major mixers.

Mixers (Tolstikhin et al., MLP-Mixer, 2021) with tokens leading: `[T, R, D]` makes token mixing and
channel mixing plain two-dimensional matrix products, which is what a CPU does fast. relu, because
gelu costs twice as much backwards.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def table(rngs, *shape, scale=0.02):
  """A learned array `shape`, normal with standard deviation `scale`."""
  return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


class RMSNorm(nnx.Module):
  def __init__(self, width):
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x):  # [..., D]
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * self.scale[...]


class MLP(nnx.Module):
  def __init__(self, inner, hidden, outer, *, rngs):
    self.up = nnx.Linear(inner, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, outer, rngs=rngs)

  def __call__(self, x):  # [..., inner] -> [..., outer]
    return self.down(jax.nn.relu(self.up(x)))


class Mixer(nnx.Module):
  """Token mixing T -> hidden -> T, then channel MLP, both residual."""

  def __init__(self, tokens, hidden, width, *, expand=2, rngs):
    self.norm_tokens, self.norm_channels = RMSNorm(width), RMSNorm(width)
    self.up = table(rngs, hidden, tokens, scale=tokens**-0.5)
    self.down = table(rngs, tokens, hidden, scale=0.5 * hidden**-0.5)
    self.mlp = MLP(width, expand * width, width, rngs=rngs)

  def __call__(self, x, gain=None):  # [T, R, D], gain: (scale, shift) [R, D] of the channel half
    h = self.norm_tokens(x)
    h = h.reshape(x.shape[0], -1)  # plain matrices: 1.5 x the speed of the einsums on a CPU
    x = x + (self.down[...] @ jax.nn.relu(self.up[...] @ h)).reshape(x.shape)
    h = self.norm_channels(x)
    if gain is not None:
      h = h * (1 + gain[0]) + gain[1]
    return x + self.mlp(h.reshape(-1, x.shape[-1])).reshape(x.shape)


class Near(nnx.Module):
  """A 3 x 3 convolution over a square grid of cells as one product, `[T, R, D]` -> `[T, R, E]`.

  The same weights for every cell: what a shape looks like is learned once, not once per place.
  """

  def __init__(self, inner, outer, *, rngs):
    self.mix = nnx.Linear(9 * inner, outer, rngs=rngs)

  def __call__(self, x):
    T, R, D = x.shape
    side = round(T**0.5)
    x = jnp.pad(x.reshape(side, side, R, D), ((1, 1), (1, 1), (0, 0), (0, 0)))
    around = [x[i:i + side, j:j + side] for i in range(3) for j in range(3)]
    return self.mix(jnp.concatenate(around, -1).reshape(T * R, 9 * D)).reshape(T, R, -1)


def patches(images, height, width):
  """`[R, H, W, 3]` -> `[T, R, height * width * 3]`, row by row."""
  r, h, w, c = images.shape
  x = images.reshape(r, h // height, height, w // width, width, c)
  return x.transpose(1, 3, 0, 2, 4, 5).reshape(-1, r, height * width * c)


def unpatch(x, height, width, size):
  """The inverse: `[T, R, height * width * 3]` -> `[R, size, size, 3]`."""
  r = x.shape[1]
  x = x.reshape(size // height, size // width, r, height, width, 3)
  return x.transpose(2, 0, 3, 1, 4, 5).reshape(r, size, size, 3)
