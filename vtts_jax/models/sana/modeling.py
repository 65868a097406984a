"""SANA (Xie et al. 2024, arXiv 2410.10629), SANA-1.5 (2501.18427) and SANA-Sprint (2503.09641).

A diffusion transformer over the latents of an autoencoder that divides sides by 32 (`models/dcae`),
so that a token is one latent cell. Self-attention is linear in the tokens, and depthwise
convolutions in the feed-forward tell where a token is. Sprint is distilled to one to four steps and
reads the guidance scale as an input. Checked against diffusers' `SanaTransformer2DModel` by golden
files (`replay.py`).

Letters: R rows · H W C latents · P patch side · h w patches per side · T = h w tokens · S tokens of
the caption · D width · F hidden channels of the feed-forward · n heads · d = D / n · L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.sd3.modeling import (
  FREQUENCIES,
  FeatureMLP,
  RMSNorm,
  join_patches,
  plain_norm,
  position_table,
  time_features,
)
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.vit import multi_head_attention, split_patches

CAPTION_EPS = QK_EPS = 1e-5  # of the RMS norms; the layer norms have 1e-6
HIDDEN = -10000.0  # added to the score of a masked word


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the names are those of the checkpoint's `config.json`, except `hidden`.

  Attributes:
    hidden: F, int(mlp_ratio D).
    sample_size: side of the latents that the network was made for; it only scales positions.
    caption_channels: width of the text encoder's states.
    interpolation_scale: where set, sines and cosines of a token's place are added, with coordinates
      divided by it (models of 2048 and 4096 pixels); None adds nothing.
    qk_norm: whether queries and keys are RMS-normed over all heads together.
    attention_bias: whether q, k and v of the self-attention have biases.
    guidance_embeds: whether the guidance scale is an input (Sprint).
    guidance_embeds_scale: factor of the guidance scale before it is embedded.
    timestep_scale: a sampler multiplies its times by it before it calls the network.

  Raises:
    ConfigError: a width that the positions cannot have.
  """

  in_channels: int = 32
  out_channels: int = 32
  num_attention_heads: int = 70
  attention_head_dim: int = 32
  num_layers: int = 20
  num_cross_attention_heads: int = 20
  cross_attention_head_dim: int = 112
  caption_channels: int = 2304
  hidden: int = 5600
  sample_size: int = 32
  patch_size: int = 1
  interpolation_scale: float | None = None
  qk_norm: bool = False
  attention_bias: bool = False
  guidance_embeds: bool = False
  guidance_embeds_scale: float = 0.1
  timestep_scale: float = 1.0

  def __post_init__(self):
    if self.interpolation_scale is not None and self.width % 4:
      raise ConfigError(
        f'interpolation_scale={self.interpolation_scale}: the width {self.width} must be a '
        'multiple of 4, or None'
      )

  @property
  def width(self) -> int:
    """D."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def cross_width(self) -> int:
    """All heads of the cross-attention together."""
    return self.num_cross_attention_heads * self.cross_attention_head_dim


def _small(**options):
  """The networks of 0.6 billion parameters."""
  return Config(
    num_attention_heads=36,
    num_layers=28,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    hidden=2880,
    **options,
  )


def _tiny(**options):
  """Sizes for tests."""
  return Config(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    caption_channels=12,
    hidden=24,
    sample_size=4,
    **options,
  )


SIZES = {
  'tiny': _tiny(),
  'sprint_tiny': _tiny(qk_norm=True, guidance_embeds=True),
  'sana_600m_512': _small(sample_size=16),
  'sana_600m_1024': _small(),
  'sana_1600m_512': Config(sample_size=16),
  'sana_1600m_1024': Config(),
  'sana_1600m_2048': Config(sample_size=64, interpolation_scale=1.0),
  'sana_1600m_4096': Config(sample_size=128, interpolation_scale=2.0),
  'sana1_5_1600m_1024': Config(qk_norm=True),
  'sana1_5_4800m_1024': Config(num_layers=60, qk_norm=True),
  'sana_sprint_600m_1024': _small(qk_norm=True, guidance_embeds=True),
  'sana_sprint_1600m_1024': Config(qk_norm=True, guidance_embeds=True),
}


def linear_attention(q, k, v):
  """ReLU attention without a softmax: what it costs grows linearly with the tokens.

  Args:
    q, k, v: `[R, T, n, d]`.

  Returns:
    `[R, T, n, d]` float32. There is no 1 / sqrt d: a factor would cancel.
  """
  q, k = jax.nn.relu(q.astype(jnp.float32)), jax.nn.relu(k.astype(jnp.float32))
  # sums over all tokens follow: a TPU's default of bfloat16 products would be seen
  exact = {'precision': jax.lax.Precision.HIGHEST}
  memory = jnp.einsum('rtnd,rtne->rnde', k, v.astype(jnp.float32), **exact)
  mixed = jnp.einsum('rtnd,rnde->rtne', q, memory, **exact)
  weight = jnp.einsum('rtnd,rnd->rtn', q, k.sum(1), **exact)
  # a token whose queries are all cut off gets zeros
  return mixed / (weight[..., None] + 1e-15)


def depthwise_conv(x, kernel):
  """Each channel's own filter, zeros outside: `x [R, h, w, F]`, `kernel [s, s, F]`, s odd."""
  side, (height, width) = len(kernel), x.shape[1:3]
  rim = side // 2
  padded = jnp.pad(x, ((0, 0), (rim, rim), (rim, rim), (0, 0)))
  # shifted sums fuse into one pass; XLA's convolution with a group for each channel is slow on CPUs
  total = sum(
    padded[:, i : i + height, j : j + width].astype(jnp.float32) * kernel[i, j]
    for i in range(side)
    for j in range(side)
  )
  return total.astype(x.dtype)


