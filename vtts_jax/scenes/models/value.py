"""A value head: predicts the score that a candidate will have when it is finished.

The trunk is `Prior` over the tokens drawn so far, with one position more: at position s it has seen
s tokens. The predicted score is linear in the picture's embedding (a dual encoder's scaled cosine
plus a bias). So the head predicts the *mean embedding of the completions*, and its product with the
caption's embedding is their mean score: successor features (Barreto et al. 2017, arXiv 1606.05312).
The captions' encoder is a frozen copy of the verifier's. tests/test_value.py checks that the value
read at one stage equals teacher forcing at all stages.

Letters: B prompts · N candidates · T tokens · Tt words · D width · E = `dim` of the embedding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.scenes.models import clip, prior

SHARDING = prior.SHARDING


@dataclasses.dataclass(frozen=True)
class Config(prior.Config):
  """Sizes of the trunk, where `tokens` is T + 1, and of the captions' encoder.

  Attributes:
    dim: E.
    of_words, of_hidden: `words` and `hidden` of the verifier's `clip.Config`.
  """

  tokens: int = 33
  width: int = 64
  layers: int = 2
  expand: int = 1
  dim: int = 128
  of_words: int = 32
  of_hidden: int = 64

  @property
  def verifier_config(self):
    """The config of the verifier whose captions' encoder is copied."""
    return clip.Config(dim=self.dim, words=self.of_words, hidden=self.of_hidden)


class Value(prior.Prior):
  """`predict_value(encode_context(text_ids), tokens, stage)`; training uses
  `completion_embeddings` and `embedding_scores`."""

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.head = nnx.Linear(config.width, config.dim, rngs=rngs)
    self.captions = clip.Words(config.verifier_config, rngs=rngs)
    self.scale, self.bias = nnx.Param(jnp.zeros(())), nnx.Param(jnp.zeros(()))

  def encode_context(self, text_ids):
    """The context of prompts `[B, Tt]`: {'text': of `Prior.encode_text`, 'caption': `[B, E]`}."""
    x = self.captions(text_ids)
    unit = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-8)
    # the verifier's scale is folded into the caption
    return {'text': self.encode_text(text_ids), 'caption': jnp.exp(self.scale[...]) * unit}

  def embedding_scores(self, context, embeddings):
    """Mean embeddings `[B, N, ..., E]` to the mean score of their pictures `[B, N, ...]`."""
    return jnp.einsum('bn...e,be->bn...', embeddings, context['caption']) + self.bias[...]

  def completion_embeddings(self, context, tokens):
    """Tokens `[B, N, T]` to the mean embeddings predicted after 0 .. T of them,
    `[B, N, T + 1, E]`."""
    return self.forced_logits(context['text'], self._pad_tokens(tokens))

  def predict_value(self, context, tokens, stage):
    """Predicted scores `[B, N]` float32 of the first `stage` (a scalar or `[B, N]`, 0 to T) of
    tokens `[B, N, T]`."""
    wide, stage = self._pad_tokens(tokens), jnp.broadcast_to(stage, tokens.shape[:2])
    # all positions before `stage` in parallel, then the one whose output is read
    cache = self.prefill(context['text'], wide, stage)
    last = jnp.take_along_axis(wide, jnp.maximum(stage - 1, 0)[..., None], 2)[..., 0]
    # before the first token the trunk reads the begin id
    last = jnp.where(stage == 0, self.config.codes, last)
    return self.embedding_scores(context, self.feed_tokens(context['text'], cache, last, stage)[0])

  def _pad_tokens(self, tokens):
    """Tokens `[B, N, T]` with the trunk's extra position, which is never read."""
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, self.config.tokens - tokens.shape[-1])))


def build_model(config, seed=0):
  """A `Value` with random parameters."""
  return Value(config, rngs=nnx.Rngs(seed))


def count_context_flops(config):
  """FLOPs of `encode_context` per prompt; a multiply-add is 2."""
  return prior.count_text_flops(config) + clip.count_flops(config.verifier_config, 'text')


def count_value_flops(config):
  """FLOPs of `predict_value` per candidate: all caches in parallel, then one full position."""
  c = config
  head = 2 * c.width * (c.dim - c.codes) + 2 * c.dim
  return prior.count_prefill_flops(c) + prior.count_step_flops(c) + head
