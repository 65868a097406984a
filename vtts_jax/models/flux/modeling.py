"""FLUX.1 (Black Forest Labs 2024, github.com/black-forest-labs/flux): text to picture latents.

A rectified flow over 2 x 2 patches of a 16-channel autoencoder's latents. The T5 states of the
prompt and the patches first run through double blocks, which keep weights of their own for each of
the two and attend jointly. Single blocks follow, which read both as one sequence and compute
attention and feed-forward side by side. Time, guidance (dev) and the pooled CLIP text modulate
every block. Rebuilt from the published code's behaviour; checked by golden files: `replay.py`,
tests/test_flux.py.

Letters: R rows · H W latent cells · C latent channels · P = (H / 2) (W / 2) patches · S text
tokens · T = S + P · L layers · D width · h heads · d = D / h · E width of T5 · V width of CLIP's
text.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.vit import ACTIVATIONS, FeedForward, multi_head_attention

EPS = 1e-6  # of every norm
FREQUENCIES = 256  # features of a time or a guidance
PATCH = 2  # side of a patch


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options; the defaults are those of FLUX.1 [dev].

  Attributes:
    channels: C of the latents that go in. out_channels: of the velocity.
    hidden: inner width of the feed-forward layers.
    text_width: E. pooled_width: V.
    axes: dimensions of a head that encode the sequence's number (always 0), the row, the column.
    theta: base of the rotary frequencies.
    has_guidance: whether the guidance scale is an input of the network.
    qkv_bias: of the double blocks; single blocks always have one.

  Raises:
    ConfigError: heads do not divide the width, or the axes do not make up a head.
  """

  channels: int = 16
  out_channels: int = 16
  width: int = 3072
  heads: int = 24
  hidden: int = 12288
  double_layers: int = 19
  single_layers: int = 38
  text_width: int = 4096
  pooled_width: int = 768
  axes: tuple[int, ...] = (16, 56, 56)
  theta: float = 10000.0
  has_guidance: bool = True
  qkv_bias: bool = True

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')
    if len(self.axes) != 3 or any(n % 2 for n in self.axes) or sum(self.axes) != self.head:
      raise ConfigError(
        f'axes={self.axes}: must be three even numbers whose sum is width / heads = {self.head}'
      )

  @property
  def head(self) -> int:
    """Width of a head, d."""
    return self.width // self.heads


SIZES = {
  # fits the tiny sizes of autoencoder_kl, t5 and clip
  'tiny': Config(
    channels=3, out_channels=3, width=16, heads=2, hidden=32, double_layers=2, single_layers=2,
    text_width=8, pooled_width=16, axes=(4, 2, 2),
  ),
  'dev': Config(),
  'schnell': Config(has_guidance=False),
}  # fmt: skip


def pack_latents(latents):
  """Latents `[R, H, W, C]` -> patches `[R, P, 4 C]`, row by row; the channel counts slowest."""
  R, H, W, C = latents.shape
  x = latents.reshape(R, H // PATCH, PATCH, W // PATCH, PATCH, C)
  return x.transpose(0, 1, 3, 5, 2, 4).reshape(R, -1, C * PATCH**2)


def unpack_latents(patches, height: int, width: int):
  """The inverse of `pack_latents` for latents of `height` x `width` cells."""
  h, w = height // PATCH, width // PATCH
  x = patches.reshape(len(patches), h, w, -1, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(len(patches), height, width, -1)


def token_positions(text: int, rows: int, columns: int) -> np.ndarray:
  """Positions `[T, 3]` of (sequence, row, column): text tokens have none, so they are 0."""
  positions = np.zeros((text + rows * columns, 3), np.float32)
  grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing='ij'), -1)
  positions[text:, 1:] = grid.reshape(-1, 2)
  return positions


def rotary_tables(c: Config, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines `[T, d / 2]` of the angles of each pair, at positions `[T, 3]`."""
  angles = [
    positions[:, i, None] / c.theta ** (np.arange(0, n, 2, dtype=np.float64) / n)
    for i, n in enumerate(c.axes)
  ]
  # shapes alone decide the angles, so they are made in float64 on the host, as the reference does
  angles = np.concatenate(angles, -1)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def time_features(t):
  """Times or guidance scales `[R]` -> `[R, 256]` float32: cosines, then sines."""
  half = FREQUENCIES // 2
  # angles reach thousands, so the last bit counts: float32 exponents as in the reference, but a
  # better exponential than numpy's of float32, and the factor 1000 on the time, not on the rates
  exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / half
  rates = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = (1000 * t.astype(jnp.float32))[:, None] * rates
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def plain_norm(x):
  """Layer norm over the last axis without weights, computed in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS)).astype(x.dtype)


def modulate(x, shift, scale):
  """The norm of an adaptive block: `x [R, T, D]`, `shift` and `scale` `[R or 1, 1, D]`."""
  return plain_norm(x) * (1 + scale) + shift


