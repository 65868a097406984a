"""T5 encoder (Raffel et al. 2020, arXiv 1910.10683; v1.1 and FLAN: Chung et al. 2022, 2210.11416).

The encoder turns a text into one vector per token. It has RMS norms, attention without a scale, one
relative position bias that all blocks use, and a gated tanh-GELU (v1.1, FLAN) or relu (v1.0)
feed-forward. Checked against `transformers.T5EncoderModel` (tests/parity) and the T5 inside the
flexar golden files.

Letters: R texts · W tokens of a text · L blocks · H heads · K width of a head · D width · F hidden.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError

FEED_FORWARD = ('gated-gelu', 'relu')


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the names are those of the checkpoint's `config.json`.

  Raises:
    ConfigError: an unknown `feed_forward_proj`, or fewer than 4 buckets.
  """

  vocab_size: int = 32128
  d_model: int = 2048  # D
  d_kv: int = 64  # K
  d_ff: int = 5120  # F
  num_layers: int = 24  # L
  num_heads: int = 32  # H
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = 'gated-gelu'

  def __post_init__(self):
    if self.feed_forward_proj not in FEED_FORWARD:
      raise ConfigError(
        f'feed_forward_proj={self.feed_forward_proj!r}: allowed are {", ".join(FEED_FORWARD)}'
      )
    if self.relative_attention_num_buckets < 4:
      raise ConfigError(
        f'relative_attention_num_buckets={self.relative_attention_num_buckets}: at least 4'
      )


# one thin layer, for random weights
_THIN = {'vocab_size': 256, 'd_kv': 4, 'd_ff': 16, 'num_layers': 1, 'num_heads': 2}
_XL = Config(d_model=2048, d_ff=5120, num_layers=24, num_heads=32)
SIZES = {
  'tiny': Config(d_model=8, **_THIN),
  'tiny_wide': Config(d_model=32, **_THIN),  # as wide as two tiny CLIPs, as SD3 wants it
  'thin_xl': Config(d_model=2048, **_THIN),  # states as wide as those of XL: for timing searches
  'flan_t5_xl': _XL,
  't5_v1_1_xl': _XL,
  't5_v1_1_xxl': Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64),
}


class RMSNorm(nnx.Module):
  """Norm by the root mean square in float32, without mean and bias; gives the weight's dtype."""

  def __init__(self, width, eps):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x):  # [..., D]
    # bfloat16 squares overflow nothing but lose the mean's digits
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
    return x.astype(self.scale.dtype) * self.scale[...]


def linear_layer(inner, outer, rngs):
  """Returns a linear layer without bias; T5 has no biases at all."""
  return nnx.Linear(inner, outer, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
  """Self-attention whose scores are not scaled; the bias carries positions and the mask."""

  def __init__(self, c, *, rngs):
    self.heads = c.num_heads
    self.q, self.k, self.v = (linear_layer(c.d_model, c.num_heads * c.d_kv, rngs) for _ in range(3))
    self.o = linear_layer(c.num_heads * c.d_kv, c.d_model, rngs)

  def __call__(self, x, bias):  # [R, W, D], [R or 1, H, W, W] -> [R, W, D]
    q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
    # no 1 / sqrt(K): T5's initialisation absorbs it
    scores = jnp.einsum('rqhk,rwhk->rhqw', q, k).astype(jnp.float32) + bias
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return self.o(jnp.einsum('rhqw,rwhk->rqhk', weights, v).reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
  """Two layers with relu (v1.0), or gated by tanh-GELU (v1.1, FLAN)."""

  def __init__(self, c, *, rngs):
    self.gated = c.feed_forward_proj == 'gated-gelu'
    if self.gated:
      self.wi_0, self.wi_1 = (linear_layer(c.d_model, c.d_ff, rngs) for _ in range(2))
    else:
      self.wi = linear_layer(c.d_model, c.d_ff, rngs)
    self.wo = linear_layer(c.d_ff, c.d_model, rngs)

  def __call__(self, x):  # [R, W, D]
    if self.gated:
      return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))
    return self.wo(jax.nn.relu(self.wi(x)))


class Block(nnx.Module):
  """One pre-norm layer: self-attention, then feed-forward, both residual."""

  def __init__(self, c, *, rngs):
    self.attention_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
    self.attention = Attention(c, rngs=rngs)
    self.feed_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
    self.feed = FeedForward(c, rngs=rngs)

  def __call__(self, x, bias):  # [R, W, D], [R or 1, H, W, W]
    x = x + self.attention(self.attention_norm(x), bias)
    return x + self.feed(self.feed_norm(x))


def relative_buckets(width, count, farthest) -> np.ndarray:
  """Returns the bucket of every (query, key) pair, `[W, W]` in 0 .. count - 1.

  Half of the buckets are for keys after the query. In each half, half of the buckets hold one
  distance each, and the rest is logarithmic up to `farthest`.
  """
  near = count // 4
  offset = np.arange(width)[None, :] - np.arange(width)[:, None]
  distance = np.abs(offset)
  # float32 and this order of operations: the reference truncates the logarithm, so a last bit moves
  # a distance to another bucket
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(near)
  far = np.log(ratio) / np.float32(math.log(farthest / near)) * np.float32(count // 2 - near)
  far = np.minimum(near + far.astype(np.int64), count // 2 - 1)
  return np.where(offset > 0, count // 2, 0) + np.where(distance < near, distance, far)


class T5Encoder(nnx.Module):
  """`__call__(ids [R, W], mask [R, W] or None) -> [R, W, D]`.

  `mask` is true (or nonzero) where a token is real; None attends to everything. Masked tokens are
  no keys, but their own outputs are computed, as the reference does.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.embed = nnx.Embed(c.vocab_size, c.d_model, rngs=rngs)
    # the checkpoint keeps this table in the first block, but all blocks use it
    self.position = nnx.Embed(c.relative_attention_num_buckets, c.num_heads, rngs=rngs)
    self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.num_layers)])
    self.norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

  def __call__(self, ids, mask=None):
    x = self.embed(ids)  # [R, W, D]
    # made once: positions and mask are the same in every block
    bias = self.position_bias(ids.shape[1], mask)
    for block in self.blocks:
      x = block(x, bias)
    return self.norm(x)

  def position_bias(self, width, mask=None):
    """Returns the bias of the scores, `[R or 1, H, W, W]` float32; masked keys have the lowest."""
    c = self.config
    count, farthest = c.relative_attention_num_buckets, c.relative_attention_max_distance
    index = relative_buckets(width, count, farthest)
    bias = self.position.embedding[...].astype(jnp.float32)[index].transpose(2, 0, 1)[None]
    if mask is None:
      return bias
    return jnp.where(mask[:, None, None, :].astype(bool), bias, jnp.finfo(jnp.float32).min)


def build_model(config: Config, seed=0) -> T5Encoder:
  """Builds a random encoder; inside `modules.abstract_module` it uses no memory."""
  return T5Encoder(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, words: int) -> int:
  """Matmul FLOPs of the encoder for one text of `words` tokens."""
  # the heads together may be wider than the model: H K is not D
  inner, gated = c.num_heads * c.d_kv, 3 if c.feed_forward_proj == 'gated-gelu' else 2
  layer = 8 * c.d_model * inner + 4 * words * inner + 2 * gated * c.d_model * c.d_ff
  return c.num_layers * words * layer
