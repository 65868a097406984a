"""Self-attention of transformers that draw a picture scale by scale (VAR, Infinity).

A call reads the tokens of one or more whole scales. It attends to the cache, which holds the keys
and values of the scales before, and to itself, and writes its own into the cache.

Letters: B prompts · N candidates · C streams of guidance · Q queries · S tokens seen · T slots of a
cache, the tokens of all scales but the last · L layers · D width · h heads · d = D / h.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

MAX_LOG_SCALE = math.log(100)
QUERIES = 1024  # at most so many are attended with at once


def layer_norm(x, eps):
  """Layer norm without weights, computed in float32; the result stays float32."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


def modulate(x, scale, shift, eps):
  """Layer norm of `x [B, N, Q, C, D]`, then scale and shift `[B, C, D]`."""
  scale, shift = (y[:, None, None].astype(jnp.float32) for y in (scale, shift))
  return (layer_norm(x, eps) * (1 + scale) + shift).astype(x.dtype)


def unit_heads(x):
  """Scales `[..., d]` to length 1, computed in float32."""
  x = x.astype(jnp.float32)
  # torch's normalize divides by at least 1e-12
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def rotate_halves(x, table):
  """Rotates `x [..., d]` by cosines and sines `[2, ..., d / 2]`; channel i and channel i + d / 2
  are a pair."""
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  cos, sin = table
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


class ScaleAttention(nnx.Module):
  """Self-attention over the scales so far; `qkv` is `[D, 3, D]`, and keys have no bias.

  With `cosine`, queries and keys have length 1 and each head has a learned scale, at most 100.
  Without it the scores are divided by 4 sqrt(d), and not by sqrt(d).
  """

  def __init__(self, width, heads, cosine, *, rngs):
    self.heads = heads
    self.qkv = nnx.LinearGeneral(width, (3, width), use_bias=False, rngs=rngs)
    self.q_bias, self.v_bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))
    self.log_scale = nnx.Param(jnp.full(heads, math.log(4.0))) if cosine else None
    self.out = nnx.Linear(width, width, rngs=rngs)

  def _split_heads(self, x):  # [..., D] -> [..., h, d]
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def _project(self, x, table):
    """`x [..., D]` -> q `[..., h, d]`, and k, v `[..., D]` as the cache holds them."""
    q, k, v = jnp.moveaxis(self.qkv(x), -2, 0)
    q, k, v = self._split_heads(q + self.q_bias[...]), self._split_heads(k), v + self.v_bias[...]
    if self.log_scale is None:
      q = q * (0.25 * q.shape[-1] ** -0.5)
    else:
      log_scale = self.log_scale[...].astype(jnp.float32)
      q = unit_heads(q) * jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE))[:, None]
      k = unit_heads(k)
    if table is not None:
      q, k = (rotate_halves(y, table) for y in (q, k))
    return q.astype(x.dtype), k.astype(x.dtype).reshape(v.shape), v

  def __call__(self, x, cache, layer, start, visible=None, table=None):
    """Reads whole scales.

    Args:
      x: `[B, N, Q, C, D]`, normed.
      cache: {'k', 'v': `[B, N, C, L, T, D]`}.
      layer: which one of the cache.
      start: the slot of the first of the Q tokens, a Python integer.
      visible: bool `[Q, start + Q]`; all of them by default.
      table: cosines and sines of the Q tokens, `[2, Q, 1, 1, d / 2]`.

    Returns:
      `[B, N, Q, C, D]` and the cache.
    """
    q, *new = self._project(x, table)
    seen = []
    for name, y in zip('kv', new):
      y = y.swapaxes(2, 3)  # [B, N, C, Q, D]
      before = jax.lax.dynamic_index_in_dim(cache[name], layer, 3, keepdims=False)
      # static slices: a scale never pays for the slots behind it
      seen.append(self._split_heads(jnp.concatenate([before[..., :start, :], y], -2)))
      # the last scale has no slots, since nothing reads it later
      kept = y[..., : cache[name].shape[4] - start, :]
      if kept.shape[-2]:
        kept = kept[:, :, :, None].astype(cache[name].dtype)
        place = (0, 0, 0, layer, start, 0)
        cache = cache | {name: jax.lax.dynamic_update_slice(cache[name], kept, place)}
    return self.out(attend_in_chunks(q, *seen, visible).reshape(x.shape)), cache


def attend_in_chunks(q, k, v, visible=None):
  """Attention of `q [B, N, Q, C, h, d]` to `k, v [B, N, C, S, h, d]`, where `visible [Q, S]`."""

  def attend(q, visible):
    scores = jnp.einsum('bnqchd,bncshd->bnchqs', q, k, preferred_element_type=jnp.float32)
    scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum('bnchqs,bncshd->bnqchd', weights, v)

  # the scores of a scale of 64 x 64 tokens to all before it would take gigabytes at once
  Q = q.shape[2]
  pieces = next(n for n in range(-(-Q // QUERIES), Q + 1) if Q % n == 0)
  if pieces == 1:
    return attend(q, visible)
  q = jnp.moveaxis(q.reshape(*q.shape[:2], pieces, -1, *q.shape[3:]), 2, 0)
  if visible is not None:
    visible = jnp.asarray(visible).reshape(pieces, -1, visible.shape[-1])
  y = jax.lax.map(lambda piece: attend(*piece), (q, visible))
  return jnp.moveaxis(y, 0, 2).reshape(*y.shape[1:3], Q, *y.shape[4:])


class GeluMLP(nnx.Module):
  """Two layers with a tanh-GELU between them."""

  def __init__(self, width, hidden, *, rngs):
    self.up = nnx.Linear(width, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, width, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.gelu(self.up(x), approximate=True))


def split_qkv(weight):
  """A fused torch weight of all layers, `[L, 3 * D, D]`, as our kernel `[L, D, 3, D]`."""
  L, rows, inner = weight.shape
  return weight.swapaxes(1, 2).reshape(L, inner, 3, rows // 3)
