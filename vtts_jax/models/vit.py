"""The pre-norm transformer that the verifiers' towers share: CLIP, SigLIP, DINO, BLIP, OWL-ViT.

One block, stacked over layers (`stacked`), with the options that tell those models apart; what is
around it (patches, positions, pooling, heads) is theirs. Attention is `jax.nn`'s, but on a CPU,
where that takes 1.2 to 2.5 times as long as products of `[R h, T, d]` with heads leading: with
those a B/16 tower runs at the machine's matmul rate.

Letters: R rows · T tokens · D width · h heads · d = D / h · L layers · P patch side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan, stack, transposed

SCORES = 2 << 20  # scores of attention at a time on a CPU
SHARDING = [  # of a `Trunk`: heads and hidden channels over 'model', as Megatron splits a block
  (r'blocks/(attn/qkv|ffn/up)/kernel', PartitionSpec(None, None, 'model')),  # [L, D, ...]
  (r'blocks/(attn/qkv|ffn/up)/bias', PartitionSpec(None, 'model')),
  (r'blocks/(attn/out|ffn/down)/kernel', PartitionSpec(None, 'model', None)),  # [L, ..., D]
]
ACTIVATIONS = {
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options of a trunk.

  Attributes:
    hidden: inner width of the feed-forward layer.
    act: one of `ACTIVATIONS`, or 'swiglu': silu(a) b of a doubled first layer.
    layer_scale: whether the branches are scaled per channel before they are added (DINOv2).
  """

  width: int
  layers: int
  heads: int
  hidden: int
  act: str = 'gelu'
  eps: float = 1e-5
  layer_scale: bool = False

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')
    if self.act not in (*ACTIVATIONS, 'swiglu'):
      allowed = ', '.join((*ACTIVATIONS, 'swiglu'))
      raise ConfigError(f'act={self.act!r}: must be one of {allowed}')


class LayerNorm(nnx.Module):
  """Over the last axis, computed in float32."""

  def __init__(self, width, eps):
    self.eps = eps
    self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


def attend(q, k, v, heads, bias=None):
  """softmax(q k / sqrt d + bias) v of `q [R, T, D]` and `k`, `v [R, S, D]`.

  `bias` is added to the scores and broadcasts to `[R, h, T, S]`; -inf hides a key (never all keys
  of a query). The softmax is in float32.
  """
  # the words of a bfloat16 BLIP are float32 where its pictures are not
  k, v = k.astype(q.dtype), v.astype(q.dtype)

  def on_accelerator(q, k, v, bias):
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    if bias is not None:
      bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    return jax.nn.dot_product_attention(split(q), split(k), split(v), bias).reshape(q.shape)

  # the branch for another platform is not compiled
  on_cpu = lambda q, k, v, bias: _attend_in_pieces(q, k, v, heads, bias)
  return jax.lax.platform_dependent(q, k, v, bias, cpu=on_cpu, default=on_accelerator)


