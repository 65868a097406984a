"""Text-conditioned flow matching in pixel space (Lipman et al. 2022, arXiv 2210.02747).

The network predicts the picture and not the velocity: pictures of the world lie on few patches,
noise fills the whole space, and a narrow network can carry only the first (Li & He 2025,
arXiv 2511.13720). A block reads the 3 x 3 neighbourhood of each 4 x 4 pixel cell with weights
shared over places, then mixes all cells. Caption and time scale and shift what a block reads.

Convention: x_t = (1 - t) noise + t data. So t = 0 is noise, t = 1 is the picture; pixels are
2 * image - 1. The null prompt (all padding) gives the unconditional picture for guidance.

Letters: R images · B prompts · P cells · D width · E embedding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.scenes import world
from vtts_jax.scenes.models.layers import MLP, RMSNorm, join_patches, learned_array, split_patches

VARIANCE = 0.06  # of the pixels of the world, in -1 .. 1
SHIFT = 2.0  # of sampling times towards the noise, where it is decided what is where


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; `patch` in pixels, `hidden` of cell mixing, `embed` is E."""

  image: int = 32
  patch: int = 4
  width: int = 64
  hidden: int = 64
  blocks: int = 4
  embed: int = 96
  text_length: int = world.TEXT_LENGTH
  words: int = len(world.VOCABULARY)

  @property
  def side(self):
    return self.image // self.patch

  @property
  def cells(self):
    return self.side**2


class Around(nnx.Module):
  """A 3 x 3 convolution over the square grid of cells, `[P, R, D]` to `[P, R, E]`."""

  def __init__(self, inner, outer, *, rngs):
    self.kernel = learned_array(rngs, 3, 3, inner, outer, scale=(9 * inner) ** -0.5)
    self.bias = nnx.Param(jnp.zeros(outer))

  def __call__(self, x):
    side = round(len(x) ** 0.5)
    # half the time of `layers.Near` on a CPU, forwards and backwards: no copies are concatenated
    out = jax.lax.conv_general_dilated(
      x.reshape(side, side, *x.shape[1:]), self.kernel[...], (1, 1), 'SAME',
      dimension_numbers=('HWNC', 'HWIO', 'HWNC'))  # fmt: skip
    return out.reshape(*x.shape[:2], -1) + self.bias[...]


class Block(nnx.Module):
  """Reads around each cell under the condition, then mixes cells; both residual."""

  def __init__(self, config, *, rngs):
    c, zeros = config, nnx.initializers.zeros
    self.norm_near, self.norm_cells = RMSNorm(c.width), RMSNorm(c.width)
    self.around = Around(c.width, c.width, rngs=rngs)
    self.gain = nnx.Linear(c.embed, 2 * c.width, kernel_init=zeros, rngs=rngs)
    self.leave = nnx.Linear(c.width, c.width, kernel_init=zeros, rngs=rngs)
    self.up = learned_array(rngs, c.hidden, c.cells, scale=c.cells**-0.5)
    self.down = learned_array(rngs, c.cells, c.hidden, scale=0.5 * c.hidden**-0.5)

  def __call__(self, x, condition):
    """x `[P, R, D]` under a condition `[R, E]`."""
    scale, shift = jnp.split(self.gain(condition), 2, -1)
    h = jax.nn.relu(self.around(self.norm_near(x)) * (1 + scale) + shift)
    # plain matrices: einsums over three axes run slower on a CPU
    x = x + self.leave(h.reshape(-1, x.shape[-1])).reshape(x.shape)
    h = self.norm_cells(x).reshape(len(x), -1)
    return x + (self.down[...] @ jax.nn.relu(self.up[...] @ h)).reshape(x.shape)


class Flow(nnx.Module):
  """`flow(x, t, flow.embed_texts(text_ids))` is the expected picture; see the convention above."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    values = 3 * c.patch**2
    self.words = learned_array(rngs, c.text_length, c.words, c.embed, scale=0.3)
    self.read = MLP(c.embed, 2 * c.embed, c.embed, rngs=rngs)
    self.time = nnx.Linear(c.embed, c.embed, rngs=rngs)
    # an object is 3 x 3 cells at most: in much noise only a filter of its size can see it
    self.enter = Around(values, c.width, rngs=rngs)
    self.place = learned_array(rngs, c.cells, 1, c.width, scale=0.3)
    self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.blocks)])
    self.norm = RMSNorm(c.width)
    # zero at the start: the first picture is the grey ground
    self.leave = nnx.Linear(c.width, values, kernel_init=nnx.initializers.zeros, rngs=rngs)

  def embed_texts(self, text_ids):
    """Word ids `[B, Tt]` to `[B, E]`: a sum of one vector per (place, word), then an MLP."""
    x = self.words[...][np.arange(self.config.text_length), text_ids].sum(1)
    return x + self.read(x)

  def read_cells(self, x, t, emb):
    """What is known of each cell, `[P, R, D]`; arguments as of the call."""
    c, t = self.config, jnp.asarray(t)
    # sinusoidal embedding of the time, with frequencies 1 .. e^5
    angle = t[:, None] * np.exp(np.linspace(0, 5, c.embed // 2, dtype=np.float32))
    condition = jax.nn.relu(emb + self.time(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
    # unit variance at every time (Karras et al. 2022, arXiv 2206.00364)
    x = x * jax.lax.rsqrt((1 - t) ** 2 + VARIANCE * t**2)[:, None, None, None]
    h = self.enter(split_patches(x, c.patch, c.patch)) + self.place[...]
    for block in self.blocks:
      h = block(h, condition)
    return self.norm(h)

  def paint_cells(self, hidden):
    """The picture `[R, H, W, 3]` in -1 .. 1 of what `read_cells` knows."""
    return join_patches(self.leave(hidden), self.config.patch, self.config.patch, self.config.image)

  def __call__(self, x, t, emb):
    """Data `[R, H, W, 3]` expected at x `[R, H, W, 3]` (in -1 .. 1), t `[R]`, emb `[R, E]`."""
    return self.paint_cells(self.read_cells(x, t, emb))

  def to_images(self, x):
    """Pixels x at t = 1 to pictures `[R, H, W, 3]` in [0, 1]."""
    return jnp.clip((x + 1) / 2, 0, 1)


def build_model(config, seed=0):
  """A `Flow` with random parameters."""
  return Flow(config, rngs=nnx.Rngs(seed))


def count_text_flops(config):
  """Matmul FLOPs of `embed_texts` per prompt."""
  return 8 * config.embed**2


def count_picture_flops(config):
  """Matmul FLOPs of one call per image, without its text."""
  c, values = config, 3 * config.patch**2
  # 3 x 3 neighbours of every cell, without those that lie outside of the grid
  pairs = (3 * c.side - 2) ** 2
  block = (2 * pairs * c.width**2 + 2 * c.cells * c.width**2 + 4 * c.cells * c.hidden * c.width
           + 4 * c.embed * c.width)
  ends = 2 * (pairs + c.cells) * c.width * values
  return c.blocks * block + ends + 2 * c.embed**2
