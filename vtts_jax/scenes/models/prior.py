"""A text-conditioned autoregressive transformer over the 32 tokens of a scene tokenizer.

Pre-norm blocks, relu, learned positions. Every layer attends jointly to the words of the prompt and
to the tokens of its own row. Keys and values of the words are computed once per prompt and shared
by its candidates; those of the tokens are in a cache, which is an argument and a result. A prompt
of padding alone has every word masked: the unconditional stream of classifier-free guidance is
simply another row of B.

Letters: B prompts · N candidates · T tokens · W words of a prompt · V codes · D width · h heads ·
d = D / h.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from vtts_jax.errors import ConfigError
from vtts_jax.scenes.models.layers import MLP, RMSNorm, learned_array

NEVER = -1e9  # score of a masked position; finite, because softmax of -inf alone is NaN
# Megatron's split of a block (Shoeybi et al. 2019, arXiv 1909.08053): first layer by columns,
# second by rows, so a block needs one sum over devices
SHARDING = [
  (r'blocks/\d+/(qkv|text_kv|mlp/up)/kernel', PartitionSpec(None, 'model')),
  (r'blocks/\d+/mlp/up/bias', PartitionSpec('model')),
  (r'blocks/\d+/(out|mlp/down)/kernel', PartitionSpec('model', None)),
]


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes. `codes` is V and also the id of the begin token; `words` is the size of the vocabulary,
  in which 0 is padding."""

  tokens: int = 32
  codes: int = 256
  width: int = 128
  layers: int = 4
  heads: int = 4
  expand: int = 2
  words: int = 38
  text_length: int = 12
  text_width: int = 64
  text_layers: int = 2

  def __post_init__(self):
    for name in ('width', 'text_width'):
      if getattr(self, name) % self.heads:
        raise ConfigError(f'{name}={getattr(self, name)}: must be a multiple of heads={self.heads}')


class Block(nnx.Module):
  """The weights of one layer; the caller runs the attention between its two methods."""

  def __init__(self, width, heads, expand, *, text_width=0, rngs):
    self.heads = heads
    self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
    self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
    self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
    self.mlp = MLP(width, expand * width, width, rngs=rngs)
    if text_width:
      self.text_kv = nnx.Linear(text_width, 2 * width, use_bias=False, rngs=rngs)

  def project_qkv(self, x):
    """`[..., D]` to q, k, v `[..., h, d]`; q is already scaled."""
    y = self.qkv(self.norm1(x))
    q, k, v = jnp.split(y.reshape(*y.shape[:-1], 3 * self.heads, -1), 3, -2)
    return q * q.shape[-1] ** -0.5, k, v

  def finish_block(self, x, mixed):
    """Adds the attention result `[..., h, d]` and then the MLP to `x [..., D]`."""
    x = x + self.out(mixed.reshape(x.shape))
    return x + self.mlp(self.norm2(x))