def random_filters(rngs, side, channels):
  """Filters `[side, side, channels]` of a depthwise convolution."""
  return nnx.Param(jax.random.normal(rngs.params(), (side, side, channels)) / side)


class GLUMBConv(nnx.Module):
  """The feed-forward: 1 x 1 up, 3 x 3 depthwise, a gate, 1 x 1 down without a bias."""

  def __init__(self, width, hidden, *, rngs):
    self.enter = nnx.Linear(width, 2 * hidden, rngs=rngs)
    self.filters = random_filters(rngs, 3, 2 * hidden)
    self.offset = nnx.Param(jnp.zeros(2 * hidden))
    self.leave = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

  def __call__(self, x):  # [R, h, w, D]
    # this first SiLU is easy to miss: it stands before the depthwise convolution
    x = jax.nn.silu(self.enter(x))
    # the value comes first, then its gate
    value, gate = jnp.split(depthwise_conv(x, self.filters[...]) + self.offset[...], 2, -1)
    return self.leave(value * jax.nn.silu(gate))


class SelfAttention(nnx.Module):
  """Linear attention among the tokens of the picture."""

  def __init__(self, c: Config, *, rngs):
    self.heads = c.num_attention_heads
    self.qkv = nnx.Linear(c.width, 3 * c.width, use_bias=c.attention_bias, rngs=rngs)
    self.out = nnx.Linear(c.width, c.width, rngs=rngs)
    self.q_norm = RMSNorm(c.width, QK_EPS) if c.qk_norm else None
    self.k_norm = RMSNorm(c.width, QK_EPS) if c.qk_norm else None

  def __call__(self, x):  # [R, T, D]
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    if self.q_norm is not None:
      # over all heads together, before they are split
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (y.reshape(*x.shape[:-1], self.heads, -1) for y in (q, k, v))
    return self.out(linear_attention(q, k, v).reshape(x.shape).astype(x.dtype))


