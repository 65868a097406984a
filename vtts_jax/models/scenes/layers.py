"""What the scene models share: RMS norm, MLP, and token-major mixers.

Mixers (Tolstikhin et al., MLP-Mixer, 2021) with tokens leading: `[T, R, D]` makes token mixing and
channel mixing plain two-dimensional matrix products, which is what a CPU does fast. relu, because gelu
costs twice as much backwards.
"""

import jax
import jax.numpy as jnp
import numpy as np
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
  """Token mixing T -> hidden -> T, then channel MLP, both residual.

  `reach > 0` mixes tokens of a `grid` (rows, columns) linearly and only within that many cells.
  """

  def __init__(self, tokens, hidden, width, *, expand=2, grid=None, reach=0, rngs):
    self.grid, self.reach = grid, reach
    self.norm_tokens, self.norm_channels = RMSNorm(width), RMSNorm(width)
    if reach:
      self.local = table(rngs, tokens, tokens, scale=0.1)
    else:
      self.up = table(rngs, hidden, tokens, scale=tokens**-0.5)
      self.down = table(rngs, tokens, hidden, scale=0.5 * hidden**-0.5)
    self.mlp = MLP(width, expand * width, width, rngs=rngs)

  def __call__(self, x, gain=None):  # [T, R, D], gain: (scale, shift) [R, D] of the channel half
    h = self.norm_tokens(x)
    if self.reach:
      y, z = (np.arange(x.shape[0]) // self.grid[1], np.arange(x.shape[0]) % self.grid[1])
      near = np.maximum(abs(y[:, None] - y), abs(z[:, None] - z)) <= self.reach
      h = jnp.einsum('ut,trd->urd', self.local[...] * near, h)
    else:
      h = h.reshape(x.shape[0], -1)  # plain matrices: 1.5 x the speed of the einsums on a CPU
      h = (self.down[...] @ jax.nn.relu(self.up[...] @ h)).reshape(x.shape)
    x = x + h
    h = self.norm_channels(x)
    if gain is not None:
      h = h * (1 + gain[0]) + gain[1]
    return x + self.mlp(h.reshape(-1, x.shape[-1])).reshape(x.shape)

  def flops(self, tokens, hidden, width, expand=2):
    """Matmul FLOPs per image."""
    mix = tokens * tokens if self.reach else 2 * tokens * hidden
    return 2 * mix * width + 2 * tokens * 2 * expand * width * width


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
