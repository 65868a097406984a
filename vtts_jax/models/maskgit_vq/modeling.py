"""MaskGIT's tokenizer: a convolutional VQ autoencoder without attention (Chang et al. 2022, arXiv
2202.04200), in the PyTorch version that RAR, TiTok and one RandAR use.

A cell is quantised to the nearest of the codes, which have their own lengths; there is no
convolution beside the codebook. Where a residual block changes the width, its shortcut is a 1 x 1
convolution of the block's *result*, not of its input, so that the input is not added at all: the
weights were trained with this. Checked against the PyTorch reference by the golden files
`rar*.npz` and `titok*.npz`.

Letters: R pictures · H W pixels · g h sides of the grid of tokens · T = g h tokens · V codes ·
E channels of a code · D channels inside.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.autoencoder_kl.modeling import group_norm


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, under the reference's names; the defaults are those of the released model.

  Attributes:
    encoder: False leaves the encoder out.

  Raises:
    ConfigError: channels that the groups do not divide.
  """

  hidden_channels: int = 128
  channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  z_channels: int = 256  # E
  num_embeddings: int = 1024  # V
  norm_num_groups: int = 32
  encoder: bool = True

  def __post_init__(self):
    if self.hidden_channels % self.norm_num_groups:
      raise ConfigError(
        f'hidden_channels={self.hidden_channels}: must be a multiple of {self.norm_num_groups}'
      )

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every resolution, finest first."""
    return tuple(self.hidden_channels * m for m in self.channel_mult)

  @property
  def downscale(self) -> int:
    """Pixels of a token's side."""
    return 2 ** (len(self.channel_mult) - 1)


