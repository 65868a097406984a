"""SiT (Ma et al. 2024, arXiv 2401.08740): a DiT that predicts a velocity, conditioned on a class.

Noisy VAE latents in patches of 2 x 2, a fixed table of positions, and blocks whose norms and gates
are set by the time and the class (adaLN-zero, Peebles & Xie 2022, 2212.09748). Times run from 0
(noise) to 1 (data) and the output is dx/dt. Rebuilt from the published code's behaviour; checked
against it by golden files (`replay`, tests/test_sit.py). The samplers are those of
`generators.diffusion`.

Letters: R rows · H W C latents · P patch side · T = (H / P) (W / P) tokens · D width · L layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models import vit
from vtts_jax.models.stacked import scan_blocks, stack_blocks

EPS = 1e-6  # of every norm
FREQUENCIES = 256  # features of a time
LARGEST_PERIOD = 10000  # the time in 0 .. 1 is not scaled, so most of the features hardly move


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults but for width, layers and heads are those of the released 256 px model.

  Attributes:
    size: H = W of the latents. channels: C.
    classes: the table has one more row, the null class, which has the number `classes`.
    learn_sigma: the network has twice the channels; the second half is not used (it was trained
      for DiT's variance).

  Raises:
    ConfigError: heads that do not divide the width, or patches that do not divide the size.
  """

  width: int
  layers: int
  heads: int
  size: int = 32
  channels: int = 4
  patch: int = 2
  classes: int = 1000
  learn_sigma: bool = True

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')
    if self.width % 4:
      raise ConfigError(f'width={self.width}: must be a multiple of 4 (sines and cosines, 2 axes)')
    if self.size % self.patch:
      raise ConfigError(f'size={self.size}: must be a multiple of patch={self.patch}')

  @property
  def tokens(self) -> int:
    """T."""
    return (self.size // self.patch) ** 2

  @property
  def outputs(self) -> int:
    """Channels that the network computes."""
    return self.channels * (2 if self.learn_sigma else 1)


SIZES = {
  'tiny': Config(width=24, layers=2, heads=2, size=8, channels=3, classes=10),
  's2': Config(width=384, layers=12, heads=6),
  'b2': Config(width=768, layers=12, heads=12),
  'l2': Config(width=1024, layers=24, heads=16),
  'xl2': Config(width=1152, layers=28, heads=16),  # the one that is released, at 256 px
  'xl2_512': Config(width=1152, layers=28, heads=16, size=64),
}


def plain_norm(x):
  """Layer norm over the last axis without weights, in float32; the dtype stays."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS)).astype(x.dtype)


def modulate(x, shift, scale):
  """`x [R, T, D]` normed, scaled and shifted by `[R, D]` each."""
  return plain_norm(x) * (1 + scale[:, None]) + shift[:, None]


def time_features(t):
  """Times `[R]` -> `[R, 256]` float32: cosines, then sines."""
  half = FREQUENCIES // 2
  rates = np.exp(-math.log(LARGEST_PERIOD) * np.arange(half, dtype=np.float32) / half)
  args = t.astype(jnp.float32)[:, None] * rates
  return jnp.concatenate([jnp.cos(args), jnp.sin(args)], -1)


def position_table(c: Config) -> np.ndarray:
  """The fixed positions `[T, D]` float32; checkpoints hold the same numbers.

  The first half of the channels is the column and the second the row, each with sines first.
  """
  side, quarter = c.size // c.patch, c.width // 4
  rates = 1 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
  angles = np.arange(side)[:, None] * rates  # [side, D / 4]
  axis = np.concatenate([np.sin(angles), np.cos(angles)], 1)
  rows, columns = np.repeat(axis, side, 0), np.tile(axis, (side, 1))
  return np.concatenate([columns, rows], 1).astype(np.float32)


class Block(nnx.Module):
  """`__call__(x [R, T, D], condition [R, D]) -> [R, T, D]`."""

  def __init__(self, c: Config, *, rngs):
    self.heads, d = c.heads, c.width
    self.qkv, self.out = nnx.Linear(d, 3 * d, rngs=rngs), nnx.Linear(d, d, rngs=rngs)
    self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)
    self.adaln = nnx.Linear(d, 6 * d, rngs=rngs)

  def __call__(self, x, condition):
    # shift, scale, gate of the attention, then of the feed-forward
    parts = jnp.split(self.adaln(jax.nn.silu(condition)), 6, -1)  # [R, D] each
    y = self.qkv(modulate(x, parts[0], parts[1]))
    y = self.out(vit.multi_head_attention(*jnp.split(y, 3, -1), self.heads))
    x = x + parts[2][:, None] * y
    y = self.up(modulate(x, parts[3], parts[4]))
    return x + parts[5][:, None] * self.down(jax.nn.gelu(y, approximate=True))


class SiT(nnx.Module):
  """`__call__(x [R, H, W, C], t [R], labels [R]) -> velocity [R, H, W, C]`, float32."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    d = c.width
    linear = lambda inner, outer: nnx.Linear(inner, outer, rngs=rngs)
    self.patch = linear(c.patch**2 * c.channels, d)
    # read from the checkpoint and not made here, since another resolution's may be interpolated
    self.position = nnx.Param(jnp.asarray(position_table(c)))
    self.time_in, self.time_out = linear(FREQUENCIES, d), linear(d, d)
    self.classes = nnx.Embed(c.classes + 1, d, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.last = linear(d, 2 * d)
    self.to_patch = linear(d, c.patch**2 * c.outputs)

  def embed_condition(self, t, labels):
    """Times `[R]` and classes `[R]` (the number `classes` is none) -> `[R, D]`."""
    features = time_features(t).astype(self.time_in.kernel.dtype)
    time = self.time_out(jax.nn.silu(self.time_in(features)))
    # nnx.Embed would answer in the dtype that it was made in
    return time + self.classes.embedding[...][labels]

  def __call__(self, x, t, labels):
    c = self.config
    condition = self.embed_condition(t, labels)
    # the dtype of the weights is that of all but norms, softmax and the result
    patches = vit.split_patches(x.astype(self.patch.kernel.dtype), c.patch)
    x = self.patch(patches) + self.position[...]
    x, _ = scan_blocks(self.blocks, lambda block, x, _: (block(x, condition), None), x)
    shift, scale = jnp.split(self.last(jax.nn.silu(condition)), 2, -1)
    x = join_patches(self.to_patch(modulate(x, shift, scale)), c)
    return x[..., : c.channels].astype(jnp.float32)


def join_patches(x, c: Config):
  """Patches `[R, T, P P C']` -> `[R, H, W, C']`; channels are the fastest in a patch."""
  side = c.size // c.patch
  x = x.reshape(len(x), side, side, c.patch, c.patch, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(len(x), c.size, c.size, -1)


def build_model(config: Config, seed=0) -> SiT:
  """A random model; under `modules.abstract_module` no memory is used."""
  return SiT(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config) -> int:
  """Matmul FLOPs of one velocity of one row (one stream of guidance)."""
  d, t = c.width, c.tokens
  block = t * (24 * d * d + 4 * t * d) + 12 * d * d  # products of tokens; adaLN of the row
  ends = 2 * t * d * c.patch**2 * (c.channels + c.outputs)
  return c.layers * block + ends + 2 * d * (FREQUENCIES + d) + 4 * d * d
