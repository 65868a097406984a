"""T5 decoder (Raffel et al. 2020, arXiv 1910.10683; v1.1 and FLAN: Chung et al. 2022, 2210.11416).

The decoder says how likely given tokens are after what the encoder read. It takes all of them in
one pass, without sampling and without a cache. Keys and values of the encoder's states are never
made: with few tokens it is far less work to project the queries to the states' space (A H vectors)
than the states to the queries' (W H vectors). The head is apart from the embeddings and the outputs
are unscaled, as in v1.1 and FLAN; v1.0 ties and scales them. Checked against
`transformers.T5ForConditionalGeneration` (tests/parity).

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
from vtts_jax.models.stacked import scan_blocks, stack_blocks, stack_layers, transpose_kernel
from vtts_jax.models.t5.modeling import (
  Attention,
  Config,
  FeedForward,
  RMSNorm,
  linear_layer,
  relative_buckets,
)

START = 0  # the token before the first one; T5 pads with it too
_BLOCK = r'decoder\.block\.\*\.layer\.'
# for a source that went through `arrange_layers`
RULES = [
  (_BLOCK + r'0\.SelfAttention\.(q|k|v|o)\.weight',
   r'blocks.attention.\1.kernel', transpose_kernel),
  (_BLOCK + r'0\.layer_norm\.weight', 'blocks.attention_norm.scale', ''),
  (_BLOCK + r'1\.EncDecAttention\.(q|k|v|o)\.weight', r'blocks.cross.\1.kernel', transpose_kernel),
  (_BLOCK + r'1\.layer_norm\.weight', 'blocks.cross_norm.scale', ''),
  (_BLOCK + r'2\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight',
   r'blocks.feed.\1.kernel', transpose_kernel),
  (_BLOCK + r'2\.layer_norm\.weight', 'blocks.feed_norm.scale', ''),
  (r'decoder\.position\.weight', 'position.embedding', ''),
  (r'decoder\.final_layer_norm\.weight', 'norm.scale', ''),
  (r'lm_head\.weight', 'head.kernel', 'T'),
]  # fmt: skip
# the blocks are stacked: [L, D, ...]
SHARDING = [
  (r'blocks/(attention/[qkv]|cross/[qkv]|feed/wi(_[01])?)/kernel',
   PartitionSpec(None, None, 'model')),
  (r'blocks/(attention/o|cross/o|feed/wo)/kernel', PartitionSpec(None, 'model', None)),
]  # fmt: skip


class CrossAttention(Attention):
  """Attention to the encoder's states, with their projections moved to the side of the tokens."""

  def __call__(self, x, states, mask=None):  # [R, A, D], [R, W, D], [R, W] -> [R, A, D]
    r, a, d = x.shape
    q = self.q(x).reshape(r, a, self.heads, -1)
    k, v = (f.kernel[...].reshape(d, self.heads, -1) for f in (self.k, self.v))
    # q (states Wk)^T = (q Wk^T) states^T: the states stay as they are
    turned = jnp.einsum('rahk,dhk->rahd', q, k).reshape(r, -1, d)
    # the axis q counts tokens and heads, A H
    scores = jnp.einsum('rqd,rwd->rqw', turned, states, preferred_element_type=jnp.float32)
    if mask is not None:
      scores = jnp.where(mask[:, None].astype(bool), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(states.dtype)
    # the states are mixed first, and only the A H mixtures are projected to values
    mixed = jnp.einsum('rqw,rwd->rqd', weights, states).reshape(r, a, self.heads, d)
    return self.o(jnp.einsum('rahd,dhk->rahk', mixed, v).reshape(r, a, -1))


class Block(nnx.Module):
  """One pre-norm layer: self-attention, cross-attention, feed-forward, all residual."""

  def __init__(self, c, *, rngs):
    self.attention_norm, self.cross_norm, self.feed_norm = (
      RMSNorm(c.d_model, c.layer_norm_epsilon) for _ in range(3)
    )
    self.attention = Attention(c, rngs=rngs)
    self.cross = CrossAttention(c, rngs=rngs)
    self.feed = FeedForward(c, rngs=rngs)

  def __call__(self, x, bias, states, mask=None):  # [R, A, D], [1, H, A, A], [R, W, D], [R, W]
    x = x + self.attention(self.attention_norm(x), bias)
    x = x + self.cross(self.cross_norm(x), states, mask)
    return x + self.feed(self.feed_norm(x))


class T5Decoder(nnx.Module):
  """`__call__(x [R, A, D], states [R, W, D], mask [R, W] or None) -> logits [R, A, V]`, float32.

  `x` holds the encoder's embeddings of the tokens after `shift_right`. `mask` is true where a state
  is that of a real token.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.position = nnx.Embed(c.relative_attention_num_buckets, c.num_heads, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.num_layers, rngs)
    self.norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
    self.head = linear_layer(c.d_model, c.vocab_size, rngs)

  def __call__(self, x, states, mask=None):
    return self.token_logits(self.layer_states(x, states, mask)[-1])

  def layer_states(self, x, states, mask=None):
    """Returns the output of every block, `[L, R, A, D]`."""
    bias = self.position_bias(x.shape[1])

    def run_block(block, x, _):
      x = block(x, bias, states, mask)
      return x, x

    return scan_blocks(self.blocks, run_block, x)[1]

  def token_logits(self, x):
    """States `[R, A, D]` -> logits `[R, A, V]` float32."""
    return self.head(self.norm(x)).astype(jnp.float32)

  def position_bias(self, tokens):
    """Returns the bias of the scores, `[1, H, A, A]`: the lowest float hides later tokens."""
    c = self.config
    # a decoder has all its buckets in one direction: half of twice as many
    count = 2 * c.relative_attention_num_buckets
    index = relative_buckets(tokens, count, c.relative_attention_max_distance)
    bias = self.position.embedding[...].astype(jnp.float32)[np.tril(index)].transpose(2, 0, 1)
    return jnp.where(np.tri(tokens, dtype=bool), bias, jnp.finfo(jnp.float32).min)[None]


def shift_right(answer):
  """Tokens `[..., A]` as the decoder reads them: the start token, then all but the last."""
  return jnp.concatenate([jnp.full_like(answer[..., :1], START), answer[..., :-1]], -1)


def arrange_layers(source):
  """Returns the source that `RULES` need: the decoder's layers are stacked to `[L, ...]`."""
  first = 'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  # only the first layer has this table, and `stack_layers` would miss it in the others
  place = {'decoder.position.weight': first}
  header = {n: v for n, v in source.header.items() if n != first}
  header |= {new: source.header[old] for new, old in place.items() if old in source}

  def read_renamed(name):
    return source.read_tensor(place.get(name, name))

  renamed = dataclasses.replace(source, header=header, read=read_renamed)
  return stack_layers(renamed, r'decoder\.block')


def config_of(source, encoder: Config) -> Config:
  """Reads the decoder's config, which differs from its encoder's in depth and vocabulary.

  Raises:
    ValueError: there is no decoder with a head of its own.
    ConfigError: the checkpoint's `config.json` says that its head is that of T5 v1.0.
  """
  options = source.config
  # transformers 5 always writes tie_word_embeddings=True, so the newer option decides where it is
  name = 'scale_decoder_outputs' if 'scale_decoder_outputs' in options else 'tie_word_embeddings'
  if options.get(name):
    raise ConfigError(f'{source.where}: {name}=True is T5 v1.0; allowed: False (v1.1, FLAN)')
  lead = 'decoder.block.'
  numbers = [int(n[len(lead) :].split('.')[0]) for n in source.tensor_names() if n.startswith(lead)]
  if not numbers or 'lm_head.weight' not in source:
    raise ValueError(f'{source.where} has no T5 decoder: no {lead}*, or no lm_head.weight')
  vocab = source.shape_of('lm_head.weight')[0]
  return dataclasses.replace(encoder, num_layers=1 + max(numbers), vocab_size=vocab)


def build_model(config: Config, seed=0) -> T5Decoder:
  """Builds a random decoder; inside `modules.abstract_module` it uses no memory."""
  return T5Decoder(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, tokens: int, states: int) -> int:
  """Matmul FLOPs for one answer of `tokens` tokens over `states` states."""
  # in cross-attention the projections of the states are moved to the queries
  inner, gated = c.num_heads * c.d_kv, 3 if c.feed_forward_proj == 'gated-gelu' else 2
  own = 8 * c.d_model * inner + 4 * tokens * inner
  cross = 8 * c.d_model * inner + 4 * c.num_heads * states * c.d_model
  layer = own + cross + 2 * gated * c.d_model * c.d_ff
  return tokens * (c.num_layers * layer + 2 * c.d_model * c.vocab_size)
