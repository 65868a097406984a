"""DC-AE (Chen et al. 2024, arXiv 2410.10733): pictures to latents of 1/32 their side, or less.

An autoencoder without a posterior. Levels of residual blocks, and deeper ones of linear attention
over several scales; each change of resolution also has a shortcut that moves pixels into channels
or back without weights. Checked against diffusers' `AutoencoderDC` by golden files (`replay.py`).

Letters: R pictures · H W pixels · h w cells at a level · T = h w · C latent channels · D channels
of a level · d channels of a head · n = D / d heads · s side of a filter.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.sana.modeling import (
  GLUMBConv,
  depthwise_conv,
  linear_attention,
  random_filters,
)
from vtts_jax.models.stacked import scan_blocks, stack_blocks

EPS = 1e-5  # of every norm
RATIO = 4  # hidden channels of a feed-forward over those of its level
ACTIVATIONS = {'silu': jax.nn.silu, 'relu': jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class Level:
  """The blocks of one resolution.

  Attributes:
    width: D.
    layers: number of blocks. The first level may have none: its resampling is then the first or
      last layer of the network.
    attention: whether they are blocks of linear attention ('EfficientViTBlock') or 'ResBlock's.
    scales: sides of the depthwise filters that give the attention further scales.
    norm: 'rms_norm' over channels, or 'batch_norm'. act: of residual blocks, one of `ACTIVATIONS`.

  Raises:
    ConfigError: an unknown norm or activation.
  """

  width: int
  layers: int
  attention: bool = False
  scales: tuple[int, ...] = ()
  norm: str = 'rms_norm'
  act: str = 'silu'

  def __post_init__(self):
    for name, allowed in (('norm', ('rms_norm', 'batch_norm')), ('act', tuple(ACTIVATIONS))):
      if getattr(self, name) not in allowed:
        raise ConfigError(f'{name}={getattr(self, name)!r}: must be one of {", ".join(allowed)}')


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options.

  Attributes:
    latent_channels: C.
    encoder, decoder: levels from the pixels down; `encoder` () leaves the encoder out.
    attention_head_dim: d.
    unshuffle: whether the encoder halves sides by a convolution and `space_to_depth`, else by a
      convolution of stride 2.
    shuffle: whether the decoder doubles sides by a convolution and `depth_to_space`, else by
      repeating cells before a convolution.
    scaling_factor: None: not known without the checkpoint, so latents cannot be scaled.

  Raises:
    ConfigError: no levels, an empty level that is not the first, or widths that do not divide.
  """

  latent_channels: int
  encoder: tuple[Level, ...]
  decoder: tuple[Level, ...]
  attention_head_dim: int = 32
  in_channels: int = 3
  unshuffle: bool = False
  shuffle: bool = False
  scaling_factor: float | None = None

  def __post_init__(self):
    for name in ('encoder', 'decoder'):
      levels = getattr(self, name)
      if (name == 'decoder' and not levels) or any(level.layers < 1 for level in levels[1:]):
        raise ConfigError(f'{name}: every level but the first must have layers')
      if levels and levels[-1].width % self.latent_channels:
        raise ConfigError(
          f'{name}: its last width {levels[-1].width} must be a multiple of '
          f'latent_channels={self.latent_channels}'
        )
      for level in levels:
        if level.attention and level.width % self.attention_head_dim:
          raise ConfigError(
            f'attention_head_dim={self.attention_head_dim}: must divide {level.width}'
          )

  @property
  def downscale(self) -> int:
    """Pixels of a latent cell's side."""
    return 2 ** (len(self.decoder) - 1)


def _released_levels(layers, widths, *, first=3, scales=(), old=False):
  """Levels by their number of blocks; those from `first` on have attention."""
  return tuple(
    Level(
      width,
      count,
      attention=i >= first,
      scales=scales if i >= first else (),
      norm='batch_norm' if old and i < first else 'rms_norm',
      act='relu' if old and i < first else 'silu',
    )
    for i, (width, count) in enumerate(zip(widths, layers))
  )


def _imagenet_model(channels, deeper, factor):
  """The models that were made before SANA: an empty first level, batch norm in the decoder."""
  widths = (128, 256, 512, 512, 1024, 1024, 2048, 2048)[: 6 + deeper]
  more = (2,) * (3 + deeper)
  return Config(
    latent_channels=channels,
    encoder=_released_levels((0, 4, 8, *more), widths),
    decoder=_released_levels((0, 5, 10, *more), widths, old=True),
    unshuffle=True,
    shuffle=True,
    scaling_factor=factor,
  )


