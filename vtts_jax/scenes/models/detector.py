"""A dense detector on the scene lattice, used only for the tokenizers' perceptual loss.

Convolutions lead to an 8 x 8 grid of 4-pixel cells; the centre of an object lies in the middle of a
cell. A cell predicts: object here (1), shape (5), colour (8), size (2). The verifier's detector is
another model with another seed, and the oracle (`scenes/oracle.py`) learns nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.scenes import world


@dataclasses.dataclass(frozen=True)
class Config:
  """Channels of the three convolutions."""

  widths: tuple = (16, 32, 64)


class Detector(nnx.Module):
  """`feature_maps` serves the perceptual loss, `read_heads` and `__call__` give predictions."""

  def __init__(self, config, *, rngs):
    self.config = config
    a, b, c = config.widths
    conv = lambda i, o, n, s: nnx.Conv(i, o, (n, n), strides=(s, s), padding='SAME', rngs=rngs)
    self.stem = conv(3, a, 4, 2)
    self.second = conv(a, b, 4, 2)
    self.third = conv(b, c, 3, 1)
    self.heads = nnx.Linear(c, 16, rngs=rngs)

  def feature_maps(self, images):
    """Images `[R, 32, 32, 3]` to activations `[R, 16, 16, a]`, `[R, 8, 8, b]`, `[R, 8, 8, c]`."""
    # all three activations are compared by the perceptual loss, from edges to objects
    x = jax.nn.relu(self.stem(2 * images - 1))
    y = jax.nn.relu(self.second(x))
    return x, y, jax.nn.relu(self.third(y))

  def __call__(self, images):
    """Logits: object `[R, 8, 8]`, shape `[..., 5]`, colour `[..., 8]`, size `[..., 2]`."""
    return self.read_heads(self.feature_maps(images)[-1])

  def read_heads(self, x):
    """Logits of `__call__` from the last activations `[R, 8, 8, c]`."""
    out = self.heads(x)
    return {'object': out[..., 0], 'shape': out[..., 1:6], 'colour': out[..., 6:14],
            'size': out[..., 14:]}


def build_model(config, seed=0):
  """A `Detector` with random parameters."""
  return Detector(config, rngs=nnx.Rngs(seed))


def grid_targets(scenes):
  """True values on the grid, numpy int32 `[R, 8, 8]` each: object (0, 1), shape, colour, size."""
  r = len(scenes.count)
  out = {k: np.zeros((r, 8, 8), np.int32) for k in ('object', 'shape', 'colour', 'size')}
  row, slot = np.nonzero(np.arange(world.SLOTS) < scenes.count[:, None])
  # lattice place (0, 0) is cell (1, 1): the outermost cells hold no centre
  y, x = (1 + i for i in np.divmod(scenes.place[row, slot], 6))
  out['object'][row, y, x] = 1
  for name in ('shape', 'colour', 'size'):
    out[name][row, y, x] = getattr(scenes, name)[row, slot]
  return out


def detection_loss(logits, truth):
  """Sum of mean cross-entropies, and each of them by name: object in all cells (weight 4), shape,
  colour and size only in cells with an object."""
  at = truth['object'].astype(jnp.float32)
  sign = jnp.where(truth['object'] == 1, 1.0, -1.0)
  terms = {'object': 4 * jnp.mean(jax.nn.softplus(-sign * logits['object']))}
  for name in ('shape', 'colour', 'size'):
    log = jax.nn.log_softmax(logits[name])
    # cells without an object have class 0 here and are masked below
    pick = jnp.take_along_axis(log, truth[name][..., None], -1)[..., 0]
    terms[name] = -jnp.sum(pick * at) / jnp.sum(at)
  return sum(terms.values()), terms