class CrossAttention(nnx.Module):
  """Softmax attention to the caption, with heads of its own size."""

  def __init__(self, c: Config, *, rngs):
    # the caption has the network's width here, whatever the text encoder's is
    self.heads, inner = c.num_cross_attention_heads, c.cross_width
    self.q = nnx.Linear(c.width, inner, rngs=rngs)
    self.kv = nnx.Linear(c.width, 2 * inner, rngs=rngs)
    self.out = nnx.Linear(inner, c.width, rngs=rngs)
    self.q_norm = RMSNorm(inner, QK_EPS) if c.qk_norm else None
    self.k_norm = RMSNorm(inner, QK_EPS) if c.qk_norm else None

  def __call__(self, x, caption, bias):  # [R, T, D], [R, S, D], [R, 1, 1, S] -> [R, T, D]
    q, (k, v) = self.q(x), jnp.split(self.kv(caption), 2, -1)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    return self.out(multi_head_attention(q, k, v, self.heads, bias))


class Block(nnx.Module):
  """One layer; its table is added to the modulations that all layers share."""

  def __init__(self, c: Config, *, rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (6, c.width)) * c.width**-0.5)
    self.attn = SelfAttention(c, rngs=rngs)
    self.cross = CrossAttention(c, rngs=rngs)
    self.ffn = GLUMBConv(c.width, c.hidden, rngs=rngs)

  def __call__(self, x, modulation, caption, bias, grid):
    """`x [R, T, D]`; `modulation [R, 6, D]`; `caption [R, S, D]`; `bias [R, 1, 1, S]`; `grid`
    is (h, w)."""
    chunks = jnp.split(self.table[...] + modulation, 6, 1)  # each [R, 1, D]
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = chunks
    x = x + gate_attn * self.attn(plain_norm(x) * (1 + scale_attn) + shift_attn)
    # the caption is read by the stream as it is, without a norm and without a gate
    x = x + self.cross(x, caption, bias)
    y = plain_norm(x) * (1 + scale_ffn) + shift_ffn
    return x + gate_ffn * self.ffn(y.reshape(len(x), *grid, -1)).reshape(x.shape)


class Caption(nnx.Module):
  """States of the text encoder to the width of the network; once for a prompt."""

  def __init__(self, c: Config, *, rngs):
    self.enter = nnx.Linear(c.caption_channels, c.width, rngs=rngs)
    self.leave = nnx.Linear(c.width, c.width, rngs=rngs)
    self.norm = RMSNorm(c.width, CAPTION_EPS)

  def __call__(self, text):  # [R, S, caption_channels] -> [R, S, D]
    x = self.enter(text.astype(self.enter.kernel.dtype))
    return self.norm(self.leave(jax.nn.gelu(x, approximate=True)))