class Embedder(nnx.Module):
  """`[R, inner] -> [R, D]`, two layers."""

  def __init__(self, inner, width, *, rngs):
    self.first = nnx.Linear(inner, width, rngs=rngs)
    self.second = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, x):
    return self.second(jax.nn.silu(self.first(x)))


class Modulation(nnx.Module):
  """`condition [R, D]` -> `count` of shift, scale, gate ..., `[count, R, 1, D]`."""

  def __init__(self, width, count, *, rngs):
    self.project = nnx.LinearGeneral(width, (count, width), rngs=rngs)

  def __call__(self, condition):
    return jnp.moveaxis(self.project(jax.nn.silu(condition))[:, :, None], 1, 0)


class Heads(nnx.Module):
  """Queries, keys and values; queries and keys are normed per head and rotated by their place.

  The reference rotates the pairs of neighbouring dimensions 2 i, 2 i + 1 of a head. Here the first
  elements of all pairs come first, because strided lanes are slow on a TPU. `convert` reorders the
  weights of queries and keys once; their products do not change.
  """

  def __init__(self, c: Config, bias=True, *, rngs):
    self.head = c.head
    self.qkv = nnx.LinearGeneral(c.width, (3, c.width), use_bias=bias, rngs=rngs)
    self.query_scale, self.key_scale = nnx.Param(jnp.ones(c.head)), nnx.Param(jnp.ones(c.head))

  def __call__(self, x, tables=None):  # [R, T, D], two of [T, d / 2] -> three of [R, T, D]
    q, k, v = jnp.moveaxis(self.qkv(x), -2, 0)
    q = self._norm_and_rotate(q, self.query_scale[...], tables)
    return q, self._norm_and_rotate(k, self.key_scale[...], tables), v

  def _norm_and_rotate(self, x, scale, tables):
    y = x.reshape(*x.shape[:2], -1, self.head).astype(jnp.float32)  # [R, T, h, d]
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS) * scale
    if tables is not None:
      cos, sin = (table[:, None] for table in tables)
      a, b = jnp.split(y, 2, -1)
      y = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    return y.reshape(x.shape).astype(x.dtype)


class Stream(nnx.Module):
  """One side of a double block, text or picture: all of it but the joint attention."""

  def __init__(self, c: Config, *, rngs):
    self.modulation = Modulation(c.width, 6, rngs=rngs)
    self.attn = Heads(c, c.qkv_bias, rngs=rngs)
    self.out = nnx.Linear(c.width, c.width, rngs=rngs)
    self.ffn = FeedForward(c.width, c.hidden, 'gelu_tanh', rngs=rngs)

  def add_branches(self, x, mixed, modulations):
    """Adds what attention mixed `[R, T, D]`, then the feed-forward, to `x [R, T, D]`."""
    _, _, gate, shift_ffn, scale_ffn, gate_ffn = modulations
    x = x + gate * self.out(mixed)
    return x + gate_ffn * self.ffn(modulate(x, shift_ffn, scale_ffn))


class DoubleBlock(nnx.Module):
  """Text and picture with weights of their own; each token attends to all of both."""

  def __init__(self, c: Config, *, rngs):
    self.heads = c.heads
    self.image, self.text = Stream(c, rngs=rngs), Stream(c, rngs=rngs)

  def __call__(self, image, text, condition, tables):
    """`image [R, P, D]`, `text [R, S, D]`, `condition [R or 1, D]` -> image and text."""
    by_image, by_text = self.image.modulation(condition), self.text.modulation(condition)
    # a text token stands at position 0, where the rotation does nothing
    sides = (
      self.text.attn(modulate(text, *by_text[:2])),
      self.image.attn(modulate(image, *by_image[:2]), tables),
    )
    q, k, v = (jnp.concatenate(pair, 1) for pair in zip(*sides))  # text first, as in the reference
    mixed = multi_head_attention(q, k, v, self.heads)
    mixed_text, mixed_image = jnp.split(mixed, [text.shape[1]], 1)
    image = self.image.add_branches(image, mixed_image, by_image)
    return image, self.text.add_branches(text, mixed_text, by_text)


class SingleBlock(nnx.Module):
  """Text and picture as one sequence; attention and feed-forward read the same normed tokens."""

  def __init__(self, c: Config, *, rngs):
    self.heads = c.heads
    self.modulation = Modulation(c.width, 3, rngs=rngs)
    self.attn = Heads(c, rngs=rngs)
    # the reference's last layer reads both branches at once; here their sum has the one bias, which
    # leaves XLA free to reduce the sum over a mesh and not each branch
    self.out = nnx.Linear(c.width, c.width, use_bias=False, rngs=rngs)
    self.up = nnx.Linear(c.width, c.hidden, rngs=rngs)
    self.down = nnx.Linear(c.hidden, c.width, use_bias=False, rngs=rngs)
    self.bias = nnx.Param(jnp.zeros(c.width))

  def __call__(self, x, condition, tables):  # [R, T, D] -> [R, T, D]
    shift, scale, gate = self.modulation(condition)
    y = modulate(x, shift, scale)
    mixed = multi_head_attention(*self.attn(y, tables), self.heads)
    branches = self.out(mixed) + self.down(ACTIVATIONS['gelu_tanh'](self.up(y)))
    return x + gate * (branches + self.bias[...])


