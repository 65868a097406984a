"""UNet of latent diffusion: SD 1.5 and 2.1 (Rombach et al. 2022, arXiv 2112.10752), SDXL (Podell et
al. 2023, 2307.01952).

Residual blocks that read the time, transformers that read the text, three or four resolutions down
and up again with skips between them. The layout is that of diffusers' `UNet2DConditionModel`;
checked against it by the golden files `unet_sd15_*.npz` and `unet_sdxl_*.npz`. Latents are scaled
ones (`models.autoencoder_kl`), and what comes out is the noise, or the velocity for SD 2.1 at 768
pixels.

Letters: R rows · H W latent cells · C latent channels · D width of a resolution · h heads ·
M = 4 * first width, width of the time embedding · S words of the text · E width of the text ·
P width of the pooled text · K size numbers of a picture · L layers of a transformer.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.stacked import scan_blocks, stack_blocks

TRANSFORMER_EPS = 1e-6  # of the group norm before a transformer; every other is `norm_eps`


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the names are those of the checkpoint's `config.json`, the defaults are SD 1.5's.

  Attributes:
    block_out_channels: D of every resolution, finest first.
    has_attention: which resolutions have transformers (`CrossAttnDownBlock2D`); the middle does.
    attention_head_dim: the NUMBER of heads of every resolution, whatever its name says.
    transformer_layers_per_block: L of every resolution; the last is also that of the middle.
    layers_per_block: residual blocks of a resolution on the way down; one more on the way up.
    cross_attention_dim: E.
    sample_size: latent side that the model was trained at; any other works.
    addition_time_embed_dim: features of each size number (SDXL); 0 for no added condition.
    projection_class_embeddings_input_dim: P + K * features; 0 for no added condition.

  Raises:
    ConfigError: tuples of different lengths, widths that groups or heads do not divide.
  """

  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  has_attention: tuple[bool, ...] = (True, True, True, False)
  attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
  transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
  layers_per_block: int = 2
  cross_attention_dim: int = 768
  in_channels: int = 4
  out_channels: int = 4
  sample_size: int = 64
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  addition_time_embed_dim: int = 0
  projection_class_embeddings_input_dim: int = 0

  def __post_init__(self):
    widths, heads = self.block_out_channels, self.attention_head_dim
    for name in ('has_attention', 'attention_head_dim', 'transformer_layers_per_block'):
      if len(getattr(self, name)) != len(widths) or not widths:
        raise ConfigError(
          f'{name}={getattr(self, name)}: must have one entry for each of '
          f'block_out_channels={widths}'
        )
    if any(width % self.norm_num_groups for width in widths):
      raise ConfigError(
        f'block_out_channels={widths}: every one must be a multiple of '
        f'norm_num_groups={self.norm_num_groups}'
      )
    # the middle has a transformer even where the last resolution has none
    used = (*self.has_attention[:-1], True)
    if any(width % h for width, h, here in zip(widths, heads, used) if here):
      raise ConfigError(f'attention_head_dim={heads}: the heads must divide {widths}')
    if bool(self.addition_time_embed_dim) != bool(self.projection_class_embeddings_input_dim):
      raise ConfigError(
        f'addition_time_embed_dim={self.addition_time_embed_dim}: must be 0 exactly if '
        'projection_class_embeddings_input_dim is'
      )

  @property
  def time_width(self) -> int:
    """M."""
    return 4 * self.block_out_channels[0]

  def depth_of(self, level: int) -> int:
    """Transformer layers after each residual block of a resolution; 0 for no transformer."""
    return self.transformer_layers_per_block[level] * self.has_attention[level]


_SD21 = Config(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024)
SIZES = {
  # they fit the tiny sizes of autoencoder_kl and clip; the first has one resolution and a
  # transformer in the middle only, because tests compile it many times
  'tiny': Config(
    block_out_channels=(8,), has_attention=(False,), attention_head_dim=(2,),
    transformer_layers_per_block=(1,), layers_per_block=1, cross_attention_dim=16, in_channels=3,
    out_channels=3, sample_size=4, norm_num_groups=4,
  ),
  'tiny_xl': Config(
    block_out_channels=(8, 16), has_attention=(False, True), attention_head_dim=(1, 2),
    transformer_layers_per_block=(1, 2), layers_per_block=1, cross_attention_dim=2 * 16,
    in_channels=3, out_channels=3, sample_size=4, norm_num_groups=4, addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=12 + 6 * 4,
  ),
  'sd15': Config(),
  'sd15_inpaint': Config(in_channels=9),  # noisy latents, mask, latents of the masked picture
  'sd21_base': _SD21,
  'sd21': dataclasses.replace(_SD21, sample_size=96),  # predicts the velocity
  'sdxl': Config(
    block_out_channels=(320, 640, 1280), has_attention=(False, True, True),
    attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048, sample_size=128, addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=1280 + 6 * 256,
  ),
}  # fmt: skip


