"""What score will a candidate have when it is finished? A small prior with a head for that.

The trunk is `Prior` over the tokens drawn so far, with one position more: at position s it has seen
s tokens. The score that it predicts is linear in the picture's embedding (a dual encoder's scaled
cosine plus a bias), so the head predicts the *mean embedding of the completions* and the score is
its product with the caption's embedding: successor features (Barreto et al. 2017, arXiv
1606.05312). The captions' encoder is the verifier's own, a frozen copy.
Checked against `scenes/train/value.py`: teacher forcing and the read-out at one stage are equal.

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
  """Sizes of the trunk, whose `tokens` are T + 1 here, and of the caption's encoder.

  Attributes:
    dim: E. of_words, of_hidden: `words` and `hidden` of the verifier's `clip.Config`.
  """

  tokens: int = 33
  width: int = 64
  layers: int = 2
  expand: int = 1
  dim: int = 128
  of_words: int = 32
  of_hidden: int = 64

  @property
  def verifier(self):
    return clip.Config(dim=self.dim, words=self.of_words, hidden=self.of_hidden)


class Value(prior.Prior):
  """`value(context(text_ids), tokens, stage)`; `embeddings` and `scores` are for training."""

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.head = nnx.Linear(config.width, config.dim, rngs=rngs)
    self.captions = clip.Words(config.verifier, rngs=rngs)
    self.scale, self.bias = nnx.Param(jnp.zeros(())), nnx.Param(jnp.zeros(()))

  def context(self, text_ids):
    """Of prompts `[B, Tt]`, once: {'text': as of `Prior.text`, 'caption': `[B, E]`}."""
    x = self.captions(text_ids)
    unit = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-8)
    return {'text': self.text(text_ids), 'caption': jnp.exp(self.scale[...]) * unit}

  def scores(self, context, embeddings):
    """Embeddings `[B, N, ..., E]` -> the score that pictures of that mean have, `[B, N, ...]`."""
    return jnp.einsum('bn...e,be->bn...', embeddings, context['caption']) + self.bias[...]

  def embeddings(self, context, tokens):
    """Tokens `[B, N, T]` -> mean embedding predicted after 0 .. T of them, `[B, N, T + 1, E]`."""
    return self.forced(context['text'], self._wide(tokens))

  def value(self, context, tokens, stage):
    """Tokens `[B, N, T]` (later than `stage` they do not matter), stage a scalar or `[B, N]`, 0 to
    T -> predicted scores `[B, N]`, float32."""
    wide, stage = self._wide(tokens), jnp.broadcast_to(stage, tokens.shape[:2])
    cache = self.prefill(context['text'], wide, stage)
    last = jnp.take_along_axis(wide, jnp.maximum(stage - 1, 0)[..., None], 2)[..., 0]
    last = jnp.where(stage == 0, self.config.codes, last)
    return self.scores(context, self.step(context['text'], cache, last, stage)[0])

  def _wide(self, tokens):
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, self.config.tokens - tokens.shape[-1])))


def build(config, seed=0):
  """A `Value` with random parameters."""
  return Value(config, rngs=nnx.Rngs(seed))


def flops_context(config):
  """Floating-point operations of `context` per prompt; a multiply-add is 2."""
  return prior.flops_text(config) + clip.flops(config.verifier, 'text')


def flops_value(config):
  """Of `value` per candidate: the caches of all positions in parallel, then one position to the
  end."""
  c = config
  head = 2 * c.width * (c.dim - c.codes) + 2 * c.dim
  return prior.flops_prefill(c) + prior.flops_step(c) + head