class Flux(nnx.Module):
  """The velocity network. Time 1 is noise, time 0 the picture's latents as the autoencoder's
  `scale_latents` gives them."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    D = c.width
    self.image_in = nnx.Linear(PATCH**2 * c.channels, D, rngs=rngs)
    self.text_in = nnx.Linear(c.text_width, D, rngs=rngs)
    self.time_in = Embedder(FREQUENCIES, D, rngs=rngs)
    self.guidance_in = Embedder(FREQUENCIES, D, rngs=rngs) if c.has_guidance else None
    self.pooled_in = Embedder(c.pooled_width, D, rngs=rngs)
    self.double_blocks = stack_blocks(
      lambda rngs: DoubleBlock(c, rngs=rngs), c.double_layers, rngs
    )
    self.single_blocks = stack_blocks(
      lambda rngs: SingleBlock(c, rngs=rngs), c.single_layers, rngs
    )
    self.last_modulation = Modulation(D, 2, rngs=rngs)
    self.image_out = nnx.Linear(D, PATCH**2 * c.out_channels, rngs=rngs)

  def embed_condition(self, t, pooled, guidance=None):
    """What modulates the blocks, `[R, D]`; arguments as in `__call__`."""
    dtype = self.image_in.kernel.dtype
    condition = self.time_in(time_features(t).astype(dtype)) + self.pooled_in(pooled.astype(dtype))
    if (guidance is None) == self.config.has_guidance:
      allowed = 'a number (this model reads it)' if self.config.has_guidance else 'None'
      raise ConfigError(f'guidance={guidance!r}: must be {allowed}')
    if guidance is None:
      return condition
    features = time_features(jnp.reshape(jnp.asarray(guidance), -1))
    return condition + self.guidance_in(features.astype(dtype))

  def __call__(self, latents, t, text, pooled, guidance=None):
    """Velocity, the slope of the latents in time.

    Args:
      latents: noisy latents `[R, H, W, C]`.
      t: times in [0, 1]: `[R]`, or `[1]` where all rows share it.
      text: T5 states `[R, S, E]`; padding is read, there is no mask.
      pooled: CLIP's pooled text `[R, V]`, before its projection.
      guidance: the distilled guidance scale, a number or `[R]`; None where the model has none.

    Returns:
      `[R, H, W, C]` float32.

    Raises:
      ConfigError: latents with an odd side; a guidance that is missing or not read.
    """
    c = self.config
    H, W = latents.shape[1:3]
    if H % PATCH or W % PATCH:
      raise ConfigError(f'latents of {H} x {W} cells: both must be multiples of {PATCH}')
    condition = self.embed_condition(t, pooled, guidance)
    image = self.image_in(pack_latents(latents).astype(condition.dtype))
    text = self.text_in(text.astype(condition.dtype))
    S = text.shape[1]
    tables = rotary_tables(c, token_positions(S, H // PATCH, W // PATCH))
    image_tables = tuple(table[S:] for table in tables)

    def run_double(block, streams, _):
      return block(*streams, condition, image_tables), None

    def run_single(block, x, _):
      return block(x, condition, tables), None

    (image, text), _ = scan_blocks(self.double_blocks, run_double, (image, text))
    x, _ = scan_blocks(self.single_blocks, run_single, jnp.concatenate([text, image], 1))
    x = self.image_out(modulate(x[:, S:], *self.last_modulation(condition)))
    return unpack_latents(x, H, W).astype(jnp.float32)


def build_model(config: Config, seed=0) -> Flux:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return Flux(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, height: int, width: int, words: int) -> int:
  """Matmul FLOPs of one velocity of one picture of `height` x `width` latent cells, with `words`
  tokens of text."""
  D, P = c.width, height // PATCH * (width // PATCH)
  T = P + words
  # a block of either kind: four D x D matrices and a feed-forward for each token, and attention
  block = 2 * T * (4 * D * D + 2 * D * c.hidden) + 4 * T * T * D
  modulations = 2 * D * D * (12 * c.double_layers + 3 * c.single_layers + 2)
  ends = 2 * D * (P * PATCH**2 * (c.channels + c.out_channels) + words * c.text_width)
  embedders = 2 * D * (c.pooled_width + D + (1 + c.has_guidance) * (FREQUENCIES + D))
  return (c.double_layers + c.single_layers) * block + modulations + ends + embedders
