"""A dense detector on the scene lattice; its one use is the tokenizers' perceptual loss.

Convolutions to an 8 x 8 grid of 4-pixel cells; the centre of an object lies in the middle of a
cell. A cell says: object here (1), shape (5), colour (8), size (2). The detector used as verifier
is another model with another seed, and the oracle (`scenes/oracle.py`) learns nothing.
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
  """`features` for the perceptual loss, `read` and `__call__` for its verdicts."""

  def __init__(self, config, *, rngs):
    self.config = config
    a, b, c = config.widths
    conv = lambda i, o, n, s: nnx.Conv(i, o, (n, n), strides=(s, s), padding='SAME', rngs=rngs)
    self.stem = conv(3, a, 4, 2)
    self.second = conv(a, b, 4, 2)
    self.third = conv(b, c, 3, 1)
    self.heads = nnx.Linear(c, 16, rngs=rngs)

  def features(self, images):
    """`[R, 32, 32, 3]` -> activations `[R, 16, 16, a]`, `[R, 8, 8, b]`, `[R, 8, 8, c]`."""
    x = jax.nn.relu(self.stem(2 * images - 1))
    y = jax.nn.relu(self.second(x))
    return x, y, jax.nn.relu(self.third(y))

  def __call__(self, images):
    """Logits: object `[R, 8, 8]`, shape `[..., 5]`, colour `[..., 8]`, size `[..., 2]`."""
    return self.read(self.features(images)[-1])

  def read(self, x):
    out = self.heads(x)
    return {'object': out[..., 0], 'shape': out[..., 1:6], 'colour': out[..., 6:14],
            'size': out[..., 14:]}


def build(config, seed=0):
  """A `Detector` with random parameters."""
  return Detector(config, rngs=nnx.Rngs(seed))


def grid_targets(scenes):
  """Truth on the grid, numpy int32 `[R, 8, 8]` each: object (0, 1), shape, colour, size."""
  r = len(scenes.count)
  out = {k: np.zeros((r, 8, 8), np.int32) for k in ('object', 'shape', 'colour', 'size')}
  row, slot = np.nonzero(np.arange(world.SLOTS) < scenes.count[:, None])
  y, x = (1 + i for i in np.divmod(scenes.place[row, slot], 6))
  out['object'][row, y, x] = 1
  for name in ('shape', 'colour', 'size'):
    out[name][row, y, x] = getattr(scenes, name)[row, slot]
  return out


def detection_loss(logits, truth):
  """Mean cross-entropies: object everywhere (weight 4), the rest where objects are."""
  at = truth['object'].astype(jnp.float32)
  sign = jnp.where(truth['object'] == 1, 1.0, -1.0)
  terms = {'object': 4 * jnp.mean(jax.nn.softplus(-sign * logits['object']))}
  for name in ('shape', 'colour', 'size'):
    log = jax.nn.log_softmax(logits[name])
    pick = jnp.take_along_axis(log, truth[name][..., None], -1)[..., 0]
    terms[name] = -jnp.sum(pick * at) / jnp.sum(at)
  return sum(terms.values()), terms
