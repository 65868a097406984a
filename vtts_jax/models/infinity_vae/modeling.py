"""Infinity's tokenizer (Han et al. 2024, arXiv 2412.04431): a picture as grids of bits.

A convolutional autoencoder without attention, with binary spherical quantisation (Zhao et al. 2024,
arXiv 2406.07548): a cell's code is the signs of its channels, on the unit sphere. As in
`models.var_vq` scales quantise what the coarser ones left over, but codes are enlarged linearly and
added as they are. Checked against the PyTorch reference by the golden files `infinity*.npz`
(`models.infinity.replay`).

Letters: R pictures · H W pixels · g h sides of the finest grid · n tokens of a scale · T tokens of
all scales · Z channels of a cell · P bits of a token: Z, or 4 Z where a token is 2 x 2 cells.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.autoencoder_kl.modeling import Down, Middle, Up, conv_layer, group_norm
from vtts_jax.models.var_vq import pyramid


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, under the reference's names; the defaults are those of the d32 tokenizer.

  Attributes:
    codebook_dim: Z.
    downscale: pixels of a cell's side, a power of two; levels beyond it keep their grid.
    encoder: False leaves the encoder out.

  Raises:
    ConfigError: channels that the groups do not divide, or a downscale that the levels cannot do.
  """

  codebook_dim: int = 32
  base_ch: int = 128
  ch_mult: tuple[int, ...] = (1, 2, 4, 4, 4)
  num_res_blocks: int = 2  # the decoder has one more
  norm_num_groups: int = 32
  downscale: int = 16
  encoder: bool = True

  mid_block_add_attention = False  # for `Middle`

  def __post_init__(self):
    if self.base_ch % self.norm_num_groups:
      raise ConfigError(f'base_ch={self.base_ch}: must be a multiple of {self.norm_num_groups}')
    if self.downscale not in [2**i for i in range(len(self.ch_mult))]:
      raise ConfigError(
        f'downscale={self.downscale}: must be a power of 2 below 2 ** {len(self.ch_mult)}'
      )

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every resolution, finest first."""
    return tuple(self.base_ch * m for m in self.ch_mult)

  @property
  def halvings(self) -> int:
    """How often the encoder halves the grid."""
    return self.downscale.bit_length() - 1

  @property
  def layers_per_block(self) -> int:
    """For `Down` and `Up`."""
    return self.num_res_blocks


SIZES = {
  'tiny': Config(codebook_dim=4, base_ch=4, ch_mult=(1, 2), num_res_blocks=1, norm_num_groups=2,
                 downscale=2),
  'd16': Config(codebook_dim=16),
  'd24': Config(codebook_dim=24),
  'd32': Config(),
  'd64': Config(codebook_dim=64),
  # that of the 8B model, whose tokens are 2 x 2 cells
  'd14_f8': Config(codebook_dim=14, ch_mult=(1, 2, 4, 4), downscale=8),
}  # fmt: skip
PARTS = ('decoder',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config without the encoder: a search only decodes."""
  del part
  return dataclasses.replace(c, encoder=False)


