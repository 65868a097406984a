"""Autoregressive scene tokens, 1D ordered or 2D grid, with guidance and a KV cache.

A stage is a token. A prefix of 1D tokens decodes to a complete but blurred picture: good enough to
score, not to return. So only finished candidates are returned, for both orders. The candidates of a
prompt share the keys and values of its words; each candidate caches those of its own tokens, once
per guidance stream.
Letters: B prompts, N candidates, T tokens, V codes.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token import TokenGenerator
from vtts_jax.scenes import world
from vtts_jax.scenes.models import SceneModel, prior, read_card, tokenizer, value

ORDERS = ('1d', '2d')
PRIORS = ('ar', 'uniform')
VALUES, ROLLOUTS = ('scenes_clip_a',), ('small',)


@dataclasses.dataclass(frozen=True)
class ScenesAR(TokenGenerator):
  """The autoregressive generators of the scene world.

  Attributes:
    order: '1d' (every prefix decodes to a picture) or '2d' (raster grid).
    prior: 'ar', or 'uniform' to draw tokens without a network.
    guidance: classifier-free guidance scale >= 0. 1 runs one stream only, 0 ignores the prompt, -1
      selects the scale stored with the weights.
    temperature, top_k, top_p: see `token_sampling`; top_k 0 switches it off. Rollouts use them too.
    value_of: 'scenes_clip_a' loads the value head that predicts this score of a candidate's
      completions (drawn with the stored guidance at temperature 1); '' loads none.
    rollout_model: 'small' loads the model distilled from the guided prior; '' loads none.
  """

  order: str = '1d'
  prior: str = 'ar'
  value_of: str = ''
  rollout_model: str = ''

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (('order', ORDERS), ('prior', PRIORS)):
      given = getattr(self, name)
      if given not in allowed:
        raise ConfigError(f'generator.{name}={given!r}: must be one of {", ".join(allowed)}')
    for name, allowed in (('value_of', VALUES), ('rollout_model', ROLLOUTS)):
      given = getattr(self, name)
      if given and (given not in allowed or self.prior != 'ar'):
        raise ConfigError(
          f"generator.{name}={given!r}: must be '' or, with generator.prior='ar', one of {allowed}"
        )

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    wanted = {
      'tokenizer': True,
      'prior': self.prior == 'ar',
      'value': self.value_of,
      'rollout': self.rollout_model,
    }
    # only the models that the settings name are read from disk
    return {part: SceneModel(f'{part}_{self.order}') for part in wanted if wanted[part]}

  def part_config(self, part):
    return self.model_parts()[part].config

  @property
  def num_stages(self):
    return self.part_config('tokenizer').tokens

  @property
  def vocab(self):
    return self.part_config('tokenizer').codes

  @property
  def decoded_output(self):
    return core.Output('image', (world.SIZE, world.SIZE, 3))

  @property
  def published_guidance(self):
    return read_card(f'prior_{self.order}')['guidance']

  @property
  def guidance_streams(self):
    return () if self.prior == 'uniform' else super().guidance_streams

  @property
  def offers(self):
    # a capability is offered only if its model is loaded
    ahead = {'value': self.value_of, 'rollout': self.rollout_model}
    return super().offers | {name for name in ahead if ahead[name]}

  # ------------------------------------------------------------------------------------ the models

  def tokenize(self, prompts):
    return {'text': world.tokenize_texts(core.texts_of(prompts))}

  def encode(self, params, prompt):
    """Keys and values of the prompt's words for each model that reads them: {stream or model:
    leaves `[B, ...]`}."""
    text = prompt['text']
    inputs = {'prompt': text, 'null': jnp.zeros_like(text)}
    # without a model the context still carries the number of prompts
    ctx = {'rows': text[:, 0]}
    for stream in self.guidance_streams:
      ctx[stream] = self.bind_part(params, 'prior').encode_text(inputs[stream])
    if self.value_of:
      ctx['value'] = self.bind_part(params, 'value').encode_context(text)
    if self.rollout_model:
      ctx['rollout'] = self.bind_part(params, 'rollout').encode_text(text)
    return ctx

  def init_cache(self, params, ctx, lead):
    model = self.bind_part(params, 'prior')
    return {stream: model.init_cache(*lead) for stream in self.guidance_streams}

  def next_logits(self, params, ctx, state, stage):
    model, fed = self.bind_part(params, 'prior'), self.previous_tokens(state, stage, self.vocab)
    # the begin token has id V, one past the codes; each stream reads it with its own words and
    # cache
    logits, caches = [], {}
    for stream in self.guidance_streams:
      row, caches[stream] = model.feed_tokens(ctx[stream], state.cache[stream], fed, stage)
      logits.append(row)
    return self.guide_logits(jnp.stack(logits, axis=-2)), caches

  def prefill(self, params, ctx, state, stage):
    model = self.bind_part(params, 'prior')
    return {s: model.prefill(ctx[s], state.tokens, stage) for s in self.guidance_streams}

  def forced_logits(self, params, ctx, state):
    model = self.bind_part(params, 'prior')
    logits = [model.forced_logits(ctx[stream], state.tokens) for stream in self.guidance_streams]
    return self.guide_logits(jnp.stack(logits, axis=-2))

  def decode(self, params, ctx, state, stage):
    rows = state.tokens.reshape(-1, self.num_stages)
    keep = jnp.broadcast_to(stage, state.tokens.shape[:2]).reshape(-1)
    images = self.bind_part(params, 'tokenizer').decode(rows, keep)
    return images.reshape(*state.tokens.shape[:2], *images.shape[1:])

  def value(self, params, ctx, state, stage):
    if not self.value_of:
      return super().value(params, ctx, state, stage)
    return self.bind_part(params, 'value').predict_value(ctx['value'], state.tokens, stage)

  def rollout(self, params, ctx, state, keys, stage, count, *, greedy=False):
    if not self.rollout_model:
      return super().rollout(params, ctx, state, keys, stage, count, greedy=greedy)
    if isinstance(stage, int):
      # with one stage for all, the loop runs exactly the stages that are left
      count = min(count, self.num_stages - stage)
    else:
      # with traced stages it runs `count` and masks the candidates that are complete
      stage = jnp.broadcast_to(stage, keys.shape)
    model = self.bind_part(params, 'rollout')

    def next_logits(state, t):
      fed = self.previous_tokens(state, t, self.vocab)
      return model.feed_tokens(ctx['rollout'], state.cache, fed, t)

    start = state._replace(cache=model.prefill(ctx['rollout'], state.tokens, stage))
    choose = self.token_chooser(keys, greedy)
    finished = self.sample_tokens(start, stage, count, next_logits, choose)
    # log-probabilities belong to the prior, which has not read what the small model drew
    return finished._replace(log_probs=state.log_probs, cache=())

  def count_flops(self, op):
    streams = len(self.guidance_streams)
    if op == 'decode':
      return tokenizer.count_decode_flops(self.part_config('tokenizer'))
    if op == 'encode':
      flops = streams * prior.count_text_flops(self.part_config('prior'))
      if self.value_of:
        flops += value.count_context_flops(self.part_config('value'))
      if self.rollout_model:
        flops += prior.count_text_flops(self.part_config('rollout'))
      return flops
    if op == 'value':
      return value.count_value_flops(self.part_config('value'))
    if op == 'rollout_prefill':
      return prior.count_prefill_flops(self.part_config('rollout'))
    if op == 'rollout_step':
      return prior.count_step_flops(self.part_config('rollout'))
    # the prior runs once per stream; value and rollout models read the prompt only
    count = {'step': prior.count_step_flops, 'prefill': prior.count_prefill_flops}[op]
    return streams * count(self.part_config('prior'))
