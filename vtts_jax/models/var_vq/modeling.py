"""VAR's tokenizer (Tian et al. 2024, arXiv 2404.02905): pictures as grids of codes, coarse to fine.

The network is that of `models.llamagen_vq`. Its latents are quantised as a residual: each scale
takes the mean of what is left over the cells of its grid, the nearest code of each cell, and
subtracts the codes after it enlarged them (bicubic) and mixed neighbours by a convolution `phi`.
The sum over a prefix of scales decodes to a picture. Checked against the PyTorch reference by the
golden files `var*.npz` (`models.var.replay`).

Letters: R pictures · H W pixels · g side of the finest grid · S scales · n tokens of a scale ·
T tokens of all scales · V codes · Z channels of a code.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.autoencoder_kl.modeling import conv_layer
from vtts_jax.models.llamagen_vq import modeling as llamagen_vq
from vtts_jax.models.var_vq import pyramid

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, under the reference's names where it has them; the defaults are the released ones.

  Attributes:
    phis: convolutions that the scales share: 4, 1 for all, or one a scale.
    quant_resi: share of the convolution in what `phi` returns; the rest is its input.
    encoder: False leaves the encoder out.

  Raises:
    ConfigError: channels that the groups do not divide, or fewer than two scales.
  """

  codebook_size: int = 4096  # V
  z_channels: int = 32  # Z
  ch: int = 160
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2  # the decoder has one more
  norm_num_groups: int = 32
  patch_nums: tuple[int, ...] = PATCH_NUMS
  phis: int = 4
  quant_resi: float = 0.5
  quant_conv_size: int = 3
  encoder: bool = True

  def __post_init__(self):
    if self.ch % self.norm_num_groups:
      raise ConfigError(f'ch={self.ch}: must be a multiple of {self.norm_num_groups}')
    # the choice of a phi divides by the number of scales less one
    if len(self.patch_nums) < 2:
      raise ConfigError(f'patch_nums={self.patch_nums}: must be at least two scales')

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every resolution, finest first."""
    return tuple(self.ch * m for m in self.ch_mult)

  @property
  def downscale(self) -> int:
    """Pixels of the side of a cell of the finest grid."""
    return 2 ** (len(self.ch_mult) - 1)

  @property
  def grids(self) -> tuple[pyramid.Grid, ...]:
    """The grid of every scale."""
    return tuple((side, side) for side in self.patch_nums)

  def phi_of_scale(self, scale: int) -> int:
    """Returns which convolution a scale uses."""
    # by place among the scales and not by number, also where every scale could have its own; four
    # of them have ticks of their own
    margin = 1 / 3 if self.phis == 4 else 1 / 2
    ticks = np.linspace(margin / self.phis, 1 - margin / self.phis, self.phis)
    return int(np.argmin(np.abs(ticks - scale / (len(self.patch_nums) - 1))))


SIZES = {
  'tiny': Config(codebook_size=16, z_channels=4, ch=8, ch_mult=(1, 2), num_res_blocks=1,
                 norm_num_groups=4, patch_nums=(1, 2)),
  '256': Config(),
  '512': Config(patch_nums=PATCH_NUMS_512),  # the same weights
}  # fmt: skip
PARTS = ('decoder',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config without the encoder: a search only decodes."""
  del part
  return dataclasses.replace(c, encoder=False)


