"""Gemma-2 (Gemma Team 2024, arXiv 2408.00118), read for its last hidden states: a text encoder.

A decoder with four norms in each layer, grouped queries with rotated positions, scores that are
soft-capped, and a sliding window in every other layer. There is no head: SANA reads the states, and
the head's weights are those of the embedding anyway. Checked against `transformers.Gemma2Model`
(tests/parity).

Letters: R texts · W tokens of a text · V vocabulary · D width · F hidden channels · n heads of
queries · g heads of keys and values · m = n / g queries of one key · d channels of a head ·
L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan_blocks, stack_blocks


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the names are those of the checkpoint's `config.json`.

  Attributes:
    num_key_value_heads: g.
    query_pre_attn_scalar: scores are divided by its square root; it need not be d.
    sliding_window: tokens that layers 0, 2, 4 ... see, the token itself included; the others see
      all before them.
    attn_logit_softcapping: largest absolute score, which tanh approaches; None: no limit.

  Raises:
    ConfigError: heads that cannot be grouped, or a head that cannot be rotated.
  """

  vocab_size: int = 256000
  hidden_size: int = 2304
  intermediate_size: int = 9216
  num_hidden_layers: int = 26
  num_attention_heads: int = 8
  num_key_value_heads: int = 4
  head_dim: int = 256
  query_pre_attn_scalar: float = 256
  sliding_window: int = 4096
  attn_logit_softcapping: float | None = 50.0
  rope_theta: float = 10000.0
  rms_norm_eps: float = 1e-6

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ConfigError(
        f'num_key_value_heads={self.num_key_value_heads}: must divide num_attention_heads='
        f'{self.num_attention_heads}'
      )
    if self.head_dim % 2:
      raise ConfigError(f'head_dim={self.head_dim}: must be even')


SIZES = {
  'tiny': Config(
    vocab_size=64, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, query_pre_attn_scalar=6, sliding_window=4,
  ),
  'gemma_2_2b': Config(),
}  # fmt: skip


class RMSNorm(nnx.Module):
  """RMS norm whose weight is stored as its distance from 1; in float32."""

  def __init__(self, width, eps):
    self.eps = eps
    self.weight = nnx.Param(jnp.zeros(width))

  def __call__(self, x):  # [..., D]
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    # scaled before it is rounded, unlike Llama's
    return (y * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)


def rotation_table(width, channels, theta):
  """Cosines and sines `[width, channels / 2]` of each place's angles, float32."""
  # the rates are float32 as in the reference, whose last bit is seen far from the beginning
  exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
  rates = np.float32(1) / np.float32(theta) ** exponents
  angles = np.arange(width, dtype=np.float32)[:, None] * rates
  return np.cos(angles), np.sin(angles)


