"""Image tokenizers of the scene world: 1D ordered and 2D grid, same decoder, tokens and codes.

Both quantise with FSQ (Mentzer et al. 2023, arXiv 2309.15505, levels 4 x 4 x 4 x 4 = 256 codes). The 1D
encoder mixes the whole picture into every token and is trained with nested dropout (Rippel et al.
2014, FlexTok 2502.13967), so that every prefix decodes, coarse to fine. The 2D encoder sees a patch
and its neighbours; its tokens are the patches in raster order. A missing token is a learned vector.

Letters: R images · K tokens · V codes · P = patch values · D width · Q FSQ dimensions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.models.scenes.layers import MLP, Mixer, patches, table, unpatch


@dataclasses.dataclass(frozen=True)
class Config:
  order: str = '1d'  # or '2d'
  image: int = 32
  patch: tuple = (4, 8)  # rows, columns of pixels
  levels: tuple = (4, 4, 4, 4)
  width: int = 64
  hidden: int = 64  # of token mixing
  encoder: int = 3  # blocks
  decoder: int = 5

  def __post_init__(self):
    if self.order not in ('1d', '2d'):
      raise ValueError(f"order={self.order!r}: allowed are '1d', '2d'")

  @property
  def grid(self):
    return self.image // self.patch[0], self.image // self.patch[1]

  @property
  def tokens(self):
    return self.grid[0] * self.grid[1]

  @property
  def codes(self):
    return int(np.prod(self.levels))


class Tokenizer(nnx.Module):
  def __init__(self, config, *, rngs):
    c = self.config = config
    values = c.patch[0] * c.patch[1] * 3
    local = dict(grid=c.grid, reach=1) if c.order == '2d' else {}
    self.enter = MLP(values, 2 * c.width, c.width, rngs=rngs)
    self.where = table(rngs, c.tokens, 1, c.width)
    blocks = c.encoder if c.order == '1d' else 1  # a 2D token sees its patch and the 8 around it
    self.encoder = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs, **local)
                             for _ in range(blocks)])
    self.to_code = nnx.Linear(c.width, len(c.levels), rngs=rngs)
    self.from_code = nnx.Linear(len(c.levels), c.width, rngs=rngs)
    self.missing = table(rngs, c.width)
    self.place = table(rngs, c.tokens, 1, c.width, scale=0.3)
    self.decoder = nnx.List([Mixer(c.tokens, c.hidden, c.width, rngs=rngs)
                             for _ in range(c.decoder)])
    self.leave = MLP(c.width, 2 * c.width, values, rngs=rngs)

  def bound(self, images):
    """Before rounding: `[R, H, W, 3]` -> `[K, R, Q]`, each in (-0.5, level - 0.5)."""
    c = self.config
    x = self.enter(patches(2 * images - 1, *c.patch)) + self.where[...]  # [K, R, D]
    for block in self.encoder:
      x = block(x)
    levels = jnp.array(c.levels, jnp.float32)
    return jax.nn.sigmoid(self.to_code(x)) * levels - 0.5

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

  def draw(self, codes, keep):
    """Codes `[K, R, Q]` and `keep` (scalar or `[R]`) -> images `[R, H, W, 3]`, not clipped."""
    c = self.config
    half = (jnp.array(c.levels, jnp.float32) - 1) / 2
    x = self.from_code(codes / half - 1)  # [K, R, D]
    there = jnp.arange(c.tokens)[:, None] < jnp.reshape(jnp.asarray(keep), (1, -1))  # [K, R or 1]
    x = jnp.where(there[..., None], x, self.missing[...]) + self.place[...]
    for block in self.decoder:
      x = block(x)
    return unpatch(self.leave(x) + 0.5, *c.patch, c.image)

  def encode(self, images):
    """`[R, H, W, 3]` float32 in [0, 1] -> ids `[R, K]` int32."""
    return self.index(self.round(self.bound(images)))

  def decode(self, ids, keep=None):
    """ids `[R, K]` -> images `[R, H, W, 3]` in [0, 1] from the first `keep` tokens.

    `keep` is None (all), a scalar, traced or not, or `[R]`; ids past it do not matter.
    """
    keep = self.config.tokens if keep is None else keep
    return jnp.clip(self.draw(self.codes(ids), keep), 0, 1)


def build(config, seed=0):
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def flops_decode(config):
  """Matmul FLOPs of `decode` per image."""
  c = config
  values = c.patch[0] * c.patch[1] * 3
  block = 4 * c.tokens * c.hidden * c.width + 8 * c.tokens * c.width**2
  return (2 * c.tokens * len(c.levels) * c.width + c.decoder * block
          + 4 * c.tokens * c.width * (c.width + values))
