"""LlamaGen: pictures from a class or a text, token by token, row by row.

Sun et al. 2024, arXiv 2406.06525: `models.llamagen` with T5 states (`models.t5`) or a class in
front and `models.llamagen_vq` behind. The base of GridAR, ScalingAR and of the GRPO papers on
picture tokens. Golden files hold the models to their references.

Letters: B prompts · N candidates · C streams · W words · R rows.
"""

import dataclasses

import jax

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token.grid import GridGenerator
from vtts_jax.models.llamagen import modeling as llamagen
from vtts_jax.models.llamagen_vq import modeling as llamagen_vq
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.t5 import modeling as t5

# settings that read no file; `prior_weights` 'random:tiny_t2i' is a model of texts
TINY = dict.fromkeys(('prior_weights', 'tokenizer_weights', 'text_weights'), 'random:tiny')


@dataclasses.dataclass(frozen=True)
class LlamaGen(GridGenerator):
  """The LlamaGen family; whether the prior reads classes or texts, its weights say.

  Attributes:
    prior_weights, tokenizer_weights: a safetensors file (the releases are pickles, to be saved as
      safetensors first: README.md of `models/llamagen`), a folder, a repository, or 'random:SIZE'.
      With `TINY` no file is read.
    text_weights: a T5 with its tokenizer beside it; models of classes do not read it.
    guidance: scale >= 0; 1 runs one stream only, 0 ignores the prompt, -1 selects the published
      scale: 4 for classes, 7.5 for texts.
    class_names, dtype, temperature, top_k, top_p: see `GridGenerator`. Published are top_k 2000
      for classes and 1000 for texts.
  """

  prior_weights: str = 't2i_XL_stage1_256.safetensors'
  tokenizer_weights: str = 'vq_ds16_t2i.safetensors'
  text_weights: str = 'google/flan-t5-xl'

  def __post_init__(self):
    super().__post_init__()
    for name in ('prior', 'tokenizer', 'text'):
      self._pretrained_part(name)  # raises on an unknown size

  # ------------------------------------------------------------------------------------- the facts

  def _pretrained_part(self, name) -> Pretrained:
    family = {'prior': 'llamagen', 'tokenizer': 'llamagen_vq', 'text': 't5'}[name]
    setting = f'{name}_weights'
    weights = getattr(self, setting)
    return Pretrained(family, weights, self.dtype, setting=f'generator.{setting}')

  def model_parts(self):
    # the prior's header tells whether it is a model of classes, which has no text encoder
    names = ['prior', 'tokenizer'] if self._reads_classes else ['prior', 'tokenizer', 'text']
    return {name: self._pretrained_part(name) for name in names}

  def part_config(self, name):
    return self._pretrained_part(name).config

  @property
  def _reads_classes(self):
    return self.part_config('prior').classes > 0

  @property
  def num_stages(self):
    return self.part_config('prior').tokens

  @property
  def vocab(self):
    return self.part_config('prior').codes

  @property
  def decoded_output(self):
    side = round(self.num_stages**0.5) * self.part_config('tokenizer').downscale
    return core.Output('image', (side, side, 3))

  @property
  def published_guidance(self):
    return 4.0 if self._reads_classes else 7.5

  def check(self):
    """Raises `ConfigError` if the models do not fit each other."""
    pairs = [('tokenizer', 'codebook_size', self.vocab)]
    if not self._reads_classes:
      pairs.append(('text', 'd_model', self.part_config('prior').text_width))
    for name, what, want in pairs:
      have = getattr(self.part_config(name), what)
      if have != want:
        raise ConfigError(f'generator.{name}_weights: has {what}={have}, the prior wants {want}')
    super().check()

  # --------------------------------------------------------------------------------------- prompts

  def tokenize(self, prompts):
    """{'labels': `[B]`} for a model of classes, {'ids', 'mask': `[B, W]`} for one of texts.

    Raises:
      ConfigError: an unknown class, or a text of more words than the prior has rows for.
    """
    prior = self.part_config('prior')
    if self._reads_classes:
      return self.tokenize_classes(prompts, prior.classes)
    text = self._pretrained_part('text')
    ids, mask = tokenizers.tokenize_texts(
      core.texts_of(prompts), '' if text.is_random else text.weights, prior.words,
      text.config.vocab_size, longer='error', setting='generator: the words of the prior',
    )  # fmt: skip
    return {'ids': ids, 'mask': mask}

  def encode(self, params, prompt):
    """The context of `models.llamagen`, leaves `[B, C, ...]`; the only place that runs T5."""
    prior = self.bind_part(params, 'prior')
    if self._reads_classes:
      return prior.class_context(self.stream_labels(prompt['labels']))
    ctx = prior.text_context(self.bind_part(params, 'text')(prompt['ids'], prompt['mask']),
                             prompt['mask'])  # fmt: skip
    # the null stream is under the mask of the prompt, so the model makes the two together
    kept = [('prompt', 'null').index(name) for name in self.guidance_streams]
    return jax.tree.map(lambda x: x[:, kept[0] : kept[-1] + 1], ctx)

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    return self.bind_part(params, 'prior').init_cache(ctx, lead[1])

  def next_logits(self, params, ctx, state, stage):
    prior, fed = self.bind_part(params, 'prior'), self.previous_tokens(state, stage)
    hidden, cache = prior.feed_tokens(ctx, state.cache, fed, stage)
    return self.guide_logits(prior.token_logits(hidden)), cache

  def prefill(self, params, ctx, state, stage):
    # fills all positions in one pass; entries from `stage` on are overwritten before they are read
    return self.bind_part(params, 'prior').prefill(ctx, state.tokens)[1]

  def forced_logits(self, params, ctx, state):
    prior = self.bind_part(params, 'prior')
    return self.guide_logits(prior.token_logits(prior.prefill(ctx, state.tokens)[0]))

  def decode_cells(self, params, tokens):
    return (self.bind_part(params, 'tokenizer').decode(tokens) + 1) / 2

  def count_flops(self, op):
    prior, streams = self.part_config('prior'), len(self.guidance_streams)
    if op == 'decode':
      side = round(self.num_stages**0.5)
      return llamagen_vq.count_decode_flops(self.part_config('tokenizer'), side)
    if op == 'encode':
      if self._reads_classes:
        return streams * llamagen.count_flops(prior, 'prefix')
      flops = t5.count_flops(self.part_config('text'), prior.words)
      return flops + 2 * llamagen.count_flops(prior, 'prefix')
    step = llamagen.count_flops(prior, 'step', self.num_stages)
    return {
      'step': streams * (step + llamagen.count_flops(prior, 'head')),
      'prefill': streams * self.num_stages * step,
    }[op]
