"""Text-conditioned flow matching in pixel space (Lipman et al. 2022, arXiv 2210.02747).

Each block reads the 3 x 3 neighbourhood of each 4 x 4 pixel cell, with weights shared over places,
then mixes all cells. Caption and time enter as a scale and shift of channels.

Convention: x_t = (1 - t) noise + t data. So t = 0 is noise, t = 1 is the picture, and sampling
integrates the velocity v = data - noise upwards; pixels are 2 * image - 1. The null prompt (all
padding) gives the unconditional velocity for guidance.

Letters: R images · B prompts · P patches · D width · E embedding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.scenes import world
from vtts_jax.scenes.models.layers import (
  MLP,
  Mixer,
  Near,
  RMSNorm,
  join_patches,
  learned_array,
  split_patches,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; `patch` in pixels, `embed` is E."""

  image: int = 32
  patch: int = 4
  width: int = 64
  hidden: int = 64
  blocks: int = 4
  embed: int = 96
  text_length: int = world.TEXT_LENGTH
  words: int = len(world.VOCABULARY)

  @property
  def tokens(self):
    return (self.image // self.patch) ** 2


class Flow(nnx.Module):
  """`flow(x, t, flow.embed_texts(text_ids))` is the velocity; see the convention above."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    values = 3 * c.patch**2
    self.words = learned_array(rngs, c.text_length, c.words, c.embed, scale=0.3)
    self.read = MLP(c.embed, 2 * c.embed, c.embed, rngs=rngs)
    self.time = nnx.Linear(c.embed, c.embed, rngs=rngs)
    self.enter = nnx.Linear(values, c.width, rngs=rngs)
    self.place = learned_array(rngs, c.tokens, 1, c.width, scale=0.3)
    self.near = nnx.List([Near(c.width, c.width, rngs=rngs) for _ in range(c.blocks)])
    self.blocks = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs) for _ in range(c.blocks)])
    self.gains = nnx.List([nnx.Linear(c.embed, 2 * c.width, kernel_init=nnx.initializers.zeros,
                                      rngs=rngs) for _ in range(c.blocks)])
    self.norm = RMSNorm(c.width)
    # zero at the start: the first velocity is 0, which makes early training stable
    self.leave = nnx.Linear(c.width, values, kernel_init=nnx.initializers.zeros, rngs=rngs)

  def embed_texts(self, text_ids):
    """Word ids `[B, Tt]` to `[B, E]`: a sum of one vector per (place, word), then an MLP."""
    x = self.words[...][np.arange(self.config.text_length), text_ids].sum(1)
    return x + self.read(x)

  def __call__(self, x, t, emb):
    """Velocity `[R, H, W, 3]` at `x [R, H, W, 3]` (in -1 .. 1), `t [R]`, `emb [R, E]`."""
    c = self.config
    # sinusoidal embedding of the time, with frequencies 1 .. e^5
    angle = jnp.asarray(t)[:, None] * np.exp(np.linspace(0, 5, c.embed // 2, dtype=np.float32))
    cond = jax.nn.relu(emb + self.time(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
    # cells on the leading axis, see `layers`
    h = self.enter(split_patches(x, c.patch, c.patch)) + self.place[...]  # [P, R, D]
    for near, block, gain in zip(self.near, self.blocks, self.gains):
      h = h + jax.nn.relu(near(h))
      h = block(h, jnp.split(gain(cond), 2, -1))
    return join_patches(self.leave(self.norm(h)), c.patch, c.patch, c.image)

  def to_images(self, x):
    """Pixels x at t = 1 to pictures `[R, H, W, 3]` in [0, 1]."""
    return jnp.clip((x + 1) / 2, 0, 1)


def build_model(config, seed=0):
  """A `Flow` with random parameters."""
  return Flow(config, rngs=nnx.Rngs(seed))


def count_text_flops(config):
  """Matmul FLOPs of `embed_texts` per prompt."""
  return 8 * config.embed**2


def count_velocity_flops(config):
  """Matmul FLOPs of one velocity per image, without its text."""
  c = config
  block = (4 * c.tokens * c.hidden * c.width + 8 * c.tokens * c.width**2
           + 18 * c.tokens * c.width**2 + 4 * c.embed * c.width)
  return c.blocks * block + 4 * c.tokens * c.width * 3 * c.patch**2 + 2 * c.embed**2
