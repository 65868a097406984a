"""AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752): pictures to latents and back.

The layout is that of diffusers: residual blocks with group norm, one single-head attention in the
middle, strided 3 x 3 convolutions down, nearest-neighbour up; 4, 8 or 16 latent channels. Checked
against `diffusers.AutoencoderKL` (tests/parity) and the golden file `autoencoderkl_a.npz`.

Letters: R pictures · H W pixels · h w latent cells (H = h * downscale) · C latent channels ·
D channels inside.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the names are those of the checkpoint's `config.json`.

  A `scaling_factor` of None means that only the checkpoint knows it, so latents cannot be scaled.
  `encoder=False` leaves the encoder out.

  Raises:
    ConfigError: channels that the groups do not divide, or no block at all.
  """

  latent_channels: int = 4  # C
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  # the decoder has one more
  layers_per_block: int = 2
  norm_num_groups: int = 32
  in_channels: int = 3
  out_channels: int = 3
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  scaling_factor: float | None = None
  shift_factor: float = 0.0
  encoder: bool = True

  def __post_init__(self):
    if not self.block_out_channels:
      raise ConfigError('block_out_channels=(): at least one block')
    for width in self.block_out_channels:
      if width % self.norm_num_groups:
        raise ConfigError(
          f'block_out_channels={self.block_out_channels}: every one must be a multiple of '
          f'norm_num_groups={self.norm_num_groups}'
        )

  @property
  def downscale(self) -> int:
    """Side of a latent cell in pixels."""
    return 2 ** (len(self.block_out_channels) - 1)


