"""FlexTok (Bachmann et al. 2025, arXiv 2502.13967): pictures as an ordered sequence of tokens.

The encoder appends 256 registers to the patches of a VAE latent and quantises their outputs. The
decoder is a flow network over noisy patches that reads any number of registers: those past `keep`
are one learned vector, as in training with nested dropout. The grid variant (GridTok) has no
registers; there a patch is a token. Rebuilt from the published code's behaviour, and checked
against the PyTorch reference by golden files: `replay.py`, tests/test_flextok.py.

Letters: R images · H W C latents · P patches · K registers · T = P + K · L layers · D width ·
h heads · d = D / h · Q dimensions of a code.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.flextok import fsq
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.vit import multi_head_attention, random_table

EPS = 1e-5  # epsilon of every norm
FREQUENCIES = 256  # number of features of a time


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options; the defaults are those of the released models.

  Attributes:
    channels: C of the VAE latent.
    size: H = W of the noise that the decoder starts from.
    patch: side of a patch.
    grid: largest side of the grid of patches, which the tables of positions have.
    registers: K; 0 is the grid variant.
    levels: levels of the quantiser.
    encoder_width, encoder_layers, decoder_width, decoder_layers: sizes of the two halves.
    head: d.
    qk_norm: whether queries and keys are normed per head.
    max_timestep: the frequencies of the time are scaled by 1000 / this.
    streams: modulations of a decoder block: 2 (patches and registers apart) or 1.
    part: '' for the whole, 'encoder' or 'decoder'; a search only decodes.

  Raises:
    ConfigError: sizes that do not fit each other, or `streams` that the variant does not have.
  """

  channels: int = 16
  size: int = 32
  patch: int = 2
  grid: int = 16
  registers: int = 256
  levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
  encoder_width: int = 1152
  encoder_layers: int = 18
  decoder_width: int = 1792
  decoder_layers: int = 28
  head: int = 64  # d
  qk_norm: bool = True
  max_timestep: float = 1000.0
  streams: int = 2
  part: str = ''

  def __post_init__(self):
    for name in ('encoder_width', 'decoder_width'):
      if getattr(self, name) % self.head:
        raise ConfigError(f'{name}={getattr(self, name)}: must be a multiple of head={self.head}')
    if self.size % self.patch or self.size // self.patch > self.grid:
      raise ConfigError(
        f'size={self.size}: must be a multiple of patch={self.patch}, at most '
        f'{self.patch * self.grid} (grid={self.grid} patches)'
      )
    if self.streams not in ((1, 2) if self.registers else (1,)):
      raise ConfigError(
        f'streams={self.streams}: must be 1, or with registers (registers={self.registers}) 1 or 2'
      )

  @property
  def tokens(self):
    """Number of tokens of a picture."""
    return self.registers or (self.size // self.patch) ** 2

  @property
  def codes(self):
    """Number of different tokens."""
    return fsq.count_codes(self.levels)


def _of_depth(encoder, decoder, **options):
  return Config(
    encoder_width=64 * encoder,
    encoder_layers=encoder,
    decoder_width=64 * decoder,
    decoder_layers=decoder,
    **options,
  )


SIZES = {
  'tiny': Config(
    channels=3, size=8, grid=4, registers=8, levels=(4, 4), encoder_width=8, encoder_layers=1,
    decoder_width=16, decoder_layers=2, head=8,
  ),
  # the released tokens with a decoder that a laptop can run, to time searches
  'small': Config(decoder_width=256, decoder_layers=4),
  'flextok_d12_d12_in1k': _of_depth(encoder=12, decoder=12),
  'flextok_d18_d18_in1k': _of_depth(encoder=18, decoder=18),
  'flextok_d18_d28_in1k': _of_depth(encoder=18, decoder=28),
  'flextok_d18_d28_dfn': _of_depth(encoder=18, decoder=28),
  'gridtok_d18_d28': _of_depth(encoder=18, decoder=28, registers=0, streams=1),
}  # fmt: skip
PARTS = ('encoder', 'decoder')


def part_of(c: Config, part: str) -> Config:
  """Returns the config of one half."""
  return dataclasses.replace(c, part=part)


def _linear_layer(inner, outer, rngs, bias=False):
  return nnx.Linear(inner, outer, use_bias=bias, rngs=rngs)


def plain_norm(x):
  """Applies a layer norm over the last axis without weights, computed in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS)).astype(x.dtype)


def split_patches(x, side):
  """`[R, H, W, C]` -> `[R, H / side, W / side, side * side * C]`, a patch's rows first."""
  R, H, W, C = x.shape
  x = x.reshape(R, H // side, side, W // side, side, C)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(R, H // side, W // side, side * side * C)


def join_patches(x, side):
  """Inverts `split_patches`."""
  R, h, w, _ = x.shape
  x = x.reshape(R, h, w, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(R, h * side, w * side, -1)


def time_features(t, max_timestep):
  """Times `[R]` in [0, 1] -> features `[R, 256]` float32: cosines, then sines.

  The largest period is 256.
  """
  half = FREQUENCIES // 2
  # float32 throughout, as the reference: phases reach 1000 radians, where rounding shows
  rates = np.exp(-math.log(256) * np.arange(half, dtype=np.float32) / half)
  args = t.astype(jnp.float32)[:, None] * (rates * np.float32(1000 / max_timestep))
  return jnp.concatenate([jnp.cos(args), jnp.sin(args)], -1)


class Attention(nnx.Module):
  """Self-attention with queries and keys normed per head; scores are scaled by 8 / d."""

  def __init__(self, width, c, *, rngs):
    self.head, self.qk_norm = c.head, c.qk_norm
    self.wq, self.wk, self.wv, self.proj = (_linear_layer(width, width, rngs) for _ in range(4))

  def __call__(self, x, bias):  # [R, T, D], None or [T, T] -> [R, T, D]
    q, k, v = self.wq(x), self.wk(x), self.wv(x)
    if self.qk_norm:
      q, k = (plain_norm(y.reshape(*y.shape[:-1], -1, self.head)).reshape(y.shape) for y in (q, k))
    # `multi_head_attention` divides by sqrt d; the reference's scale is that only at d = 64
    scale = 8 * self.head**-0.5
    return self.proj(multi_head_attention(q * scale, k, v, x.shape[-1] // self.head, bias))


class SwiGLU(nnx.Module):
  """A feed-forward layer gated by silu, 8 D / 3 wide inside."""

  def __init__(self, width, *, rngs):
    # cut and not rounded, as the reference
    hidden = int(2 * 4 * width / 3)
    self.fc1, self.fc3 = _linear_layer(width, hidden, rngs), _linear_layer(width, hidden, rngs)
    self.fc2 = _linear_layer(hidden, width, rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.silu(self.fc1(x)) * self.fc3(x))


class Block(nnx.Module):
  """A pre-norm block of the encoder (`streams` 0) or a modulated one of the decoder.

  Modulated blocks have adaptive norms and gates (DiT, arXiv 2212.09748): one for all tokens
  (`streams` 1), or one each for patches and registers (2).
  """

  def __init__(self, width, streams, c, *, rngs):
    self.streams = streams
    self.attn, self.mlp = Attention(width, c, rngs=rngs), SwiGLU(width, rngs=rngs)
    self.adaln = _linear_layer(width, streams * 6 * width, rngs, bias=True) if streams else None

  def __call__(self, x, bias=None, time=None, is_patch=None):
    """`x [R, T, D]`; `bias` None or `[T, T]`; `time [R or 1, D]`; `is_patch [T]` bool."""
    if not self.streams:
      x = x + self.attn(plain_norm(x), bias)
      return x + self.mlp(plain_norm(x))
    m = self.adaln(jax.nn.silu(time)).reshape(time.shape[0], self.streams, 6, 1, -1)
    # the axes of m: row, stream, which modulation, token, channel
    if self.streams == 2:
      m = jnp.where(is_patch[:, None], m[:, 0], m[:, 1])  # [R or 1, 6, T, D]
    else:
      m = m[:, 0]
    gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = jnp.moveaxis(m, 1, 0)
    x = x + gate_attn * self.attn(plain_norm(x) * (1 + scale_attn) + shift_attn, bias)
    return x + gate_mlp * self.mlp(plain_norm(x) * (1 + scale_mlp) + shift_mlp)


class Encoder(nnx.Module):
  """Latents to tokens."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    D = c.encoder_width
    self.patch = _linear_layer(c.patch**2 * c.channels, D, rngs, bias=True)
    # positions of the largest grid; a smaller one uses its upper left corner
    self.places = random_table(rngs, c.grid, c.grid, D)
    self.registers = random_table(rngs, c.registers, D) if c.registers else None
    self.blocks = stack_blocks(lambda rngs: Block(D, 0, c, rngs=rngs), c.encoder_layers, rngs)
    self.to_code = _linear_layer(D, len(c.levels), rngs, bias=True)

  def embed_patches(self, latents):
    """Latents `[R, H, W, C]` -> tokens of the patches `[R, h, w, D]`, with their positions."""
    x = self.patch(split_patches(latents.astype(self.patch.kernel.dtype), self.config.patch))
    return x + self.places[: x.shape[1], : x.shape[2]]

  def unquantized_codes(self, latents):
    """Latents `[R, H, W, C]` -> what is quantised, `[R, K, Q]`.

    In the grid variant K is the number of patches, row by row.
    """
    x = self.embed_patches(latents)
    R, h, w, D = x.shape
    x, K, bias = x.reshape(R, h * w, D), self.config.registers, None
    if K:
      x = jnp.concatenate([x, jnp.broadcast_to(self.registers[...], (R, K, D))], 1)
      # all tokens see the patches; a register also sees itself and the registers before it
      sees = np.tri(h * w + K, dtype=bool)
      sees[:, : h * w] = True
      bias = jnp.where(sees, 0.0, -jnp.inf)
    x, _ = scan_blocks(self.blocks, lambda block, x, _: (block(x, bias), None), x)
    return self.to_code(plain_norm(x[:, -K:] if K else x))

  def __call__(self, latents):
    """Scaled VAE latents `[R, H, W, C]` -> ids `[R, K]` int32, coarse to fine."""
    levels = self.config.levels
    return fsq.ids_of(fsq.quantize_codes(self.unquantized_codes(latents), levels), levels)


class Decoder(nnx.Module):
  """Tokens to the flow's velocity: `embed_registers` once a picture, `__call__` once a step."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    D = c.decoder_width
    self.from_code = _linear_layer(len(c.levels), D, rngs, bias=True)
    if c.registers:
      self.register_places = random_table(rngs, c.registers, D)
      self.dropped = random_table(rngs, D)
    self.unconditional = random_table(rngs, D)
    self.patch = _linear_layer(c.patch**2 * c.channels, D, rngs, bias=True)
    self.places = random_table(rngs, c.grid, c.grid, D)
    self.time_in = _linear_layer(FREQUENCIES, D, rngs, bias=True)
    self.time_out = _linear_layer(D, D, rngs, bias=True)
    self.blocks = stack_blocks(
      lambda rngs: Block(D, c.streams, c, rngs=rngs), c.decoder_layers, rngs
    )
    self.last = _linear_layer(D, 2 * D, rngs, bias=True)
    self.to_patch = _linear_layer(D, c.patch**2 * c.channels, rngs, bias=True)

  def embed_registers(self, ids, keep=None):
    """Ids `[R, K]` int -> registers `[R, K, D]`.

    Only the first `keep` ids count (`[R]` or a scalar; None for all): the registers after them are
    one learned vector.
    """
    c = self.config
    keep = c.tokens if keep is None else keep
    # a mask and not a slice: `keep` may differ between rows and be traced
    there = jnp.arange(ids.shape[1]) < jnp.reshape(keep, (-1, 1))  # [R or 1, K]
    # the grid variant was not trained with dropped tokens: id 0 takes their place
    if not c.registers:
      ids = jnp.where(there, ids, 0)
    codes = fsq.codes_of(ids, c.levels).astype(self.from_code.kernel.dtype)
    x = self.from_code(codes)
    if not c.registers:
      return x
    return jnp.where(there[..., None], x + self.register_places[...], self.dropped[...])

  def null_registers(self):
    """Returns the unconditional pass's registers `[1, 1, D]`, to be broadcast to `[R, K, D]`."""
    return self.unconditional[...][None, None]

  def __call__(self, x, t, registers):
    """Returns the velocity `[R, H, W, C]` float32.

    Args:
      x: noisy latents `[R, H, W, C]`.
      t: times in [0, 1], where 1 is noise: `[R]`, or `[1]` if all rows share it, which computes the
        modulations once instead of R times.
      registers: `[R, K, D]`.
    """
    c = self.config
    x = self.patch(split_patches(x.astype(self.patch.kernel.dtype), c.patch))
    R, h, w, D = x.shape
    x = (x + self.places[:h, :w]).reshape(R, h * w, D)
    # in the grid variant a register belongs to a patch
    x = jnp.concatenate([x, registers], 1) if c.registers else x + registers
    # one row of modulations serves all pictures if they share the time
    features = time_features(t, c.max_timestep).astype(x.dtype)
    time = self.time_out(jax.nn.silu(self.time_in(features)))
    is_patch = np.arange(x.shape[1]) < h * w

    def run_block(block, x, _):
      return block(x, time=time, is_patch=is_patch), None

    x, _ = scan_blocks(self.blocks, run_block, x)
    # registers have done their work: only patches become velocities
    shift, scale = jnp.split(self.last(jax.nn.silu(time))[:, None], 2, -1)
    x = self.to_patch(plain_norm(x[:, : h * w]) * (1 + scale) + shift)
    return join_patches(x.reshape(R, h, w, -1), c.patch).astype(jnp.float32)


class FlexTok(nnx.Module):
  """`encoder` and `decoder`; the VAE between pictures and latents is `models.autoencoder_kl`."""

  def __init__(self, config, *, rngs):
    self.config = config
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)


def build_model(config: Config, seed=0) -> FlexTok | Encoder | Decoder:
  """Builds a random model, or the half `config.part` of one.

  Inside `modules.abstract_module` it uses no memory.
  """
  # a half has no prefix of its own in its parameters
  kind = {'': FlexTok, 'encoder': Encoder, 'decoder': Decoder}[config.part]
  return kind(config, rngs=nnx.Rngs(seed))


def count_velocity_flops(config) -> int:
  """Matmul FLOPs of one velocity of one picture, for one stream of guidance."""
  # the modulations act once a picture and are not counted
  c = config
  P, D = (c.size // c.patch) ** 2, c.decoder_width
  T = P + c.registers
  layer = 2 * T * (4 * D * D + 3 * D * int(8 * D / 3)) + 4 * T * T * D
  ends = 2 * P * D * 2 * c.patch**2 * c.channels
  return c.decoder_layers * layer + ends