class Encoder(nnx.Module):
  """Pictures to latents."""

  def __init__(self, c, *, rngs):
    widths = [c.widths[0], *c.widths]
    self.conv_in = conv_layer(3, widths[0], 3, rngs)
    self.down = nnx.List([
      Down(a, b, c, last=i >= c.halvings, rngs=rngs)
      for i, (a, b) in enumerate(zip(widths, widths[1:]))
    ])  # fmt: skip
    self.mid = Middle(widths[-1], c, rngs=rngs)
    self.norm_out = group_norm(widths[-1], c, rngs)
    self.conv_out = conv_layer(widths[-1], c.codebook_dim, 3, rngs)

  def __call__(self, x):  # [R, H, W, 3] -> [R, g, h, Z]
    x = self.conv_in(x)
    for block in self.down:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
  """Latents to pictures; `up` counts resolutions from the finest, and is used from its end."""

  def __init__(self, c, *, rngs):
    widths = [*c.widths, c.widths[-1]]
    self.conv_in = conv_layer(c.codebook_dim, widths[-1], 3, rngs)
    self.mid = Middle(widths[-1], c, rngs=rngs)
    # the finest level has nothing to enlarge to
    self.up = nnx.List([
      Up(b, a, c, last=not 1 <= i <= c.halvings, rngs=rngs)
      for i, (a, b) in enumerate(zip(widths, widths[1:]))
    ])  # fmt: skip
    self.norm_out, self.conv_out = group_norm(widths[0], c, rngs), conv_layer(widths[0], 3, 3, rngs)

  def __call__(self, x):  # [R, g, h, Z] -> [R, H, W, 3]
    x = self.mid(self.conv_in(x))
    for block in reversed(self.up):
      x = block(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Tokenizer(nnx.Module):
  """Pictures `[R, H, W, 3]` in -1..1, bits of tokens `[..., n, P]`, latents `[..., g, h, Z]`.

  Grids are those of tokens: a cell each, or 2 x 2 cells (`cells_of_token`).
  """

  def __init__(self, config: Config, *, rngs):
    self.config = config
    self.encoder = Encoder(config, rngs=rngs) if config.encoder else None
    self.decoder = Decoder(config, rngs=rngs)

  # -------------------------------------------------------------------------------------- scales

  def codes_of_bits(self, bits):
    """Bits `[..., Z]` -> codes of length 1, float32."""
    return (2.0 * bits - 1.0) * self.config.codebook_dim**-0.5

  def expand_scale(self, bits, grid, final):
    """What the bits `[..., n, P]` of a scale on `grid` add to the latents of the grid `final`:
    `[..., g, h, Z]` float32."""
    side = cells_of_token(self.config, bits.shape[-1])
    cells = split_tokens(bits.reshape(*bits.shape[:-2], *grid, bits.shape[-1]), side)
    final = tuple(side * length for length in final)
    return pyramid.resize_grid(self.codes_of_bits(cells), final, 'linear')

  def shrink_latents(self, latents, grid, bits):
    """What a transformer reads to draw a scale of `bits` bits a token: latents `[..., g, h, Z]` of
    the scales before it -> `[..., n, P]` float32."""
    # linear without antialiasing; the tokenizer's own inputs for training are means (`quantise`)
    side = cells_of_token(self.config, bits)
    x = pyramid.resize_grid(latents, tuple(side * length for length in grid), 'linear')
    x = join_cells(x, side)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])

  def sum_scales(self, bits, grids, stage):
    """Latents `[..., g, h, Z]` of the first `stage` scales of bits `[..., T, P]`; `stage` may be an
    array of the leading shape."""
    ends, total = pyramid.scale_ends(grids), 0.0
    for s, (start, end) in enumerate(zip(ends, ends[1:])):
      drawn = (s < jnp.asarray(stage))[..., None, None, None]
      part = self.expand_scale(bits[..., start:end, :], grids[s], grids[-1])
      total = total + jnp.where(drawn, part, 0.0)
    return total

  def inputs_of_scales(self, bits, grids, last: int):
    """What a transformer reads at the scales 1 .. `last` - 1 (teacher forcing).

    Args:
      bits: `[..., T, P]`; those from the scale `last` - 1 on do not matter.
      grids: of all scales.
      last: at least 1.

    Returns:
      Inputs `[..., tokens of these scales, P]`, and the latents `[..., g, h, Z]` of the last of
      them, which have no tokens of the scale `last` - 1.
    """
    P, ends = bits.shape[-1], pyramid.scale_ends(grids)
    latents = self.sum_scales(bits, grids, 0)
    inputs = [jnp.zeros((*bits.shape[:-2], 0, P))]
    for s in range(1, last):
      part = bits[..., ends[s - 1] : ends[s], :]
      latents = latents + self.expand_scale(part, grids[s - 1], grids[-1])
      inputs.append(self.shrink_latents(latents, grids[s], P))
    return jnp.concatenate(inputs, -2), latents

  # ------------------------------------------------------------------------------------ pictures

  def encode_latents(self, images):
    """`[R, H, W, 3]` -> latents before the quantiser, `[R, g, h, Z]`.

    Raises:
      ConfigError: there is no encoder.
    """
    if self.encoder is None:
      raise ConfigError('encoder=False: this tokenizer was built to decode only')
    return self.encoder(images.astype(self.encoder.conv_in.kernel.dtype))

  def quantise(self, latents, grids):
    """Latents `[R, g, h, Z]` -> bits of every scale `[R, *grid, Z]` bool, one bit a channel, and
    the sums of codes `[R, g, h, Z]` after every scale."""
    rest, bits, sums = latents.astype(jnp.float32), [], []
    for grid in grids:
      # the sign does not depend on the length, so nothing is normalised; 0 counts as negative
      bits.append(pyramid.resize_grid(rest, grid, 'area') > 0)
      part = pyramid.resize_grid(self.codes_of_bits(bits[-1]), latents.shape[-3:-1], 'linear')
      rest = rest - part
      sums.append(sums[-1] + part if sums else part)
    return bits, sums

  def decode_latents(self, latents):
    """Latents `[R, g, h, Z]` -> pictures `[R, H, W, 3]` float32 in about -1..1, not clipped."""
    return self.decoder(latents.astype(self.decoder.conv_in.kernel.dtype)).astype(jnp.float32)


