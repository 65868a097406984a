"""SD3 and SD3.5 (Esser et al. 2024, arXiv 2403.03206): MMDiT, a rectified-flow transformer.

Picture and text are two streams with weights of their own that attend jointly. The block's
modulations come from the time and the pooled text. The first blocks of SD3.5 medium have a second
attention, inside the picture only. The last block reads the text and does not write it. Checked
against diffusers' `SD3Transformer2DModel` by golden files (`replay.py`).

Letters: R rows · H W C latents · P patch side · h w patches per side · T = h w tokens of the
picture · S tokens of the text · D width · J width of the text's states · L layers · n heads ·
d = D / n · M side of the table of positions.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.vit import multi_head_attention, split_patches

EPS = 1e-6  # of every norm
FREQUENCIES = 256  # features of a time


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the names are those of the checkpoint's `config.json`.

  Attributes:
    sample_size: side of the latents that the network was made for; it scales the positions that
      `position_table` computes, and a checkpoint holds the table itself.
    num_layers: L, the last one included, which has no text stream of its own.
    joint_attention_dim: J. pooled_projection_dim: width of the pooled text.
    pos_embed_max_size: M, in patches.
    dual_attention_layers: blocks with a second attention inside the picture.
    qk_norm: whether queries and keys are RMS-normed per head.

  Raises:
    ConfigError: a width that the table of positions cannot have, or layers that do not exist.
  """

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  out_channels: int = 16
  num_layers: int = 24
  num_attention_heads: int = 24
  attention_head_dim: int = 64
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 2048
  pos_embed_max_size: int = 192
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: bool = False

  def __post_init__(self):
    if self.width % 4:
      raise ConfigError(
        f'num_attention_heads={self.num_attention_heads}: times attention_head_dim='
        f'{self.attention_head_dim} must be a multiple of 4'
      )
    beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
    if beyond or self.num_layers < 1:
      raise ConfigError(
        f'dual_attention_layers={self.dual_attention_layers}: must be in 0 .. num_layers - 1, '
        f'and num_layers={self.num_layers} at least 1'
      )

  @property
  def width(self) -> int:
    """D."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def runs(self) -> tuple[tuple[int, ...], ...]:
    """The layers but the last, in runs of neighbours that are built alike."""
    alike = itertools.groupby(range(self.num_layers - 1), lambda i: i in self.dual_attention_layers)
    return tuple(tuple(layers) for _, layers in alike)


SIZES = {
  # fits the tiny sizes of autoencoder_kl and clip, and 'tiny_wide' of t5
  'tiny': Config(
    sample_size=8, in_channels=3, out_channels=3, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, joint_attention_dim=32, pooled_projection_dim=24, pos_embed_max_size=6,
  ),
  'sd3_medium': Config(),
  'sd3_5_medium': Config(
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm=True
  ),
  'sd3_5_large': Config(num_layers=38, num_attention_heads=38, qk_norm=True),
}  # fmt: skip


# ---------------------------------------------------------------- what diffusion transformers share


def plain_norm(x, eps=EPS):
  """Layer norm over the last axis without weights, computed in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """RMS norm over the last axis with a weight, computed in float32."""

  def __init__(self, width, eps=EPS):
    self.eps = eps
    self.weight = nnx.Param(jnp.ones(width))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * self.weight[...]).astype(x.dtype)


def time_features(t):
  """Times `[R]` -> `[R, 256]` float32: cosines, then sines, of frequencies 1 .. 1 / 10000."""
  half = FREQUENCIES // 2
  # the rates are float32 as in the reference: at t = 1000 their last bit is seen in the cosine
  rates = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / half)
  angles = t.astype(jnp.float32)[:, None] * rates
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class FeatureMLP(nnx.Module):
  """Linear, SiLU, linear: what embeds a time, a guidance scale or a pooled text."""

  def __init__(self, inner, width, *, rngs):
    self.enter = nnx.Linear(inner, width, rngs=rngs)
    self.leave = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, x):  # [R, inner] -> [R, D]
    return self.leave(jax.nn.silu(self.enter(x.astype(self.enter.kernel.dtype))))


