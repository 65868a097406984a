"""RAR (Yu et al. 2024, arXiv 2411.00776): a transformer over picture tokens, row by row.

It was trained on random orders, so every position also carries an embedding of the position that
comes next. The sequence is [begin, class, x_0, x_1, ..]; blocks are pre-norm with adaLN, whose
condition is the class plus an embedding of the step, and with norms of queries and keys. The begin
token and the class depend on the prompt alone: their keys and values exist once for each prompt,
and candidates share them (`models.shared_prefix`). The tokenizer is `models.maskgit_vq`. Checked
against the PyTorch reference by the golden files `rar*.npz` (replay.py).

Letters: B prompts · N candidates · C streams of guidance (class, then null) · T tokens ·
Q queries · S slots of a cache · L layers · V codes · D width · h heads · d = D / h.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models import vit
from vtts_jax.models.shared_prefix import attend_shared, read_layer, write_cache
from vtts_jax.models.stacked import scan_blocks, stack_blocks

# the begin token and the class
PREFIX = 2
# rows of the position tables that no picture uses
SPARE_POSITIONS, SPARE_STEPS = 1024, 100


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of RAR-B.

  Attributes:
    hidden: inner width of the feed-forward layer.
    tokens: T.
    codes: V.
    classes: without the null class.

  Raises:
    ConfigError: heads do not divide the width.
  """

  width: int = 768
  layers: int = 24
  heads: int = 16
  hidden: int = 3072
  tokens: int = 256
  codes: int = 1024
  classes: int = 1000
  eps: float = 1e-6

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')


SIZES = {
  'tiny': Config(width=16, layers=2, heads=2, hidden=24, tokens=9, codes=16, classes=5),
  'rar_b': Config(),
  'rar_l': Config(width=1024, hidden=4096),
  'rar_xl': Config(width=1280, layers=32, hidden=5120),
  'rar_xxl': Config(width=1408, layers=40, hidden=6144),
}


def guidance_at(step, tokens: int, scale: float, power: float):
  """Returns the guidance scale of token `step` of `tokens`: a cosine from 1 to `scale`.

  Power 0 gives `scale` throughout. The reference switches guidance off at scale 0.
  """
  done = (step / tokens) ** power
  return (scale - 1) * (1 - jnp.cos(math.pi * done)) / 2 + 1


