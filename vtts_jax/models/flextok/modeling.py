"""FlexTok (Bachmann et al. 2025, arXiv 2502.13967): pictures as an ordered sequence of tokens.

The encoder appends 256 registers to the patches of a VAE latent and quantises their outputs; the
decoder is a flow network over noisy patches that reads the registers, any number of them: those
past `keep` are one learned vector, as in training with nested dropout. Rebuilt from the published
code's behaviour; checked against the PyTorch reference by golden files: `replay.py`,
tests/test_flextok.py. The grid variant (GridTok) has no registers: a patch is a token.

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
from vtts_jax.models.stacked import scan, stack
from vtts_jax.models.vit import attend

EPS = 1e-5  # of every norm
FREQUENCIES = 256  # features of a time


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options; the defaults are those of the released models.

  Attributes:
    channels: C of the VAE latent. size: H = W of the noise that the decoder starts from.
    patch: side of a patch. grid: largest side of the grid of patches (tables of positions).
    registers: K; 0 is the grid variant.
    levels: of the quantiser.
    max_timestep: the frequencies of the time are scaled by 1000 / this.
    streams: modulations of a decoder block: 2 (patches and registers apart) or 1.
    part: '' for the whole, 'encoder' or 'decoder': a search only decodes.
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
    """Tokens of a picture."""
    return self.registers or (self.size // self.patch) ** 2

  @property
  def codes(self):
    return fsq.size(self.levels)


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
  # released tokens, and a decoder that a laptop can run: for timing searches
  'small': Config(decoder_width=256, decoder_layers=4),
  'flextok_d12_d12_in1k': _of_depth(encoder=12, decoder=12),
  'flextok_d18_d18_in1k': _of_depth(encoder=18, decoder=18),
  'flextok_d18_d28_in1k': _of_depth(encoder=18, decoder=28),
  'flextok_d18_d28_dfn': _of_depth(encoder=18, decoder=28),
  'gridtok_d18_d28': _of_depth(encoder=18, decoder=28, registers=0, streams=1),
}  # fmt: skip
PARTS = ('encoder', 'decoder')


def part_of(c: Config, part: str) -> Config:
  """The config of one half."""
  return dataclasses.replace(c, part=part)


def _linear(inner, outer, rngs, bias=False):
  return nnx.Linear(inner, outer, use_bias=bias, rngs=rngs)


def _table(rngs, *shape):
  return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def norm(x):
  """Layer norm over the last axis without weights, computed in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS)).astype(x.dtype)