class Prior(nnx.Module):
  """The transformer; `prior(text_ids, tokens)` runs teacher forcing."""

  def __init__(self, config, *, rngs):
    c = self.config = config
    self.words = learned_array(rngs, c.words, c.text_width, scale=1.0)
    self.word_place = learned_array(rngs, c.text_length, c.text_width, scale=0.5)
    self.text_blocks = nnx.List(
      [Block(c.text_width, c.heads, c.expand, rngs=rngs) for _ in range(c.text_layers)]
    )
    self.text_norm = RMSNorm(c.text_width)
    self.codes = learned_array(rngs, c.codes + 1, c.width, scale=0.5)
    self.place = learned_array(rngs, c.tokens, c.width, scale=0.5)
    self.blocks = nnx.List(
      [
        Block(c.width, c.heads, c.expand, text_width=c.text_width, rngs=rngs)
        for _ in range(c.layers)
      ]
    )
    self.norm = RMSNorm(c.width)
    self.head = nnx.Linear(c.width, c.codes, rngs=rngs)

  def encode_text(self, text_ids):
    """Prompts `[B, W]` int32 to a tuple: {'k', 'v': `[B, W, h, d]`, 'mask': `[B, W]`} per layer.

    'mask' is added to the attention scores of a word: 0, or NEVER for padding.
    """
    mask = jnp.where(text_ids == 0, NEVER, 0.0)  # [B, W]
    x = self.words[...][text_ids] + self.word_place[...]
    for block in self.text_blocks:
      q, k, v = block.project_qkv(x)
      scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) + mask[:, None, None]
      x = block.finish_block(x, jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v))
    x = self.text_norm(x)
    out = []
    for block in self.blocks:
      kv = block.text_kv(x).reshape(*text_ids.shape, 2 * self.config.heads, -1)
      k, v = jnp.split(kv, 2, -2)
      out.append({'k': k, 'v': v, 'mask': mask})
    return tuple(out)

  def init_cache(self, b, n):
    """Zeros: a tuple over layers of {'k', 'v': `[B, N, h, T, d]`}."""
    # Heads before tokens: attention is then a batched product on the cache as it is stored. With
    # tokens first, XLA copies the cache at each step (measured: 30 times slower on a CPU).
    c = self.config
    zeros = lambda: jnp.zeros((b, n, c.heads, c.tokens, c.width // c.heads))
    return tuple({'k': zeros(), 'v': zeros()} for _ in self.blocks)

  def feed_tokens(self, text_kv, cache, tokens, position):
    """Feeds the input at sequence position `position`; returns the logits of token t = `position`.

    Args:
      text_kv: from `encode_text`.
      cache: from `init_cache`, `prefill` or an earlier call.
      tokens: `[B, N]` int32: the begin id V at position 0, token t - 1 at position t.
      position: 0 <= position < T, a scalar (may be traced) or one for each row `[B, N]`.

    Returns:
      (logits `[B, N, V]` float32, cache).
    """
    x = self.codes[...][tokens] + self.place[...][position]  # [B, N, D]
    own_place = jnp.asarray(position)[..., None]
    # cache entries from `position` on are not written yet
    hidden = jnp.where(jnp.arange(self.config.tokens) < own_place, 0.0, NEVER)  # [T] or [B, N, T]
    hidden = hidden[..., None, :]
    new = []
    for block, text, own in zip(self.blocks, text_kv, cache):
      q, k, v = block.project_qkv(x)
      new.append({'k': k, 'v': v})
      to_text = jnp.einsum('bnhd,bwhd->bnhw', q, text['k']) + text['mask'][:, None, None]
      to_own = jnp.einsum('bnhd,bnhtd->bnht', q, own['k']) + hidden
      # the new key is scored apart from the cache, so all layers read the old cache and it is
      # written once
      to_self = (q * k).sum(-1, keepdims=True)
      weights = jax.nn.softmax(jnp.concatenate([to_text, to_own, to_self], -1))
      weights = jnp.split(weights, np.cumsum([to_text.shape[-1], to_own.shape[-1]]), -1)
      mixed = jnp.einsum('bnhw,bwhd->bnhd', weights[0], text['v'])
      mixed += jnp.einsum('bnht,bnhtd->bnhd', weights[1], own['v']) + weights[2] * v
      x = block.finish_block(x, mixed)
    logits = self.head(self.norm(x))
    # Adds 0, but makes the write depend on the last read; otherwise XLA copies the cache first.
    after = jnp.where(logits[0, 0, 0] > 1e30, 1.0, 0.0)
    here = jnp.arange(self.config.tokens) == own_place  # [T] or [B, N, T]

    def write_entry(old, now):
      # a position for each row needs a masked write; a shared one updates in place
      if jnp.ndim(position):
        return jnp.where(here[:, :, None, :, None], (now + after)[:, :, :, None], old)
      return jax.lax.dynamic_update_index_in_dim(old, now + after, position, 3)

    return logits, jax.tree.map(write_entry, tuple(cache), tuple(new))

  def prefill(self, text_kv, tokens, length):
    """The cache after `feed_tokens` at positions 0 .. `length` - 1, in one parallel pass.

    These positions hold the begin token and `tokens[..., :length - 1]`; the next call feeds token
    `length` - 1 at position `length`.

    Args:
      text_kv: from `encode_text`.
      tokens: `[B, N, T]` int32; tokens from `length` - 1 on are ignored.
      length: 0 <= length <= T, a scalar (may be traced) or `[B, N]`.
    """
    _, pairs = self._run_parallel(text_kv, tokens)
    there = jnp.arange(self.config.tokens) < jnp.asarray(length)[..., None]  # [T] or [B, N, T]
    there = jnp.expand_dims(there, -2)[..., None]
    keep = lambda x: jnp.where(there, x.swapaxes(2, 3), 0.0)
    return tuple({'k': keep(k), 'v': keep(v)} for k, v in pairs)

  def __call__(self, text_ids, tokens):
    """Teacher forcing: prompts `[B, W]` and tokens `[B, T]` to the logits `[B, T, V]` of each
    token."""
    return self.forced_logits(self.encode_text(text_ids), tokens[:, None])[:, 0]

  def forced_logits(self, text_kv, tokens):
    """Teacher forcing of N rows per prompt: tokens `[B, N, T]` to logits `[B, N, T, V]`."""
    x, _ = self._run_parallel(text_kv, tokens)
    return self.head(self.norm(x))

  def _run_parallel(self, text_kv, tokens):
    """All positions in one pass: tokens `[B, N, T]` to (`[B, N, T, D]`, list over layers of (k, v)
    `[B, N, T, h, d]`)."""
    c, (b, n, t) = self.config, tokens.shape
    begin = jnp.full_like(tokens[..., :1], c.codes)
    x = self.codes[...][jnp.concatenate([begin, tokens[..., :-1]], -1)] + self.place[...]
    # with two axes the products run at 1.2 x the speed on a CPU
    x = x.reshape(b * n * t, c.width)
    # causal mask of the tokens, after the padding mask of the words
    later = np.where(np.tril(np.ones((t, t), bool)), 0.0, NEVER).astype(np.float32)
    words = text_kv[0]['mask'][:, None]
    mask = jnp.broadcast_to(words, (b, t, words.shape[-1]))
    mask = jnp.concatenate([mask, jnp.broadcast_to(later, (b, t, t))], -1)[:, None, None]
    pairs = []
    for block, text in zip(self.blocks, text_kv):
      q, k, v = (y.reshape(b, n, t, c.heads, -1) for y in block.project_qkv(x))
      pairs.append((k, v))
      spread = lambda y: jnp.broadcast_to(y[:, None], (b, n, *y.shape[1:]))
      k = jnp.concatenate([spread(text['k']), k], 2)  # [B, N, W + T, h, d]
      v = jnp.concatenate([spread(text['v']), v], 2)
      weights = jax.nn.softmax(jnp.einsum('bnthd,bnshd->bnhts', q, k) + mask)
      x = block.finish_block(x, jnp.einsum('bnhts,bnshd->bnthd', weights, v))
    return x.reshape(b, n, t, c.width), pairs


def build_model(config, seed=0):
  """A `Prior` with random parameters."""
  return Prior(config, rngs=nnx.Rngs(seed))


def count_text_flops(config):
  """FLOPs of `encode_text` per prompt: matrix products only, a multiply-add is 2."""
  c, w = config, config.text_length
  block = 2 * w * (4 + 2 * c.expand) * c.text_width**2 + 4 * w * w * c.text_width
  return c.text_layers * block + c.layers * 4 * w * c.text_width * c.width


def count_step_flops(config):
  """FLOPs of `feed_tokens` per row (one token of one candidate)."""
  # the cache has a fixed size, so attention always reads all T entries
  c = config
  block = 2 * (4 + 2 * c.expand) * c.width**2 + 4 * (c.text_length + c.tokens) * c.width
  return c.layers * block + 2 * c.width * c.codes


def count_prefill_flops(config):
  """FLOPs of `prefill` per row: T steps without the head and what follows the last keys."""
  c = config
  unused = 2 * (1 + 2 * c.expand) * c.width**2 + 4 * (c.text_length + c.tokens) * c.width
  return c.tokens * (count_step_flops(c) - 2 * c.width * c.codes - unused)
