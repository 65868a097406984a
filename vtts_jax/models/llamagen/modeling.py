"""LlamaGen (Sun et al. 2024, arXiv 2406.06525): a Llama over the image tokens of a picture.

A prefix of condition tokens (a class, or 120 words of T5) stands before the image tokens, row by
row; blocks are pre-norm with RMS norms, SwiGLU and rotary positions in two axes. Checked against
the PyTorch reference by golden files: `replay.py`, tests/test_llamagen.py. The tokenizer is
`models.llamagen_vq`.

A quirk of the reference decides the form of this port. Its table of rotations is zero, and not the
identity, at the prefix. So queries and keys of the prefix are zero vectors: whoever sees a
condition token gives it the score 0, and condition tokens look at each other uniformly. Hence a
prefix needs no queries or keys, and for the image tokens n visible condition tokens are one slot:
the mean of their values, with the score log n. Prompts keep that slot for each layer
(`class_context`, `text_context`), and candidates share it.

Letters: B prompts · N candidates · C streams of guidance (prompt, then null) · T tokens ·
Q queries · S slots of a cache · W condition tokens · E width of the text · L layers · V codes ·
D width · h heads · d = D / h.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.shared_prefix import read_layer, write_cache
from vtts_jax.models.stacked import scan_blocks, stack_blocks


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of GPT-B at 256 pixels.

  Attributes:
    hidden: inner width of the feed-forward layer; see `swiglu_width`.
    tokens: of a picture, a square number.
    codes: V.
    classes: number of classes, without the null class; 0 for a text model.
    words: W of a text model; class models have one condition token.
    text_width: E.

  Raises:
    ConfigError: heads do not divide the width into multiples of 4, or tokens are no square.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  hidden: int = 2048
  tokens: int = 256
  codes: int = 16384
  classes: int = 1000
  words: int = 120
  text_width: int = 2048
  rope_base: float = 10000.0
  eps: float = 1e-5

  def __post_init__(self):
    # a head has pairs of channels for the row and as many for the column
    if self.width % (4 * self.heads):
      raise ConfigError(f'width={self.width}: must be a multiple of 4 * heads={4 * self.heads}')
    if math.isqrt(self.tokens) ** 2 != self.tokens:
      raise ConfigError(f'tokens={self.tokens}: must be a square number')


def swiglu_width(width: int, multiple_of: int = 256) -> int:
  """Returns the hidden width: 8 D / 3 cut to an integer, then up to a multiple."""
  return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


# name -> (layers, heads, width) of the trunks
TRUNKS = {
  'b': (12, 12, 768), 'l': (24, 16, 1024), 'xl': (36, 20, 1280), 'xxl': (48, 24, 1536),
  'xxxl': (48, 40, 2560), '1b': (22, 32, 2048), '3b': (24, 32, 3200), '7b': (32, 32, 4096),
}  # fmt: skip


def _of_trunk(name, pixels, **options):
  layers, heads, width = TRUNKS[name]
  return Config(
    width=width, layers=layers, heads=heads, hidden=swiglu_width(width),
    tokens=(pixels // 16) ** 2, **options,
  )  # fmt: skip


_TINY = {
  'width': 16, 'layers': 2, 'heads': 2, 'hidden': 24, 'tokens': 9, 'codes': 16, 'classes': 5,
}  # fmt: skip
SIZES = {
  'tiny': Config(**_TINY),
  'tiny_t2i': Config(**_TINY | {'classes': 0}, words=4, text_width=8),
  # released; the number is the side of the pictures with the tokenizer VQ-16
  **{f'c2i_{name}_{side}': _of_trunk(name, side) for name, side in (
    ('b', 256), ('b', 384), ('l', 256), ('l', 384), ('xl', 384), ('xxl', 384), ('3b', 384),
  )},
  't2i_xl_256': _of_trunk('xl', 256, classes=0),
  't2i_xl_512': _of_trunk('xl', 512, classes=0),
}  # fmt: skip


def rotation_table(c: Config) -> np.ndarray:
  """Returns cosines and sines of the image tokens, `[2, T, d / 2]`: rows of the grid first."""
  # half of a head's pairs turn with the row and half with the column
  side, half = math.isqrt(c.tokens), c.width // c.heads // 2
  rates = 1.0 / c.rope_base ** (np.arange(0, half, 2, dtype=np.float32) / half)  # [d / 4]
  angles = np.outer(np.arange(side, dtype=np.float32), rates)
  row, column = np.repeat(angles, side, 0), np.tile(angles, (side, 1))
  angles = np.concatenate([row, column], -1)
  return np.stack([np.cos(angles), np.sin(angles)])


def rotate_heads(x, table):
  """Rotates `x [..., h, d]` by cosines and sines `[2, ..., d / 2]` of the same leading axes."""
  # the loader put the first channels of all pairs before the second ones (`convert`)
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  cos, sin = table[0][..., None, :], table[1][..., None, :]
  y = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
  return y.astype(x.dtype)


def visible_pairs(mask):
  """Key mask `[..., T]` -> who sees whom `[..., T, T]`: causal, and everybody sees himself."""
  # a padded position sees itself only, so that no softmax is empty
  T = mask.shape[-1]
  return (jnp.tri(T, dtype=bool) & (mask != 0)[..., None, :]) | jnp.eye(T, dtype=bool)


def pad_left(states, mask):
  """Moves the padding of T5 states `[..., W, E]` with mask `[..., W]` to the front, as zeros.

  Returns:
    States and mask of the same shapes.
  """
  W, real = mask.shape[-1], (mask != 0).sum(-1, keepdims=True)
  order = (jnp.arange(W) + real) % W
  mask = jnp.flip(mask, -1)
  return jnp.take_along_axis(states, order[..., None], -2) * mask[..., None], mask


class RMSNorm(nnx.Module):
  """RMS norm over the last axis, computed in float32 and cast before the weight."""

  def __init__(self, width, eps):
    self.eps, self.weight = eps, nnx.Param(jnp.ones(width))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * self.weight[...]


class Attention(nnx.Module):
  """Projections without biases; `qkv` is `[D, 3, D]`, so that a mesh splits each of the three."""

  def __init__(self, c, *, rngs):
    self.heads = c.heads
    self.qkv = nnx.LinearGeneral(c.width, (3, c.width), use_bias=False, rngs=rngs)
    self.out = nnx.Linear(c.width, c.width, use_bias=False, rngs=rngs)

  def _split_heads(self, x):  # [..., D] -> [..., h, d]
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def project_values(self, x):
    """Values `[..., D]` alone, all that a condition token needs."""
    return x @ self.qkv.kernel[...][:, 2]

  def project_rotated(self, x, table):
    """`x [..., D]` -> q `[..., h, d]` and k, v `[..., D]`, as the cache holds them; see
    `rotate_heads` for `table`."""
    q, k, v = jnp.moveaxis(self.qkv(x), -2, 0)
    q, k = (rotate_heads(self._split_heads(y), table) for y in (q, k))
    return q, k.reshape(v.shape), v

  def mix_values(self, q, k, v, visible, prefix):
    """Attention over the cached image tokens and the slot of the prefix.

    Args:
      q: `[B, N, Q, C, h, d]`.
      k, v: `[B, N, C, S, D]`.
      visible: bool, broadcasts to `[B, N, Q, S]`.
      prefix: (mean value `[B, C, D]`, score `[B, C]`).

    Returns:
      `[B, N, Q, C, D]`.
    """
    k, v, S = self._split_heads(k), self._split_heads(v), k.shape[3]
    s = jnp.einsum('bnqchd,bncshd->bnqchs', q, k, preferred_element_type=jnp.float32)
    s = jnp.where(visible[..., None, None, :], s * q.shape[-1] ** -0.5, -jnp.inf)
    value, score = self._split_heads(prefix[0]), prefix[1][:, None, None, :, None, None]
    s = jnp.concatenate([s, jnp.broadcast_to(score, (*s.shape[:-1], 1))], -1)
    a = jax.nn.softmax(s, -1).astype(v.dtype)
    x = jnp.einsum('bnqchs,bncshd->bnqchd', a[..., :S], v)
    x = x + a[..., S:] * value[:, None, None]
    return self.out(x.reshape(*x.shape[:-2], -1))


class SwiGLU(nnx.Module):
  """down(silu(gate) * value); `up` is `[D, 2, hidden]`, gate first."""

  def __init__(self, c, *, rngs):
    self.up = nnx.LinearGeneral(c.width, (2, c.hidden), use_bias=False, rngs=rngs)
    self.down = nnx.Linear(c.hidden, c.width, use_bias=False, rngs=rngs)

  def __call__(self, x):
    gate, value = jnp.moveaxis(self.up(x), -2, 0)
    return self.down(jax.nn.silu(gate) * value)


class Block(nnx.Module):
  """One layer."""

  def __init__(self, c, *, rngs):
    self.norm_attn, self.norm_ffn = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
    self.attn, self.ffn = Attention(c, rngs=rngs), SwiGLU(c, rngs=rngs)

  def finish_layer(self, x):
    """Runs the feed-forward layer, `[..., D]`."""
    return x + self.ffn(self.norm_ffn(x))


class TextMLP(nnx.Module):
  """T5 states to the width of the trunk; tanh-GELU, no biases, so that zeros stay zeros."""

  def __init__(self, c, *, rngs):
    self.fc1 = nnx.Linear(c.text_width, c.width, use_bias=False, rngs=rngs)
    self.fc2 = nnx.Linear(c.width, c.width, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class LlamaGen(nnx.Module):
  """Make a context, then call `prefill` or `feed_tokens`, then `token_logits` and `guide_logits`.

  A context is {'hidden': `[B, C, D]`, which predicts the first token, 'values': `[B, C, L, D]`,
  'score': `[B, C]` float32}. A cache is {'k', 'v': `[B, N, C, L, S, D]`} of image tokens. Prompts
  and candidates lead, so that gathering beams and sharding prompts touch leading axes only.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    table = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.embedding = table(c.codes, c.width)
    if c.classes:
      self.classes = table(c.classes + 1, c.width)  # the last one is the null class
    else:
      self.text_mlp, self.null_text = TextMLP(c, rngs=rngs), table(c.words, c.text_width)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.norm = RMSNorm(c.width, c.eps)
    self.head = nnx.Linear(c.width, c.codes, use_bias=False, rngs=rngs)

  # ------------------------------------------------------------------------------------ condition

  def class_context(self, labels):
    """Classes `[B, C]` int, -1 for the null class -> context."""
    x = self.classes[...][jnp.where(labels < 0, self.config.classes, labels)][:, :, None]
    return self._prefix_context(x, jnp.ones(x.shape[:3], jnp.int32))

  def text_context(self, states, mask):
    """T5 states `[B, W, E]` and mask `[B, W]`, padded on the right -> context of two streams.

    The null stream is the learned caption, under the mask of the prompt.
    """
    states, mask = pad_left(states.astype(self.null_text[...].dtype), mask)
    null = jnp.broadcast_to(self.null_text[...], states.shape)
    x = self.text_mlp(jnp.stack([states, null], 1))
    return self._prefix_context(x, jnp.broadcast_to(mask[:, None], x.shape[:3]))

  def _prefix_context(self, x, mask):
    """Runs condition tokens `[B, C, W, D]` with key mask `[B, C, W]` through all layers."""
    # with zero queries and keys attention is the mean over what a token sees
    pairs = visible_pairs(mask).astype(jnp.float32)
    mean = (pairs / pairs.sum(-1, keepdims=True)).astype(x.dtype)
    real = (mask != 0).sum(-1)  # [B, C]
    seen = ((mask != 0) / jnp.maximum(real, 1)[..., None]).astype(x.dtype)

    def run_layer(block, x, _):
      values = block.attn.project_values(block.norm_attn(x))
      x = x + block.attn.out(jnp.einsum('bcqw,bcwd->bcqd', mean, values))
      return block.finish_layer(x), jnp.einsum('bcw,bcwd->bcd', seen, values)

    x, values = scan_blocks(self.blocks, run_layer, x)
    # a prompt without words has no slot: the score is -inf
    score = jnp.log(real.astype(jnp.float32))
    return {'hidden': self.norm(x[:, :, -1]), 'values': jnp.moveaxis(values, 0, 2), 'score': score}

  # ------------------------------------------------------------------------------------ sequences

  def prefill(self, ctx, tokens):
    """Feeds whole sequences in parallel (teacher forcing).

    Args:
      ctx: context.
      tokens: `[B, N, T]` int.

    Returns:
      hidden: `[B, N, T, C, D]`; the one at t predicts token t from those before it.
      cache: `[B, N, C, L, T, D]` of all tokens.
    """
    table = rotation_table(self.config)[:, None, None, : tokens.shape[2]]  # [2, 1, 1, T, d / 2]
    x, cache = self.run_sequence(ctx, self.embedding[...][tokens], table)
    first = jnp.broadcast_to(ctx['hidden'][:, None, None], (*x.shape[:2], 1, *x.shape[3:]))
    return jnp.concatenate([first, x[:, :, :-1]], 2), cache

  def run_sequence(self, ctx, x, table, first=0):
    """Runs whole sequences of embeddings through all layers, each after those before it.

    Args:
      ctx: context.
      x: `[B, N, Q, D]`; the streams of guidance read the same.
      table: cosines and sines, `[2, B, N, Q, d / 2]`; axes of 1 where they are shared.
      first: embeddings (or slots of a cache) before it are never seen.

    Returns:
      hidden: `[B, N, Q, C, D]`, normed.
      cache: `[B, N, C, L, Q, D]`.
    """
    x, table = jnp.repeat(x[:, :, :, None], ctx['score'].shape[1], 3), table[..., None, :]
    visible = jnp.tri(x.shape[2], dtype=bool) & (jnp.arange(x.shape[2]) >= first)

    def run_layer(block, x, values):
      q, k, v = block.attn.project_rotated(block.norm_attn(x), table)
      k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
      x = x + block.attn.mix_values(q, k, v, visible, (values, ctx['score']))
      return block.finish_layer(x), {'k': k, 'v': v}

    x, cache = scan_blocks(self.blocks, run_layer, x, jnp.moveaxis(ctx['values'], 2, 0))
    return self.norm(x), {name: jnp.moveaxis(y, 0, 3) for name, y in cache.items()}

  def init_cache(self, ctx, candidates: int, slots: int | None = None):
    """Returns an empty cache for N candidates; as many slots as a picture has tokens by default."""
    B, C, L, D = ctx['values'].shape
    shape = B, candidates, C, L, self.config.tokens if slots is None else slots, D
    return {name: jnp.zeros(shape, ctx['values'].dtype) for name in 'kv'}

  def feed_tokens(self, ctx, cache, tokens, position):
    """Feeds one token for each candidate.

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
    table = jnp.asarray(rotation_table(self.config))[:, slot]
    # axes of candidates and queries between the 2 and d / 2
    table = table[:, :, :, None] if slot.ndim else table[:, None, None, None]
    x, cache = self.run_cached(ctx, cache, self.embedding[...][tokens][:, :, None], table, slot)
    first = (position == 0)[..., None, None]
    return jnp.where(first, ctx['hidden'][:, None], x[:, :, 0]), cache

  def run_cached(self, ctx, cache, x, table, slot, first=0):
    """Runs a few embeddings through all layers; each sees the cache up to its own slot.

    Args:
      ctx, cache, x, table, first: as in `run_sequence`.
      slot: where the first one is written, the others behind it; a scalar, or `[B, N]`.

    Returns:
      hidden: `[B, N, Q, C, D]`, normed.
      cache: with the new keys and values.
    """
    Q, slot = x.shape[2], jnp.asarray(slot)
    x, table = jnp.repeat(x[:, :, :, None], ctx['score'].shape[1], 3), table[..., None, :]
    slots, own = jnp.arange(cache['k'].shape[4]), slot[..., None] + jnp.arange(Q)
    visible = (slots <= own[..., None]) & (slots >= first)  # [Q, S] or [B, N, Q, S]

    def run_layer(block, carry, inputs):
      (x, cache), (values, layer) = carry, inputs
      q, k, v = block.attn.project_rotated(block.norm_attn(x), table)
      cache = {name: write_cache(cache[name], new, layer, slot) for name, new in zip('kv', (k, v))}
      k, v = (read_layer(cache[name], layer) for name in 'kv')
      x = x + block.attn.mix_values(q, k, v, visible, (values, ctx['score']))
      return (block.finish_layer(x), cache), None

    # the cache is carried, not stacked anew: a call writes its slots and not the whole cache
    layers = jnp.moveaxis(ctx['values'], 2, 0), jnp.arange(self.config.layers)
    (x, cache), _ = scan_blocks(self.blocks, run_layer, (x, cache), layers)
    return self.norm(x), cache

  def token_logits(self, hidden):
    """Hidden `[..., D]` -> logits `[..., V]` float32."""
    # float32 out of bfloat16 factors: sampling compares logits that lie close together
    return jnp.matmul(hidden, self.head.kernel[...], preferred_element_type=jnp.float32)


def guide_logits(logits, scale):
  """Applies classifier-free guidance over the streams: `[..., C, V]` -> `[..., V]`; one stream
  stays as it is."""
  if logits.shape[-2] == 1:
    return logits[..., 0, :]
  prompt, null = logits[..., 0, :], logits[..., 1, :]
  return null + scale * (prompt - null)


def build_model(config: Config, seed=0) -> LlamaGen:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return LlamaGen(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, keys: int = 0) -> int:
  """Matmul FLOPs for one stream of one candidate.

  Args:
    op: 'prefix', the context of a prompt; 'step', one image token that sees `keys` of them;
      'head', the logits of one token.
  """
  matrices = 8 * c.width**2 + 6 * c.width * c.hidden
  if op == 'head':
    return 2 * c.width * c.codes
  if op == 'step':
    return c.layers * (matrices + 4 * keys * c.width)
  W = 1 if c.classes else c.words
  # of queries, keys and values the prefix has the values alone, and one product of means with them
  layer = matrices - 4 * c.width**2 + 2 * (W + 1) * c.width
  mlp = 0 if c.classes else 2 * c.width * (c.text_width + c.width)
  return W * (c.layers * layer + mlp)