SIZES = {
  'tiny': Config(latent_channels=3, block_out_channels=(4, 8), layers_per_block=1,
                 norm_num_groups=2, scaling_factor=1.0),
  'small': Config(latent_channels=16, block_out_channels=(16, 16, 32, 32), layers_per_block=1,
                  norm_num_groups=8, scaling_factor=1.0),  # to time searches on a laptop
  'sd1': Config(scaling_factor=0.18215),
  'sdxl': Config(scaling_factor=0.13025),
  # EPFL-VILAB/flextok_vae_*: only the checkpoint knows the factor; 1 is for random weights
  'flextok_vae_c4': Config(latent_channels=4, scaling_factor=1.0),
  'flextok_vae_c8': Config(latent_channels=8, scaling_factor=1.0),
  'flextok_vae_c16': Config(latent_channels=16, scaling_factor=1.0),
  'sd3': Config(
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.5305,
    shift_factor=0.0609,
  ),
  'flux': Config(
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
  ),
}  # fmt: skip
PARTS = ('decoder',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config of the decoder alone: a search only decodes."""
  del part
  return dataclasses.replace(c, encoder=False)


def group_norm(width, c, rngs):
  """Returns a group norm with diffusers' epsilon."""
  # two passes: the fast variance E[x^2] - E[x]^2 loses digits that parity needs
  return nnx.GroupNorm(width, c.norm_num_groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


def conv_layer(inner, outer, size, rngs, stride=1, padding=None):
  """Returns a convolution of `size` x `size`; its padding keeps the grid unless one is given."""
  padding = size // 2 if padding is None else padding
  return nnx.Conv(inner, outer, (size, size), stride, padding=padding, rngs=rngs)


class Resnet(nnx.Module):
  """A residual block: twice norm, silu and 3 x 3 convolution; 1 x 1 where the width changes."""

  def __init__(self, inner, outer, c, *, rngs):
    self.norm1, self.conv1 = group_norm(inner, c, rngs), conv_layer(inner, outer, 3, rngs)
    self.norm2, self.conv2 = group_norm(outer, c, rngs), conv_layer(outer, outer, 3, rngs)
    self.conv_shortcut = None if inner == outer else conv_layer(inner, outer, 1, rngs)

  def __call__(self, x):  # [R, h, w, D] -> [R, h, w, D']
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
  """Self-attention over all cells, with one head as wide as the block."""

  def __init__(self, width, c, *, rngs):
    self.group_norm = group_norm(width, c, rngs)
    self.q, self.k, self.v, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

  def __call__(self, x):  # [R, h, w, D]
    y = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = self.q(y), self.k(y), self.v(y)
    # softmax in float32: a row has thousands of cells
    scores = jnp.einsum('rqd,rkd->rqk', q, k).astype(jnp.float32) * x.shape[-1] ** -0.5
    y = jnp.einsum('rqk,rkd->rqd', jax.nn.softmax(scores, -1).astype(v.dtype), v)
    return x + self.out(y).reshape(x.shape)


class Middle(nnx.Module):
  """Residual block, attention, residual block, at the smallest grid."""

  def __init__(self, width, c, *, rngs):
    self.resnets = nnx.List([Resnet(width, width, c, rngs=rngs) for _ in range(2)])
    self.attention = Attention(width, c, rngs=rngs) if c.mid_block_add_attention else None

  def __call__(self, x):
    x = self.resnets[0](x)
    return self.resnets[1](x if self.attention is None else self.attention(x))


class Down(nnx.Module):
  """Residual blocks, then half the grid unless it is the `last` one."""

  def __init__(self, inner, outer, c, *, last, rngs):
    widths = [inner] + [outer] * c.layers_per_block
    self.resnets = nnx.List([Resnet(a, b, c, rngs=rngs) for a, b in zip(widths, widths[1:])])
    # the reference pads with zeros at the right and the bottom only
    self.downsample = None if last else conv_layer(outer, outer, 3, rngs, 2, ((0, 1), (0, 1)))

  def __call__(self, x):  # [R, h, w, D] -> [R, h / 2, w / 2, D']
    for resnet in self.resnets:
      x = resnet(x)
    return x if self.downsample is None else self.downsample(x)


class Up(nnx.Module):
  """Residual blocks, then twice the grid unless it is the `last` one."""

  def __init__(self, inner, outer, c, *, last, rngs):
    widths = [inner] + [outer] * (c.layers_per_block + 1)
    self.resnets = nnx.List([Resnet(a, b, c, rngs=rngs) for a, b in zip(widths, widths[1:])])
    self.upsample = None if last else conv_layer(outer, outer, 3, rngs)

  def __call__(self, x):  # [R, h, w, D] -> [R, 2 h, 2 w, D']
    for resnet in self.resnets:
      x = resnet(x)
    # nearest neighbour: each cell becomes 2 x 2
    return x if self.upsample is None else self.upsample(x.repeat(2, 1).repeat(2, 2))


class Encoder(nnx.Module):
  """Pictures to moments: mean and log variance of the latents."""

  def __init__(self, c, *, rngs):
    widths = [c.block_out_channels[0], *c.block_out_channels]
    end = len(widths) - 2
    self.conv_in = conv_layer(c.in_channels, widths[0], 3, rngs)
    self.down_blocks = nnx.List(
      [Down(a, b, c, last=i == end, rngs=rngs) for i, (a, b) in enumerate(zip(widths, widths[1:]))]
    )
    self.mid_block = Middle(widths[-1], c, rngs=rngs)
    self.conv_norm_out = group_norm(widths[-1], c, rngs)
    self.conv_out = conv_layer(widths[-1], 2 * c.latent_channels, 3, rngs)

  def __call__(self, x):  # [R, H, W, 3] -> [R, h, w, 2 C]
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
  """Latents to pictures."""

  def __init__(self, c, *, rngs):
    # the decoder goes through the encoder's blocks in reverse
    widths = [c.block_out_channels[-1], *reversed(c.block_out_channels)]
    end = len(widths) - 2
    self.conv_in = conv_layer(c.latent_channels, widths[0], 3, rngs)
    self.mid_block = Middle(widths[0], c, rngs=rngs)
    self.up_blocks = nnx.List(
      [Up(a, b, c, last=i == end, rngs=rngs) for i, (a, b) in enumerate(zip(widths, widths[1:]))]
    )
    self.conv_norm_out = group_norm(widths[-1], c, rngs)
    self.conv_out = conv_layer(widths[-1], c.out_channels, 3, rngs)

  def __call__(self, x):  # [R, h, w, C] -> [R, H, W, 3]
    x = self.mid_block(self.conv_in(x))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Pictures `[R, H, W, 3]` in -1 .. 1 (the decoder does not clip) and latents `[R, h, w, C]`.

  `encode` and `decode` take raw latents. Generators take scaled ones: see `scale_latents` and
  `unscale_latents`.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.encoder = Encoder(c, rngs=rngs) if c.encoder else None
    # mean and log variance of every latent channel
    moments = 2 * c.latent_channels
    quant = c.encoder and c.use_quant_conv
    self.quant_conv = conv_layer(moments, moments, 1, rngs) if quant else None
    width = c.latent_channels
    self.post_quant_conv = conv_layer(width, width, 1, rngs) if c.use_post_quant_conv else None
    self.decoder = Decoder(c, rngs=rngs)

  def encode(self, images):
    """Pictures `[R, H, W, 3]` -> mean and log variance (in -30 .. 20), each `[R, h, w, C]`.

    Raises:
      ConfigError: there is no encoder, or `downscale` does not divide the picture.
    """
    if self.encoder is None:
      raise ConfigError('encoder=False: this autoencoder was built to decode only')
    if images.shape[1] % self.config.downscale or images.shape[2] % self.config.downscale:
      raise ConfigError(
        f'image size={images.shape[1:3]}: multiples of {self.config.downscale} are allowed'
      )
    moments = self.encoder(images)
    moments = moments if self.quant_conv is None else self.quant_conv(moments)
    mean, log_variance = jnp.split(moments, 2, -1)
    # the reference's limits: beyond them the exponential overflows
    return mean, jnp.clip(log_variance, -30, 20)

  def decode(self, latents):  # [R, h, w, C] -> [R, H, W, 3]
    if self.post_quant_conv is not None:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)

  def scale_latents(self, latents):
    """Raw latents -> latents as a generator sees them."""
    return (latents - self.config.shift_factor) * self._known_factor()

  def unscale_latents(self, latents):
    """Inverts `scale_latents`: a generator's latents -> latents for `decode`."""
    return latents / self._known_factor() + self.config.shift_factor

  def _known_factor(self):
    # a latent of a wrong scale would decode to a wrong picture without any error
    if self.config.scaling_factor is None:
      raise ConfigError('scaling_factor=None: it stands in the checkpoint; give its number')
    return self.config.scaling_factor


def sample_posterior(key, mean, log_variance):
  """Draws latents `[R, h, w, C]` from a posterior of mean and log variance of that shape."""
  noise = jax.random.normal(key, mean.shape, mean.dtype)
  return mean + jnp.exp(0.5 * log_variance) * noise


def kl_divergence(mean, log_variance):
  """Returns the KL divergence from the unit normal in nats, `[R, h, w, C]` twice -> `[R]`."""
  terms = mean**2 + jnp.exp(log_variance) - 1 - log_variance
  return 0.5 * terms.sum((1, 2, 3))


def build_model(config: Config, seed=0) -> AutoencoderKL:
  """Builds a random autoencoder; inside `modules.abstract_module` it uses no memory."""
  return AutoencoderKL(config, rngs=nnx.Rngs(seed))


def count_decode_flops(c: Config, height: int, width: int) -> int:
  """FLOPs of the convolutions and matmuls of `decode` for one latent of `height` x `width`."""
  cells = height * width

  def conv(cells, a, b, size=3):
    return 2 * cells * size**2 * a * b

  def resnet(cells, a, b):
    return conv(cells, a, b) + conv(cells, b, b) + (a != b) * conv(cells, a, b, 1)

  # norms and activations are not counted
  widths, latent = c.block_out_channels[::-1], c.latent_channels
  inner = widths[0]
  total = conv(cells, latent, inner) + 2 * resnet(cells, inner, inner)
  total += conv(cells, latent, latent, 1) if c.use_post_quant_conv else 0
  if c.mid_block_add_attention:
    # four projections, then two products of all cells with all cells
    total += 4 * conv(cells, inner, inner, 1) + 4 * cells**2 * inner
  for i, outer in enumerate(widths):
    if i:
      cells *= 4
      total += conv(cells, inner, inner)
    total += resnet(cells, inner, outer) + c.layers_per_block * resnet(cells, outer, outer)
    inner = outer
  return total + conv(cells, inner, c.out_channels)
