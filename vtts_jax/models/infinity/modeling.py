"""Infinity (Han et al. 2024, arXiv 2412.04431): a transformer that draws pictures bit by bit.

As in `models.var` all tokens of a scale are drawn at once, given the scales before. A token is not
one of a table of codes but d bits, drawn each for itself, and a text takes the place of the class:
its T5 states are pooled into the first input, which also modulates every norm, and each layer looks
at all of them. Positions are rotary, in two axes. Checked against the PyTorch reference by golden
files: `replay.py`, tests/test_infinity.py.

Letters: B prompts · N candidates · C streams of guidance (text, then null) · S scales · Q tokens of
a call · W words · E width of the text · L layers · P bits of a token · D width · h heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.infinity.schedules import Schedule
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.var.attention import GeluMLP, ScaleAttention, layer_norm, modulate
from vtts_jax.models.var_vq import pyramid


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of Infinity-2B.

  Attributes:
    hidden: inner width of the feed-forward layer.
    bits: P.
    words, text_width: W at most, and E.
    pool_heads: heads of the attention that pools the text.
    levels: scales at most.

  Raises:
    ConfigError: heads do not divide the width into multiples of 4, or pool heads do not divide it.
  """

  width: int = 2048
  layers: int = 32
  heads: int = 16
  hidden: int = 8192
  bits: int = 32
  words: int = 512
  text_width: int = 2048
  pool_heads: int = 16
  levels: int = 15
  rope_base: float = 10000.0
  eps: float = 1e-6

  def __post_init__(self):
    # a head has pairs of channels for the row and as many for the column
    if self.width % (4 * self.heads):
      raise ConfigError(f'width={self.width}: must be a multiple of 4 * heads={4 * self.heads}')
    if self.width % self.pool_heads:
      raise ConfigError(f'width={self.width}: must be a multiple of pool_heads={self.pool_heads}')


SIZES = {
  'tiny': Config(
    width=16, layers=2, heads=2, hidden=24, bits=4, words=8, text_width=8, pool_heads=2,
  ),
  # released
  '2b': Config(),
  '8b': Config(width=3584, layers=40, heads=28, hidden=14336, bits=56),
}  # fmt: skip


def rotation_table(c: Config, schedule: Schedule) -> np.ndarray:
  """Returns cosines and sines of the tokens of all scales, `[2, T, d / 2]`: rows of the grid first.
  """
  half = c.width // c.heads // 2
  rates = 1.0 / c.rope_base ** (np.arange(0, half, 2, dtype=np.float32) / half)  # [d / 4]
  angles = []
  for grid in schedule.grids:
    # a coarse grid is spread over the frame and rounded to its cells; halves go to even numbers,
    # so the products must be those of float32
    row, column = (
      np.round(np.arange(n, dtype=np.float32) * np.float32(frame / n))
      for n, frame in zip(grid, schedule.frame)
    )
    row, column = np.outer(row, rates), np.outer(column, rates)
    angles.append(np.concatenate([row.repeat(grid[1], 0), np.tile(column, (grid[0], 1))], -1))
  angles = np.concatenate(angles)
  return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


class LayerNorm(nnx.Module):
  """Layer norm with weights, computed in float32."""

  def __init__(self, width, eps):
    self.eps = eps
    self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    return (layer_norm(x, self.eps) * self.weight[...] + self.bias[...]).astype(x.dtype)


