"""LlamaGen's tokenizer: a convolutional VQ autoencoder (Sun et al. 2024, arXiv 2406.06525), which
Janus uses too.

The network is the autoencoder of latent diffusion (`models.autoencoder_kl`) with attention also at
the lowest resolution. A cell is quantised to the nearest of the codes, both on the unit sphere.
Checked against the PyTorch reference by the golden files `llamagen*.npz` (models.llamagen.replay).

Letters: R pictures · H W pixels · g h sides of the grid of tokens · C = g h tokens · V codes ·
E channels of a code · Z latent channels · D channels inside.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.autoencoder_kl.modeling import Attention, Resnet, conv_layer, group_norm


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, under the reference's names; the defaults are those of VQ-16.

  Raises:
    ConfigError: channels that the groups do not divide.
  """

  codebook_size: int = 16384  # V
  codebook_embed_dim: int = 8  # E
  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2  # the decoder has one more
  z_channels: int = 256  # Z
  norm_num_groups: int = 32

  def __post_init__(self):
    if self.ch % self.norm_num_groups:
      raise ConfigError(f'ch={self.ch}: must be a multiple of {self.norm_num_groups}')

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every resolution, finest first."""
    return tuple(self.ch * m for m in self.ch_mult)

  @property
  def downscale(self) -> int:
    """Pixels of a token's side."""
    return 2 ** (len(self.ch_mult) - 1)


SIZES = {
  'tiny': Config(codebook_size=16, codebook_embed_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1,
                 z_channels=8, norm_num_groups=4),
  'vq16': Config(),
  'vq8': Config(ch_mult=(1, 2, 2, 4)),
}  # fmt: skip


def unit_codes(x):
  """Scales codes `[..., E]` to length 1, computed in float32."""
  y = x.astype(jnp.float32)
  # torch's normalize divides by at least 1e-12
  return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)


class Level(nnx.Module):
  """Residual blocks of one resolution, each followed by attention at the lowest one."""

  def __init__(self, inner, outer, count, c, *, lowest, rngs):
    widths = [inner] + [outer] * count
    self.res = nnx.List([Resnet(a, b, c, rngs=rngs) for a, b in zip(widths, widths[1:])])
    attention = [Attention(outer, c, rngs=rngs) for _ in range(count)] if lowest else None
    self.attn = None if attention is None else nnx.List(attention)

  def __call__(self, x):  # [R, H, W, D] -> [R, H, W, D']
    for i, resnet in enumerate(self.res):
      x = resnet(x)
      x = x if self.attn is None else self.attn[i](x)
    return x


def make_middle(width, c, rngs):
  """Returns residual block, attention, residual block."""
  kinds = Resnet, Attention, Resnet
  args = (width, width, c), (width, c), (width, width, c)
  return nnx.List([kind(*a, rngs=rngs) for kind, a in zip(kinds, args)])


