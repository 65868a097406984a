"""VAR (Tian et al. 2024, arXiv 2404.02905): a transformer that draws a picture scale by scale.

All tokens of a scale are drawn at once, given the scales before. The input of the first scale is
the class; that of each other scale is the picture so far, shrunk to its grid (`models.var_vq`). A
class modulates every norm (AdaLN), and since it is the same at all scales, the modulation is part
of the context. Checked against the PyTorch reference by golden files: `replay.py`,
tests/test_var.py.

Letters: B prompts · N candidates · C streams of guidance (class, then null) · S scales ·
T tokens of all scales · Q tokens of a call · L layers · V codes · Z channels of a code · D width ·
h heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.var.attention import GeluMLP, ScaleAttention, modulate
from vtts_jax.models.var_vq import pyramid
from vtts_jax.models.var_vq.modeling import PATCH_NUMS, PATCH_NUMS_512


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of VAR-d16.

  Attributes:
    hidden: inner width of the feed-forward layer.
    codes, channels: V and Z of the tokenizer.
    classes: number of classes, without the null class.
    patch_nums: side of each scale's grid.
    cosine: see `ScaleAttention`.
    shared_adaln: one modulation for all layers, to which each adds an offset of its own.

  Raises:
    ConfigError: heads do not divide the width, or fewer than two scales.
  """

  width: int = 1024
  layers: int = 16
  heads: int = 16
  hidden: int = 4096
  codes: int = 4096
  channels: int = 32
  classes: int = 1000
  patch_nums: tuple[int, ...] = PATCH_NUMS
  cosine: bool = True
  shared_adaln: bool = False
  eps: float = 1e-6

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')
    # guidance divides by the number of scales less one
    if len(self.patch_nums) < 2:
      raise ConfigError(f'patch_nums={self.patch_nums}: must be at least two scales')

  @property
  def grids(self) -> tuple[pyramid.Grid, ...]:
    """The grid of every scale."""
    return tuple((side, side) for side in self.patch_nums)

  @property
  def ends(self) -> tuple[int, ...]:
    """Tokens up to the end of each scale, with a 0 in front."""
    return pyramid.scale_ends(self.grids)


def _of_depth(layers, **options):
  # the released family: a head of 64 channels for each layer
  width = 64 * layers
  return Config(width=width, layers=layers, heads=layers, hidden=4 * width, **options)


_TINY = {
  'width': 16, 'layers': 2, 'heads': 2, 'hidden': 24, 'codes': 16, 'channels': 4, 'classes': 5,
  'patch_nums': (1, 2),
}  # fmt: skip
SIZES = {
  'tiny': Config(**_TINY),
  'tiny_shared': Config(**_TINY, shared_adaln=True),
  # released
  **{f'd{layers}': _of_depth(layers) for layers in (16, 20, 24, 30)},
  'd36_512': _of_depth(36, patch_nums=PATCH_NUMS_512, shared_adaln=True),
}


class Block(nnx.Module):
  """One layer: attention and feed-forward, each between modulated norms and gates."""

  def __init__(self, c, *, rngs):
    self.eps = c.eps
    self.attn = ScaleAttention(c.width, c.heads, c.cosine, rngs=rngs)
    self.ffn = GeluMLP(c.width, c.hidden, rngs=rngs)
    if c.shared_adaln:
      self.offset = nnx.Param(jax.random.normal(rngs.params(), (6, c.width)) * c.width**-0.5)
    else:
      self.adaln = nnx.LinearGeneral(c.width, (6, c.width), rngs=rngs)

  def __call__(self, x, modulation, cache, layer, start, visible):
    # gates come first in the file's order, then scales, then shifts
    gate1, gate2, scale1, scale2, shift1, shift2 = jnp.moveaxis(modulation, -2, 0)
    y = modulate(x, scale1, shift1, self.eps)
    y, cache = self.attn(y, cache, layer, start, visible)
    x = x + gate1[:, None, None] * y
    y = self.ffn(modulate(x, scale2, shift2, self.eps))
    return x + gate2[:, None, None] * y, cache


