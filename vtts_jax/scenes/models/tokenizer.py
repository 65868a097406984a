"""Image tokenizers of the scene world: 1D ordered and 2D grid, with equal decoders and codes.

Both quantise with FSQ (Mentzer et al. 2023, arXiv 2309.15505; levels 4 x 4 x 4 x 4 = 256 codes).
Both first read 4 x 4 pixel cells with weights shared over places. The 1D encoder then mixes the
whole picture into every token. It is trained with nested dropout (Rippel et al. 2014, FlexTok
2502.13967), so every prefix decodes, from coarse to fine. A 2D token is a patch of two cells in
raster order and sees 24 x 20 pixels around it. A missing token is a learned vector.

Letters: R images · K tokens · V codes · Q FSQ dimensions · C = 64 cells · D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
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
  """Sizes; `tokens` is K, `codes` (the product of `levels`) is V."""

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
  """`encode` and `decode`; training uses the steps between: `bounded_codes`, `round_codes`,
  `decode_cells`, `paint_cells`."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    values, group = 3 * c.cell**2, c.cells // c.tokens
    self.see = nnx.Linear(values, c.near, rngs=rngs)
    self.look = nnx.List([Near(c.near, c.near, rngs=rngs) for _ in range(2)])
    self.enter = MLP(group * c.near, 2 * c.width, c.width, rngs=rngs)
    if c.order == '1d':
      self.where = learned_array(rngs, c.tokens, 1, c.width, scale=0.3)
      self.encoder = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs)
                               for _ in range(c.encoder)])
    self.norm = RMSNorm(c.width)
    self.to_code = nnx.Linear(c.width, len(c.levels), rngs=rngs)
    self.from_code = MLP(len(c.levels), c.width, c.width, rngs=rngs)
    self.missing = learned_array(rngs, c.width)
    self.place = learned_array(rngs, c.tokens, 1, c.width, scale=0.3)
    self.decoder = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs)
                             for _ in range(c.decoder)])
    self.paint = nnx.Linear(c.width, group * c.near, rngs=rngs)
    self.draw_near = nnx.List([Near(c.near, c.near, rngs=rngs) for _ in range(2)])
    self.leave = nnx.Linear(c.near, values, rngs=rngs)

  def bounded_codes(self, images):
    """Codes before rounding: images `[R, H, W, 3]` to `[K, R, Q]`, each in (-0.5, level - 0.5)."""
    c, R = self.config, len(images)
    x = jax.nn.relu(self.see(split_patches(2 * images - 1, c.cell, c.cell)))  # [C, R, near]
    # each residual step widens the view of a cell by one cell on every side
    for near in self.look:
      x = x + jax.nn.relu(near(x))
    # in both orders a token starts from its own cells; from a random mixture learning starts late
    x = x.reshape(c.tokens, -1, R, c.near).swapaxes(1, 2).reshape(c.tokens * R, -1)
    x = self.enter(x).reshape(c.tokens, R, c.width)
    if c.order == '1d':
      x = x + self.where[...]
      for block in self.encoder:
        x = block(x)
    levels = jnp.array(c.levels, jnp.float32)
    return jax.nn.sigmoid(self.to_code(self.norm(x))) * levels - 0.5

  def round_codes(self, z):
    """Rounds to the nearest codes `[K, R, Q]`; the gradient passes straight through."""
    levels = jnp.array(self.config.levels, jnp.float32)
    # the forward pass rounds, the backward pass sees the identity
    hard = jnp.clip(jnp.round(z), 0, levels - 1)
    return z + jax.lax.stop_gradient(hard - z)

  def codes_to_ids(self, codes):
    """Codes `[K, R, Q]` to ids `[R, K]` int32, as digits of a mixed-radix number."""
    base = np.cumprod((1, *self.config.levels[:-1]))
    return jnp.sum(jnp.round(codes) * base, -1).astype(jnp.int32).T

  def ids_to_codes(self, ids):
    """Ids `[R, K]` to codes `[K, R, Q]` float32."""
    base = np.cumprod((1, *self.config.levels[:-1]))
    return (ids.T[..., None] // base % np.array(self.config.levels)).astype(jnp.float32)

  def decode_cells(self, codes, keep):
    """Codes `[K, R, Q]` to the content of each cell `[C, R, near]`, from the first `keep` (a scalar
    or `[R]`) tokens."""
    c = self.config
    # codes 0 .. level - 1 become inputs in -1 .. 1
    half = (jnp.array(c.levels, jnp.float32) - 1) / 2
    x = self.from_code(codes / half - 1)  # [K, R, D]
    # masked, not cut: `keep` may be traced, and one program serves all prefixes
    there = jnp.arange(c.tokens)[:, None] < jnp.reshape(jnp.asarray(keep), (1, -1))  # [K, R or 1]
    x = jnp.where(there[..., None], x, self.missing[...]) + self.place[...]
    for block in self.decoder:
      x = block(x)
    # a token paints the cells that the same 2D token covers; 1D tokens use the layout too
    x = self.paint(x).reshape(c.tokens, x.shape[1], -1, c.near)
    return x.swapaxes(1, 2).reshape(c.cells, -1, c.near)

  def paint_cells(self, hidden):
    """Cells `[C, R, near]` to images `[R, H, W, 3]`, not clipped."""
    c, x = self.config, jax.nn.relu(hidden)
    for near in self.draw_near:
      x = x + jax.nn.relu(near(x))
    return join_patches(self.leave(x) + 0.5, c.cell, c.cell, c.image)

  def encode(self, images):
    """Images `[R, H, W, 3]` float32 in [0, 1] to ids `[R, K]` int32."""
    return self.codes_to_ids(self.round_codes(self.bounded_codes(images)))

  def decode(self, ids, keep=None):
    """Ids `[R, K]` to images `[R, H, W, 3]` in [0, 1], from the first `keep` tokens.

    `keep` is None (all), a scalar, or `[R]`, and may be traced; ids from `keep` on are ignored.
    """
    keep = self.config.tokens if keep is None else keep
    return jnp.clip(self.paint_cells(self.decode_cells(self.ids_to_codes(ids), keep)), 0, 1)


def build_model(config, seed=0):
  """A `Tokenizer` with random parameters."""
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def count_decode_flops(config):
  """Matmul FLOPs of `decode` per image."""
  c = config
  mixer = 4 * c.tokens * c.hidden * c.width + 8 * c.tokens * c.width**2
  read = 2 * c.tokens * c.width * (len(c.levels) + c.width)
  cells = c.width * c.near + 2 * 9 * c.near**2 + c.near * 3 * c.cell**2
  return read + c.decoder * mixer + 2 * c.cells * cells