def _attend_in_pieces(q, k, v, heads, bias):
  """So many rows at a time that their scores stay near the cores: 3 times as fast at 512 tokens."""
  (R, T, _), S = q.shape, k.shape[1]
  rows = max(n for n in range(1, R + 1) if R % n == 0 and (n == 1 or n * heads * T * S <= SCORES))
  if rows == R:
    return _attend_whole(q, k, v, heads, bias)
  cut = lambda x: x.reshape(R // rows, rows, *x.shape[1:])
  each = (cut(q), cut(k), cut(v))
  if bias is not None and bias.ndim == 4 and len(bias) > 1:
    out = jax.lax.map(lambda x: _attend_whole(*x[:3], heads, x[3]), (*each, cut(bias)))
  else:
    out = jax.lax.map(lambda x: _attend_whole(*x, heads, bias), each)
  return out.reshape(q.shape)


def _attend_whole(q, k, v, heads, bias):
  split = lambda x: x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
  q, k, v = split(q), split(k), split(v)
  scores = jnp.einsum('rhtd,rhsd->rhts', q, k, preferred_element_type=jnp.float32)
  scores = scores * q.shape[-1] ** -0.5
  if bias is not None:
    scores = scores + bias
  mixed = jnp.einsum('rhts,rhsd->rhtd', jax.nn.softmax(scores, -1).astype(v.dtype), v)
  return mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


class Attention(nnx.Module):
  def __init__(self, width, heads, *, rngs):
    self.heads = heads
    self.qkv, self.out = (
      nnx.Linear(width, 3 * width, rngs=rngs),
      nnx.Linear(width, width, rngs=rngs),
    )

  def __call__(self, x, bias=None):  # [R, T, D]
    return self.out(attend(*jnp.split(self.qkv(x), 3, -1), self.heads, bias))


class FeedForward(nnx.Module):
  def __init__(self, width, hidden, act, *, rngs):
    self.act = act
    self.up = nnx.Linear(width, hidden * (2 if act == 'swiglu' else 1), rngs=rngs)
    self.down = nnx.Linear(hidden, width, rngs=rngs)

  def __call__(self, x):  # [..., D]
    x = self.up(x)
    if self.act == 'swiglu':
      a, b = jnp.split(x, 2, -1)
      return self.down(jax.nn.silu(a) * b)
    return self.down(ACTIVATIONS[self.act](x))


class Block(nnx.Module):
  def __init__(self, c: Config, *, rngs):
    self.norm_attn, self.norm_ffn = LayerNorm(c.width, c.eps), LayerNorm(c.width, c.eps)
    self.attn = Attention(c.width, c.heads, rngs=rngs)
    self.ffn = FeedForward(c.width, c.hidden, c.act, rngs=rngs)
    self.scale_attn = nnx.Param(jnp.ones(c.width)) if c.layer_scale else None
    self.scale_ffn = nnx.Param(jnp.ones(c.width)) if c.layer_scale else None

  def __call__(self, x, bias=None):  # [R, T, D]
    scaled = lambda y, scale: y if scale is None else y * scale[...]
    x = x + scaled(self.attn(self.norm_attn(x), bias), self.scale_attn)
    return x + scaled(self.ffn(self.norm_ffn(x)), self.scale_ffn)


class Trunk(nnx.Module):
  """`__call__(x [R, T, D], bias)` -> `[R, T, D]`; norms around it are the caller's."""

  def __init__(self, config: Config, *, rngs):
    self.config = config
    self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)

  def __call__(self, x, bias=None):
    return scan(self.blocks, lambda block, x, _: (block(x, bias), None), x)[0]

  def states(self, x, bias=None):
    """What comes out of every block, `[L, R, T, D]`."""

    def body(block, x, _):
      x = block(x, bias)
      return x, x

    return scan(self.blocks, body, x)[1]


def patches(images, side):
  """Images `[R, H, W, 3]` -> `[R, (H / P) (W / P), P P 3]`, row by row; a rest is cut off."""
  r, h, w, c = images.shape
  rows, columns = h // side, w // side
  x = images[:, : rows * side, : columns * side].reshape(r, rows, side, columns, side, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(r, rows * columns, side * side * c)


def patch_kernel(array):
  """torch convolution `[D, 3, P, P]` -> the kernel `[P P 3, D]` of a linear layer on `patches`."""
  return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


def causal(tokens):
  """Bias `[T, T]` by which a token sees itself and those before it."""
  return jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), 0.0, -jnp.inf)


def rules(lead: str, target: str, names: dict[str, str]) -> list:
  """The key table of a trunk, its source `stacked` and, where q, k and v are apart, `fused`.

  Args:
    lead: regular expression before a block's own names, e.g. r'vision\\.encoder\\.layers\\.\\*\\.'.
    target: path of the `Trunk` with its dot, e.g. 'vision.trunk.'.
    names: this checkpoint's name of each of norm_attn, norm_ffn, qkv, out, up, down and, with layer
      scale, scale_attn and scale_ffn (the whole name of those).
  """
  table, found = [], f'{target}blocks.'
  where = {'qkv': 'attn.qkv', 'out': 'attn.out', 'up': 'ffn.up', 'down': 'ffn.down'}
  for ours, theirs in names.items():
    theirs = theirs.replace('.', r'\.')
    if ours.startswith('norm'):
      table.append((rf'{lead}{theirs}\.(weight|bias)', rf'{found}{ours}.\1', ''))
    elif ours.startswith('scale'):
      table.append((lead + theirs, found + ours, ''))
    else:
      table.append((rf'{lead}{theirs}\.weight', f'{found}{where[ours]}.kernel', transposed))
      table.append((rf'{lead}{theirs}\.bias', f'{found}{where[ours]}.bias', ''))
  return table


def flops(c: Config, tokens: int) -> int:
  """Matmul FLOPs of the trunk for one row of so many tokens."""
  ffn = 2 * c.width * c.hidden * (3 if c.act == 'swiglu' else 2)
  return c.layers * tokens * (8 * c.width**2 + 4 * tokens * c.width + ffn)
