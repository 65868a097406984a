"""Corruptions that generated pictures show, for training verifiers.

Each function takes images and a key and can be traced.

Letters: R rows. Images are `[R, 32, 32, 3]` in [0, 1]; results may leave this range slightly.
"""

import jax
import jax.numpy as jnp

from vtts_jax.scenes.world import GROUND, SIZE


def _row_uniform(key, images, low=0.0, high=1.0):
  """One uniform number for each row, `[R, 1, 1, 1]`."""
  return jax.random.uniform(key, (images.shape[0], 1, 1, 1), minval=low, maxval=high)


def blur_images(images, amount):
  """Blurs with a binomial 3 x 3 kernel; `amount [R, 1, 1, 1]` mixes it with the original."""
  # the edge is repeated: zeros would paint a black border
  x = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
  x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
  x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
  return images + amount * (x - images)


def degrade_mildly(images, key):
  """Blur up to about one pixel, contrast 0.6 .. 1.1, noise up to 0.1; all objects stay visible."""
  k = jax.random.split(key, 5)
  x = images
  for i in range(2):
    x = blur_images(x, _row_uniform(k[i], x))
  x = GROUND + (x - GROUND) * _row_uniform(k[2], x, 0.6, 1.1)
  return x + _row_uniform(k[3], x, 0.0, 0.1) * jax.random.normal(k[4], x.shape)


def smear_images(images, key):
  """Heavy Gaussian blur of 0.8 to 2.5 pixels, as in pictures of short 1D prefixes."""
  sigma = _row_uniform(key, images, 0.8, 2.5)[:, :, 0]  # [R, 1, 1]
  gap = jnp.arange(SIZE)[:, None] - jnp.arange(SIZE)
  near = jnp.exp(-(gap**2) / (2 * sigma**2))
  near = near / near.sum(-1, keepdims=True)  # [R, 32, 32]
  # the width differs from row to row: a matrix per row, rows and columns in turn
  x = jnp.einsum('ryv,rvxc->ryxc', near, images)
  return jnp.einsum('rxu,ryuc->ryxc', near, x)


def leave_unfinished(images, key):
  """Keeps a raster prefix of the 4 x 8 pixel patches, as in 2D prefixes; the rest is ground."""
  done = _row_uniform(key, images, 0.2, 1.0) * 32
  y, x = jnp.arange(SIZE)[:, None] // 4, jnp.arange(SIZE) // 8
  order = (y * 4 + x)[None, :, :, None]
  return jnp.where(order < done, images, GROUND)


def cut_holes(images, key):
  """Paints two rectangles of 3 to 8 pixels a side in the colour of the ground."""
  x = images
  for k in jax.random.split(key, 2):
    a, b = jax.random.split(k)
    corner = jax.random.randint(a, (x.shape[0], 2), 0, SIZE - 4)
    side = jax.random.randint(b, (x.shape[0], 2), 3, 9)
    grid = jnp.arange(SIZE)
    inside = (grid >= corner[..., None]) & (grid < (corner + side)[..., None])  # [R, 2, 32]
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    x = jnp.where(hole[..., None], GROUND, x)
  return x


def mix_neighbours(images, key):
  """Mixes in a share of 0.15 to 0.6 of another row's picture."""
  share = _row_uniform(key, images, 0.15, 0.6)
  return images + share * (jnp.roll(images, 1, 0) - images)


def corrupt_rows(images, key, ways):
  """Corrupts each row in one of `ways` (functions of images and a key), chosen uniformly."""
  # every way runs on all rows and one result per row is kept: no row-wise branches inside jit
  keys = jax.random.split(key, len(ways) + 1)
  which = jax.random.randint(keys[0], (images.shape[0], 1, 1, 1), 0, len(ways))
  out = images
  for i, way in enumerate(ways):
    out = jnp.where(which == i, way(images, keys[i + 1]), out)
  return out
