"""A quality scorer, independent of the prompt: convolutions, mean and max pooling, an MLP.

Letters: R rows (images).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.scenes.models.layers import MLP


@dataclasses.dataclass(frozen=True)
class Config:
  """Channels of the three convolutions (4 x 4 with stride 2 twice, 3 x 3) and of the MLP."""

  widths: tuple = (24, 48, 48)
  hidden: int = 64


class Quality(nnx.Module):
  """`quality(images [R, 32, 32, 3]) -> logit [R]`; its sigmoid is 1 for a clean rendering."""

  def __init__(self, config, *, rngs):
    a, b, c = config.widths
    conv = lambda i, o, n, s: nnx.Conv(i, o, (n, n), strides=(s, s), padding='SAME', rngs=rngs)
    self.first, self.second, self.third = conv(3, a, 4, 2), conv(a, b, 4, 2), conv(b, c, 3, 1)
    self.out = MLP(2 * c, config.hidden, 1, rngs=rngs)

  def __call__(self, images):
    # pixels in -1 .. 1, centred on the grey ground
    x = 2 * images - 1
    for layer in (self.first, self.second, self.third):
      x = jax.nn.relu(layer(x))
    # the mean sees blur everywhere, the maximum a small defect
    return self.out(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))[:, 0]


def build_model(config, seed=0):
  """A `Quality` with random parameters."""
  return Quality(config, rngs=nnx.Rngs(seed))


def count_flops(config):
  """FLOPs of one image, a multiply-add is 2; taps that fall on the padding do not count.

  Along an axis, 16 places of 4 taps with stride 2 see 62 of 64, 8 places 30 of 32, and 8 places of
  3 taps see 22 of 24.
  """
  a, b, c = config.widths
  return 2 * (62**2 * 3 * a + 30**2 * a * b + 22**2 * b * c + config.hidden * (2 * c + 1))