def position_table(rows, columns, width, base, scale=1.0):
  """Sines and cosines of a patch's place, `[rows, columns, width]` float32.

  Args:
    base: the sides of the table span this many patches, whatever their number.
    scale: divides the coordinates once more.
  """
  # float64 up to the sine, as the reference has it
  rates = 10000.0 ** -(np.arange(width // 4) / (width // 4))

  def encode_line(count):  # [count, width / 2]
    angles = np.arange(count)[:, None] / (count / base) / scale * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)

  # the first half of the channels tells the COLUMN, the second the row
  half = (rows, columns, width // 2)
  across = jnp.broadcast_to(encode_line(columns)[None], half)
  down = jnp.broadcast_to(encode_line(rows)[:, None], half)
  return jnp.concatenate([across, down], -1)


def join_patches(x, rows, columns, side):
  """`[R, T, P P C]`, a patch's rows first and channels last -> `[R, H, W, C]`."""
  x = x.reshape(len(x), rows, columns, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(len(x), rows * side, columns * side, -1)


# ---------------------------------------------------------------- the block


class Attention(nnx.Module):
  """One stream's projections of an attention; `out` is missing where the stream ends."""

  def __init__(self, c: Config, *, ends=False, rngs):
    self.heads = c.num_attention_heads
    self.qkv = nnx.Linear(c.width, 3 * c.width, rngs=rngs)
    self.q_norm = RMSNorm(c.attention_head_dim) if c.qk_norm else None
    self.k_norm = RMSNorm(c.attention_head_dim) if c.qk_norm else None
    self.out = None if ends else nnx.Linear(c.width, c.width, rngs=rngs)

  def project(self, x):
    """`[R, T, D]` -> queries, keys and values, each `[R, T, D]`."""
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    # the norm is taken inside each head
    if self.q_norm is not None:
      by_head = (*x.shape[:-1], self.heads, -1)
      q, k = (
        norm(y.reshape(by_head)).reshape(x.shape)
        for norm, y in ((self.q_norm, q), (self.k_norm, k))
      )
    return q, k, v

  def attend_within(self, x):  # [R, T, D]
    return self.out(multi_head_attention(*self.project(x), self.heads))


class Stream(nnx.Module):
  """The weights of one stream in a block.

  Args:
    dual: whether it has a second attention, `attn2`, among its own tokens.
    ends: whether it is only read: no output, no feed-forward.
  """

  def __init__(self, c: Config, *, dual=False, ends=False, rngs):
    D = c.width
    self.chunks = 2 if ends else 9 if dual else 6
    self.modulation = nnx.Linear(D, self.chunks * D, rngs=rngs)
    self.attn = Attention(c, ends=ends, rngs=rngs)
    self.attn2 = Attention(c, rngs=rngs) if dual else None
    self.up = None if ends else nnx.Linear(D, 4 * D, rngs=rngs)
    self.down = None if ends else nnx.Linear(4 * D, D, rngs=rngs)

  def modulations(self, condition):
    """`[R, D]` -> the chunks, each `[R, 1, D]`: shift, scale, gate of the attention, of the
    feed-forward and of `attn2`; of a stream that ends, the attention's shift and scale."""
    chunks = jnp.split(self.modulation(condition)[:, None], self.chunks, -1)
    # a stream that ends stores (scale, shift), all others (shift, scale, gate)
    return chunks[::-1] if self.chunks == 2 else chunks

  def feed_forward(self, x):  # [R, T, D]
    return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
  """One joint layer. `dual`: see `Stream`. `last`: the text is read and not written."""

  def __init__(self, c: Config, *, dual=False, last=False, rngs):
    self.image = Stream(c, dual=dual, rngs=rngs)
    self.text = Stream(c, ends=last, rngs=rngs)

  def __call__(self, image, text, condition):
    """`image [R, T, D]`, `text [R, S, D]`, `condition [R, D]` after its SiLU -> image, text."""
    # `more`: shift, scale, gate of the feed-forward, then of the second attention
    shift, scale, gate, *more = self.image.modulations(condition)
    text_shift, text_scale, *text_more = self.text.modulations(condition)
    normed = plain_norm(image)
    # the picture's tokens come before the text's
    pairs = zip(
      self.image.attn.project(normed * (1 + scale) + shift),
      self.text.attn.project(plain_norm(text) * (1 + text_scale) + text_shift),
    )
    q, k, v = (jnp.concatenate(pair, 1) for pair in pairs)
    mixed = multi_head_attention(q, k, v, self.image.attn.heads)  # [R, T + S, D]
    image = image + gate * self.image.attn.out(mixed[:, : image.shape[1]])
    if self.image.attn2 is not None:
      # it reads the norm of the picture as it was before the joint attention
      shift, scale, gate = more[3:]
      image = image + gate * self.image.attn2.attend_within(normed * (1 + scale) + shift)
    image = _add_feed_forward(self.image, image, *more[:3])
    # in the last block nothing reads the text any more, so nothing writes it
    if text_more:
      gate, *text_more = text_more
      text = text + gate * self.text.attn.out(mixed[:, -text.shape[1] :])
      text = _add_feed_forward(self.text, text, *text_more)
    return image, text


def _add_feed_forward(stream, x, shift, scale, gate):
  return x + gate * stream.feed_forward(plain_norm(x) * (1 + scale) + shift)


# ---------------------------------------------------------------- the network


class SD3(nnx.Module):
  """`__call__(x, t, text, pooled)` -> velocity.

  `runs` holds the blocks but the last, stacked where they are built alike.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    D, M = c.width, c.pos_embed_max_size
    self.patch = nnx.Linear(c.patch_size**2 * c.in_channels, D, rngs=rngs)
    # no weight is learned here, but released files hold the table, and their numbers count
    self.positions = nnx.Param(position_table(M, M, D, c.sample_size // c.patch_size))
    self.time = FeatureMLP(FREQUENCIES, D, rngs=rngs)
    self.pooled = FeatureMLP(c.pooled_projection_dim, D, rngs=rngs)
    self.words = nnx.Linear(c.joint_attention_dim, D, rngs=rngs)
    self.runs = nnx.List([_stack_run(c, layers, rngs) for layers in c.runs])
    dual = c.num_layers - 1 in c.dual_attention_layers
    self.last = Block(c, dual=dual, last=True, rngs=rngs)
    self.modulation = nnx.Linear(D, 2 * D, rngs=rngs)
    self.to_patch = nnx.Linear(D, c.patch_size**2 * c.out_channels, rngs=rngs)

  def embed_patches(self, x):
    """Latents `[R, H, W, C]` -> tokens `[R, T, D]` with their positions.

    Raises:
      ConfigError: sides that the patch does not divide, or more patches than positions.
    """
    side, most = self.config.patch_size, self.config.pos_embed_max_size
    rows, columns = x.shape[1] // side, x.shape[2] // side
    if x.shape[1] % side or x.shape[2] % side or max(rows, columns) > most:
      raise ConfigError(
        f'latent size={x.shape[1:3]}: multiples of {side} up to {side * most} are allowed'
      )
    # the table is cut out at its centre
    top, left = (most - rows) // 2, (most - columns) // 2
    places = self.positions[...][top : top + rows, left : left + columns]
    tokens = self.patch(split_patches(x.astype(self.patch.kernel.dtype), side))
    return tokens + places.reshape(rows * columns, -1)

  def embed_condition(self, t, pooled):
    """Times `[R]` in [0, 1000] and pooled texts `[R, .]` -> `[R, D]`."""
    return self.time(time_features(t)) + self.pooled(pooled)

  def embed_words(self, text):  # [R, S, J] -> [R, S, D]
    return self.words(text.astype(self.words.kernel.dtype))

  def __call__(self, x, t, text, pooled, skip_layers: tuple[int, ...] = ()):
    """Velocity.

    Args:
      x: noisy latents `[R, H, W, C]`.
      t: times `[R]`, 1000 times sigma: 1000 is noise.
      text: states of CLIP and T5 `[R, S, J]`; padding is read, too, as there is no mask.
      pooled: the pooled texts of both CLIPs `[R, .]`.
      skip_layers: blocks that change nothing (skip-layer guidance of SD3.5 medium).

    Returns:
      `[R, H, W, C]` float32.
    """
    c = self.config
    image, words = self.embed_patches(x), self.embed_words(text)
    # every modulation begins with a SiLU of the same vector
    condition = jax.nn.silu(self.embed_condition(t, pooled))
    streams = image, words

    def run_block(block, streams, skipped):
      if skipped is None:
        return block(*streams, condition), None
      # a branch that is not taken costs no time, which a `where` would not save
      run = lambda streams: block(*streams, condition)
      return jax.lax.cond(skipped, lambda streams: streams, run, streams), None

    for layers, blocks in zip(c.runs, self.runs):
      skipped = np.isin(layers, skip_layers)
      streams, _ = scan_blocks(blocks, run_block, streams, skipped if skipped.any() else None)
    if c.num_layers - 1 not in skip_layers:
      streams = self.last(*streams, condition)
    # the final modulation is (scale, shift) as well
    scale, shift = jnp.split(self.modulation(condition)[:, None], 2, -1)
    out = self.to_patch(plain_norm(streams[0]) * (1 + scale) + shift)
    rows, columns = x.shape[1] // c.patch_size, x.shape[2] // c.patch_size
    return join_patches(out, rows, columns, c.patch_size).astype(jnp.float32)


def _stack_run(c, layers, rngs):
  dual = layers[0] in c.dual_attention_layers
  return stack_blocks(lambda rngs: Block(c, dual=dual, rngs=rngs), len(layers), rngs)


def build_model(config: Config, seed=0) -> SD3:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return SD3(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, height: int, width: int, words: int) -> int:
  """Matmul FLOPs of one velocity of one row.

  Args:
    height, width: of the latents. words: S.
  """
  D, T = c.width, (height // c.patch_size) * (width // c.patch_size)
  block = 2 * (T + words) * 12 * D * D + 4 * (T + words) ** 2 * D
  dual = len(c.dual_attention_layers) * (8 * T * D * D + 4 * T * T * D)
  # the last block projects the text to q, k, v and nothing more
  missing = 2 * words * 9 * D * D
  modulations = 2 * D * D * (12 * c.num_layers + 3 * len(c.dual_attention_layers) - 4 + 2)
  ends = 2 * T * D * c.patch_size**2 * (c.in_channels + c.out_channels)
  ends += 2 * words * c.joint_attention_dim * D
  ends += 2 * D * (FREQUENCIES + c.pooled_projection_dim + 2 * D)
  return c.num_layers * block + dual - missing + modulations + ends
