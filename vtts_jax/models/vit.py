"""The pre-norm transformer that the verifiers' towers share: CLIP, SigLIP, DINO, BLIP, OWL-ViT.

`Trunk` is one block stacked over layers (`models.stacked`), with the options that tell those models
apart. What surrounds it (patches, positions, pooling, heads) belongs to each model. Attention is
`jax.nn.dot_product_attention` except on a CPU and, for long sequences, on a TPU. On a CPU it takes
1.2 to 2.5 times as long as products with heads leading, which run a B/16 tower at the machine's
matmul rate. On a TPU it writes all scores to memory: for the 4,429 tokens of SD3.5 that is 140
times the traffic of queries, keys, values and result; taken head by head it is 4 times
(`benchmarks/diffusion.py`).

Letters: R rows · T tokens · S keys · D width · h heads · d = D / h · L layers · P patch side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan_blocks, stack_blocks, transpose_kernel

SCORES = 2 << 20  # attention scores computed at a time on a CPU: 8 MB in float32
TPU_SCORES = 4 << 20  # and on a TPU, where so many stay in the memory on the chip
# Megatron's split of a block: columns of the first matrix and rows of the second lie on 'model', so
# that a branch needs one all-reduce
SHARDING = [
  (r'blocks/(attn/qkv|ffn/up)/kernel', PartitionSpec(None, None, 'model')),  # [L, D, ...]
  (r'blocks/(attn/qkv|ffn/up)/bias', PartitionSpec(None, 'model')),
  (r'blocks/(attn/out|ffn/down)/kernel', PartitionSpec(None, 'model', None)),  # [L, ..., D]
]
# CLIP's quick GELU is an approximation of its own: it must not be replaced by either GELU
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
    act: one of `ACTIVATIONS`, or 'swiglu', where the first layer is doubled to (a, b) and gives
      silu(a) b.
    eps: added to the variance in the norms.
    layer_scale: whether each branch is scaled per channel before it is added (DINOv2).

  Raises:
    ConfigError: heads do not divide the width, or an unknown activation.
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
  """Layer norm over the last axis, computed in float32."""

  def __init__(self, width, eps):
    self.eps = eps
    self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    # two passes: E[x^2] - E[x]^2 loses digits where the mean is large
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


def multi_head_attention(q, k, v, heads, bias=None):
  """Attention: softmax(q k / sqrt d + bias) v of `q [R, T, D]` and `k`, `v [R, S, D]`.

  Args:
    heads: h, into which D is split.
    bias: added to the scores; it broadcasts to `[R, h, T, S]`. -inf hides a key; every query must
      see at least one key.

  Returns:
    `[R, T, D]`. The softmax is in float32.
  """
  # a bfloat16 BLIP has float32 words beside bfloat16 pictures
  k, v = k.astype(q.dtype), v.astype(q.dtype)

  def attend_on_tpu(q, k, v, bias):
    if bias is None and q.shape[0] * heads * q.shape[1] * k.shape[1] > TPU_SCORES:
      return _attend_by_head(q, k, v, heads)
    return attend_on_accelerator(q, k, v, bias)

  def attend_on_accelerator(q, k, v, bias):
    q_heads, k_heads, v_heads = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    if bias is not None:
      bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    return jax.nn.dot_product_attention(q_heads, k_heads, v_heads, bias).reshape(q.shape)

  def attend_on_cpu(q, k, v, bias):
    return _attend_in_pieces(q, k, v, heads, bias)

  # the branch of the other platform is not compiled, so a TPU program holds no loop over rows
  return jax.lax.platform_dependent(
    q, k, v, bias, cpu=attend_on_cpu, tpu=attend_on_tpu, default=attend_on_accelerator
  )


def _attend_in_pieces(q, k, v, heads, bias):
  """Takes as many rows at a time as keep their scores in cache: 3 times as fast at 512 tokens."""
  (R, T, _), S = q.shape, k.shape[1]
  rows = max(n for n in range(1, R + 1) if R % n == 0 and (n == 1 or n * heads * T * S <= SCORES))
  if rows == R:
    return _attend_whole(q, k, v, heads, bias)

  def cut_rows(x):
    return x.reshape(R // rows, rows, *x.shape[1:])

  pieces = (cut_rows(q), cut_rows(k), cut_rows(v))
  # a bias of every row is cut with the rows, one bias for all rows is not
  if bias is not None and bias.ndim == 4 and len(bias) > 1:
    out = jax.lax.map(lambda x: _attend_whole(*x[:3], heads, x[3]), (*pieces, cut_rows(bias)))
  else:
    out = jax.lax.map(lambda x: _attend_whole(*x, heads, bias), pieces)
  return out.reshape(q.shape)


def _attend_whole(q, k, v, heads, bias):
  # heads lead, so that each product is a batch of plain matrices for the CPU's matmul
  q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
  # scores and softmax are float32 in bfloat16 models too
  scores = jnp.einsum('rhtd,rhsd->rhts', q, k, preferred_element_type=jnp.float32)
  scores = scores * q.shape[-1] ** -0.5
  if bias is not None:
    scores = scores + bias
  mixed = jnp.einsum('rhts,rhsd->rhtd', jax.nn.softmax(scores, -1).astype(v.dtype), v)
  return mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def _attend_by_head(q, k, v, heads):
  """One head of one row after the other, and its queries in pieces whose scores stay on the chip.

  Where a mesh splits the heads, each device takes its own heads one after the other: a loop over an
  axis that is split would gather it.
  """
  (R, T, _), S = q.shape, k.shape[1]
  split = jax.sharding.get_abstract_mesh().shape.get('model', 1)
  split = split if heads % split == 0 else 1
  # rows of 8 fill the registers of a TPU; the pieces are as equal as they can be
  pieces = -(-T * S // TPU_SCORES)
  rows = -(-T // (8 * pieces)) * 8
  pieces = -(-T // rows)

  def lead_heads(x):  # [R, N, D] -> [h / split * R, split, N, d]
    x = x.reshape(R, x.shape[1], split, heads // split, -1).transpose(3, 0, 2, 1, 4)
    return x.reshape(-1, *x.shape[2:])

  def attend_head(head):
    queries, keys, values = head

    def attend_piece(queries):  # [split, rows, d]
      scores = jnp.einsum('mtd,msd->mts', queries, keys, preferred_element_type=jnp.float32)
      weights = jax.nn.softmax(scores * queries.shape[-1] ** -0.5, -1).astype(values.dtype)
      return jnp.einsum('mts,msd->mtd', weights, values)

    return jax.lax.map(attend_piece, queries)

  queries = jnp.pad(q, ((0, 0), (0, rows * pieces - T), (0, 0)))
  queries = lead_heads(queries)
  queries = queries.reshape(*queries.shape[:2], pieces, rows, -1).swapaxes(1, 2)
  mixed = jax.lax.map(attend_head, (queries, lead_heads(k), lead_heads(v)))
  # [h / split * R, pieces, split, rows, d] -> [R, T, D]
  mixed = mixed.reshape(heads // split, R, pieces, split, rows, -1).transpose(1, 2, 4, 3, 0, 5)
  return mixed.reshape(R, pieces * rows, -1)[:, :T]


class Attention(nnx.Module):
  """Self-attention with one fused projection to queries, keys and values."""

  def __init__(self, width, heads, *, rngs):
    self.heads = heads
    self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
    self.out = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, x, bias=None):  # [R, T, D]
    return self.out(multi_head_attention(*jnp.split(self.qkv(x), 3, -1), self.heads, bias))


class FeedForward(nnx.Module):
  """Two linear layers, with an activation or a SwiGLU gate between them."""

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
  """One pre-norm layer: self-attention, then feed-forward, both residual."""

  def __init__(self, c: Config, *, rngs):
    self.norm_attn, self.norm_ffn = LayerNorm(c.width, c.eps), LayerNorm(c.width, c.eps)
    self.attn = Attention(c.width, c.heads, rngs=rngs)
    self.ffn = FeedForward(c.width, c.hidden, c.act, rngs=rngs)
    self.scale_attn = nnx.Param(jnp.ones(c.width)) if c.layer_scale else None
    self.scale_ffn = nnx.Param(jnp.ones(c.width)) if c.layer_scale else None

  def __call__(self, x, bias=None):  # [R, T, D]
    x = x + _scale_branch(self.attn(self.norm_attn(x), bias), self.scale_attn)
    return x + _scale_branch(self.ffn(self.norm_ffn(x)), self.scale_ffn)


def _scale_branch(x, scale):
  return x if scale is None else x * scale[...]


class Trunk(nnx.Module):
  """`__call__(x [R, T, D], bias)` -> `[R, T, D]`; the caller applies the norms around it."""

  def __init__(self, config: Config, *, rngs):
    self.config = config
    self.blocks = stack_blocks(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)

  def __call__(self, x, bias=None):
    return scan_blocks(self.blocks, lambda block, x, _: (block(x, bias), None), x)[0]

  def layer_states(self, x, bias=None):
    """Returns the output of every block, `[L, R, T, D]`."""

    def run_block(block, x, _):
      x = block(x, bias)
      return x, x

    return scan_blocks(self.blocks, run_block, x)[1]


def random_table(rngs, *shape):
  """Returns a parameter of small normal numbers, for class tokens and positions."""
  return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def split_patches(images, side):
  """Images `[R, H, W, 3]` -> patches `[R, (H / P) (W / P), P P 3]`, row by row.

  Pixels that do not fill a patch at the right or the bottom are cut off.
  """
  # a reshape and one transpose: the matmul after it is the convolution of stride P
  r, h, w, c = images.shape
  rows, columns = h // side, w // side
  x = images[:, : rows * side, : columns * side].reshape(r, rows, side, columns, side, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(r, rows * columns, side * side * c)


def patch_kernel(array):
  """torch convolution `[D, 3, P, P]` -> kernel `[P P 3, D]` for the rows of `split_patches`."""
  return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


def causal_bias(tokens):
  """Bias `[T, T]` that lets a token see itself and the tokens before it."""
  return jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), 0.0, -jnp.inf)


def trunk_rules(lead: str, target: str, names: dict[str, str]) -> list:
  """Returns the key rules of a trunk, for a source that went through `stack_layers`.

  Where the checkpoint keeps q, k and v apart, the source must go through `fuse_projections` too.

  Args:
    lead: regular expression before a block's own names, e.g. r'vision\\.encoder\\.layers\\.\\*\\.'.
    target: path of the `Trunk` with its dot, e.g. 'vision.trunk.'.
    names: this checkpoint's name of norm_attn, norm_ffn, qkv, out, up, down and, with layer scale,
      the full name of scale_attn and scale_ffn.
  """
  table, found = [], f'{target}blocks.'
  where = {'qkv': 'attn.qkv', 'out': 'attn.out', 'up': 'ffn.up', 'down': 'ffn.down'}
  for ours, theirs in names.items():
    # a name may be a regular expression with alternatives, but its dots are dots
    theirs = theirs.replace('.', r'\.')
    if ours.startswith('norm'):
      table.append((rf'{lead}{theirs}\.(weight|bias)', rf'{found}{ours}.\1', ''))
    elif ours.startswith('scale'):
      table.append((lead + theirs, found + ours, ''))
    else:
      table.append((rf'{lead}{theirs}\.weight', f'{found}{where[ours]}.kernel', transpose_kernel))
      table.append((rf'{lead}{theirs}\.bias', f'{found}{where[ours]}.bias', ''))
  return table


def count_flops(c: Config, tokens: int) -> int:
  """Matmul FLOPs of the trunk for one row of `tokens` tokens."""
  # SwiGLU has three matrices; norms, softmax and activations are not counted
  ffn = 2 * c.width * c.hidden * (3 if c.act == 'swiglu' else 2)
  return c.layers * tokens * (8 * c.width**2 + 4 * tokens * c.width + ffn)