SIZES = {
  'tiny': Config(hidden_channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=8,
                 num_embeddings=16, norm_num_groups=4),
  'imagenet_f16_256': Config(),
}  # fmt: skip
PARTS = ('decoder',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config without the encoder: a search only decodes."""
  del part
  return dataclasses.replace(c, encoder=False)


def conv_layer(inner, outer, size, rngs, bias=True):
  """Returns a convolution that keeps the grid."""
  # of an odd size and stride 1 'SAME' pads both sides alike, as the reference does
  return nnx.Conv(inner, outer, (size, size), padding='SAME', use_bias=bias, rngs=rngs)


class Resnet(nnx.Module):
  """Twice norm, silu and 3 x 3 convolution, and the shortcut of the docstring above."""

  def __init__(self, inner, outer, c, *, rngs):
    self.norm1, self.norm2 = group_norm(inner, c, rngs), group_norm(outer, c, rngs)
    self.conv1 = conv_layer(inner, outer, 3, rngs, bias=False)
    self.conv2 = conv_layer(outer, outer, 3, rngs, bias=False)
    shortcut = None if inner == outer else conv_layer(outer, outer, 1, rngs, bias=False)
    # under the reference's name: `convert` passes names through
    self.nin_shortcut = shortcut

  def __call__(self, x):  # [R, H, W, D] -> [R, H, W, D']
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    # of the result y, not of x: see the docstring of the file
    return y + (x if self.nin_shortcut is None else self.nin_shortcut(y))


def make_blocks(inner, outer, c, rngs):
  """Returns the residual blocks of one resolution."""
  widths = [inner] + [outer] * c.num_res_blocks
  return nnx.List([Resnet(a, b, c, rngs=rngs) for a, b in zip(widths, widths[1:])])


class DownLevel(nnx.Module):
  """Residual blocks of one resolution of the encoder, then half the grid unless it is the last."""

  def __init__(self, inner, outer, c, *, last, rngs):
    self.block, self.last = make_blocks(inner, outer, c, rngs), last

  def __call__(self, x):  # [R, H, W, D] -> [R, H / 2, W / 2, D']
    for block in self.block:
      x = block(x)
    return x if self.last else nnx.avg_pool(x, (2, 2), strides=(2, 2))


class Encoder(nnx.Module):
  """Pictures to latents."""

  def __init__(self, c, *, rngs):
    inner, end = c.hidden_channels, c.widths[-1]
    self.conv_in = conv_layer(3, inner, 3, rngs, bias=False)
    widths, levels = (inner, *c.widths), len(c.widths)
    self.down = nnx.List([
      DownLevel(widths[i], widths[i + 1], c, last=i == levels - 1, rngs=rngs) for i in range(levels)
    ])
    self.mid = make_blocks(end, end, c, rngs)
    self.norm_out, self.conv_out = group_norm(end, c, rngs), conv_layer(end, c.z_channels, 1, rngs)

  def __call__(self, x):  # [R, H, W, 3] -> [R, g, h, E]
    # an average halves the grid, where latent diffusion's encoders have strided convolutions
    x = self.conv_in(x)
    for level in self.down:
      x = level(x)
    for block in self.mid:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class UpLevel(nnx.Module):
  """Residual blocks of one resolution of the decoder, then twice the grid unless it is the last."""

  def __init__(self, inner, outer, c, *, last, rngs):
    self.block = make_blocks(inner, outer, c, rngs)
    self.upsample_conv = None if last else conv_layer(outer, outer, 3, rngs)

  def __call__(self, x):  # [R, H, W, D] -> [R, 2 H, 2 W, D']
    for block in self.block:
      x = block(x)
    return x if self.upsample_conv is None else self.upsample_conv(x.repeat(2, 1).repeat(2, 2))


class Decoder(nnx.Module):
  """Latents to pictures."""

  def __init__(self, c, *, rngs):
    # level i comes after level i + 1: they are numbered from the finest on, as in the reference
    widths = (*c.widths, c.widths[-1])
    self.conv_in = conv_layer(c.z_channels, widths[-1], 3, rngs)
    self.mid = make_blocks(widths[-1], widths[-1], c, rngs)
    self.up = nnx.List([
      UpLevel(widths[i + 1], widths[i], c, last=i == 0, rngs=rngs) for i in range(len(c.widths))
    ])
    self.norm_out = group_norm(widths[0], c, rngs)
    self.conv_out = conv_layer(widths[0], 3, 3, rngs)

  def __call__(self, x):  # [R, g, h, E] -> [R, H, W, 3]
    x = self.conv_in(x)
    for block in self.mid:
      x = block(x)
    for level in reversed(self.up):
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Tokenizer(nnx.Module):
  """Pictures `[R, H, W, 3]` in 0..1 and ids `[R, T]`, row by row."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    # a search only decodes
    self.encoder = Encoder(c, rngs=rngs) if c.encoder else None
    self.decoder = Decoder(c, rngs=rngs)
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), (c.num_embeddings, c.z_channels)))

  def encode_latents(self, images):
    """`[R, H, W, 3]` -> latents before the quantiser, `[R, g, h, E]`."""
    return self.encoder(images.astype(self.codebook.dtype))

  def encode(self, images):
    """`[R, H, W, 3]` -> ids `[R, T]` int32; ties go to the lowest index."""
    latents = self.encode_latents(images)
    # plain distances: unlike LlamaGen's, these codes have lengths that matter
    ids = jnp.argmin(code_distances(latents, self.codebook[...]), -1).astype(jnp.int32)
    return ids.reshape(len(ids), -1)

  def look_up(self, ids):
    """Ids `[...]` -> codes `[..., E]`."""
    return self.codebook[...][ids]

  def decode_latents(self, latents):
    """Latents `[R, g, h, E]` -> pictures `[R, H, W, 3]` float32, not clipped."""
    return self.decoder(latents).astype(jnp.float32)

  def decode(self, ids):
    """Ids `[R, T]` of square pictures -> pictures `[R, H, W, 3]` float32 in 0..1."""
    side = round(ids.shape[1] ** 0.5)
    if side**2 != ids.shape[1]:
      raise ConfigError(f'{ids.shape[1]} tokens of a picture: must be a square number')
    return jnp.clip(self.decode_latents(self.look_up(ids.reshape(-1, side, side))), 0, 1)


def code_distances(latents, codes):
  """Squared distances `[..., V]` of latents `[..., E]` to codes `[V, E]`, in float32."""
  z, codes = latents.astype(jnp.float32), codes.astype(jnp.float32)
  # 'highest': on a TPU bfloat16 products would choose another code where two are near
  product = jnp.einsum('...e,ve->...v', z, codes, precision='highest')
  return (z * z).sum(-1, keepdims=True) + (codes * codes).sum(-1) - 2 * product


def build_model(config: Config, seed=0) -> Tokenizer:
  """Builds a random tokenizer; inside `modules.abstract_module` it uses no memory."""
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def count_decode_flops(c: Config, side: int) -> int:
  """FLOPs of the convolutions of `decode_latents` for one picture of `side` x `side` tokens."""

  def conv(a, b, size=3):
    return 2 * (side * size) ** 2 * a * b

  def blocks(a, b):
    shortcut = (a != b) * conv(b, b, 1)
    return conv(a, b) + (2 * c.num_res_blocks - 1) * conv(b, b) + shortcut

  # the middle has as many blocks as a level
  inner = c.widths[-1]
  total = conv(c.z_channels, inner) + blocks(inner, inner)
  for i, width in enumerate(reversed(c.widths)):
    total += blocks(inner, width)
    inner = width
    if i < len(c.widths) - 1:
      side *= 2
      total += conv(width, width)
  return total + conv(inner, 3)
