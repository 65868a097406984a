"""Ways in which a generated picture goes wrong, for training verifiers; all traced, one key each.

Letters: R rows. Images are `[R, 32, 32, 3]` in [0, 1] before and roughly so after.
"""

import jax
import jax.numpy as jnp

from vtts_jax.scenes.world import GROUND, SIZE


def _uniform(key, images, low=0.0, high=1.0):
  return jax.random.uniform(key, (images.shape[0], 1, 1, 1), minval=low, maxval=high)


def blur(images, amount):
  """Binomial 3 x 3 kernel, mixed in by `amount [R, 1, 1, 1]`."""
  x = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
  x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
  x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
  return images + amount * (x - images)


def mild(images, key):
  """Blur of up to about one pixel, fading to 0.6, noise up to 0.1: everything is still there."""
  k = jax.random.split(key, 5)
  x = images
  for i in range(2):
    x = blur(x, _uniform(k[i], x))
  x = GROUND + (x - GROUND) * _uniform(k[2], x, 0.6, 1.1)
  return x + _uniform(k[3], x, 0.0, 0.1) * jax.random.normal(k[4], x.shape)


def smear(images, key):
  """Heavy Gaussian blur, as a coarse-to-fine prefix has it: 0.8 to 2.5 pixels."""
  sigma = _uniform(key, images, 0.8, 2.5)[:, :, 0]  # [R, 1, 1]
  gap = jnp.arange(SIZE)[:, None] - jnp.arange(SIZE)
  near = jnp.exp(-(gap**2) / (2 * sigma**2))
  near = near / near.sum(-1, keepdims=True)  # [R, 32, 32]
  x = jnp.einsum('ryv,rvxc->ryxc', near, images)
  return jnp.einsum('rxu,ryuc->ryxc', near, x)


def unfinished(images, key):
  """A raster prefix of 4 x 8 patches: the later ones are empty ground."""
  done = _uniform(key, images, 0.2, 1.0) * 32
  y, x = jnp.arange(SIZE)[:, None] // 4, jnp.arange(SIZE) // 8
  order = (y * 4 + x)[None, :, :, None]
  return jnp.where(order < done, images, GROUND)


def holes(images, key):
  """Two rectangles of 3 to 8 pixels a side painted over with ground."""
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


def mixture(images, key):
  """Two scenes at once: a share of up to 0.6 of the next row's picture."""
  share = _uniform(key, images, 0.15, 0.6)
  return images + share * (jnp.roll(images, 1, 0) - images)


def one_of(images, key, ways):
  """Each row corrupted in one of `ways`, uniformly."""
  keys = jax.random.split(key, len(ways) + 1)
  which = jax.random.randint(keys[0], (images.shape[0], 1, 1, 1), 0, len(ways))
  out = images
  for i, way in enumerate(ways):
    out = jnp.where(which == i, way(images, keys[i + 1]), out)
  return out