class Encoder(nnx.Module):
  """Pictures to latents."""

  def __init__(self, c, *, rngs):
    inner, end = c.widths[0], len(c.widths) - 1
    self.conv_in = conv_layer(3, inner, 3, rngs)
    levels, samplers = [], []
    for i, width in enumerate(c.widths):
      levels.append(Level(inner, width, c.num_res_blocks, c, lowest=i == end, rngs=rngs))
      # zeros at the right and at the bottom only, as the reference pads
      pad = ((0, 1), (0, 1))
      samplers += [conv_layer(width, width, 3, rngs, 2, pad)] if i < end else []
      inner = width
    self.conv_blocks, self.samplers = nnx.List(levels), nnx.List(samplers)
    self.mid = make_middle(inner, c, rngs)
    self.norm_out = group_norm(inner, c, rngs)
    self.conv_out = conv_layer(inner, c.z_channels, 3, rngs)

  def __call__(self, x):  # [R, H, W, 3] -> [R, g, h, Z]
    x = self.conv_in(x)
    for i, level in enumerate(self.conv_blocks):
      x = level(x)
      x = self.samplers[i](x) if i < len(self.samplers) else x
    for layer in self.mid:
      x = layer(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
  """Latents to pictures; `conv_blocks` stand in the order of their use, the coarsest first."""

  def __init__(self, c, *, rngs):
    inner = c.widths[-1]
    self.conv_in = conv_layer(c.z_channels, inner, 3, rngs)
    self.mid = make_middle(inner, c, rngs)
    levels, samplers = [], []
    for i, width in enumerate(reversed(c.widths)):
      levels.append(Level(inner, width, c.num_res_blocks + 1, c, lowest=i == 0, rngs=rngs))
      samplers += [conv_layer(width, width, 3, rngs)] if i < len(c.widths) - 1 else []
      inner = width
    self.conv_blocks, self.samplers = nnx.List(levels), nnx.List(samplers)
    self.norm_out, self.conv_out = group_norm(inner, c, rngs), conv_layer(inner, 3, 3, rngs)

  def __call__(self, x):  # [R, g, h, Z] -> [R, H, W, 3]
    x = self.conv_in(x)
    for layer in self.mid:
      x = layer(x)
    for i, level in enumerate(self.conv_blocks):
      x = level(x)
      x = self.samplers[i](x.repeat(2, 1).repeat(2, 2)) if i < len(self.samplers) else x
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Tokenizer(nnx.Module):
  """Pictures `[R, H, W, 3]` in -1..1 (the decoder does not clip) and ids `[R, C]`, row by row."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.encoder, self.decoder = Encoder(c, rngs=rngs), Decoder(c, rngs=rngs)
    self.quant_conv = conv_layer(c.z_channels, c.codebook_embed_dim, 1, rngs)
    self.post_quant_conv = conv_layer(c.codebook_embed_dim, c.z_channels, 1, rngs)
    shape = c.codebook_size, c.codebook_embed_dim
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), shape))

  def encode_latents(self, images):
    """`[R, H, W, 3]` -> latents before the quantiser, `[R, g, h, E]`."""
    return self.quant_conv(self.encoder(images.astype(self.quant_conv.kernel.dtype)))

  def code_distances(self, latents):
    """Squared distances `[..., V]` of latents `[..., E]` to all codes, on the unit sphere."""
    z, codes = unit_codes(latents), unit_codes(self.codebook[...])
    product = jnp.einsum('...e,ve->...v', z, codes, precision='highest')
    return (z * z).sum(-1, keepdims=True) + (codes * codes).sum(-1) - 2 * product

  def encode(self, images):
    """`[R, H, W, 3]` -> ids `[R, C]` int32; ties go to the lowest index."""
    latents = self.encode_latents(images)
    ids = jnp.argmin(self.code_distances(latents), -1).astype(jnp.int32)
    return ids.reshape(len(ids), -1)

  def look_up(self, ids):
    """Ids `[...]` -> codes `[..., E]` of length 1."""
    return unit_codes(self.codebook[...][ids]).astype(self.codebook.dtype)

  def decode(self, ids, width: int | None = None):
    """Ids `[R, C]` -> pictures `[R, H, W, 3]` of `width` tokens in a row, a square by default."""
    width = round(ids.shape[1] ** 0.5) if width is None else width
    if ids.shape[1] % width:
      raise ConfigError(f'width={width}: must divide the {ids.shape[1]} tokens of a picture')
    codes = self.look_up(ids).reshape(len(ids), -1, width, self.config.codebook_embed_dim)
    return self.decoder(self.post_quant_conv(codes)).astype(jnp.float32)


def build_model(config: Config, seed=0) -> Tokenizer:
  """Builds a random tokenizer; inside `modules.abstract_module` it uses no memory."""
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def count_decode_flops(c: Config, side: int) -> int:
  """FLOPs of the convolutions and matmuls of `decode` for one picture of `side` x `side` tokens."""

  def conv(a, b, size=3):
    return 2 * (side * size) ** 2 * a * b

  def resnet(a, b):
    return conv(a, b) + conv(b, b) + (a != b) * conv(a, b, 1)

  inner = c.widths[-1]
  attention = 4 * conv(inner, inner, 1) + 4 * side**4 * inner
  total = conv(c.codebook_embed_dim, c.z_channels, 1) + conv(c.z_channels, inner)
  # the middle and every residual block of the coarsest resolution have attention
  total += 2 * resnet(inner, inner) + (c.num_res_blocks + 2) * attention
  for i, width in enumerate(reversed(c.widths)):
    total += resnet(inner, width) + c.num_res_blocks * resnet(width, width)
    inner = width
    if i < len(c.widths) - 1:
      side *= 2
      total += conv(width, width)
  return total + conv(inner, 3)