def time_features(t, width: int):
  """Numbers `t [...]` -> `[..., width]` float32: cosines, then sines, periods up to 10000."""
  half = width // 2
  # the exponent is i / half: older models of diffusers divide by half - 1
  rates = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / half)
  angles = jnp.asarray(t, jnp.float32)[..., None] * rates
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


# Modules are built of zeros, and `random_parameters` draws: initialisers take long to compile, and
# most of the time of a trace.
ZEROS = nnx.initializers.zeros_init()
Linear = functools.partial(nnx.Linear, kernel_init=ZEROS)
LinearGeneral = functools.partial(nnx.LinearGeneral, kernel_init=ZEROS)


class SameKey:
  """What modules use of `nnx.Rngs`, without the counter: it is a traced array inside a trace, and
  flax searches the whole trace at each draw."""

  def __init__(self, key):
    self.key = key

  def params(self):
    return self.key


class GroupNorm(nnx.Module):
  """Norm of D / groups channels over all cells, in float32: `[R, ..., D] -> [R, ..., D]`."""

  def __init__(self, width, c, eps=None):
    self.groups, self.eps = c.norm_num_groups, c.norm_eps if eps is None else eps
    self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
    # two passes: E[x^2] - E[x]^2 loses digits where the mean is large
    y = y - y.mean((1, 3), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, (1, 3), keepdims=True) + self.eps)
    return (y.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(x.dtype)


def make_conv(inner, outer, size, rngs, stride=1):
  # symmetric padding also where the stride is 2, unlike the autoencoder's
  padding = size // 2
  return nnx.Conv(inner, outer, (size, size), stride, padding=padding, kernel_init=ZEROS, rngs=rngs)


class Embedding(nnx.Module):
  """`[R, features] -> [R, M]`."""

  def __init__(self, inner, outer, *, rngs):
    self.linear_1 = Linear(inner, outer, rngs=rngs)
    self.linear_2 = Linear(outer, outer, rngs=rngs)

  def __call__(self, x):
    # features are float32 and reach 1000 before the cosine; from here on bfloat16 is enough
    x = x.astype(self.linear_1.kernel.dtype)
    return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Resnet(nnx.Module):
  """A residual block; the time is added between its two convolutions."""

  def __init__(self, inner, outer, c, *, rngs):
    self.norm1, self.conv1 = GroupNorm(inner, c), make_conv(inner, outer, 3, rngs)
    self.time_emb_proj = Linear(c.time_width, outer, rngs=rngs)
    self.norm2, self.conv2 = GroupNorm(outer, c), make_conv(outer, outer, 3, rngs)
    self.conv_shortcut = None if inner == outer else make_conv(inner, outer, 1, rngs)

  def __call__(self, x, time):  # [R, H, W, D], [R or 1, M] -> [R, H, W, D']
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    # a time that all rows share is projected once
    y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    # the shortcut reads the raw input, not the normed one
    return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nnx.Module):
  """Cells look at cells; `qkv` is `[D, 3, D]`, so that a mesh splits each of the three by heads."""

  def __init__(self, width, heads, *, rngs):
    self.heads = heads
    self.qkv = LinearGeneral(width, (3, width), use_bias=False, rngs=rngs)
    self.out = Linear(width, width, rngs=rngs)

  def __call__(self, x):  # [R, HW, D]
    q, k, v = jnp.moveaxis(self.qkv(x), -2, 0)
    return self.out(vit.multi_head_attention(q, k, v, self.heads))


class CrossAttention(nnx.Module):
  """Cells look at words, at padding as well: the released models have no text mask."""

  def __init__(self, width, heads, c, *, rngs):
    self.heads = heads
    self.q = Linear(width, width, use_bias=False, rngs=rngs)
    self.kv = LinearGeneral(c.cross_attention_dim, (2, width), use_bias=False, rngs=rngs)
    self.out = Linear(width, width, rngs=rngs)

  def __call__(self, x, text):  # [R, HW, D], [R, S, E]
    k, v = jnp.moveaxis(self.kv(text), -2, 0)
    return self.out(vit.multi_head_attention(self.q(x), k, v, self.heads))