def cells_of_token(c: Config, bits: int) -> int:
  """Returns the side, in cells, of a token of P bits: 1 or 2.

  Raises:
    ConfigError: P is neither Z nor 4 Z.
  """
  sides = {c.codebook_dim: 1, 4 * c.codebook_dim: 2}
  if bits not in sides:
    raise ConfigError(f'bits={bits}: the tokenizer allows {" or ".join(map(str, sides))}')
  return sides[bits]


def split_tokens(x, side):
  """Tokens `[..., g, h, Z * side ** 2]` -> cells `[..., g * side, h * side, Z]`, torch's
  pixel_shuffle."""
  *lead, g, h, P = x.shape
  x = x.reshape(*lead, g, h, P // side**2, side, side)
  # the offset of a cell is the last part of a channel's number
  x = jnp.moveaxis(x, (-2, -1), (-4, -2))  # [..., g, side, h, side, Z]
  return x.reshape(*lead, g * side, h * side, P // side**2)


def join_cells(x, side):
  """Inverts `split_tokens`."""
  *lead, g, h, Z = x.shape
  x = x.reshape(*lead, g // side, side, h // side, side, Z)
  x = jnp.moveaxis(x, (-4, -2), (-2, -1))  # [..., g, h, Z, side, side]
  return x.reshape(*lead, g // side, h // side, Z * side**2)


def build_model(config: Config, seed=0) -> Tokenizer:
  """Builds a random tokenizer; inside `modules.abstract_module` it uses no memory."""
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def count_expand_flops(c: Config, grid, final, bits: int) -> int:
  """FLOPs of `expand_scale` for one picture."""
  side = cells_of_token(c, bits)
  inner, outer = (tuple(side * length for length in g) for g in (grid, final))
  return pyramid.count_resize_flops(inner, outer, c.codebook_dim)


def count_decode_flops(c: Config, cells: int) -> int:
  """FLOPs of `decode_latents` for one picture of so many cells."""

  def conv(a, b, size=3):
    return 2 * cells * size**2 * a * b

  def resnet(a, b):
    return conv(a, b) + conv(b, b) + (a != b) * conv(a, b, 1)

  inner = c.widths[-1]
  total = conv(c.codebook_dim, inner) + 2 * resnet(inner, inner)
  for i, width in reversed(list(enumerate(c.widths))):
    total += resnet(inner, width) + c.num_res_blocks * resnet(width, width)
    inner = width
    if 1 <= i <= c.halvings:
      cells *= 4
      total += conv(width, width)
  return total + conv(inner, 3)
