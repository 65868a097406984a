"""Infinity: pictures from a text, scale by scale and bit by bit (Han et al. 2024, 2412.04431).

`models.infinity` draws the bits of a scale, `models.infinity_vae` turns those of a prefix of scales
into a picture, so that a search sees every candidate at every stage. Random flips of bits, by which
the model learned to correct itself, belong to training: what it draws here is fed as it is. Golden
files hold the models to the reference.

Letters: B prompts, N candidates, S scales, T tokens of all scales, P bits of a token, C streams.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token.next_scale import NextScaleGenerator
from vtts_jax.models.infinity import modeling
from vtts_jax.models.infinity.schedules import Schedule, schedule_of
from vtts_jax.models.infinity_vae import modeling as infinity_vae
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.t5 import modeling as t5
from vtts_jax.models.var_vq import pyramid

TINY = dict.fromkeys(
  ('weights', 'tokenizer_weights', 'text_weights'), 'random:tiny'
)  # settings that read no file


@dataclasses.dataclass(frozen=True)
class Infinity(NextScaleGenerator):
  """The Infinity family.

  Attributes:
    weights: safetensors in the layout of FoundationVision/Infinity (the 2B release is a pickle, to
      be saved as safetensors first), or 'random:SIZE'. With `TINY` no file is read.
    tokenizer_weights: the tokenizer, likewise; its tokens have as many bits as `weights` say.
    text_weights: a T5 with its tokenizer beside it.
    area: pixels of a picture, one of `schedules.AREAS`: '0.06M' (256 x 256), '0.25M' (512), '0.60M'
      (768), '1M' (1024).
    aspect: height over width; the nearest released one is taken.
    scales: how many scales to draw; 0 for all. Fewer give a smaller picture, for trials.
    words: W, the length that texts are padded to; a longer text is an error.
    guidance: classifier-free guidance scale >= 0. 1 runs one stream only, 0 ignores the prompt, -1
      is the published 4.
    guided_layer: where guidance acts: 0 on the logits, as published; -k on the output of the k-th
      layer from the end.
    temperature, top_k, top_p: see `token_sampling`. A bit has two values, so top_k is of no use;
      top_p leaves out a value whose probability is below 1 - top_p, the published 0.03.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  top_p: float = 0.97
  weights: str = 'infinity_2b_reg.safetensors'
  tokenizer_weights: str = 'infinity_vae_d32reg.safetensors'
  text_weights: str = 'google/flan-t5-xl'
  area: str = '1M'
  aspect: float = 1.0
  scales: int = 0
  words: int = 128
  guided_layer: int = 0
  dtype: str = 'float32'

  published_guidance = 4.0
  vocab = 2

  def __post_init__(self):
    super().__post_init__()
    full = len(schedule_of(self.area, self.aspect).grids)  # raises on an unknown area
    for name, least, most in (('scales', 0, full), ('words', 1, None)):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < least or (
        most is not None and value > most
      ):
        allowed = f'in {least} .. {most}' if most else f'at least {least}'
        raise ConfigError(f'generator.{name}={value!r}: must be an integer {allowed}')
    self.model_parts()  # raises on an unknown random size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    part = lambda family, setting, name='': Pretrained(
      family, getattr(self, setting), self.dtype, name, f'generator.{setting}'
    )
    return {
      'prior': part('infinity', 'weights'),
      # a search never encodes pictures
      'tokenizer': part('infinity_vae', 'tokenizer_weights', 'decoder'),
      'text': part('t5', 'text_weights'),
    }

  @property
  def schedule(self) -> Schedule:
    """The grids; with fewer scales positions stay those of the full picture."""
    grids, frame = schedule_of(self.area, self.aspect)
    return Schedule(grids[: self.scales or None], frame)

  @property
  def scale_tokens(self):
    return tuple(height * width for height, width in self.schedule.grids)

  @property
  def token_shape(self):
    return (self.part_config('prior').bits,)

  @property
  def decoded_output(self):
    config = self.part_config('tokenizer')
    side = infinity_vae.cells_of_token(config, *self.token_shape) * config.downscale
    height, width = self.schedule.grids[-1]
    return core.Output('image', (height * side, width * side, 3))

  def check(self):
    """Raises `ConfigError` if the models do not fit each other or the settings."""
    prior, text = self.part_config('prior'), self.part_config('text')
    try:
      infinity_vae.cells_of_token(self.part_config('tokenizer'), prior.bits)
    except ConfigError as error:
      raise ConfigError(f'generator.tokenizer_weights: {error}') from error
    if text.d_model != prior.text_width:
      raise ConfigError(
        f'generator.text_weights: has d_model={text.d_model}, the transformer wants '
        f'{prior.text_width}'
      )
    # the null text is a table of so many words
    if self.words > prior.words:
      raise ConfigError(f'generator.words={self.words}: must be at most {prior.words}')
    if not -prior.layers < self.guided_layer <= 0:
      raise ConfigError(
        f'generator.guided_layer={self.guided_layer}: must be in {1 - prior.layers} .. 0'
      )
    if len(self.scale_tokens) > prior.levels:
      raise ConfigError(f'generator.area={self.area!r}: has more scales than {prior.levels}')
    super().check()

  # ------------------------------------------------------------------------------ prompts, pictures

  def tokenize(self, prompts):
    """{'ids', 'mask': `[B, W]`}; raises `ConfigError` on a text of more than `words` tokens."""
    text = self.model_parts()['text']
    ids, mask = tokenizers.tokenize_texts(
      core.texts_of(prompts),
      '' if text.is_random else text.weights,
      self.words,
      text.config.vocab_size,
      longer='error',
      setting='generator.words',
    )
    return {'ids': ids, 'mask': mask}

  def encode(self, params, prompt):
    """The context of `models.infinity`; the only place that runs T5."""
    states = self.bind_part(params, 'text')(prompt['ids'], prompt['mask'])
    prior = self.bind_part(params, 'prior')
    return prior.text_context(states, prompt['mask'], self.guidance_streams)

  def decode(self, params, ctx, state, stage):
    tokenizer = self.bind_part(params, 'tokenizer')
    latents = tokenizer.sum_scales(state.tokens, self.schedule.grids, stage)
    images = tokenizer.decode_latents(latents.reshape(-1, *latents.shape[2:]))
    return jnp.clip(images.reshape(*latents.shape[:2], *images.shape[1:]) * 0.5 + 0.5, 0, 1)

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    # beside keys and values the picture that they have read
    cache = self.bind_part(params, 'prior').init_cache(ctx, lead[1], self.schedule)
    none = jnp.zeros((*lead, self.scale_ends[-1], *self.token_shape), jnp.int32)
    latents = self.bind_part(params, 'tokenizer').sum_scales(none, self.schedule.grids, 0)
    return {**cache, 'latents': latents}

  def next_logits(self, params, ctx, state, stage):
    tokenizer, grids = self.bind_part(params, 'tokenizer'), self.schedule.grids
    cache, latents, ends = dict(state.cache), state.cache['latents'], self.scale_ends
    # the first scale reads the text alone
    inputs = jnp.zeros((*latents.shape[:2], 0, *self.token_shape))
    if stage:
      before = state.tokens[:, :, ends[stage - 1] : ends[stage]]
      latents = latents + tokenizer.expand_scale(before, grids[stage - 1], grids[-1])
      inputs = tokenizer.shrink_latents(latents, grids[stage], *self.token_shape)
    del cache['latents']
    logits, cache = self._feed(params, ctx, cache, inputs, stage, stage + 1)
    return logits, {**cache, 'latents': latents}

  def _feed(self, params, ctx, cache, inputs, first, last):
    """Guided logits `[B, N, Q, P, 2]` of the scales `first` .. `last` - 1, and caches."""
    prior, guide, scale = self.bind_part(params, 'prior'), None, self.guidance_scale
    if self.guided_layer and len(self.guidance_streams) > 1:
      guide = (prior.config.layers + self.guided_layer, scale)
      scale = 1.0  # the first stream alone has logits
    hidden, cache = prior.feed_scales(ctx, cache, inputs, self.schedule, first, last, guide)
    return modeling.guide_logits(prior.bit_logits(ctx, hidden), scale), cache

  def _read_scales(self, params, ctx, state, stage):
    """Guided logits and caches of the first `stage` scales in one pass."""
    tokenizer = self.bind_part(params, 'tokenizer')
    inputs, latents = tokenizer.inputs_of_scales(state.tokens, self.schedule.grids, stage)
    prior = self.bind_part(params, 'prior')
    cache = prior.init_cache(ctx, state.tokens.shape[1], self.schedule)
    logits, cache = self._feed(params, ctx, cache, inputs, 0, stage)
    return logits, {**cache, 'latents': latents}

  def prefill(self, params, ctx, state, stage):
    if stage == 0:
      return self.init_cache(params, ctx, state.tokens.shape[:2])
    # what the caches do not need (the logits) is dropped by the compiler
    return self._read_scales(params, ctx, state, stage)[1]

  def forced_logits(self, params, ctx, state):
    return self._read_scales(params, ctx, state, self.num_stages)[0]

  def count_flops(self, op, stage=0):
    prior, tokenizer = self.part_config('prior'), self.part_config('tokenizer')
    streams, ends, grids = len(self.guidance_streams), self.scale_ends, self.schedule.grids
    count = lambda op, tokens=0, keys=0: modeling.count_flops(
      prior, op, streams, self.words, tokens, keys
    )
    if op == 'encode':
      return count('context') + t5.count_flops(self.part_config('text'), self.words)
    if op == 'decode':
      cells = ends[-1] - ends[-2]
      cells *= infinity_vae.cells_of_token(tokenizer, prior.bits) ** 2
      scales = sum(
        infinity_vae.count_expand_flops(tokenizer, grid, grids[-1], prior.bits) for grid in grids
      )
      return scales + infinity_vae.count_decode_flops(tokenizer, cells)
    if op == 'step':
      n = self.scale_tokens[stage]
      flops = count('trunk', n, ends[stage + 1]) + count('head', n)
      return flops + (self._count_input_flops(stage) + count('embed', n) if stage else 0)
    read = ends[stage]
    inputs = sum(map(self._count_input_flops, range(1, stage)))
    return count('trunk', read, read) + inputs + (count('embed', read - ends[1]) if stage else 0)

  def _count_input_flops(self, stage):
    grids, bits = self.schedule.grids, self.part_config('prior').bits
    config = self.part_config('tokenizer')
    side = infinity_vae.cells_of_token(config, bits)
    shrunk = pyramid.count_resize_flops(
      *(tuple(side * n for n in grids[s]) for s in (-1, stage)), config.codebook_dim
    )
    return shrunk + infinity_vae.count_expand_flops(config, grids[stage - 1], grids[-1], bits)