class GEGLU(nnx.Module):
  """value * gelu(gate): the first half of the wide layer is the value, GELU is the exact one."""

  def __init__(self, width, *, rngs):
    self.up = LinearGeneral(width, (2, 4 * width), rngs=rngs)
    self.down = Linear(4 * width, width, rngs=rngs)

  def __call__(self, x):
    value, gate = jnp.moveaxis(self.up(x), -2, 0)
    return self.down(value * jax.nn.gelu(gate, approximate=False))


class Block(nnx.Module):
  """One layer of a transformer."""

  def __init__(self, width, heads, c, *, rngs):
    self.norm1, self.norm2, self.norm3 = (vit.LayerNorm(width, 1e-5) for _ in range(3))
    self.attn1 = SelfAttention(width, heads, rngs=rngs)
    self.attn2 = CrossAttention(width, heads, c, rngs=rngs)
    self.ff = GEGLU(width, rngs=rngs)

  def __call__(self, x, text):  # [R, HW, D], [R, S, E] -> [R, HW, D]
    x = x + self.attn1(self.norm1(x))
    x = x + self.attn2(self.norm2(x), text)
    return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
  """`depth` stacked blocks over the cells of one resolution, added to their input."""

  def __init__(self, width, heads, depth, c, *, rngs):
    self.norm = GroupNorm(width, c, TRANSFORMER_EPS)
    # a 1 x 1 convolution in SD 1.5's files and a matrix in the others': the same numbers
    self.proj_in, self.proj_out = (Linear(width, width, rngs=rngs) for _ in range(2))
    build = lambda rngs: Block(width, heads, c, rngs=SameKey(rngs.params()))
    self.blocks = stack_blocks(build, depth, rngs)

  def __call__(self, x, text):  # [R, H, W, D], [R, S, E] -> [R, H, W, D]
    y = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
    y, _ = scan_blocks(self.blocks, lambda block, y, _: (block(y, text), None), y)
    return x + self.proj_out(y).reshape(x.shape)


def make_pairs(inputs, level, c, rngs):
  """(residual blocks, transformers or None) of one resolution, a residual block for each of the
  widths `inputs`."""
  width, depth, heads = c.block_out_channels[level], c.depth_of(level), c.attention_head_dim[level]
  resnets = nnx.List([Resnet(inner, width, c, rngs=rngs) for inner in inputs])
  if not depth:
    return resnets, None
  return resnets, nnx.List([Transformer(width, heads, depth, c, rngs=rngs) for _ in inputs])


class Down(nnx.Module):
  """A resolution on the way down."""

  def __init__(self, inner, level, c, *, rngs):
    width, last = c.block_out_channels[level], level == len(c.block_out_channels) - 1
    inputs = [inner] + [width] * (c.layers_per_block - 1)
    self.resnets, self.attentions = make_pairs(inputs, level, c, rngs)
    self.downsample = None if last else make_conv(width, width, 3, rngs, 2)

  def __call__(self, x, time, text):
    """Returns what every pair and the downsampling give, in order: the skips."""
    skips = []
    for i, resnet in enumerate(self.resnets):
      x = resnet(x, time)
      x = x if self.attentions is None else self.attentions[i](x, text)
      skips.append(x)
    return skips if self.downsample is None else [*skips, self.downsample(x)]


class Middle(nnx.Module):
  """The coarsest resolution between the ways down and up."""

  def __init__(self, c, *, rngs):
    width, heads = c.block_out_channels[-1], c.attention_head_dim[-1]
    depth = c.transformer_layers_per_block[-1]
    self.resnets = nnx.List([Resnet(width, width, c, rngs=rngs) for _ in range(2)])
    self.attentions = nnx.List([Transformer(width, heads, depth, c, rngs=rngs)])

  def __call__(self, x, time, text):  # [R, H, W, D]
    return self.resnets[1](self.attentions[0](self.resnets[0](x, time), text), time)


