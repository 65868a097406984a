"""FlexTok AR: a causal transformer over 256 image tokens, conditioned on text or on a class.

It was published with "(1D) Ordered Tokens Enable Efficient Test-Time Search" (arXiv 2604.15453).
The blocks are those of apple/ml-l3m: self-attention, cross-attention to the projected text (in text
models) and feed-forward, all pre-norm. Checked against the PyTorch reference by golden files:
`replay.py`, tests/test_flexar.py.

Text keys and values are computed once per prompt (`text_context`), and its candidates share them.
The streams of classifier-free guidance are an axis, so one pass over the weights serves both. The
cache of the image tokens' keys and values is an argument and a result. Each prompt has P pools of R
rows, which gives two layouts in one code:

- a cache for every candidate (P = N, R = 1), which beams reorder by gathering (`keys.take`);
- one pool for all candidates (P = 1, R = N), in which a row sees the slots of its ancestors, and
  which beams reorder by moving indices.

Letters: B prompts · N candidates · P pools · R rows of a pool · C streams of guidance (prompt, then
null) · T tokens · S slots of a pool · W words · L layers · V codes · D width · h heads · d = D / h.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan_blocks, stack_blocks
from vtts_jax.models.vit import random_table


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options.

  The options' defaults are those of the released checkpoints, as far as they are known (README.md).

  Attributes:
    tokens: rows of the table of positions, which is the longest sequence.
    codes: V.
    classes: number of classes; 0 for a text model, which has cross-attention instead.
    text_width: width of the T5 states that are projected to D.
    norm: 'rmsnorm' (weight only) or 'layernorm' (weight and bias).
    qk_norm: whether queries and keys have an RMS norm per head.
    ffn: 'swiglu' or 'mlp_gelu'.
    hidden: inner width of the feed-forward layer.
    qkv_bias: whether the q, k, v projections have biases.
    bias: whether every other projection of a block has one.
    post_norm: whether a norm lies between the last block and the head.

  Raises:
    ConfigError: heads do not divide the width, or an unknown `norm` or `ffn`.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  tokens: int = 256
  codes: int = 64000
  classes: int = 0
  text_width: int = 2048
  norm: str = 'rmsnorm'
  eps: float = 1e-6
  qk_norm: bool = True
  ffn: str = 'swiglu'
  hidden: int = 2048
  qkv_bias: bool = False
  bias: bool = False
  post_norm: bool = True

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')
    for name, allowed in (('norm', ('rmsnorm', 'layernorm')), ('ffn', ('swiglu', 'mlp_gelu'))):
      if getattr(self, name) not in allowed:
        raise ConfigError(f'{name}={getattr(self, name)!r}: must be one of {allowed}')


# caches read at a time, as many as fit a TPU's on-chip memory
ROWS = 10


def swiglu_width(width: int, multiple_of: int = 1) -> int:
  """Returns the gated layer's hidden width: 8 D / 3 cut to an integer, then up to a multiple."""
  return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


def _of_depth(layers, **options):
  width = 64 * layers
  return Config(width=width, layers=layers, heads=layers, hidden=swiglu_width(width), **options)


_TINY = {'width': 16, 'layers': 2, 'heads': 2, 'tokens': 8, 'codes': 16, 'hidden': 24}
SIZES = {
  'tiny': Config(**_TINY, text_width=8),
  'tiny_c2i': Config(**_TINY, classes=5),
  # the names count the trunk's parameters, without embeddings, head and T5
  'flexar_113m': _of_depth(12),
  'flexar_382m': _of_depth(18),
  'flexar_1b': _of_depth(26),
  'flexar_3b': _of_depth(36),
  'gridar_3b': _of_depth(36),
  'flexar_1b_c2i': _of_depth(26, classes=1000),
}


def _linear_layer(inner, outer, bias, rngs):
  # whether there is a bias is an option of the checkpoint, never nnx's default
  return nnx.Linear(inner, outer, use_bias=bias, rngs=rngs)


class Norm(nnx.Module):
  """RMS or layer norm over the last axis, computed in float32."""

  def __init__(self, width, kind, eps):
    self.kind, self.eps = kind, eps
    self.weight = nnx.Param(jnp.ones(width))
    if kind == 'layernorm':
      self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    if self.kind == 'layernorm':
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps) * self.weight[...]
    if self.kind == 'layernorm':
      y = y + self.bias[...]
    return y.astype(x.dtype)