class WordAttention(nnx.Module):
  """Attention of anything to the words of a text; keys have no bias.

  Without `query_width` it pools: one learned query stands for all.
  """

  def __init__(self, width, text_width, heads, *, pool, rngs):
    self.heads = heads
    if pool:
      self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
    else:
      self.query = nnx.Linear(width, width, rngs=rngs)
    self.kv = nnx.LinearGeneral(text_width, (2, width), use_bias=False, rngs=rngs)
    self.v_bias = nnx.Param(jnp.zeros(width))
    self.out = nnx.Linear(width, width, rngs=rngs)

  def _split_heads(self, x):  # [..., D] -> [..., h, d]
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def project_words(self, words):
    """`[B, C, W, E]` -> keys and values `[B, C, W, D]`."""
    keys, values = jnp.moveaxis(self.kv(words), -2, 0)
    return keys, values + self.v_bias[...]

  def mix_words(self, q, keys, values, mask):
    """Queries `[B, M, C, D]` -> `[B, M, C, D]`; words `[B, C, W, D]` where mask `[B, W]`."""
    heads, keys, values = map(self._split_heads, (q, keys, values))
    s = jnp.einsum('bmchd,bcwhd->bmchw', heads, keys, preferred_element_type=jnp.float32)
    s = jnp.where(mask[:, None, None, None] != 0, s * heads.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(s, -1).astype(q.dtype)
    return self.out(jnp.einsum('bmchw,bcwhd->bmchd', weights, values).reshape(q.shape))


class Block(nnx.Module):
  """One layer: attention to the scales so far, to the words, and a feed-forward."""

  def __init__(self, c, *, rngs):
    self.eps = c.eps
    self.attn = ScaleAttention(c.width, c.heads, True, rngs=rngs)
    self.cross = WordAttention(c.width, c.width, c.heads, pool=False, rngs=rngs)
    self.cross_norm = LayerNorm(c.width, c.eps)
    self.ffn = GeluMLP(c.width, c.hidden, rngs=rngs)
    self.offset = nnx.Param(jax.random.normal(rngs.params(), (6, c.width)) * c.width**-0.5)

  def __call__(self, x, modulation, words, cache, layer, start, visible, table):
    # gates come first in the file's order, then scales, then shifts
    parts = jnp.moveaxis(modulation + self.offset[...], -2, 0)
    gate1, gate2, scale1, scale2, shift1, shift2 = parts
    y = modulate(x, scale1, shift1, self.eps)
    y, cache = self.attn(y, cache, layer, start, visible, table)
    x = x + gate1[:, None, None] * y
    # all tokens of all candidates are queries to the words of their prompt
    q = self.cross.query(self.cross_norm(x)).reshape(len(x), -1, *x.shape[3:])
    x = x + self.cross.mix_words(q, *words).reshape(x.shape)
    y = self.ffn(modulate(x, scale2, shift2, self.eps))
    return x + gate2[:, None, None] * y, cache


class Infinity(nnx.Module):
  """Make a context, then call `feed_scales`, `bit_logits` and `guide_logits` for each scale.

  A context is {'start': `[B, C, D]`, 'modulation': `[B, C, 6, D]`, 'head': `[B, C, 2, D]`, 'keys',
  'values': `[B, C, L, W, D]`, 'mask': `[B, W]`}. A cache is {'k', 'v': `[B, N, C, L, T, D]`}.
  Prompts and candidates lead, so that gathering beams and sharding prompts touch leading axes only.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    table = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.null_text, self.text_norm = table(c.words, c.text_width), nnx.Param(jnp.ones(c.text_width))
    self.pool = WordAttention(c.width, c.text_width, c.pool_heads, pool=True, rngs=rngs)
    self.text_in = nnx.Linear(c.text_width, c.width, rngs=rngs)
    self.text_out = nnx.Linear(c.width, c.width, rngs=rngs)
    self.start, self.levels = table(c.width), table(c.levels, c.width)
    self.embedding = nnx.Linear(c.bits, c.width, rngs=rngs)
    self.adaln = nnx.LinearGeneral(c.width, (6, c.width), rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.head_adaln = nnx.LinearGeneral(c.width, (2, c.width), rngs=rngs)
    self.head = nnx.Linear(c.width, 2 * c.bits, rngs=rngs)

  # ------------------------------------------------------------------------------------- the text

  def norm_text(self, states):
    """RMS norm of T5 states `[..., E]`."""
    y = states.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.config.eps)
    return (y * self.text_norm[...]).astype(self.start.dtype)

  def project_text(self, normed):
    """Normed states `[..., E]` -> words as the layers see them, `[..., D]`."""
    return self.text_out(jax.nn.gelu(self.text_in(normed), approximate=True))

  def pool_text(self, normed, mask):
    """Normed states `[B, C, W, E]` with mask `[B, W]` -> one vector `[B, C, D]`."""
    keys, values = self.pool.project_words(normed)
    shape = len(normed), 1, normed.shape[1], keys.shape[-1]
    query = jnp.broadcast_to(self.pool.query[...], shape)
    return self.pool.mix_words(query, keys, values, mask)[:, 0]

  def text_context(self, states, mask, streams=('prompt', 'null')):
    """T5 states `[B, W, E]` and mask `[B, W]`, padded on the right -> context.

    The null stream reads a learned text of as many words as the prompt has.
    """
    null = jnp.broadcast_to(self.null_text[...][: states.shape[1]], states.shape)
    texts = {'prompt': states.astype(null.dtype), 'null': null}
    normed = self.norm_text(jnp.stack([texts[stream] for stream in streams], 1))
    words = self.project_text(normed)
    start = self.pool_text(normed, mask)
    body = lambda block, carry, _: (carry, block.cross.project_words(words))
    keys, values = (jnp.moveaxis(y, 0, 2) for y in scan_blocks(self.blocks, body, ())[1])
    condition = jax.nn.silu(start)
    return {
      'start': start, 'modulation': self.adaln(condition), 'head': self.head_adaln(condition),
      'keys': keys, 'values': values, 'mask': mask,
    }  # fmt: skip

  # -------------------------------------------------------------------------------------- scales

  def init_cache(self, ctx, candidates: int, schedule: Schedule):
    """Returns an empty cache for N candidates; nothing reads the last scale, so it has no slots."""
    B, C, L, _, D = ctx['keys'].shape
    shape = B, candidates, C, L, pyramid.scale_ends(schedule.grids)[-2], D
    return {name: jnp.zeros(shape, ctx['start'].dtype) for name in 'kv'}

  def feed_scales(self, ctx, cache, inputs, schedule: Schedule, first: int, last: int, guide=None):
    """Feeds the scales `first` .. `last` - 1, of which `first` must be the next of the cache.

    Args:
      ctx, cache: context and cache.
      inputs: `[B, N, n, P]`, what the tokenizer's `shrink_latents` makes of the scales before each
        scale; the first scale of all has no input, so that n is 0 for it alone.
      schedule: the grids.
      first, last: Python integers.
      guide: (layer, scale): the output of this layer is guided, and goes on in all streams. By
        default none is.

    Returns:
      hidden: `[B, N, Q, C, D]`, which predicts the bits of these scales.
      cache: with their keys and values.
    """
    c, ends = self.config, pyramid.scale_ends(schedule.grids)
    start, end = ends[first], ends[last]
    dtype = ctx['start'].dtype
    # the streams of guidance read the same codes
    x = self.embedding(inputs.astype(dtype))[:, :, :, None]
    x = jnp.broadcast_to(x, (*x.shape[:3], ctx['start'].shape[1], c.width))
    if first == 0:
      begin = (ctx['start'] + self.start[...])[:, None, None]
      x = jnp.concatenate([jnp.broadcast_to(begin, (*x.shape[:2], *begin.shape[2:])), x], 2)
    level = pyramid.scale_of_tokens(schedule.grids)[start:end]
    x = x + self.levels[...][level][:, None]
    table = rotation_table(c, schedule)[:, start:end, None, None]
    visible = pyramid.visible_tokens(schedule.grids, first, last) if last - first > 1 else None

    def run_layer(block, carry, inputs):
      (x, cache), (keys, values, layer) = carry, inputs
      words = keys, values, ctx['mask']
      x, cache = block(x, ctx['modulation'], words, cache, layer, start, visible, table)
      if guide is not None:
        guided = guide_streams(x, guide[1])[..., None, :]
        x = jnp.where(layer == guide[0], guided, x)
      return (x, cache), None

    # the cache is carried, not stacked anew: a call writes its own slots and not the whole cache
    words = (jnp.moveaxis(ctx[name], 2, 0) for name in ('keys', 'values'))
    return scan_blocks(self.blocks, run_layer, (x, cache), (*words, jnp.arange(c.layers)))[0]

  def bit_logits(self, ctx, hidden):
    """Hidden `[B, N, Q, C, D]` -> logits of every bit, `[B, N, Q, C, P, 2]` float32."""
    scale, shift = jnp.moveaxis(ctx['head'], -2, 0)
    x = modulate(hidden, scale, shift, self.config.eps)
    # float32 out of bfloat16 factors: sampling compares logits that lie close together
    logits = jnp.matmul(x, self.head.kernel[...], preferred_element_type=jnp.float32)
    return (logits + self.head.bias[...]).reshape(*logits.shape[:-1], -1, 2)


def guide_streams(x, scale):
  """Applies classifier-free guidance over the streams `[..., C, D]` -> `[..., D]`; one stream stays
  as it is."""
  if x.shape[-2] == 1:
    return x[..., 0, :]
  return scale * x[..., 0, :] + (1 - scale) * x[..., 1, :]


def guide_logits(logits, scale):
  """`guide_streams` of the logits of bits: `[..., C, P, 2]` -> `[..., P, 2]`."""
  flat = logits.reshape(*logits.shape[:-2], -1)
  return guide_streams(flat, scale).reshape(*logits.shape[:-3], *logits.shape[-2:])


def build_model(config: Config, seed=0) -> Infinity:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return Infinity(config, rngs=nnx.Rngs(seed))


def count_flops(
  c: Config, op: str, streams: int, words: int = 0, tokens: int = 0, keys: int = 0
) -> int:
  """Matmul FLOPs of all streams.

  Args:
    op: 'context' of a prompt of `words` words; for one candidate 'trunk', all layers of `tokens`
      tokens that see `keys` of them and the words, 'embed', their inputs, and 'head', their logits.
    streams: C.
    words, tokens, keys: see `op`.
  """
  D = c.width
  if op == 'context':
    # pooling: keys, values, two products with the query, output; then words of all layers
    pool = words * 4 * c.text_width * D + 4 * words * D + 2 * D * D
    text = words * 2 * (c.text_width * D + D * D)
    return streams * (pool + text + c.layers * words * 4 * D * D + 16 * D * D)
  if op == 'embed':  # the streams read the same codes
    return tokens * 2 * c.bits * D
  if op == 'head':
    return streams * tokens * 4 * D * c.bits
  return streams * tokens * c.layers * (12 * D * D + 4 * D * c.hidden + 4 * (keys + words) * D)