class Sana(nnx.Module):
  """`caption` once for a prompt, then `__call__(x, t, caption, mask, guidance)` in each step."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    D = c.width
    self.patch = nnx.Linear(c.patch_size**2 * c.in_channels, D, rngs=rngs)
    self.caption = Caption(c, rngs=rngs)
    self.time = FeatureMLP(FREQUENCIES, D, rngs=rngs)
    self.guidance = FeatureMLP(FREQUENCIES, D, rngs=rngs) if c.guidance_embeds else None
    self.modulation = nnx.Linear(D, 6 * D, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.num_layers, rngs)
    self.table = nnx.Param(jax.random.normal(rngs.params(), (2, D)) * D**-0.5)
    self.to_patch = nnx.Linear(D, c.patch_size**2 * c.out_channels, rngs=rngs)

  def embed_patches(self, x):
    """Latents `[R, H, W, C]` -> tokens `[R, T, D]`.

    Raises:
      ConfigError: sides that the patch does not divide.
    """
    c = self.config
    rows, columns = self._grid(x)
    tokens = self.patch(split_patches(x.astype(self.patch.kernel.dtype), c.patch_size))
    if c.interpolation_scale is None:
      return tokens  # the depthwise convolutions tell where a token is
    # no file stores this table: it is made for the sides at hand
    base = c.sample_size // c.patch_size
    places = position_table(rows, columns, c.width, base, c.interpolation_scale)
    return tokens + places.reshape(rows * columns, -1).astype(tokens.dtype)

  def embed_time(self, t, guidance=None):
    """Times `[R]`, and of Sprint guidance scales `[R]` -> what is embedded `[R, D]`, and the
    modulations that all layers share `[R, 6, D]`.

    Raises:
      ConfigError: a guidance scale for a network that reads none, or none for one that does.
    """
    if (guidance is None) != (self.guidance is None):
      raise ConfigError(f'guidance: the network has guidance_embeds={self.guidance is not None}')
    time = self.time(time_features(t))
    if guidance is not None:
      # summed before the SiLU, so that scale and time share the modulations
      time = time + self.guidance(time_features(guidance * self.config.guidance_embeds_scale))
    return time, self.modulation(jax.nn.silu(time)).reshape(len(time), 6, -1)

  def __call__(self, x, t, caption, mask=None, guidance=None):
    """What the network predicts: a velocity; of Sprint see `predict_trigflow`.

    Args:
      x: noisy latents `[R, H, W, C]`.
      t: times `[R]`: 1000 sigma; of Sprint in [0, 1].
      caption: `self.caption(text)`, `[R, S, D]`.
      mask: `[R, S]`, 1 for words that are read; None reads all.
      guidance: guidance scales `[R]`; of Sprint only.

    Returns:
      `[R, H, W, C]` float32.
    """
    grid, tokens = self._grid(x), self.embed_patches(x)
    time, modulation = self.embed_time(t, guidance)
    # a finite number, so that a row without any word is not nan
    bias = None if mask is None else ((1.0 - mask) * HIDDEN)[:, None, None]

    def run_block(block, tokens, _):
      return block(tokens, modulation, caption, bias, grid), None

    tokens, _ = scan_blocks(self.blocks, run_block, tokens)
    # the final norm is modulated by the embedded time itself, before SiLU and `modulation`
    shift, scale = jnp.split(self.table[...] + time[:, None], 2, 1)
    out = self.to_patch(plain_norm(tokens) * (1 + scale) + shift)
    return join_patches(out, *grid, self.config.patch_size).astype(jnp.float32)

  def _grid(self, x):
    side = self.config.patch_size
    if x.shape[1] % side or x.shape[2] % side:
      raise ConfigError(f'latent size={x.shape[1:3]}: multiples of {side} are allowed')
    return x.shape[1] // side, x.shape[2] // side


def predict_trigflow(network, x, angle, sigma_data=0.5):
  """Sprint's prediction: from an angle of TrigFlow to the flow that the network was trained on.

  With it, `cos(angle) x - sin(angle) prediction` are the data (times `sigma_data`).

  Args:
    network: function of latents and times in [0, 1], `[R, H, W, C]`, `[R]` -> `[R, H, W, C]`.
    x: noisy latents `[R, H, W, C]`; pure noise has standard deviation `sigma_data`.
    angle: `[R]` in [0, pi / 2], pi / 2 is noise.
  """
  time = jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))
  s = time[:, None, None, None]
  # the point of the circle (sin, cos) is moved onto the line (s, 1 - s), and back at the end
  norm = jnp.sqrt(s**2 + (1 - s) ** 2)
  noisy = x / sigma_data * norm
  out = network(noisy, time)
  return ((1 - 2 * s) * noisy + (1 - 2 * s + 2 * s**2) * out) / norm * sigma_data


def build_model(config: Config, seed=0) -> Sana:
  """A random model; under `modules.abstract_module` no memory is used."""
  return Sana(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, height=0, width=0, words=0) -> int:
  """Matmul FLOPs of one row, without the depthwise convolutions.

  Args:
    op: 'caption' or 'predict'.
    height, width: of the latents. words: S.
  """
  D = c.width
  if op == 'caption':
    return 2 * words * D * (c.caption_channels + D)
  T, inner = (height // c.patch_size) * (width // c.patch_size), c.cross_width
  # q, k, v and out; then keys times values, queries times that, and the sum of the weights
  own = 8 * T * D * D + 4 * T * D * c.attention_head_dim + 2 * T * D
  cross = 4 * T * D * inner + 4 * words * D * inner + 4 * T * words * inner
  ffn = 6 * T * D * c.hidden
  times = 2 * (FREQUENCIES * D + D * D) * (1 + c.guidance_embeds) + 12 * D * D
  ends = 2 * T * D * c.patch_size**2 * (c.in_channels + c.out_channels)
  return c.num_layers * (own + cross + ffn) + times + ends