class Up(nnx.Module):
  """A resolution on the way up; `widths` are those of its skips in the order of their use."""

  def __init__(self, inner, widths, level, c, *, rngs):
    width = c.block_out_channels[level]
    # every residual block reads the stream and one skip beside it
    streams = [inner] + [width] * c.layers_per_block
    inputs = [stream + skip for stream, skip in zip(streams, widths)]
    self.resnets, self.attentions = make_pairs(inputs, level, c, rngs)
    self.upsample = make_conv(width, width, 3, rngs) if level else None

  def __call__(self, x, skips, time, text):
    for i, (resnet, skip) in enumerate(zip(self.resnets, skips)):
      # the stream comes first: the norm's groups and the kernel's rows depend on the order
      x = resnet(jnp.concatenate([x, skip], -1), time)
      x = x if self.attentions is None else self.attentions[i](x, text)
    return x

  def enlarge(self, x, side):  # [R, H, W, D] -> [R, *side, D]
    # an odd side was rounded up on the way down; cutting is what nearest neighbours come to
    return self.upsample(x.repeat(2, 1).repeat(2, 2)[:, : side[0], : side[1]])


class UNet(nnx.Module):
  """`__call__` predicts noise; `embed_time`, `run_down` and `run_up` are its three parts."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    widths, added = c.block_out_channels, c.projection_class_embeddings_input_dim
    self.conv_in = make_conv(c.in_channels, widths[0], 3, rngs)
    self.time_embedding = Embedding(widths[0], c.time_width, rngs=rngs)
    self.add_embedding = Embedding(added, c.time_width, rngs=rngs) if added else None
    # `skips` are the widths of what `run_down` keeps, which the way up takes from the end
    skips, downs = [widths[0]], []
    for level, width in enumerate(widths):
      downs.append(Down(skips[-1], level, c, rngs=rngs))
      skips += [width] * (c.layers_per_block + (downs[-1].downsample is not None))
    self.down_blocks = nnx.List(downs)
    self.mid_block = Middle(c, rngs=rngs)
    inner, ups = widths[-1], []
    for level in reversed(range(len(widths))):
      used = [skips.pop() for _ in range(c.layers_per_block + 1)]
      ups.append(Up(inner, used, level, c, rngs=rngs))
      inner = widths[level]
    self.up_blocks = nnx.List(ups)
    self.conv_norm_out = GroupNorm(inner, c)
    self.conv_out = make_conv(inner, c.out_channels, 3, rngs)

  def embed_added(self, pooled, time_ids):
    """SDXL's added condition.

    Args:
      pooled: `[R, P]`, the pooled text (of the second text encoder only).
      time_ids: `[R, K]`: height and width of the original, top and left of the crop, height and
        width of the target; the refiner has an aesthetic score for the last two.

    Returns:
      `[R, M]`.
    """
    c = self.config
    # every number has its own features; the text stands before them
    sizes = time_features(time_ids, c.addition_time_embed_dim).reshape(len(time_ids), -1)
    x = jnp.concatenate([pooled.astype(jnp.float32), sizes], -1)
    if x.shape[-1] != c.projection_class_embeddings_input_dim:
      raise ConfigError(
        f'pooled {pooled.shape} and time_ids {time_ids.shape}: must give '
        f'{c.projection_class_embeddings_input_dim} features, {x.shape[-1]} given'
      )
    return self.add_embedding(x)

  def embed_time(self, t, pooled=None, time_ids=None):
    """Steps `t [R or 1]`, of 0 .. 999, and the added condition -> `[R or 1, M]`.

    Raises:
      ConfigError: a condition that the model does not have, or lacks.
    """
    time = self.time_embedding(time_features(t, self.config.block_out_channels[0]))
    given = pooled is not None and time_ids is not None
    if given != (self.add_embedding is not None) or (pooled is None) != (time_ids is None):
      wanted = 'pooled and time_ids' if self.add_embedding is not None else 'neither'
      raise ConfigError(f'pooled, time_ids: this model reads {wanted}')
    return time + self.embed_added(pooled, time_ids) if given else time

  def run_down(self, latents, time, text):
    """Returns (output of the middle, skips).

    Args:
      latents: `[R, H, W, C]`; time: `[R or 1, M]`; text: `[R, S, E]`; all of the parameters' dtype.
    """
    skips = [self.conv_in(latents)]
    for block in self.down_blocks:
      skips += block(skips[-1], time, text)
    return self.mid_block(skips[-1], time, text), skips

  def run_up(self, x, skips, time, text):
    """The output of the middle and the skips -> the prediction `[R, H, W, C']`."""
    for block in self.up_blocks:
      count = len(block.resnets)
      used, skips = skips[-count:], skips[:-count]
      x = block(x, used[::-1], time, text)
      if block.upsample is not None:
        x = block.enlarge(x, skips[-1].shape[1:3])
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

  def __call__(self, latents, t, text, pooled=None, time_ids=None):
    """Predicts the noise.

    Args:
      latents: `[R, H, W, C]`, scaled for the step by the sampler.
      t: steps of 0 .. 999, not necessarily whole: `[R]`, or `[1]` for all rows.
      text: `[R, S, E]`, hidden states of the text encoders.
      pooled: `[R, P]`, SDXL only; time_ids: `[R, K]`, SDXL only.

    Returns:
      `[R, H, W, C']` float32.
    """
    # a sampler keeps float32 latents; the network runs in the dtype of its parameters
    dtype = self.conv_in.kernel.dtype
    time, text = self.embed_time(t, pooled, time_ids), text.astype(dtype)
    x, skips = self.run_down(latents.astype(dtype), time, text)
    return self.run_up(x, skips, time, text).astype(jnp.float32)


def build_model(config: Config) -> UNet:
  """Builds a UNet of zeros; inside `modules.abstract_module` it uses no memory."""
  return UNet(config, rngs=SameKey(jax.random.key(0)))


def random_parameters(config: Config, dtype: str = 'float32'):
  """Returns random parameters, drawn on the host; they are the same at every call."""
  draw = np.random.default_rng(0)

  def draw_leaf(path, leaf):
    names, shape = [entry.key for entry in path], leaf.shape
    if names[-1] != 'kernel':
      return jnp.full(shape, names[-1] in ('scale', 'weight'), dtype)
    # a stack has the layer first, and a fused projection its parts before the outputs
    inner = shape[1:] if 'blocks' in names else shape
    inputs = inner[0] if len(inner) == 3 else math.prod(inner[:-1])
    return jnp.asarray(draw.standard_normal(shape, np.float32) * inputs**-0.5, dtype)

  _, template = modules.structure_of(build_model, config)
  return jax.tree_util.tree_map_with_path(draw_leaf, template)


def count_flops(c: Config, height: int, width: int, words: int = 77) -> int:
  """FLOPs of the convolutions and matmuls of one prediction for latents of `height` x `width`."""

  def conv(cells, inner, outer, size=3):
    return 2 * cells * size**2 * inner * outer

  def resnet(cells, inner, outer):
    shortcut = conv(cells, inner, outer, 1) if inner != outer else 0
    time = conv(1, c.time_width, outer, 1)
    return conv(cells, inner, outer) + time + conv(cells, outer, outer) + shortcut

  def transformer(cells, d, depth):
    # 3 + 1 matrices of self attention, 1 + 1 of cross attention, 8 + 4 of the feed-forward layer
    matrices = conv(cells, 18 * d, d, 1) + conv(words, c.cross_attention_dim, 2 * d, 1)
    return depth and depth * (matrices + 4 * cells * (cells + words) * d) + 4 * cells * d * d

  # as the model is built: conv_in and conv_out, embeddings, down, middle, up
  widths, end = c.block_out_channels, len(c.block_out_channels) - 1
  sides = [(-(-height // 2**i), -(-width // 2**i)) for i in range(end + 1)]
  cells = [h * w for h, w in sides]
  total = conv(cells[0], c.in_channels, widths[0]) + conv(cells[0], widths[0], c.out_channels)
  for inner in (widths[0], c.projection_class_embeddings_input_dim):
    total += conv(1, inner + c.time_width, c.time_width, 1) if inner else 0
  skips = [widths[0]]
  for i, d in enumerate(widths):
    for _ in range(c.layers_per_block):
      total += resnet(cells[i], skips[-1], d) + transformer(cells[i], d, c.depth_of(i))
      skips.append(d)
    if i < end:
      total += conv(cells[i + 1], d, d)
      skips.append(d)
  inner, depth = widths[-1], c.transformer_layers_per_block[-1]
  total += 2 * resnet(cells[-1], inner, inner) + transformer(cells[-1], inner, depth)
  for i in reversed(range(end + 1)):
    for _ in range(c.layers_per_block + 1):
      total += resnet(cells[i], inner + skips.pop(), widths[i])
      total += transformer(cells[i], widths[i], c.depth_of(i))
      inner = widths[i]
    total += conv(cells[i - 1], inner, inner) if i else 0
  return total
