"""T5 decoder (Raffel et al. 2020, arXiv 1910.10683; v1.1 and FLAN: Chung et al. 2022, 2210.11416).

How likely given tokens are after what the encoder read: all of them in one pass, no sampling and no
cache. Keys and values of the encoder's states are never made: with few tokens it is far less work
to turn the queries to the states (A H vectors) than the states to the queries (W H). Head apart
from the embeddings and outputs unscaled, as in v1.1 and FLAN; v1.0 ties and scales them. Checked
against `transformers.T5ForConditionalGeneration` (tests/parity).

Letters: R texts · A tokens of an answer · W states of the encoder · L blocks · H heads · K width of
a head · D width · V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from vtts_jax.errors import ConfigError
from vtts_jax.models.stacked import scan, stack, stacked, transposed
from vtts_jax.models.t5.modeling import Attention, Config, FeedForward, RMSNorm, buckets, linear

START = 0  # the token before the first, which also pads
_BLOCK = r'decoder\.block\.\*\.layer\.'
RULES = [  # of a source made by `layered`
  (_BLOCK + r'0\.SelfAttention\.(q|k|v|o)\.weight', r'blocks.attention.\1.kernel', transposed),
  (_BLOCK + r'0\.layer_norm\.weight', 'blocks.attention_norm.scale', ''),
  (_BLOCK + r'1\.EncDecAttention\.(q|k|v|o)\.weight', r'blocks.cross.\1.kernel', transposed),
  (_BLOCK + r'1\.layer_norm\.weight', 'blocks.cross_norm.scale', ''),
  (_BLOCK + r'2\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight', r'blocks.feed.\1.kernel', transposed),
  (_BLOCK + r'2\.layer_norm\.weight', 'blocks.feed_norm.scale', ''),
  (r'decoder\.position\.weight', 'position.embedding', ''),
  (r'decoder\.final_layer_norm\.weight', 'norm.scale', ''),
  (r'lm_head\.weight', 'head.kernel', 'T'),
]  # fmt: skip
SHARDING = [  # of the stacked blocks [L, D, ...]
  (r'blocks/(attention/[qkv]|cross/[qkv]|feed/wi(_[01])?)/kernel',
   PartitionSpec(None, None, 'model')),
  (r'blocks/(attention/o|cross/o|feed/wo)/kernel', PartitionSpec(None, 'model', None)),
]  # fmt: skip


class CrossAttention(Attention):
  """`Attention` to other states; its projections of them are moved to the side of the tokens."""

  def __call__(self, x, states, mask=None):  # [R, A, D], [R, W, D], [R, W] -> [R, A, D]
    r, a, d = x.shape
    q = self.q(x).reshape(r, a, self.heads, -1)
    k, v = (f.kernel[...].reshape(d, self.heads, -1) for f in (self.k, self.v))
    turned = jnp.einsum('rahk,dhk->rahd', q, k).reshape(r, -1, d)
    kind = {'preferred_element_type': jnp.float32}
    scores = jnp.einsum('rqd,rwd->rqw', turned, states, **kind)  # q counts A H
    if mask is not None:
      scores = jnp.where(mask[:, None].astype(bool), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(states.dtype)
    mixed = jnp.einsum('rqw,rwd->rqd', weights, states).reshape(r, a, self.heads, d)
    return self.o(jnp.einsum('rahd,dhk->rahk', mixed, v).reshape(r, a, -1))


class Block(nnx.Module):
  def __init__(self, c, *, rngs):
    norm = lambda: RMSNorm(c.d_model, c.layer_norm_epsilon)
    self.attention_norm, self.cross_norm, self.feed_norm = norm(), norm(), norm()
    self.attention = Attention(c, rngs=rngs)
    self.cross = CrossAttention(c, rngs=rngs)
    self.feed = FeedForward(c, rngs=rngs)

  def __call__(self, x, bias, states, mask=None):  # [R, A, D], [1, H, A, A], [R, W, D], [R, W]
    x = x + self.attention(self.attention_norm(x), bias)
    x = x + self.cross(self.cross_norm(x), states, mask)
    return x + self.feed(self.feed_norm(x))


class T5Decoder(nnx.Module):
  """`__call__(x [R, A, D], states [R, W, D], mask [R, W] or None) -> logits [R, A, V]`, float32.

  `x` are the embeddings (the encoder's own) of `shifted` tokens; `mask` is true where a state is
  that of a real token.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.position = nnx.Embed(c.relative_attention_num_buckets, c.num_heads, rngs=rngs)
    self.blocks = stack(lambda rngs: Block(c, rngs=rngs), c.num_layers, rngs)
    self.norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
    self.head = linear(c.d_model, c.vocab_size, rngs)

  def __call__(self, x, states, mask=None):
    return self.logits(self.states(x, states, mask)[-1])

  def states(self, x, states, mask=None):
    """What comes out of every block, `[L, R, A, D]`."""
    bias = self.bias(x.shape[1])

    def body(block, x, _):
      x = block(x, bias, states, mask)
      return x, x

    return scan(self.blocks, body, x)[1]

  def logits(self, x):
    """`[R, A, D] -> [R, A, V]`."""
    return self.head(self.norm(x)).astype(jnp.float32)

  def bias(self, tokens):
    """What is added to a token's scores of those up to it, `[1, H, A, A]`; of later ones the lowest
    float."""
    c = self.config  # one direction has all the buckets
    index = buckets(tokens, 2 * c.relative_attention_num_buckets, c.relative_attention_max_distance)
    bias = self.position.embedding[...].astype(jnp.float32)[np.tril(index)].transpose(2, 0, 1)
    return jnp.where(np.tri(tokens, dtype=bool), bias, jnp.finfo(jnp.float32).min)[None]


def shifted(answer):
  """Tokens `[..., A]` as the decoder reads them: the start, and all but the last."""
  return jnp.concatenate([jnp.full_like(answer[..., :1], START), answer[..., :-1]], -1)


def layered(source):
  """The source in which the decoder's layers are one tensor `[L, ...]` each, as `RULES` need it."""
  first = 'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  # of all layers the first alone has it; `stacked` would miss the others
  place = {'decoder.position.weight': first}
  header = {n: v for n, v in source.header.items() if n != first}
  header |= {new: source.header[old] for new, old in place.items() if old in source}
  read = lambda name: source.get(place.get(name, name))
  return stacked(dataclasses.replace(source, header=header, read=read), r'decoder\.block')


def config_of(source, encoder: Config) -> Config:
  """The decoder's config beside that of its encoder: its depth is its own.

  Raises:
    ValueError: there is no decoder with a head of its own.
    ConfigError: the checkpoint's `config.json` says that its head is that of T5 v1.0.
  """
  options = source.config  # transformers 5 writes tie_word_embeddings=True always
  name = 'scale_decoder_outputs' if 'scale_decoder_outputs' in options else 'tie_word_embeddings'
  if options.get(name):
    raise ConfigError(f'{source.where}: {name}=True is T5 v1.0; allowed: False (v1.1, FLAN)')
  lead = 'decoder.block.'
  numbers = [int(n[len(lead) :].split('.')[0]) for n in source.names() if n.startswith(lead)]
  if not numbers or 'lm_head.weight' not in source:
    raise ValueError(f'{source.where} has no T5 decoder: no {lead}*, or no lm_head.weight')
  vocab = source.shape('lm_head.weight')[0]
  return dataclasses.replace(encoder, num_layers=1 + max(numbers), vocab_size=vocab)


def build(config: Config, seed=0) -> T5Decoder:
  """A random decoder; under `modules.abstract_module` no memory is used."""
  return T5Decoder(config, rngs=nnx.Rngs(seed))


def flops(c: Config, tokens: int, states: int) -> int:
  """Matmul FLOPs for one answer of so many tokens over so many states."""
  inner, gated = c.num_heads * c.d_kv, 3 if c.feed_forward_proj == 'gated-gelu' else 2
  own = 8 * c.d_model * inner + 4 * tokens * inner
  cross = 8 * c.d_model * inner + 4 * c.num_heads * states * c.d_model
  layer = own + cross + 2 * gated * c.d_model * c.d_ff
  return tokens * (c.num_layers * layer + 2 * c.d_model * c.vocab_size)
