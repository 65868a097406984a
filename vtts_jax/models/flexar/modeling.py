"""FlexTok AR: a causal transformer over 256 image tokens, with text or a class as the condition.

Published with "(1D) Ordered Tokens Enable Efficient Test-Time Search" (arXiv 2604.15453); blocks of
apple/ml-l3m. Self-attention, cross-attention to the projected text (text models), feed-forward; all
pre-norm. Checked against the PyTorch reference by golden files: `replay.py`, tests/test_flexar.py.

Text keys and values are computed once per prompt (`text_context`) and shared by its candidates. The
streams of classifier-free guidance are an axis: one pass over the weights serves both. The cache of
own keys and values is an argument and a result; it has P pools for a prompt with R rows each, so
that one code serves a cache for every candidate (P = N, R = 1; `core.take` gathers it) and one pool
shared by all candidates (P = 1, R = N), in which a row sees the slots of its ancestors and beams
are reordered by moving indices.

Letters: B prompts · N candidates · P pools · R rows of a pool · C streams of guidance (prompt, then
null) · T tokens · S slots of a pool · W words · L layers · V codes · D width · h heads · d = D / h.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan, stack


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options. The defaults of the options are those of the released checkpoints as far as
  they are known (README.md).

  Attributes:
    tokens: rows of the table of positions, and so the longest sequence.
    codes: V. classes: 0 for a text model, else the number of classes (no cross-attention).
    text_width: width of the T5 states that are projected to D.
    norm: 'rmsnorm' (weight only) or 'layernorm' (weight and bias).
    qk_norm: RMS norm of queries and keys per head.
    ffn: 'swiglu' or 'mlp_gelu'. hidden: its inner width.
    qkv_bias, bias: biases of the q, k, v projections; of every other projection of a block.
    post_norm: a norm between the last block and the head.
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


ROWS = 10  # caches read at a time


def swiglu(width: int, multiple_of: int = 1) -> int:
  """Hidden width of the gated layer: 8 D / 3, cut to an integer, up to a multiple."""
  return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


def _of_depth(layers, **options):
  width = 64 * layers
  return Config(width=width, layers=layers, heads=layers, hidden=swiglu(width), **options)


_TINY = {'width': 16, 'layers': 2, 'heads': 2, 'tokens': 8, 'codes': 16, 'hidden': 24}
SIZES = {
  'tiny': Config(**_TINY, text_width=8),
  'tiny_c2i': Config(**_TINY, classes=5),
  # parameters of the trunk (no embeddings, no head, no T5) are what the names count
  'flexar_113m': _of_depth(12),
  'flexar_382m': _of_depth(18),
  'flexar_1b': _of_depth(26),
  'flexar_3b': _of_depth(36),
  'gridar_3b': _of_depth(36),
  'flexar_1b_c2i': _of_depth(26, classes=1000),
}


def _linear(inner, outer, bias, rngs):
  return nnx.Linear(inner, outer, use_bias=bias, rngs=rngs)


def _table(rngs, *shape):
  return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


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
  """Projections of one attention layer, with or without a fused `qkv`."""

  def __init__(self, c, *, cross, rngs):
    self.heads = c.heads
    if cross:
      for name in ('q', 'k', 'v'):
        setattr(self, name, _linear(c.width, c.width, c.qkv_bias, rngs))
    else:
      self.qkv = _linear(c.width, 3 * c.width, c.qkv_bias, rngs)
    self.proj = _linear(c.width, c.width, c.bias, rngs)
    self.q_norm = Norm(c.width // c.heads, 'rmsnorm', c.eps) if c.qk_norm else None
    self.k_norm = Norm(c.width // c.heads, 'rmsnorm', c.eps) if c.qk_norm else None

  def _split(self, x, norm=None):  # [..., D] -> [..., h, d]
    x = x.reshape(*x.shape[:-1], self.heads, -1)
    return x if norm is None else norm(x)

  def fused(self, x):
    """`[..., D]` -> q `[..., h, d]` and k, v `[..., D]`, k normed per head."""
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    return self._split(q, self.q_norm), self._split(k, self.k_norm).reshape(k.shape), v

  def queries(self, x):
    return self._split(self.q(x), self.q_norm)

  def keys_values(self, x):
    """`[..., D]` -> k, v `[..., D]`, k normed per head."""
    k = self.k(x)
    return self._split(k, self.k_norm).reshape(k.shape), self.v(x)

  def mix(self, letters, q, k, v, bias):
    """softmax(q k / sqrt d + bias) v, then the output projection.

    Args:
      letters: the axes of q and of k without head and channel, e.g. 'bprc,bpcs'; the last of k is
        what is summed over.
      q: `[..., h, d]`. k, v: `[..., D]`.
      bias: broadcasts to `[..., h, keys]` of q.
    """
    k, v = self._split(k), self._split(v)
    rows, keys = letters.split(',')
    score = f'{rows}h{keys[-1]}'
    s = jnp.einsum(f'{rows}hd,{keys}hd->{score}', q, k, preferred_element_type=jnp.float32)
    a = jax.nn.softmax(s * q.shape[-1] ** -0.5 + bias, -1).astype(v.dtype)
    x = jnp.einsum(f'{score},{keys}hd->{rows}hd', a, v)
    return self.proj(x.reshape(*x.shape[:-2], -1))

  def mix_cached(self, q, cache, layer, bias):
    """As `mix`, of q `[B, P, R, C, h, d]` over one layer of a cache, and its bias.

    Rows with a cache each (R = 1) are taken ROWS at a time, so that keys and values fit a TPU's
    on-chip memory and are read once (one at a time on a CPU, which is twice as fast); and heads are
    not split, which would turn the cache over: query i is zero outside the channels of head i.
    """
    at = lambda x, row, n: jax.lax.dynamic_slice_in_dim(x, row, n, 1)
    of = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 3, keepdims=False)
    B, P, R, C, h, d = q.shape
    if R > 1:
      return self.mix('bprc,bpcs', q, of(cache['k']), of(cache['v']), bias)
    heads = jnp.repeat(jnp.eye(h, dtype=q.dtype), d, 1)  # [h, D]
    wide = (q.reshape(B, P, C, 1, h * d) * heads * d**-0.5).astype(q.dtype)
    bias = jnp.broadcast_to(bias[:, :, 0, :, 0, :, None], (B, P, 1, bias.shape[-1], 1))
    most = max(n for n in range(1, min(P, ROWS) + 1) if P % n == 0)

    def some(row, n):
      k, v, q, hidden = (at(x, row, n) for x in (cache['k'], cache['v'], wide, bias))
      s = jnp.einsum('bpcsd,bpchd->bpcsh', of(k), q, preferred_element_type=jnp.float32)
      a = jax.nn.softmax(s + hidden, 3).astype(v.dtype)
      return (jnp.einsum('bpcsh,bpcsd->bpchd', a, of(v)) * heads).sum(3)

    def mixed(n):
      x = jax.lax.map(lambda row: some(row, n), jnp.arange(0, P, n))  # [P / n, B, n, C, D]
      return jnp.moveaxis(x, 0, 1).reshape(B, P, 1, C, h * d)

    return self.proj(jax.lax.platform_dependent(cpu=lambda: mixed(1), default=lambda: mixed(most)))


class FeedForward(nnx.Module):
  def __init__(self, c, *, rngs):
    self.fc1 = _linear(c.width, c.hidden, c.bias, rngs)
    self.fc2 = _linear(c.hidden, c.width, c.bias, rngs)
    self.fc3 = _linear(c.width, c.hidden, c.bias, rngs) if c.ffn == 'swiglu' else None

  def __call__(self, x):
    if self.fc3 is None:
      return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
    return self.fc2(jax.nn.silu(self.fc1(x)) * self.fc3(x))


class Block(nnx.Module):
  """One layer; class models have no cross-attention."""

  def __init__(self, c, *, rngs):
    self.norm_self, self.norm_ffn = (Norm(c.width, c.norm, c.eps) for _ in range(2))
    self.self_attn = Attention(c, cross=False, rngs=rngs)
    if not c.classes:
      self.norm_cross = Norm(c.width, c.norm, c.eps)
      self.cross_attn = Attention(c, cross=True, rngs=rngs)
    self.ffn = FeedForward(c, rngs=rngs)

  def rest(self, x, rows, text):
    """Cross-attention and feed-forward of `x [..., D]`, whose other axes are `rows`.

    text: None or (k `[B, C, W, D]`, v, bias) of this layer.
    """
    if text is not None:
      q = self.cross_attn.queries(self.norm_cross(x))
      x = x + self.cross_attn.mix(f'{rows},bcw', q, *text)
    return x + self.ffn(self.norm_ffn(x))


class TextMLP(nnx.Module):
  """T5 states to the width of the trunk; tanh-GELU, no biases."""

  def __init__(self, c, *, rngs):
    self.fc1 = _linear(c.text_width, c.text_width, False, rngs)
    self.fc2 = _linear(c.text_width, c.width, False, rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class FlexAR(nnx.Module):
  """Make a context, then `prefill` or `step`, then `logits` and `guide`.

  A context is {'start': `[B, C, D]`} and, in text models, also {'k', 'v': `[B, C, L, W, D]`,
  'bias': `[B, C, W]` float32, 0 or -inf}. A cache is {'k', 'v': `[B, P, C, L, S, D]`}: prompts and
  candidates lead, so that gathering beams and sharding prompts touch leading axes only.
  """

  def __init__(self, config, *, rngs):
    c = self.config = config
    self.embedding = _table(rngs, c.codes, c.width)
    self.positions = _table(rngs, c.tokens, c.width)
    self.start = _table(rngs, c.width)
    if c.classes:
      self.classes = _table(rngs, c.classes, c.width)
    else:
      self.text_mlp = TextMLP(c, rngs=rngs)
    self.blocks = stack(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.norm = Norm(c.width, c.norm, c.eps) if c.post_norm else None
    self.head = _linear(c.width, c.codes, False, rngs)

  # ------------------------------------------------------------------------------------ condition

  def text_context(self, states, mask):
    """T5 states `[B, C, W, E]` and mask `[B, C, W]` (nonzero: a word) -> context.

    Stream 0 is the prompt, stream 1, if there is one, the empty text.
    """
    text = self.text_mlp(states.astype(self.embedding[...].dtype))
    bias = jnp.where(mask != 0, 0.0, -jnp.inf).astype(jnp.float32)
    _, kv = scan(self.blocks, lambda block, _, x: (None, block.cross_attn.keys_values(text)), None)
    k, v = (jnp.moveaxis(x, 0, 2) for x in kv)
    start = jnp.broadcast_to(self.start[...], (*mask.shape[:2], self.config.width))
    return {'start': start, 'k': k, 'v': v, 'bias': bias}

  def class_context(self, labels):
    """Classes `[B, C]` int, -1 for none -> context."""
    named = jnp.where((labels >= 0)[..., None], self.classes[...][jnp.maximum(labels, 0)], 0)
    return {'start': self.start[...] + named}

  def _text(self, ctx, layer, rows):
    """(k, v, bias) of one layer; bias with the axes `rows`, h, W."""
    if 'k' not in ctx:
      return None
    k, v = (jax.lax.dynamic_index_in_dim(ctx[n], layer, 2, keepdims=False) for n in 'kv')
    B, C, W = ctx['bias'].shape
    shape = [{'b': B, 'c': C}.get(axis, 1) for axis in rows]
    return k, v, ctx['bias'].reshape(*shape, 1, W)

  def embed(self, ctx, tokens, position):
    """Inputs of the trunk: tokens `[B, P, R]`, positions `[B, P, R]` -> `[B, P, R, C, D]`.

    Position 0 is the start vector (with the class); its token does not matter.
    """
    x = self.embedding[...][tokens][:, :, :, None]  # [B, P, R, 1, D]
    start = ctx['start'][:, None, None]  # [B, 1, 1, C, D]
    x = jnp.where((position == 0)[..., None, None], start, x)
    return x + self.positions[...][position][:, :, :, None]

  # ------------------------------------------------------------------------------------ sequences

  def prefill(self, ctx, tokens):
    """Teacher forcing in parallel.

    Args:
      ctx: context.
      tokens: `[B, N, T]` int. The last one is not read: position t is fed token t - 1.

    Returns:
      hidden `[B, N, T, C, D]`, at t the prediction of token t from those before it, and the cache
      `[B, N, C, L, T, D]` of positions 0 .. T - 1.
    """
    T = tokens.shape[-1]
    fed = jnp.concatenate([jnp.zeros_like(tokens[..., :1]), tokens[..., :-1]], -1)
    x = self.embed(ctx, fed, jnp.broadcast_to(jnp.arange(T), tokens.shape))
    causal = jnp.where(jnp.tri(T, dtype=bool), 0.0, -jnp.inf)[:, None, None]  # [T, C, h, keys]

    def layer(block, x, i):
      q, k, v = block.self_attn.fused(block.norm_self(x))
      x = x + block.self_attn.mix('bntc,bncs', q, *(y.swapaxes(2, 3) for y in (k, v)), causal)
      return block.rest(x, 'bntc', self._text(ctx, i, 'bntc')), (k, v)

    x, kv = scan(self.blocks, layer, x, jnp.arange(self.config.layers))
    k, v = (y.transpose(1, 2, 4, 0, 3, 5) for y in kv)  # [L, B, N, T, C, D] -> [B, N, C, L, T, D]
    return self._out(x), {'k': k, 'v': v}

  def init_cache(self, prompts, pools, streams, slots=None, dtype=None):
    """Zeros `[B, P, C, L, S, D]`; `slots` None for one for each token."""
    c = self.config
    shape = (prompts, pools, streams, c.layers, c.tokens if slots is None else slots, c.width)
    dtype = self.embedding[...].dtype if dtype is None else dtype
    return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}

  def step(self, ctx, cache, tokens, position, slot=None, visible=None):
    """One token for each row.

    Args:
      ctx, cache: as above.
      tokens: `[B, P, R]` int, token t - 1 for a row at position t; not read at position 0.
      position: t, a scalar or `[B, P, R]`.
      slot: where keys and values go: the R rows of a pool take slots `slot .. slot + R - 1`. None
        is `position`, for caches with a row each (R = 1), whose slots are positions; then it may
        differ between candidates.
      visible: `[B, P, R, S]` bool, the slots that a row sees, its own included. None is slots up to
        `position` (R = 1).

    Returns:
      hidden `[B, P, R, C, D]` that predicts token t, and the cache.
    """
    position = jnp.asarray(position)
    if slot is None:
      slot = position[..., 0] if position.ndim else position
    if visible is None:
      visible = jnp.arange(cache['k'].shape[4]) <= position[..., None]
    x = self.embed(ctx, tokens, jnp.broadcast_to(position, tokens.shape))
    # [B, P, R, C, h, S]
    bias = jnp.where(jnp.broadcast_to(visible, (*tokens.shape, visible.shape[-1])), 0.0, -jnp.inf)
    bias = bias[:, :, :, None, None]

    def layer(block, carry, i):
      x, cache = carry
      q, k, v = block.self_attn.fused(block.norm_self(x))
      cache = {name: _write(cache[name], new, i, slot) for name, new in (('k', k), ('v', v))}
      x = x + block.self_attn.mix_cached(q, cache, i, bias)
      return (block.rest(x, 'bprc', self._text(ctx, i, 'bprc')), cache), None

    # the cache is carried, not stacked anew: a step writes R slots, not the whole of it
    (x, cache), _ = scan(self.blocks, layer, (x, cache), jnp.arange(self.config.layers))
    return self._out(x), cache

  def _out(self, x):
    return x if self.norm is None else self.norm(x)

  def logits(self, hidden):
    """`[..., D]` -> `[..., V]` float32."""
    kernel = self.head.kernel[...]
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def _write(cache, new, layer, slot):
  """`new [B, P, R, C, D]` into `cache [B, P, C, L, S, D]` at `layer`, from `slot` on."""
  new = new.swapaxes(2, 3)[:, :, :, None].astype(cache.dtype)  # [B, P, C, 1, R, D]
  if jnp.ndim(slot) == 0:
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, layer, slot, 0))
  put = lambda c, n, s: jax.lax.dynamic_update_slice(c, n, (0, layer, s, 0))
  return jax.vmap(jax.vmap(put))(cache, new, slot)


def guide(logits, scale):
  """Classifier-free guidance over the streams: `[..., C, V]` -> `[..., V]`; C = 1 is as it is."""
  if logits.shape[-2] == 1:
    return logits[..., 0, :]
  prompt, null = logits[..., 0, :], logits[..., 1, :]
  return null + scale * (prompt - null)


# ------------------------------------------------------------------------------------------- cost


def build(config: Config, seed=0) -> FlexAR:
  """A random model; under `modules.abstract_module` no memory is used."""
  return FlexAR(config, rngs=nnx.Rngs(seed))


def flops_text(config, words) -> int:
  """Matmul FLOPs of `text_context` for one stream of a prompt; T5 itself is not in it."""
  c = config
  if c.classes:
    return 0
  return words * (2 * c.text_width * (c.text_width + c.width) + c.layers * 4 * c.width**2)


def flops_trunk(config, keys, words) -> int:
  """Matmul FLOPs of one position of one stream that attends to `keys` slots and `words` words."""
  c, D = config, config.width
  layer = 8 * D * D + 4 * keys * D + 2 * (3 if c.ffn == 'swiglu' else 2) * D * c.hidden
  if not c.classes:
    layer += 4 * D * D + 4 * words * D
  return c.layers * layer


def flops_head(config) -> int:
  """Matmul FLOPs of `logits` for one position of one stream."""
  return 2 * config.width * config.codes