def plain_norm(x, eps):
  """Layer norm over the last axis without weights, in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype)


class Attention(nnx.Module):
  """Projections, and layer norms of queries and keys head by head."""

  def __init__(self, c, *, rngs):
    self.heads = c.heads
    # [D, 3, D], so that a mesh splits each of the three
    self.qkv = nnx.LinearGeneral(c.width, (3, c.width), rngs=rngs)
    self.norm_q, self.norm_k = (vit.LayerNorm(c.width // c.heads, c.eps) for _ in range(2))
    self.out = nnx.Linear(c.width, c.width, rngs=rngs)

  def project(self, x):
    """`x [..., D]` -> q `[..., h, d]` and k, v `[..., D]`, as the cache holds them."""
    q, k, v = jnp.moveaxis(self.qkv(x), -2, 0)
    q, k = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (q, k))
    # normed before they are cached, so that a cached key is not normed again
    return self.norm_q(q), self.norm_k(k).reshape(v.shape), v


class Block(nnx.Module):
  """One layer; `__call__(x, condition, attend)`."""

  def __init__(self, c, *, rngs):
    self.norm_attn, self.norm_ffn = (vit.LayerNorm(c.width, c.eps) for _ in range(2))
    self.attn = Attention(c, rngs=rngs)
    self.ffn = vit.FeedForward(c.width, c.hidden, 'gelu', rngs=rngs)
    self.modulation = nnx.Linear(c.width, 6 * c.width, rngs=rngs)

  def __call__(self, x, condition, attend):
    """Runs the layer.

    Args:
      x: `[B, N, Q, C, D]`.
      condition: of adaLN, after its activation; broadcasts to `x`.
      attend: `(q, k, v) -> (mixed values [B, N, Q, C, D], kept)`.

    Returns:
      (x, kept).
    """
    # condition and modulation have no axis of candidates where these are at the same step
    chunks = jnp.split(self.modulation(condition), 6, -1)
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = chunks
    mixed, kept = attend(*self.attn.project(self.norm_attn(x) * (1 + scale_attn) + shift_attn))
    x = x + gate_attn * self.attn.out(mixed)
    x = x + gate_ffn * self.ffn(self.norm_ffn(x) * (1 + scale_ffn) + shift_ffn)
    return x, kept


class RAR(nnx.Module):
  """Make a context by `class_context`, then call `prefill` or `feed_tokens`, then `token_logits`.

  A context is {'hidden': `[B, C, D]`, which predicts the first token, 'class': `[B, C, D]`, and
  'k', 'v': `[B, C, L, 2, D]` of the prefix}. A cache is {'k', 'v': `[B, N, C, L, T, D]`} of image
  tokens.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    # codes, a mask token that only training used, classes, the null class
    self.embedding = vit.random_table(rngs, c.codes + 1 + c.classes + 1, c.width)
    self.begin = vit.random_table(rngs, c.width)
    rows = c.tokens + SPARE_POSITIONS
    self.positions, self.next_positions = (
      vit.random_table(rngs, rows, c.width) for _ in range(2)
    )
    self.steps = vit.random_table(rngs, c.tokens + SPARE_STEPS, c.width)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.head_modulation = nnx.Linear(c.width, 2 * c.width, rngs=rngs)
    self.head = nnx.Linear(c.width, c.codes, rngs=rngs)

  def class_context(self, labels, first=0):
    """Classes `[B, C]` int, -1 for the null class -> context.

    `first` is the position of the token that is drawn first: a scalar, or `[B, C]`; 0 unless the
    order is another one than row by row.
    """
    c = self.config
    named = self.embedding[...][c.codes + 1 + jnp.where(labels < 0, c.classes, labels)]
    begin = jnp.broadcast_to(self.begin[...], named.shape) + self.positions[...][0]
    # the class announces the position of the first token; the begin token announces nothing
    told = named + self.positions[...][1] + self.next_positions[...][PREFIX + first]
    x = jnp.stack([begin, told], 1)[:, None]  # [B, 1, 2, C, D]
    condition = jax.nn.silu(self._conditions(named, jnp.arange(PREFIX)[None, None]))
    visible = jnp.tri(PREFIX, dtype=bool)

    def run_layer(block, x, _):
      def attend(q, k, v):
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
        return attend_shared(q, (k, v), visible), (k[:, 0], v[:, 0])

      return block(x, condition, attend)

    x, (k, v) = scan_blocks(self.blocks, run_layer, x)
    hidden = self._modulate_head(x, condition)[:, 0, -1]
    k, v = (jnp.moveaxis(y, 0, 2) for y in (k, v))  # [B, C, L, 2, D]
    return {'hidden': hidden, 'class': named, 'k': k, 'v': v}

  def prefill(self, ctx, tokens, order=None):
    """Feeds whole sequences in parallel (teacher forcing).

    Args:
      ctx: context, made for the first position of `order`.
      tokens: `[B, N, T]` int, in the order in which they are drawn.
      order: `[B, N, T]` int, the position of each token; row by row if None.

    Returns:
      hidden: `[B, N, T, C, D]`; the one at t predicts token t from those before it.
      cache: `[B, N, C, L, T, D]` of all tokens.
    """
    T = tokens.shape[2]
    order = jnp.arange(T)[None, None] if order is None else order
    # behind the last token no position comes
    told = self.next_positions[...][PREFIX + order[..., 1:]]
    told = jnp.pad(told, ((0, 0), (0, 0), (0, 1), (0, 0)))
    x = self.embedding[...][tokens] + self.positions[...][PREFIX + order] + told
    x = jnp.repeat(x[:, :, :, None], ctx['class'].shape[1], 3)
    condition = jax.nn.silu(self._conditions(ctx['class'], PREFIX + jnp.arange(T)[None, None]))
    visible = jnp.tri(T, dtype=bool)

    def run_layer(block, x, prefix):
      def attend(q, k, v):
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
        return attend_shared(q, (k, v), visible, prefix), (k, v)

      return block(x, condition, attend)

    x, cache = scan_blocks(self.blocks, run_layer, x, self._prefix_layers(ctx))
    first = jnp.broadcast_to(ctx['hidden'][:, None, None], (*x.shape[:2], 1, *x.shape[3:]))
    hidden = jnp.concatenate([first, self._modulate_head(x, condition)[:, :, :-1]], 2)
    return hidden, {name: jnp.moveaxis(y, 0, 3) for name, y in zip('kv', cache)}

  def init_cache(self, ctx, candidates: int):
    """Returns an empty cache for N candidates."""
    B, C, L, _, D = ctx['k'].shape
    shape = B, candidates, C, L, self.config.tokens, D
    return {name: jnp.zeros(shape, ctx['k'].dtype) for name in 'kv'}

  def feed_tokens(self, ctx, cache, tokens, position):
    """Feeds one token for each candidate, row by row.

    Args:
      ctx, cache: context and cache.
      tokens: `[B, N]` int, the tokens at `position` - 1; at position 0 they do not matter.
      position: t, the token to predict: a scalar, or `[B, N]`.

    Returns:
      hidden: `[B, N, C, D]`, which predicts token t.
      cache: with the new keys and values.
    """
    # at position 0 slot 0 gets a token that does not count: position 1 writes it again
    position = jnp.asarray(position)
    slot = jnp.maximum(position - 1, 0)
    at = slot[..., None] if slot.ndim else slot[None, None, None]  # [B, N, 1], or axes of 1
    # its own position, and that of the token which it predicts
    x = self.embedding[...][tokens][:, :, None] + self.positions[...][PREFIX + at]
    x = x + self.next_positions[...][PREFIX + at + 1]
    x = jnp.repeat(x[:, :, :, None], ctx['class'].shape[1], 3)
    condition = jax.nn.silu(self._conditions(ctx['class'], PREFIX + at))
    visible = (jnp.arange(cache['k'].shape[4]) <= slot[..., None])[..., None, :]

    def run_layer(block, carry, inputs):
      (x, cache), (prefix, layer) = carry, inputs

      def attend(q, k, v):
        new = {n: write_cache(cache[n], y, layer, slot) for n, y in (('k', k), ('v', v))}
        own = tuple(read_layer(new[n], layer) for n in 'kv')
        return attend_shared(q, own, visible, prefix), new

      return block(x, condition, attend), None

    # the cache is carried, not stacked anew: a call writes one slot and not the whole cache
    layers = self._prefix_layers(ctx), jnp.arange(self.config.layers)
    (x, cache), _ = scan_blocks(self.blocks, run_layer, (x, cache), layers)
    hidden = self._modulate_head(x, condition)[:, :, 0]
    return jnp.where((position == 0)[..., None, None], ctx['hidden'][:, None], hidden), cache

  def token_logits(self, hidden):
    """Hidden `[..., D]` -> logits `[..., V]` float32."""
    # float32 out of bfloat16 factors: sampling compares logits that lie close together
    kernel, bias = self.head.kernel[...], self.head.bias[...]
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32) + bias

  def _conditions(self, named, steps):
    """Classes `[B, C, D]` and steps `[B, N, Q]` (axes of 1 where shared) -> `[B, N, Q, C, D]`."""
    return named[:, None, None] + self.steps[...][steps][..., None, :]

  def _prefix_layers(self, ctx):
    """Keys and values of the prefix, layers leading."""
    return tuple(jnp.moveaxis(ctx[name], 2, 0) for name in 'kv')

  def _modulate_head(self, x, condition):
    # scale first here, unlike in the blocks
    scale, shift = jnp.split(self.head_modulation(condition), 2, -1)
    return plain_norm(x, self.config.eps) * (1 + scale) + shift


def build_model(config: Config, seed=0) -> RAR:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return RAR(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, keys: int = 0) -> int:
  """Matmul FLOPs for one stream of one candidate.

  Args:
    op: 'prefix', the context of a class; 'step', the hidden state of one image token that sees
      `keys` of them and the prefix (its modulations are billed to every candidate, although
      candidates at the same step share them); 'head', the logits of one token.
  """
  if op == 'head':
    return 2 * c.width * c.codes
  matrices = 20 * c.width**2 + 4 * c.width * c.hidden
  if op == 'step':
    return c.layers * (matrices + 4 * (keys + PREFIX) * c.width) + 4 * c.width**2
  return PREFIX * (c.layers * (matrices + 4 * PREFIX * c.width) + 4 * c.width**2)