class Attention(nnx.Module):
  """Projections of one attention layer; self-attention has them fused, cross-attention apart."""

  def __init__(self, c, *, cross, rngs):
    self.heads = c.heads
    if cross:
      for name in ('q', 'k', 'v'):
        setattr(self, name, _linear_layer(c.width, c.width, c.qkv_bias, rngs))
    else:
      self.qkv = _linear_layer(c.width, 3 * c.width, c.qkv_bias, rngs)
    self.proj = _linear_layer(c.width, c.width, c.bias, rngs)
    self.q_norm = Norm(c.width // c.heads, 'rmsnorm', c.eps) if c.qk_norm else None
    self.k_norm = Norm(c.width // c.heads, 'rmsnorm', c.eps) if c.qk_norm else None

  def _split_heads(self, x, norm=None):  # [..., D] -> [..., h, d]
    # the norm goes over the channels of a head, so heads are split first
    x = x.reshape(*x.shape[:-1], self.heads, -1)
    return x if norm is None else norm(x)

  def project_fused(self, x):
    """`[..., D]` -> q `[..., h, d]` and k, v `[..., D]`; q and k are normed per head.

    Keys and values keep their heads together, as the cache holds them.
    """
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    return self._split_heads(q, self.q_norm), self._split_heads(k, self.k_norm).reshape(k.shape), v

  def project_queries(self, x):
    """`[..., D]` -> q `[..., h, d]`, normed per head."""
    return self._split_heads(self.q(x), self.q_norm)

  def project_keys_values(self, x):
    """`[..., D]` -> k, v `[..., D]`, k normed per head."""
    k = self.k(x)
    return self._split_heads(k, self.k_norm).reshape(k.shape), self.v(x)

  def mix_values(self, letters, q, k, v, bias):
    """Computes softmax(q k / sqrt d + bias) v, then the output projection.

    Args:
      letters: the axes of q and of k without head and channel, e.g. 'bprc,bpcs'; the sum goes over
        the last axis of k.
      q: `[..., h, d]`.
      k, v: `[..., D]`.
      bias: broadcasts to `[..., h, keys]`, with the axes of q first.
    """
    # einsum by letters: sequences, pools and text have their axes in different places
    k, v = self._split_heads(k), self._split_heads(v)
    rows, keys = letters.split(',')
    score = f'{rows}h{keys[-1]}'
    s = jnp.einsum(f'{rows}hd,{keys}hd->{score}', q, k, preferred_element_type=jnp.float32)
    a = jax.nn.softmax(s * q.shape[-1] ** -0.5 + bias, -1).astype(v.dtype)
    x = jnp.einsum(f'{score},{keys}hd->{rows}hd', a, v)
    return self.proj(x.reshape(*x.shape[:-2], -1))

  def mix_cached(self, q, cache, layer, bias):
    """Does `mix_values` for q `[B, P, R, C, h, d]` over one layer of a cache.

    Where each row has its own cache (R = 1), ROWS of them are taken at a time, so that keys and
    values fit a TPU's on-chip memory and are read once. A CPU takes one at a time, which is twice
    as fast.
    """

    def select_layer(x):
      return jax.lax.dynamic_index_in_dim(x, layer, 3, keepdims=False)

    B, P, R, C, h, d = q.shape
    if R > 1:
      k, v = select_layer(cache['k']), select_layer(cache['v'])
      return self.mix_values('bprc,bpcs', q, k, v, bias)
    # Splitting the cache into heads would transpose all of it. Instead query i is as wide as all
    # heads and zero outside the channels of head i.
    heads = jnp.repeat(jnp.eye(h, dtype=q.dtype), d, 1)  # [h, D]
    wide = (q.reshape(B, P, C, 1, h * d) * heads * d**-0.5).astype(q.dtype)
    bias = jnp.broadcast_to(bias[:, :, 0, :, 0, :, None], (B, P, 1, bias.shape[-1], 1))
    most = max(n for n in range(1, min(P, ROWS) + 1) if P % n == 0)

    def mix_rows(row, n):
      k, v, q, hidden = (
        jax.lax.dynamic_slice_in_dim(x, row, n, 1) for x in (cache['k'], cache['v'], wide, bias)
      )
      s = jnp.einsum('bpcsd,bpchd->bpcsh', select_layer(k), q, preferred_element_type=jnp.float32)
      a = jax.nn.softmax(s + hidden, 3).astype(v.dtype)
      return (jnp.einsum('bpcsh,bpcsd->bpchd', a, select_layer(v)) * heads).sum(3)

    def mix_all(n):
      x = jax.lax.map(lambda row: mix_rows(row, n), jnp.arange(0, P, n))  # [P / n, B, n, C, D]
      return jnp.moveaxis(x, 0, 1).reshape(B, P, 1, C, h * d)

    mixed = jax.lax.platform_dependent(cpu=lambda: mix_all(1), default=lambda: mix_all(most))
    return self.proj(mixed)


class FeedForward(nnx.Module):
  """Two layers with GELU, or gated by silu."""

  def __init__(self, c, *, rngs):
    self.fc1 = _linear_layer(c.width, c.hidden, c.bias, rngs)
    self.fc2 = _linear_layer(c.hidden, c.width, c.bias, rngs)
    self.fc3 = _linear_layer(c.width, c.hidden, c.bias, rngs) if c.ffn == 'swiglu' else None

  def __call__(self, x):
    if self.fc3 is None:
      return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
    return self.fc2(jax.nn.silu(self.fc1(x)) * self.fc3(x))


class Block(nnx.Module):
  """One layer; class models have no cross-attention."""

  def __init__(self, c, *, rngs):
    self.norm_self, self.norm_ffn = (Norm(c.width, c.norm, c.eps) for _ in range(2))
    self.self_attn = Attention(c, cross=False, rngs=rngs)
    # a class stands in the start vector and needs no attention
    if not c.classes:
      self.norm_cross = Norm(c.width, c.norm, c.eps)
      self.cross_attn = Attention(c, cross=True, rngs=rngs)
    self.ffn = FeedForward(c, rngs=rngs)

  def finish_layer(self, x, rows, text):
    """Runs what follows self-attention: cross-attention and feed-forward.

    Args:
      x: `[..., D]`.
      rows: letters of its other axes, for example 'bprc'.
      text: None, or (k, v `[B, C, W, D]`, bias) of this layer.
    """
    if text is not None:
      q = self.cross_attn.project_queries(self.norm_cross(x))
      x = x + self.cross_attn.mix_values(f'{rows},bcw', q, *text)
    return x + self.ffn(self.norm_ffn(x))


class TextMLP(nnx.Module):
  """Projects T5 states to the width of the trunk; tanh-GELU, no biases."""

  def __init__(self, c, *, rngs):
    self.fc1 = _linear_layer(c.text_width, c.text_width, False, rngs)
    self.fc2 = _linear_layer(c.text_width, c.width, False, rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class FlexAR(nnx.Module):
  """Make a context, then call `prefill` or `feed_tokens`, then `token_logits` and `guide_logits`.

  A context is {'start': `[B, C, D]`}. A text model adds {'k', 'v': `[B, C, L, W, D]`, 'bias':
  `[B, C, W]` float32, 0 or -inf}. A cache is {'k', 'v': `[B, P, C, L, S, D]`}. Prompts and
  candidates lead, so that gathering beams and sharding prompts touch leading axes only.
  """

  def __init__(self, config, *, rngs):
    c = self.config = config
    self.embedding = random_table(rngs, c.codes, c.width)
    self.positions = random_table(rngs, c.tokens, c.width)
    self.start = random_table(rngs, c.width)
    if c.classes:
      self.classes = random_table(rngs, c.classes, c.width)
    else:
      self.text_mlp = TextMLP(c, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.norm = Norm(c.width, c.norm, c.eps) if c.post_norm else None
    self.head = _linear_layer(c.width, c.codes, False, rngs)

  # ------------------------------------------------------------------------------------ condition

  def text_context(self, states, mask):
    """T5 states `[B, C, W, E]` and mask `[B, C, W]`, nonzero where a word is real -> context.

    Stream 0 is the prompt; stream 1, if there is one, is the empty text.
    """
    # keys and values of all layers at once: no step of the search projects the text again
    text = self.text_mlp(states.astype(self.embedding[...].dtype))
    bias = jnp.where(mask != 0, 0.0, -jnp.inf).astype(jnp.float32)

    def run_layer(block, _, x):
      return None, block.cross_attn.project_keys_values(text)

    _, kv = scan_blocks(self.blocks, run_layer, None)
    k, v = (jnp.moveaxis(x, 0, 2) for x in kv)
    start = jnp.broadcast_to(self.start[...], (*mask.shape[:2], self.config.width))
    return {'start': start, 'k': k, 'v': v, 'bias': bias}

  def class_context(self, labels):
    """Classes `[B, C]` int, -1 for no class -> context."""
    # no class is a zero vector, not an embedding of its own
    named = jnp.where((labels >= 0)[..., None], self.classes[...][jnp.maximum(labels, 0)], 0)
    return {'start': self.start[...] + named}

  def _layer_text(self, ctx, layer, rows):
    """Returns (k, v, bias) of one layer, or None; bias has the axes `rows`, h, W."""
    if 'k' not in ctx:
      return None
    k, v = (jax.lax.dynamic_index_in_dim(ctx[n], layer, 2, keepdims=False) for n in 'kv')
    # the letters b and c keep their sizes, all other axes broadcast
    B, C, W = ctx['bias'].shape
    shape = [{'b': B, 'c': C}.get(axis, 1) for axis in rows]
    return k, v, ctx['bias'].reshape(*shape, 1, W)

  def embed_tokens(self, ctx, tokens, position):
    """Tokens and positions `[B, P, R]` -> the trunk's input `[B, P, R, C, D]`.

    Position 0 has the start vector (with the class); its token does not matter.
    """
    x = self.embedding[...][tokens][:, :, :, None]  # [B, P, R, 1, D]
    start = ctx['start'][:, None, None]  # [B, 1, 1, C, D]
    x = jnp.where((position == 0)[..., None, None], start, x)
    return x + self.positions[...][position][:, :, :, None]

  # ------------------------------------------------------------------------------------ sequences

  def prefill(self, ctx, tokens):
    """Feeds whole sequences in parallel (teacher forcing).

    Args:
      ctx: context.
      tokens: `[B, N, T]` int. The last one is not read: position t is fed token t - 1.

    Returns:
      hidden: `[B, N, T, C, D]`; the one at t predicts token t from those before it.
      cache: `[B, N, C, L, T, D]` of positions 0 .. T - 1.
    """
    # position t is fed token t - 1; the 0 at the start is replaced by the start vector
    T = tokens.shape[-1]
    fed = jnp.concatenate([jnp.zeros_like(tokens[..., :1]), tokens[..., :-1]], -1)
    x = self.embed_tokens(ctx, fed, jnp.broadcast_to(jnp.arange(T), tokens.shape))
    causal = jnp.where(jnp.tri(T, dtype=bool), 0.0, -jnp.inf)[:, None, None]  # [T, C, h, keys]

    def run_layer(block, x, i):
      q, k, v = block.self_attn.project_fused(block.norm_self(x))
      keys, values = k.swapaxes(2, 3), v.swapaxes(2, 3)
      x = x + block.self_attn.mix_values('bntc,bncs', q, keys, values, causal)
      return block.finish_layer(x, 'bntc', self._layer_text(ctx, i, 'bntc')), (k, v)

    x, kv = scan_blocks(self.blocks, run_layer, x, jnp.arange(self.config.layers))
    k, v = (y.transpose(1, 2, 4, 0, 3, 5) for y in kv)  # [L, B, N, T, C, D] -> [B, N, C, L, T, D]
    return self._final_norm(x), {'k': k, 'v': v}

  def init_cache(self, prompts, pools, streams, slots=None, dtype=None):
    """Returns a cache of zeros `[B, P, C, L, S, D]`; `slots` None gives a slot for each token."""
    c = self.config
    shape = (prompts, pools, streams, c.layers, c.tokens if slots is None else slots, c.width)
    # keys and values in the weights' dtype: the cache is most of a search's memory
    dtype = self.embedding[...].dtype if dtype is None else dtype
    return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}

  def feed_tokens(self, ctx, cache, tokens, position, slot=None, visible=None):
    """Feeds one token of each row.

    Args:
      ctx, cache: see the class.
      tokens: `[B, P, R]` int, token t - 1 of a row at position t; not read at position 0.
      position: t, a scalar or `[B, P, R]`.
      slot: where keys and values go: the R rows of a pool take slots `slot .. slot + R - 1`. None
        means `position`, for caches of one row (R = 1), whose slots are positions; then it may
        differ between candidates.
      visible: `[B, P, R, S]` bool, the slots that a row sees, with its own. None means the slots up
        to `position` (R = 1).

    Returns:
      hidden: `[B, P, R, C, D]`, which predicts token t.
      cache: with the new keys and values.
    """
    # without pools a slot is a position, and a row sees all before it
    position = jnp.asarray(position)
    if slot is None:
      slot = position[..., 0] if position.ndim else position
    if visible is None:
      visible = jnp.arange(cache['k'].shape[4]) <= position[..., None]
    x = self.embed_tokens(ctx, tokens, jnp.broadcast_to(position, tokens.shape))
    # [B, P, R, C, h, S]
    bias = jnp.where(jnp.broadcast_to(visible, (*tokens.shape, visible.shape[-1])), 0.0, -jnp.inf)
    bias = bias[:, :, :, None, None]

    def run_layer(block, carry, i):
      x, cache = carry
      q, k, v = block.self_attn.project_fused(block.norm_self(x))
      cache = {name: _write_cache(cache[name], new, i, slot) for name, new in (('k', k), ('v', v))}
      x = x + block.self_attn.mix_cached(q, cache, i, bias)
      return (block.finish_layer(x, 'bprc', self._layer_text(ctx, i, 'bprc')), cache), None

    # the cache is carried, not stacked anew: a call writes R slots and not the whole cache
    (x, cache), _ = scan_blocks(self.blocks, run_layer, (x, cache), jnp.arange(self.config.layers))
    return self._final_norm(x), cache

  def _final_norm(self, x):
    return x if self.norm is None else self.norm(x)

  def token_logits(self, hidden):
    """Hidden `[..., D]` -> logits `[..., V]` float32."""
    # float32 out of bfloat16 factors: sampling compares logits that lie close together
    kernel = self.head.kernel[...]
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def _write_cache(cache, new, layer, slot):
  """Writes `new [B, P, R, C, D]` into `cache [B, P, C, L, S, D]` at `layer`, from `slot` on."""
  new = new.swapaxes(2, 3)[:, :, :, None].astype(cache.dtype)  # [B, P, C, 1, R, D]
  # one slot for all candidates is one contiguous write
  if jnp.ndim(slot) == 0:
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, layer, slot, 0))

  def write_row(cache, new, slot):
    return jax.lax.dynamic_update_slice(cache, new, (0, layer, slot, 0))

  # candidates at different positions write to different slots
  return jax.vmap(jax.vmap(write_row))(cache, new, slot)


def guide_logits(logits, scale):
  """Applies classifier-free guidance over the streams: `[..., C, V]` -> `[..., V]`.

  A single stream (C = 1) stays as it is.
  """
  if logits.shape[-2] == 1:
    return logits[..., 0, :]
  prompt, null = logits[..., 0, :], logits[..., 1, :]
  return null + scale * (prompt - null)


def build_model(config: Config, seed=0) -> FlexAR:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return FlexAR(config, rngs=nnx.Rngs(seed))


# ------------------------------------------------------------------------------------------- cost


def count_text_flops(config, words) -> int:
  """Matmul FLOPs of `text_context` for one stream of a prompt, without T5 itself."""
  c = config
  if c.classes:
    return 0
  return words * (2 * c.text_width * (c.text_width + c.width) + c.layers * 4 * c.width**2)


def count_trunk_flops(config, keys, words) -> int:
  """Matmul FLOPs of one position of one stream, which attends to `keys` slots and `words` words."""
  c, D = config, config.width
  # projections, then scores and values over the keys, then the feed-forward
  layer = 8 * D * D + 4 * keys * D + 2 * (3 if c.ffn == 'swiglu' else 2) * D * c.hidden
  if not c.classes:
    layer += 4 * D * D + 4 * words * D
  return c.layers * layer


def count_head_flops(config) -> int:
  """Matmul FLOPs of `token_logits` for one position of one stream."""
  return 2 * config.width * config.codes