def rotate_heads(x, cosines, sines):
  """Turns channel i of a head with channel i + d / 2; `x [R, W, heads, d]` -> float32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  cosines, sines = cosines[:, None], sines[:, None]
  return jnp.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)


def visible_tokens(width, window, mask=None):
  """Which tokens a token sees, `[R or 1, 2, W, W]` bool: in layers with a window, and without.

  Args:
    mask: `[R, W]`, true where a token is real; None: all are.
  """
  back = np.arange(width)[:, None] - np.arange(width)
  seen = np.stack([(back >= 0) & (back < window), back >= 0])[None]
  return seen if mask is None else seen & mask[:, None, None].astype(bool)


class Attention(nnx.Module):
  """Causal attention; n / g neighbouring heads of queries share a key."""

  def __init__(self, c: Config, *, rngs):
    self.config = c
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    self.qkv = nnx.Linear(c.hidden_size, heads * c.head_dim, use_bias=False, rngs=rngs)
    inner = c.num_attention_heads * c.head_dim
    self.out = nnx.Linear(inner, c.hidden_size, use_bias=False, rngs=rngs)

  def __call__(self, x, rotation, seen):
    """`x [R, W, D]`; `rotation` as of `rotation_table`; `seen [R or 1, W, W]` -> `[R, W, D]`."""
    c, (R, W, _) = self.config, x.shape
    n, g = c.num_attention_heads, c.num_key_value_heads
    heads = self.qkv(x).reshape(R, W, n + 2 * g, c.head_dim)
    q, k, v = jnp.split(heads, (n, n + g), 2)
    q = (rotate_heads(q, *rotation) * c.query_pre_attn_scalar**-0.5).astype(x.dtype)
    k = rotate_heads(k, *rotation).astype(x.dtype)
    q = q.reshape(R, W, g, n // g, c.head_dim)
    scores = jnp.einsum('rqgmd,rkgd->rgmqk', q, k, preferred_element_type=jnp.float32)
    if c.attn_logit_softcapping is not None:
      # before the mask: capped, a hidden token would be seen a little
      scores = c.attn_logit_softcapping * jnp.tanh(scores / c.attn_logit_softcapping)
    # a finite number: padding that sees no real token must not be nan
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return self.out(jnp.einsum('rgmqk,rkgd->rqgmd', weights, v).reshape(R, W, -1))


class FeedForward(nnx.Module):
  """Two layers, gated by tanh-GELU."""

  def __init__(self, c: Config, *, rngs):
    # the gate comes first, then what it lets through
    self.enter = nnx.Linear(c.hidden_size, 2 * c.intermediate_size, use_bias=False, rngs=rngs)
    self.leave = nnx.Linear(c.intermediate_size, c.hidden_size, use_bias=False, rngs=rngs)

  def __call__(self, x):  # [R, W, D]
    gate, value = jnp.split(self.enter(x), 2, -1)
    return self.leave(jax.nn.gelu(gate, approximate=True) * value)


class Block(nnx.Module):
  """One layer: attention and feed-forward, each with a norm before it and one behind it."""

  def __init__(self, c: Config, *, rngs):
    sizes = (c.hidden_size, c.rms_norm_eps)
    self.norm_attn, self.norm_attn_out = RMSNorm(*sizes), RMSNorm(*sizes)
    self.attn = Attention(c, rngs=rngs)
    self.norm_ffn, self.norm_ffn_out = RMSNorm(*sizes), RMSNorm(*sizes)
    self.ffn = FeedForward(c, rngs=rngs)

  def __call__(self, x, rotation, seen):  # [R, W, D]
    # the second norm is inside the branch, the stream itself is never normed
    x = x + self.norm_attn_out(self.attn(self.norm_attn(x), rotation, seen))
    return x + self.norm_ffn_out(self.ffn(self.norm_ffn(x)))


class Gemma2(nnx.Module):
  """`__call__(ids [R, W], mask [R, W] or None) -> [R, W, D]`, the last states after the norm.

  `mask` is true where a token is real. Places count from the first token, padding included, so
  texts are padded on the right. States of padding are computed, and nothing reads them.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.embed = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.num_hidden_layers, rngs)
    self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

  def __call__(self, ids, mask=None):
    c = self.config
    # looked up here, because Embed itself would give float32 for bfloat16 weights
    x = self.embed.embedding[...][ids]
    # the factor has the dtype of the weights, as in the reference: 55.5, not 55.43, in bfloat16
    x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
    rotation = rotation_table(ids.shape[1], c.head_dim, c.rope_theta)
    seen = jnp.asarray(visible_tokens(ids.shape[1], c.sliding_window, mask))

    def run_block(block, x, layer):
      # even layers have the window
      return block(x, rotation, seen[:, layer % 2]), None

    return self.norm(scan_blocks(self.blocks, run_block, x, jnp.arange(c.num_hidden_layers))[0])


def build_model(config: Config, seed=0) -> Gemma2:
  """A random model; under `modules.abstract_module` no memory is used."""
  return Gemma2(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, words: int) -> int:
  """Matmul FLOPs of one text of `words` tokens; hidden tokens are computed and counted."""
  inner, shared = (heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads))
  layer = 4 * c.hidden_size * (inner + shared) + 4 * words * inner
  return c.num_hidden_layers * words * (layer + 6 * c.hidden_size * c.intermediate_size)