def patches(x, side):
  """`[R, H, W, C]` -> `[R, H / side, W / side, side * side * C]`, rows of a patch first."""
  R, H, W, C = x.shape
  x = x.reshape(R, H // side, side, W // side, side, C)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(R, H // side, W // side, side * side * C)


def unpatch(x, side):
  """The inverse of `patches`."""
  R, h, w, _ = x.shape
  x = x.reshape(R, h, w, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(R, h * side, w * side, -1)


def time_features(t, max_timestep):
  """Times `[R]` in [0, 1] -> `[R, 256]` float32: cosines, then sines; largest period 256."""
  half = FREQUENCIES // 2
  rates = np.exp(-math.log(256) * np.arange(half, dtype=np.float32) / half)
  args = t.astype(jnp.float32)[:, None] * (rates * np.float32(1000 / max_timestep))
  return jnp.concatenate([jnp.cos(args), jnp.sin(args)], -1)


class Attention(nnx.Module):
  """Queries and keys normed per head; scores scaled by 8 / d (1 / sqrt d at d = 64)."""

  def __init__(self, width, c, *, rngs):
    self.head, self.qk_norm = c.head, c.qk_norm
    self.wq, self.wk, self.wv, self.proj = (_linear(width, width, rngs) for _ in range(4))

  def __call__(self, x, bias):  # [R, T, D], None or [T, T] -> [R, T, D]
    normed = lambda y: norm(y.reshape(*y.shape[:-1], -1, self.head)).reshape(y.shape)
    q, k, v = self.wq(x), self.wk(x), self.wv(x)
    if self.qk_norm:
      q, k = normed(q), normed(k)
    scale = 8 * self.head**-0.5  # over the 1 / sqrt d of `attend`
    return self.proj(attend(q * scale, k, v, x.shape[-1] // self.head, bias))


class SwiGLU(nnx.Module):
  def __init__(self, width, *, rngs):
    hidden = int(2 * 4 * width / 3)
    self.fc1, self.fc3 = _linear(width, hidden, rngs), _linear(width, hidden, rngs)
    self.fc2 = _linear(hidden, width, rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.silu(self.fc1(x)) * self.fc3(x))


class Block(nnx.Module):
  """`streams` 0: pre-norm block. 1 or 2: adaptive norms and gates (DiT, arXiv 2212.09748) for all
  tokens or for patches and registers apart."""

  def __init__(self, width, streams, c, *, rngs):
    self.streams = streams
    self.attn, self.mlp = Attention(width, c, rngs=rngs), SwiGLU(width, rngs=rngs)
    self.adaln = _linear(width, streams * 6 * width, rngs, bias=True) if streams else None

  def __call__(self, x, bias=None, time=None, is_patch=None):
    """`x [R, T, D]`; `bias` None or `[T, T]`; `time [R or 1, D]`; `is_patch [T]` bool."""
    if not self.streams:
      x = x + self.attn(norm(x), bias)
      return x + self.mlp(norm(x))
    m = self.adaln(jax.nn.silu(time)).reshape(time.shape[0], self.streams, 6, 1, -1)
    if self.streams == 2:
      m = jnp.where(is_patch[:, None], m[:, 0], m[:, 1])  # [R or 1, 6, T, D]
    else:
      m = m[:, 0]
    gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = jnp.moveaxis(m, 1, 0)
    x = x + gate_attn * self.attn(norm(x) * (1 + scale_attn) + shift_attn, bias)
    return x + gate_mlp * self.mlp(norm(x) * (1 + scale_mlp) + shift_mlp)


class Encoder(nnx.Module):
  """Latents to tokens."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    D = c.encoder_width
    self.patch = _linear(c.patch**2 * c.channels, D, rngs, bias=True)
    self.places = _table(rngs, c.grid, c.grid, D)
    self.registers = _table(rngs, c.registers, D) if c.registers else None
    self.blocks = stack(lambda rngs: Block(D, 0, c, rngs=rngs), c.encoder_layers, rngs)
    self.to_code = _linear(D, len(c.levels), rngs, bias=True)

  def project(self, latents):
    """`[R, H, W, C]` -> tokens of the patches `[R, h, w, D]`, with their positions."""
    x = self.patch(patches(latents.astype(self.patch.kernel.dtype), self.config.patch))
    return x + self.places[: x.shape[1], : x.shape[2]]

  def unquantized(self, latents):
    """`[R, H, W, C]` -> what is quantised, `[R, K, Q]` (grid: K = patches, row by row)."""
    x = self.project(latents)
    R, h, w, D = x.shape
    x, K, bias = x.reshape(R, h * w, D), self.config.registers, None
    if K:
      x = jnp.concatenate([x, jnp.broadcast_to(self.registers[...], (R, K, D))], 1)
      # all see the patches, a register also itself and the registers before it
      sees = np.tri(h * w + K, dtype=bool)
      sees[:, : h * w] = True
      bias = jnp.where(sees, 0.0, -jnp.inf)
    x, _ = scan(self.blocks, lambda block, x, _: (block(x, bias), None), x)
    return self.to_code(norm(x[:, -K:] if K else x))

  def __call__(self, latents):
    """Scaled VAE latents `[R, H, W, C]` -> ids `[R, K]` int32, coarse to fine."""
    levels = self.config.levels
    return fsq.ids_of(fsq.quantize(self.unquantized(latents), levels), levels)


class Decoder(nnx.Module):
  """Tokens to the velocity of the flow: `condition` once for a picture, then `__call__` a step."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    D = c.decoder_width
    self.from_code = _linear(len(c.levels), D, rngs, bias=True)
    if c.registers:
      self.register_places = _table(rngs, c.registers, D)
      self.dropped = _table(rngs, D)
    self.unconditional = _table(rngs, D)
    self.patch = _linear(c.patch**2 * c.channels, D, rngs, bias=True)
    self.places = _table(rngs, c.grid, c.grid, D)
    self.time_in = _linear(FREQUENCIES, D, rngs, bias=True)
    self.time_out = _linear(D, D, rngs, bias=True)
    self.blocks = stack(lambda rngs: Block(D, c.streams, c, rngs=rngs), c.decoder_layers, rngs)
    self.last = _linear(D, 2 * D, rngs, bias=True)
    self.to_patch = _linear(D, c.patch**2 * c.channels, rngs, bias=True)

  def condition(self, ids, keep=None):
    """Ids `[R, K]` int -> registers `[R, K, D]` of which the first `keep` (None: all; or `[R]` or
    a scalar) say something; ids after them do not matter."""
    c = self.config
    keep = c.tokens if keep is None else keep
    there = jnp.arange(ids.shape[1]) < jnp.reshape(keep, (-1, 1))  # [R or 1, K]
    if not c.registers:  # the grid variant was not trained with dropped tokens: id 0 stands there
      ids = jnp.where(there, ids, 0)
    codes = fsq.codes_of(ids, c.levels).astype(self.from_code.kernel.dtype)
    x = self.from_code(codes)
    if not c.registers:
      return x
    return jnp.where(there[..., None], x + self.register_places[...], self.dropped[...])

  def null(self):
    """Registers `[1, 1, D]` of the unconditional pass; broadcast to `[R, K, D]`."""
    return self.unconditional[...][None, None]

  def __call__(self, x, t, registers):
    """Velocity.

    Args:
      x: noisy latents `[R, H, W, C]`.
      t: times in [0, 1], 1 is noise: `[R]`, or `[1]` where all rows share it, which saves the
        modulations of all rows but one.
      registers: `[R, K, D]`.

    Returns:
      `[R, H, W, C]` float32.
    """
    c = self.config
    x = self.patch(patches(x.astype(self.patch.kernel.dtype), c.patch))
    R, h, w, D = x.shape
    x = (x + self.places[:h, :w]).reshape(R, h * w, D)
    x = jnp.concatenate([x, registers], 1) if c.registers else x + registers
    features = time_features(t, c.max_timestep).astype(x.dtype)
    time = self.time_out(jax.nn.silu(self.time_in(features)))
    is_patch = np.arange(x.shape[1]) < h * w
    body = lambda block, x, _: (block(x, time=time, is_patch=is_patch), None)
    x, _ = scan(self.blocks, body, x)
    shift, scale = jnp.split(self.last(jax.nn.silu(time))[:, None], 2, -1)
    x = self.to_patch(norm(x[:, : h * w]) * (1 + scale) + shift)
    return unpatch(x.reshape(R, h, w, -1), c.patch).astype(jnp.float32)


class FlexTok(nnx.Module):
  """`encoder` and `decoder`. The VAE between pictures and latents is `models.autoencoder_kl`."""

  def __init__(self, config, *, rngs):
    self.config = config
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)


def build(config: Config, seed=0) -> FlexTok | Encoder | Decoder:
  """A random model, or the half that `config.part` says; under `modules.abstract_module` no memory
  is used."""
  kind = {'': FlexTok, 'encoder': Encoder, 'decoder': Decoder}[config.part]
  return kind(config, rngs=nnx.Rngs(seed))


def flops_decode(config) -> int:
  """Matmul FLOPs of one velocity of one picture (one stream of guidance)."""
  c = config
  P, D = (c.size // c.patch) ** 2, c.decoder_width
  T = P + c.registers
  layer = 2 * T * (4 * D * D + 3 * D * int(8 * D / 3)) + 4 * T * T * D
  ends = 2 * P * D * 2 * c.patch**2 * c.channels
  return c.decoder_layers * layer + ends
