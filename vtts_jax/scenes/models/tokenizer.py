"""Image tokenizers of the scene world: 1D ordered and 2D grid, same decoder, tokens and codes.

Both quantise with FSQ (Mentzer et al. 2023, arXiv 2309.15505; levels 4 x 4 x 4 x 4 = 256 codes).
The eye of both reads 4 x 4 pixel cells with weights shared over places. The 1D encoder then mixes
the whole picture into every token and is trained with nested dropout (Rippel et al. 2014, FlexTok
2502.13967), so that every prefix decodes, coarse to fine. A 2D token is a patch of two cells in
raster order and sees 24 x 20 pixels around it. A missing token is a learned vector.

Letters: R images · K tokens · V codes · Q FSQ dimensions · C = 64 cells · D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.scenes.models.layers import MLP, Mixer, Near, RMSNorm, patches, table, unpatch


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes. `order` '1d' or '2d'; `tokens` is K, `codes` (the product of `levels`) V."""

  order: str = '1d'  # or '2d'
  image: int = 32
  cell: int = 4  # pixels
  tokens: int = 32  # a 2D token is cells / tokens neighbouring cells of a row
  levels: tuple = (4, 4, 4, 4)
  near: int = 48  # channels of a cell
  width: int = 64  # of a token
  hidden: int = 64  # of token mixing
  encoder: int = 2  # mixers, 1D only
  decoder: int = 3

  def __post_init__(self):
    if self.order not in ('1d', '2d'):
      raise ConfigError(f"order={self.order!r}: allowed are '1d', '2d'")
    if self.cells % self.tokens:
      raise ConfigError(f'tokens={self.tokens} must divide the number of cells, {self.cells}')

  @property
  def cells(self):
    return (self.image // self.cell) ** 2

  @property
  def codes(self):
    return int(np.prod(self.levels))


class Tokenizer(nnx.Module):
  """`encode` and `decode`; training goes through `bound`, `round`, `hidden`, `pixels`."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    values, group = 3 * c.cell**2, c.cells // c.tokens
    self.see = nnx.Linear(values, c.near, rngs=rngs)
    self.look = nnx.List([Near(c.near, c.near, rngs=rngs) for _ in range(2)])
    self.enter = MLP(group * c.near, 2 * c.width, c.width, rngs=rngs)
    if c.order == '1d':
      self.where = table(rngs, c.tokens, 1, c.width, scale=0.3)
      self.encoder = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs)
                               for _ in range(c.encoder)])
    self.norm = RMSNorm(c.width)
    self.to_code = nnx.Linear(c.width, len(c.levels), rngs=rngs)
    self.from_code = MLP(len(c.levels), c.width, c.width, rngs=rngs)
    self.missing = table(rngs, c.width)
    self.place = table(rngs, c.tokens, 1, c.width, scale=0.3)
    self.decoder = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs)
                             for _ in range(c.decoder)])
    self.paint = nnx.Linear(c.width, group * c.near, rngs=rngs)
    self.draw_near = nnx.List([Near(c.near, c.near, rngs=rngs) for _ in range(2)])
    self.leave = nnx.Linear(c.near, values, rngs=rngs)

  def bound(self, images):
    """Before rounding: `[R, H, W, 3]` -> `[K, R, Q]`, each in (-0.5, level - 0.5)."""
    c, R = self.config, len(images)
    x = jax.nn.relu(self.see(patches(2 * images - 1, c.cell, c.cell)))  # [C, R, near]
    for near in self.look:
      x = x + jax.nn.relu(near(x))
    # a token starts from its own cells in either order: from a random mixture learning starts late
    x = x.reshape(c.tokens, -1, R, c.near).swapaxes(1, 2).reshape(c.tokens * R, -1)
    x = self.enter(x).reshape(c.tokens, R, c.width)
    if c.order == '1d':
      x = x + self.where[...]
      for block in self.encoder:
        x = block(x)
    levels = jnp.array(c.levels, jnp.float32)
    return jax.nn.sigmoid(self.to_code(self.norm(x))) * levels - 0.5

  def round(self, z):
    """Nearest codes with a straight-through gradient, `[K, R, Q]`."""
    levels = jnp.array(self.config.levels, jnp.float32)
    hard = jnp.clip(jnp.round(z), 0, levels - 1)
    return z + jax.lax.stop_gradient(hard - z)

  def index(self, codes):
    """`[K, R, Q]` -> ids `[R, K]` int32."""
    base = np.cumprod((1, *self.config.levels[:-1]))
    return jnp.sum(jnp.round(codes) * base, -1).astype(jnp.int32).T

  def codes(self, ids):
    """ids `[R, K]` -> `[K, R, Q]` float32."""
    base = np.cumprod((1, *self.config.levels[:-1]))
    return (ids.T[..., None] // base % np.array(self.config.levels)).astype(jnp.float32)

  def hidden(self, codes, keep):
    """Codes `[K, R, Q]`, `keep` scalar or `[R]` -> what is in each cell `[C, R, near]`."""
    c = self.config
    half = (jnp.array(c.levels, jnp.float32) - 1) / 2
    x = self.from_code(codes / half - 1)  # [K, R, D]
    there = jnp.arange(c.tokens)[:, None] < jnp.reshape(jnp.asarray(keep), (1, -1))  # [K, R or 1]
    x = jnp.where(there[..., None], x, self.missing[...]) + self.place[...]
    for block in self.decoder:
      x = block(x)
    x = self.paint(x).reshape(c.tokens, x.shape[1], -1, c.near)
    return x.swapaxes(1, 2).reshape(c.cells, -1, c.near)

  def pixels(self, hidden):
    """`[C, R, near]` -> images `[R, H, W, 3]`, not clipped."""
    c, x = self.config, jax.nn.relu(hidden)
    for near in self.draw_near:
      x = x + jax.nn.relu(near(x))
    return unpatch(self.leave(x) + 0.5, c.cell, c.cell, c.image)

  def encode(self, images):
    """`[R, H, W, 3]` float32 in [0, 1] -> ids `[R, K]` int32."""
    return self.index(self.round(self.bound(images)))

  def decode(self, ids, keep=None):
    """ids `[R, K]` -> images `[R, H, W, 3]` in [0, 1] from the first `keep` tokens.

    `keep` is None (all), a scalar, traced or not, or `[R]`; ids past it do not matter.
    """
    keep = self.config.tokens if keep is None else keep
    return jnp.clip(self.pixels(self.hidden(self.codes(ids), keep)), 0, 1)


def build(config, seed=0):
  """A `Tokenizer` with random parameters."""
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def flops_decode(config):
  """Matmul FLOPs of `decode` per image."""
  c = config
  mixer = 4 * c.tokens * c.hidden * c.width + 8 * c.tokens * c.width**2
  read = 2 * c.tokens * c.width * (len(c.levels) + c.width)
  cells = c.width * c.near + 2 * 9 * c.near**2 + c.near * 3 * c.cell**2
  return read + c.decoder * mixer + 2 * c.cells * cells