_SANA = (128, 256, 512, 512, 1024, 1024)
SIZES = {
  'tiny': Config(
    latent_channels=4, encoder=(Level(4, 1), Level(8, 1, True, (3,))),
    decoder=(Level(4, 1), Level(8, 1, True, (3,))), attention_head_dim=4, scaling_factor=1.0,
  ),
  'f32c32_sana': Config(
    latent_channels=32, encoder=_released_levels((2, 2, 2, 3, 3, 3), _SANA, scales=(5,)),
    decoder=_released_levels((3,) * 6, _SANA, scales=(5,)), scaling_factor=0.41407,
  ),
  'f32c32_in': _imagenet_model(32, 0, 0.3189),
  'f32c32_mix': _imagenet_model(32, 0, 0.4552),
  'f64c128_in': _imagenet_model(128, 1, 0.2889),
  'f64c128_mix': _imagenet_model(128, 1, 0.4538),
  'f128c512_in': _imagenet_model(512, 2, 0.4883),
  'f128c512_mix': _imagenet_model(512, 2, 0.3620),
}  # fmt: skip
PARTS = ('decoder',)


def part_of(c: Config, part: str) -> Config:
  """The config of the decoder alone: a search only decodes."""
  del part
  return dataclasses.replace(c, encoder=(), unshuffle=False)


# ---------------------------------------------------------------- pixels into channels and back