class Tokenizer(nnx.Module):
  """Pictures `[R, H, W, 3]` in -1..1, ids of all scales `[..., T]`, latents `[..., g, g, Z]`."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    size, width = c.quant_conv_size, c.z_channels
    self.encoder = llamagen_vq.Encoder(c, rngs=rngs) if c.encoder else None
    self.quant_conv = conv_layer(width, width, size, rngs) if c.encoder else None
    self.decoder = llamagen_vq.Decoder(c, rngs=rngs)
    self.post_quant_conv = conv_layer(width, width, size, rngs)
    self.phis = nnx.List([conv_layer(width, width, 3, rngs) for _ in range(c.phis)])
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), (c.codebook_size, width)))

  # -------------------------------------------------------------------------------------- scales

  def expand_scale(self, ids, scale: int):
    """What the tokens `[..., n]` of a scale add to the latents: `[..., g, g, Z]` float32."""
    c, grid = self.config, self.config.grids[scale]
    codes = self.codebook[...][ids].reshape(-1, *grid, c.z_channels)
    # the finest scale has the final size, and still goes through its phi
    x = pyramid.resize_grid(codes, c.grids[-1], 'cubic')
    phi = self.phis[c.phi_of_scale(scale)]
    mixed = phi(x.astype(phi.kernel.dtype)).astype(jnp.float32)
    x = (1 - c.quant_resi) * x + c.quant_resi * mixed
    return x.reshape(*ids.shape[:-1], *x.shape[1:])

  def shrink_latents(self, latents, scale: int):
    """What a transformer reads to draw a scale: latents `[..., g, g, Z]` of the scales before it
    -> `[..., n, Z]` float32."""
    x = pyramid.resize_grid(latents, self.config.grids[scale], 'area')
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])

  def sum_scales(self, ids, stage):
    """Latents `[..., g, g, Z]` of the first `stage` scales of ids `[..., T]`; `stage` may be an
    array of the leading shape."""
    ends, total = pyramid.scale_ends(self.config.grids), 0.0
    for s, (start, end) in enumerate(zip(ends, ends[1:])):
      drawn = (s < jnp.asarray(stage))[..., None, None, None]
      total = total + jnp.where(drawn, self.expand_scale(ids[..., start:end], s), 0.0)
    return total

  def inputs_of_scales(self, ids, last: int):
    """What a transformer reads at the scales 1 .. `last` - 1 (teacher forcing).

    Args:
      ids: `[..., T]`; those from the scale `last` - 1 on do not matter.
      last: at least 1.

    Returns:
      Inputs `[..., tokens of these scales, Z]`, and the latents `[..., g, g, Z]` of the last of
      them, which have no tokens of the scale `last` - 1.
    """
    c, ends = self.config, pyramid.scale_ends(self.config.grids)
    latents = jnp.zeros((*ids.shape[:-1], *c.grids[-1], c.z_channels))
    inputs = [jnp.zeros((*ids.shape[:-1], 0, c.z_channels))]
    for s in range(1, last):
      latents = latents + self.expand_scale(ids[..., ends[s - 1] : ends[s]], s - 1)
      inputs.append(self.shrink_latents(latents, s))
    return jnp.concatenate(inputs, -2), latents

  # ------------------------------------------------------------------------------------ pictures

  def encode_latents(self, images):
    """`[R, H, W, 3]` -> latents before the quantiser, `[R, g, g, Z]`.

    Raises:
      ConfigError: there is no encoder.
    """
    if self.encoder is None:
      raise ConfigError('encoder=False: this tokenizer was built to decode only')
    return self.quant_conv(self.encoder(images.astype(self.quant_conv.kernel.dtype)))

  def code_distances(self, latents):
    """Squared distances `[..., V]` of latents `[..., Z]` to all codes."""
    z, codes = latents.astype(jnp.float32), self.codebook[...].astype(jnp.float32)
    product = jnp.einsum('...z,vz->...v', z, codes, precision='highest')
    return (z * z).sum(-1, keepdims=True) + (codes * codes).sum(-1) - 2 * product

  def quantise(self, latents):
    """Latents `[R, g, g, Z]` -> ids `[R, T]` int32, and the distances that decided, one
    `[R, n, V]` a scale; ties go to the lowest index."""
    rest, ids, distances = latents.astype(jnp.float32), [], []
    for s in range(len(self.config.patch_nums)):
      distances.append(self.code_distances(self.shrink_latents(rest, s)))
      ids.append(jnp.argmin(distances[-1], -1).astype(jnp.int32))
      rest = rest - self.expand_scale(ids[-1], s)
    return jnp.concatenate(ids, -1), distances

  def encode(self, images):
    """`[R, H, W, 3]` -> ids `[R, T]` int32."""
    return self.quantise(self.encode_latents(images))[0]

  def decode_latents(self, latents):
    """Latents `[R, g, g, Z]` -> pictures `[R, H, W, 3]` float32 in about -1..1, not clipped."""
    x = self.post_quant_conv(latents.astype(self.post_quant_conv.kernel.dtype))
    return self.decoder(x).astype(jnp.float32)


def build_model(config: Config, seed=0) -> Tokenizer:
  """Builds a random tokenizer; inside `modules.abstract_module` it uses no memory."""
  return Tokenizer(config, rngs=nnx.Rngs(seed))


def count_expand_flops(c: Config, scale: int) -> int:
  """FLOPs of `expand_scale` for one picture."""
  grid, final = c.grids[scale], c.grids[-1]
  resized = pyramid.count_resize_flops(grid, final, c.z_channels)
  return resized + 2 * final[0] * final[1] * 9 * c.z_channels**2


def count_decode_flops(c: Config) -> int:
  """FLOPs of `decode_latents` for one picture."""
  side = c.patch_nums[-1]
  # the same network with a convolution of another size in front
  network = llamagen_vq.Config(
    codebook_embed_dim=0, ch=c.ch, ch_mult=c.ch_mult, num_res_blocks=c.num_res_blocks,
    z_channels=c.z_channels, norm_num_groups=c.norm_num_groups,
  )  # fmt: skip
  front = 2 * (side * c.quant_conv_size * c.z_channels) ** 2
  return front + llamagen_vq.count_decode_flops(network, side)