class VAR(nnx.Module):
  """Make a context, then call `feed_scales`, `token_logits` and `guide_logits` for each scale.

  A context is {'start': `[B, C, D]`, 'layers': `[B, C, L, 6, D]`, 'head': `[B, C, 2, D]`}. A cache
  is {'k', 'v': `[B, N, C, L, T, D]`}. Prompts and candidates lead, so that gathering beams and
  sharding prompts touch leading axes only.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    table = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.classes = table(c.classes + 1, c.width)  # the last one is the null class
    self.start = table(c.ends[1], c.width)
    self.positions, self.levels = table(c.ends[-1], c.width), table(len(c.patch_nums), c.width)
    self.embedding = nnx.Linear(c.channels, c.width, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.adaln = nnx.LinearGeneral(c.width, (6, c.width), rngs=rngs) if c.shared_adaln else None
    self.head_adaln = nnx.LinearGeneral(c.width, (2, c.width), rngs=rngs)
    self.head = nnx.Linear(c.width, c.codes, rngs=rngs)

  def class_context(self, labels):
    """Classes `[B, C]` int, -1 for the null class -> context."""
    c = self.config
    start = self.classes[...][jnp.where(labels < 0, c.classes, labels)]
    condition = jax.nn.silu(start)
    if c.shared_adaln:
      layers = self.adaln(condition)[:, :, None] + self.blocks.offset[...]
    else:
      body = lambda block, carry, _: (carry, block.adaln(condition))
      layers = jnp.moveaxis(scan_blocks(self.blocks, body, ())[1], 0, 2)
    return {'start': start, 'layers': layers, 'head': self.head_adaln(condition)}

  def init_cache(self, ctx, candidates: int):
    """Returns an empty cache for N candidates; nothing reads the last scale, so it has no slots."""
    B, C, L, _, D = ctx['layers'].shape
    shape = B, candidates, C, L, self.config.ends[-2], D
    return {name: jnp.zeros(shape, ctx['start'].dtype) for name in 'kv'}

  def feed_scales(self, ctx, cache, inputs, first: int, last: int):
    """Feeds the scales `first` .. `last` - 1, of which `first` must be the next of the cache.

    Args:
      ctx, cache: context and cache.
      inputs: `[B, N, n, Z]`, what the tokenizer's `shrink_latents` makes of the scales before each
        scale; the first scale of all has no input, so that n is 0 for it alone.
      first, last: Python integers.

    Returns:
      hidden: `[B, N, Q, C, D]`, which predicts the tokens of these scales.
      cache: with their keys and values.
    """
    c, (start, end) = self.config, (self.config.ends[first], self.config.ends[last])
    dtype = ctx['start'].dtype
    # the streams of guidance read the same codes
    x = self.embedding(inputs.astype(dtype))[:, :, :, None]
    x = jnp.broadcast_to(x, (*x.shape[:3], ctx['start'].shape[1], c.width))
    if first == 0:
      begin = ctx['start'][:, None, None] + self.start[...][:, None]  # [B, 1, n, C, D]
      begin = jnp.broadcast_to(begin, (*x.shape[:2], *begin.shape[2:]))
      x = jnp.concatenate([begin, x], 2)
    level = pyramid.scale_of_tokens(c.grids)[start:end]
    x = x + (self.levels[...][level] + self.positions[...][start:end])[:, None]
    visible = pyramid.visible_tokens(c.grids, first, last) if last - first > 1 else None

    def run_layer(block, carry, inputs):
      (x, cache), (modulation, layer) = carry, inputs
      return block(x, modulation, cache, layer, start, visible), None

    # the cache is carried, not stacked anew: a call writes its own slots and not the whole cache
    layers = jnp.moveaxis(ctx['layers'], 2, 0), jnp.arange(c.layers)
    return scan_blocks(self.blocks, run_layer, (x, cache), layers)[0]

  def token_logits(self, ctx, hidden):
    """Hidden `[B, N, Q, C, D]` -> logits `[B, N, Q, C, V]` float32."""
    scale, shift = jnp.moveaxis(ctx['head'], -2, 0)
    x = modulate(hidden, scale, shift, self.config.eps)
    # float32 out of bfloat16 factors: sampling compares logits that lie close together
    logits = jnp.matmul(x, self.head.kernel[...], preferred_element_type=jnp.float32)
    return logits + self.head.bias[...]


def guidance_ramp(strength: float, scale: int, scales: int) -> float:
  """Returns the strength of guidance at a scale: 0 at the first one, all of it at the last one."""
  return strength * scale / (scales - 1)


def guide_logits(logits, strength):
  """Applies guidance over the streams, (1 + strength) class - strength null: `[..., C, V]` ->
  `[..., V]`; one stream stays as it is."""
  if logits.shape[-2] == 1:
    return logits[..., 0, :]
  return (1 + strength) * logits[..., 0, :] - strength * logits[..., 1, :]


def build_model(config: Config, seed=0) -> VAR:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return VAR(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, streams: int, tokens: int = 0, keys: int = 0) -> int:
  """Matmul FLOPs of all streams.

  Args:
    op: 'context' of a prompt; for one candidate 'trunk', all layers of `tokens` tokens that see
      `keys` of them, 'embed', their inputs, and 'head', their logits.
    streams: C.
    tokens, keys: see `op`.
  """
  if op == 'context':
    return streams * 2 * c.width**2 * (6 * (1 if c.shared_adaln else c.layers) + 2)
  if op == 'embed':  # the streams read the same codes
    return tokens * 2 * c.channels * c.width
  if op == 'head':
    return streams * tokens * 2 * c.width * c.codes
  layer = 8 * c.width**2 + 4 * c.width * c.hidden + 4 * keys * c.width
  return streams * tokens * c.layers * layer
