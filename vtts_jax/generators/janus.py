"""Janus and Janus-Pro: pictures from a text, by a language model, token by token, row by row.

Wu et al. 2024 (arXiv 2410.13848), Chen et al. 2025 (2501.17811): `models.janus`. The base of most
published searches over picture tokens (SoTo 2604.15453, GridAR 2511.21185). Golden files and
transformers' class hold the model to its references.

Letters: B prompts · N candidates · C streams · W words · R rows.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token.grid import GridGenerator
from vtts_jax.models.janus import modeling as janus
from vtts_jax.models.llamagen_vq import modeling as llamagen_vq
from vtts_jax.models.pretrained import Pretrained

# how a prompt is put to each model; the last word begins the picture
TEMPLATES = {
  'pro': '<|User|>: {}\n\n<|Assistant|>:<begin_of_image>',
  'first': 'User: {}\n\nAssistant:<begin_of_image>',
}
PAD = 100002  # the padding word of the released tokenizers, which the null stream reads
TINY = {'weights': 'random:tiny'}  # settings that read no file


@dataclasses.dataclass(frozen=True)
class Janus(GridGenerator):
  """The Janus family, to draw; the model that reads pictures is another part of the same weights.

  Attributes:
    weights: a repository or a folder in either layout of `models.janus`, with the tokenizer beside
      the weights, or 'random:SIZE'. With `TINY` no file is read.
    template: 'pro' for Janus-Pro, 'first' for Janus-1.3B.
    words: W, the most that a prompt may have with its template.
    guidance: scale >= 0; 1 runs one stream only, 0 ignores the prompt, -1 selects the published 5.
    dtype, temperature, top_k, top_p: see `GridGenerator`.
  """

  weights: str = 'deepseek-community/Janus-Pro-1B'
  template: str = 'pro'
  words: int = 128

  published_guidance = 5.0

  def __post_init__(self):
    super().__post_init__()
    if self.template not in TEMPLATES:
      allowed = ', '.join(TEMPLATES)
      raise ConfigError(f'generator.template={self.template!r}: must be one of {allowed}')
    if not isinstance(self.words, int) or isinstance(self.words, bool) or self.words < 3:
      raise ConfigError(f'generator.words={self.words!r}: must be an integer >= 3')
    self.model_parts()  # raises on an unknown size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    setting = 'generator.weights'
    return {'model': Pretrained('janus', self.weights, self.dtype, 'drawing', setting)}

  @property
  def num_stages(self):
    return self.part_config('model').tokens

  @property
  def vocab(self):
    return self.part_config('model').codes

  @property
  def decoded_output(self):
    side = round(self.num_stages**0.5) * self.part_config('model').vq.downscale
    return core.Output('image', (side, side, 3))

  # --------------------------------------------------------------------------------------- prompts

  def tokenize(self, prompts):
    """{'prompt', 'null', 'mask': `[B, W]`}, padded on the right.

    Raises:
      ConfigError: a prompt of more than `words` words.
    """
    part = self.model_parts()['model']
    ids, mask = tokenizers.tokenize_texts(
      core.texts_of(prompts), '' if part.is_random else part.weights, self.words,
      part.config.vocab, TEMPLATES[self.template], longer='error', setting='generator.words',
    )  # fmt: skip
    # the released tokenizers pad on the left; positions count from the first word
    order = np.argsort(mask == 0, -1, kind='stable')
    ids, mask = (np.take_along_axis(x, order, -1) for x in (ids, mask))
    null = janus.null_prompts(ids, mask, 0 if part.is_random else PAD)
    return {'prompt': ids, 'null': null, 'mask': mask}

  def encode(self, params, prompt):
    """The context of `models.janus`, leaves `[B, ...]`; the only place that reads the prompt."""
    ids = jnp.stack([prompt[name] for name in self.guidance_streams], 1)
    return self.bind_part(params, 'model').prompt_context(ids, prompt['mask'])

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    return self.bind_part(params, 'model').init_cache(ctx, lead[1])

  def next_logits(self, params, ctx, state, stage):
    model, fed = self.bind_part(params, 'model'), self.previous_tokens(state, stage)
    hidden, cache = model.feed_tokens(ctx, state.cache, fed, stage)
    return self.guide_logits(model.token_logits(hidden)), cache

  def prefill(self, params, ctx, state, stage):
    # fills all positions in one pass; entries from `stage` on are overwritten before they are read
    return self.bind_part(params, 'model').prefill(ctx, state.tokens)[1]

  def forced_logits(self, params, ctx, state):
    model = self.bind_part(params, 'model')
    return self.guide_logits(model.token_logits(model.prefill(ctx, state.tokens)[0]))

  def decode_cells(self, params, tokens):
    return self.bind_part(params, 'model').decode(tokens)

  def count_flops(self, op):
    sizes, streams = self.part_config('model'), len(self.guidance_streams)
    if op == 'decode':
      return llamagen_vq.count_decode_flops(sizes.vq, round(self.num_stages**0.5))
    if op == 'encode':
      return streams * janus.count_flops(sizes, 'prompt', self.words)
    step = janus.count_flops(sizes, 'step', self.words, self.num_stages)
    return {
      'step': streams * (step + janus.count_flops(sizes, 'head', 0)),
      'prefill': streams * self.num_stages * step,
    }[op]