def space_to_depth(x):
  """`[R, 2 h, 2 w, D]` -> `[R, h, w, 4 D]`; the four cells of a channel are neighbours."""
  R, H, W, D = x.shape
  # torch's pixel_unshuffle has the channel first and the cell after it
  x = x.reshape(R, H // 2, 2, W // 2, 2, D).transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(R, H // 2, W // 2, 4 * D)


def depth_to_space(x):
  """The inverse of `space_to_depth`."""
  R, h, w, D = x.shape
  x = x.reshape(R, h, w, D // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(R, 2 * h, 2 * w, D // 4)


def average_channels(x, width):
  """Means over groups of consecutive channels, `[..., D]` -> `[..., width]`."""
  return x.reshape(*x.shape[:-1], width, -1).mean(-1)


def conv_layer(inner, outer, rngs, *, stride=1, bias=True):
  # one cell of zeros on every side, at stride 2 as well
  return nnx.Conv(inner, outer, (3, 3), stride, padding=1, use_bias=bias, rngs=rngs)


class Down(nnx.Module):
  """Half the sides. `shortcut`: pixels are moved into channels and averaged to the new width."""

  def __init__(self, inner, outer, c: Config, *, shortcut=True, rngs):
    self.outer, self.unshuffle, self.shortcut = outer, c.unshuffle, shortcut
    if c.unshuffle:
      self.conv = conv_layer(inner, outer // 4, rngs)
    else:
      self.conv = conv_layer(inner, outer, rngs, stride=2)

  def __call__(self, x):  # [R, h, w, D] -> [R, h / 2, w / 2, D']
    y = space_to_depth(self.conv(x)) if self.unshuffle else self.conv(x)
    return y + average_channels(space_to_depth(x), self.outer) if self.shortcut else y


class Up(nnx.Module):
  """Twice the sides. `shortcut`: channels are repeated and moved into pixels."""

  def __init__(self, inner, outer, c: Config, *, shortcut=True, rngs):
    self.copies, self.shuffle, self.shortcut = 4 * outer // inner, c.shuffle, shortcut
    self.conv = conv_layer(inner, 4 * outer if c.shuffle else outer, rngs)

  def __call__(self, x):  # [R, h, w, D] -> [R, 2 h, 2 w, D']
    if self.shuffle:
      y = depth_to_space(self.conv(x))
    else:
      y = self.conv(x.repeat(2, 1).repeat(2, 2))
    # the copies of a channel are neighbours: repeated, not tiled
    return y + depth_to_space(x.repeat(self.copies, -1)) if self.shortcut else y


# ---------------------------------------------------------------- the blocks


class Norm(nnx.Module):
  """RMS norm over channels with weight and bias, or batch norm by stored moments; in float32."""

  def __init__(self, width, kind):
    self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
    stored = kind == 'batch_norm'
    self.mean = nnx.Param(jnp.zeros(width)) if stored else None
    self.variance = nnx.Param(jnp.ones(width)) if stored else None

  def __call__(self, x):  # [R, h, w, D]
    # the reference takes moments in float32 for weights of any dtype
    y = x.astype(jnp.float32)
    if self.mean is None:
      y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPS)
    else:
      y = (y - self.mean[...]) * jax.lax.rsqrt(self.variance[...].astype(jnp.float32) + EPS)
    return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class ResBlock(nnx.Module):
  def __init__(self, level: Level, *, rngs):
    self.act = level.act
    self.conv1 = conv_layer(level.width, level.width, rngs)
    self.conv2 = conv_layer(level.width, level.width, rngs, bias=False)
    self.norm = Norm(level.width, level.norm)

  def __call__(self, x):  # [R, h, w, D]
    # the norm stands at the end, over the whole branch
    return x + self.norm(self.conv2(ACTIVATIONS[self.act](self.conv1(x))))


class Scale(nnx.Module):
  """Queries, keys and values as seen through a larger filter, then mixed inside groups of d."""

  def __init__(self, width, side, head, *, rngs):
    # the checkpoint's 1 x 1 convolution has a group for each d channels of q, of k and of v
    groups = 3 * width // head
    self.filters = random_filters(rngs, side, 3 * width)
    self.mix = nnx.Param(jax.random.normal(rngs.params(), (groups, head, head)) * head**-0.5)

  def __call__(self, qkv):  # [R, h, w, 3 D]
    x = depthwise_conv(qkv, self.filters[...])
    groups, head, _ = self.mix.shape
    x = x.reshape(*x.shape[:-1], groups, head)
    return jnp.einsum('rhwgi,gio->rhwgo', x, self.mix[...]).reshape(qkv.shape)


class MultiscaleAttention(nnx.Module):
  """Linear attention; each further scale adds n heads."""

  def __init__(self, level: Level, head, *, rngs):
    self.head = head
    self.qkv = nnx.Linear(level.width, 3 * level.width, use_bias=False, rngs=rngs)
    self.scales = nnx.List([Scale(level.width, side, head, rngs=rngs) for side in level.scales])
    inner = level.width * (1 + len(level.scales))
    self.out = nnx.Linear(inner, level.width, use_bias=False, rngs=rngs)
    self.norm = Norm(level.width, level.norm)

  def __call__(self, x):  # [R, h, w, D]
    qkv = self.qkv(x)
    # the filters see q, k and v as one picture
    qkv = jnp.concatenate([qkv, *(scale(qkv) for scale in self.scales)], -1)
    # heads are cut from q, k and v side by side, in 3 d neighbours each: what is called q holds
    # queries, keys and values of the first heads
    R, h, w, _ = x.shape
    q, k, v = jnp.split(qkv.reshape(R, h * w, -1, 3 * self.head), 3, -1)
    mixed = linear_attention(q, k, v).reshape(R, h, w, -1).astype(x.dtype)
    return x + self.norm(self.out(mixed))


class EfficientViTBlock(nnx.Module):
  def __init__(self, level: Level, head, *, rngs):
    self.attn = MultiscaleAttention(level, head, rngs=rngs)
    self.ffn = GLUMBConv(level.width, RATIO * level.width, rngs=rngs)
    # RMS, whatever the level's own norm is
    self.norm = Norm(level.width, 'rms_norm')

  def __call__(self, x):  # [R, h, w, D]
    x = self.attn(x)
    return x + self.norm(self.ffn(x))


class Stage(nnx.Module):
  """The blocks of a level, stacked, and the change of resolution after or before them."""

  def __init__(self, level: Level, c: Config, resample, *, rngs):
    def build(rngs):
      if level.attention:
        return EfficientViTBlock(level, c.attention_head_dim, rngs=rngs)
      return ResBlock(level, rngs=rngs)

    self.blocks = stack_blocks(build, level.layers, rngs)
    self.resample = resample

  def run_blocks(self, x):  # [R, h, w, D]
    return scan_blocks(self.blocks, lambda block, x, _: (block(x), None), x)[0]


class Encoder(nnx.Module):
  def __init__(self, c: Config, *, rngs):
    empty, levels = _split_levels(c.encoder)
    first = levels[0].width
    if empty:  # a picture is halved at once
      self.conv_in = Down(c.in_channels, first, c, shortcut=False, rngs=rngs)
    else:
      self.conv_in = conv_layer(c.in_channels, first, rngs)
    downs = [Down(a.width, b.width, c, rngs=rngs) for a, b in zip(levels, levels[1:])]
    self.stages = nnx.List(
      [Stage(level, c, down, rngs=rngs) for level, down in zip(levels, [*downs, None])]
    )
    self.conv_out = conv_layer(levels[-1].width, c.latent_channels, rngs)
    self.channels = c.latent_channels

  def __call__(self, x):  # [R, H, W, 3] -> [R, h, w, C]
    x = self.conv_in(x)
    for stage in self.stages:
      x = stage.run_blocks(x)
      x = x if stage.resample is None else stage.resample(x)
    return self.conv_out(x) + average_channels(x, self.channels)


class Decoder(nnx.Module):
  def __init__(self, c: Config, *, rngs):
    # an empty first level leaves its resampling to `conv_out`
    empty, levels = _split_levels(c.decoder)
    last = levels[0].width
    self.conv_in = conv_layer(c.latent_channels, levels[-1].width, rngs)
    ups = [Up(b.width, a.width, c, rngs=rngs) for a, b in zip(levels, levels[1:])]
    # stored from the pixels down, as in the checkpoint; run from the last
    self.stages = nnx.List(
      [Stage(level, c, up, rngs=rngs) for level, up in zip(levels, [*ups, None])]
    )
    self.norm_out = Norm(last, 'rms_norm')
    if empty:
      self.conv_out = Up(last, c.in_channels, c, shortcut=False, rngs=rngs)
    else:
      self.conv_out = conv_layer(last, c.in_channels, rngs)
    self.copies = levels[-1].width // c.latent_channels

  def __call__(self, x):  # [R, h, w, C] -> [R, H, W, 3]
    # the shortcut of the latents: copies here, averages at the encoder's end
    x = self.conv_in(x) + x.repeat(self.copies, -1)
    for stage in reversed(self.stages):
      x = x if stage.resample is None else stage.resample(x)
      x = stage.run_blocks(x)
    # ReLU here, whatever the levels have
    return self.conv_out(jax.nn.relu(self.norm_out(x)))


def _split_levels(levels):
  """(whether the first level is empty, the levels that have blocks)."""
  empty = levels[0].layers == 0
  return empty, levels[1:] if empty else levels


class DCAE(nnx.Module):
  """Pictures `[R, H, W, 3]` in -1..1 (the decoder does not clip), latents `[R, h, w, C]`.

  `encode` and `decode` speak raw latents; generators speak scaled ones (`scale_latents`,
  `unscale_latents`).
  """

  def __init__(self, config: Config, *, rngs):
    self.config = config
    self.encoder = Encoder(config, rngs=rngs) if config.encoder else None
    self.decoder = Decoder(config, rngs=rngs)

  def encode(self, images):
    """The latents of pictures, `[R, H, W, 3]` -> `[R, h, w, C]`; nothing is drawn.

    Raises:
      ConfigError: built without the encoder, or a picture that `downscale` does not divide.
    """
    if self.encoder is None:
      raise ConfigError('encoder=(): this autoencoder was built to decode only')
    if images.shape[1] % self.config.downscale or images.shape[2] % self.config.downscale:
      raise ConfigError(
        f'image size={images.shape[1:3]}: multiples of {self.config.downscale} are allowed'
      )
    return self.encoder(images)

  def decode(self, latents):  # [R, h, w, C] -> [R, H, W, 3]
    return self.decoder(latents)

  def scale_latents(self, latents):
    """Raw latents as a generator sees them."""
    return latents * self._known_factor()

  def unscale_latents(self, latents):
    """The inverse of `scale_latents`: what `decode` wants."""
    return latents / self._known_factor()

  def _known_factor(self):
    if self.config.scaling_factor is None:
      raise ConfigError('scaling_factor=None: it stands in the checkpoint; give its number')
    return self.config.scaling_factor


def build_model(config: Config, seed=0) -> DCAE:
  """A random autoencoder; under `modules.abstract_module` no memory is used."""
  return DCAE(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, height: int, width: int) -> int:
  """Matmul and convolution FLOPs of one picture, without the depthwise convolutions.

  Args:
    op: 'encode' or 'decode'.
    height, width: of the latents.
  """
  levels = c.encoder if op == 'encode' else c.decoder
  empty, filled = _split_levels(levels)
  total, deepest, d = 0, len(filled) - 1, c.attention_head_dim
  for i, level in enumerate(filled):
    cells, D = height * width * 4 ** (deepest - i), level.width
    block = 36 * D * D
    if level.attention:
      scales = len(level.scales)
      # q, k and v, the scales' mixtures, linear attention, out; then the feed-forward
      block = 6 * D * D + scales * 6 * D * d + (1 + scales) * (4 * d + 2 + 2 * D) * D
      block += 6 * RATIO * D * D
    total += level.layers * cells * block
    if i:
      # a shuffle moves the convolution to the other side of the change and divides its channels by
      # four: both ways cost the same
      total += 18 * cells * D * filled[i - 1].width * (1 if op == 'encode' else 4)
  total += 18 * height * width * filled[-1].width * c.latent_channels
  # where the first level is empty, the last convolution writes twice the sides
  edge = 4 if empty and op == 'decode' else 1
  return total + 18 * height * width * 4**deepest * filled[0].width * c.in_channels * edge
