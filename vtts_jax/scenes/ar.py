"""Autoregressive scene tokens, 1D ordered or 2D grid, with guidance and a KV cache; or no model at
all.

A stage is a token. A prefix of 1D tokens decodes to a whole but blurred picture, good enough to
score and not to hand out: only finished candidates are returned, of either order. The prompt's keys
and values are computed once per prompt and shared by its candidates; each candidate keeps its own
tokens' and, with classifier-free guidance, a second stream's.
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
  """The embedded generators.

  Attributes:
    order: '1d' (every prefix decodes to a picture) or '2d' (raster grid).
    prior: 'ar' or 'uniform' (tokens drawn without a model, at no network evaluation).
    guidance: classifier-free guidance scale >= 0; 1 runs a single stream, 0 ignores the prompt, -1
      is the scale that the weights were shipped with.
    temperature, top_k, top_p: see `token_sampling`; top_k 0 is off. They hold for rollouts too.
    value_of: 'scenes_clip_a' for the value head that predicts this score of the completions that
      the shipped guidance draws at temperature 1; '' loads and computes nothing.
    rollout_model: 'small' for the model distilled from the shipped guidance; '' as above.
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
    return {part: SceneModel(f'{part}_{self.order}') for part in wanted if wanted[part]}

  def _config(self, part):
    return self.model_parts()[part].config

  @property
  def num_stages(self):
    return self._config('tokenizer').tokens

  @property
  def vocab(self):
    return self._config('tokenizer').codes

  @property
  def decoded_output(self):
    return core.Output('image', (world.SIZE, world.SIZE, 3))

  @property
  def published_guidance(self):
    return read_card(f'prior_{self.order}')['guidance']

  @property
  def streams(self):
    return () if self.prior == 'uniform' else super().streams

  @property
  def offers(self):
    ahead = {'value': self.value_of, 'rollout': self.rollout_model}
    return super().offers | {name for name in ahead if ahead[name]}

  # ------------------------------------------------------------------------------------ the models

  def tokenize(self, prompts):
    return {'text': world.tokenize_texts(core.texts_of(prompts))}

  def encode(self, params, prompt):
    """Keys and values of the prompt's words, for each model that reads them: {stream or model:
    leaves `[B, ...]`}."""
    text = prompt['text']
    inputs = {'prompt': text, 'null': jnp.zeros_like(text)}
    ctx = {'rows': text[:, 0]}  # without a model the context still says how many prompts there are
    for stream in self.streams:
      ctx[stream] = self.bind_part(params, 'prior').text(inputs[stream])
    if self.value_of:
      ctx['value'] = self.bind_part(params, 'value').context(text)
    if self.rollout_model:
      ctx['rollout'] = self.bind_part(params, 'rollout').text(text)
    return ctx

  def init_cache(self, params, ctx, lead):
    model = self.bind_part(params, 'prior')
    return {stream: model.init_cache(*lead) for stream in self.streams}

  def next_logits(self, params, ctx, state, stage):
    model, fed = self.bind_part(params, 'prior'), self.previous_tokens(state, stage, self.vocab)
    found = {s: model.step(ctx[s], state.cache[s], fed, stage) for s in self.streams}
    logits = jnp.stack([found[s][0] for s in self.streams], axis=-2)
    return self.guide_logits(logits), {s: cache for s, (_, cache) in found.items()}

  def prefill(self, params, ctx, state, stage):
    model = self.bind_part(params, 'prior')
    return {s: model.prefill(ctx[s], state.tokens, stage) for s in self.streams}

  def forced_logits(self, params, ctx, state):
    model = self.bind_part(params, 'prior')
    logits = [model.forced(ctx[stream], state.tokens) for stream in self.streams]
    return self.guide_logits(jnp.stack(logits, axis=-2))

  def decode(self, params, ctx, state, stage):
    rows = state.tokens.reshape(-1, self.num_stages)
    keep = jnp.broadcast_to(stage, state.tokens.shape[:2]).reshape(-1)
    images = self.bind_part(params, 'tokenizer').decode(rows, keep)
    return images.reshape(*state.tokens.shape[:2], *images.shape[1:])

  def value(self, params, ctx, state, stage):
    if not self.value_of:
      return super().value(params, ctx, state, stage)
    return self.bind_part(params, 'value').value(ctx['value'], state.tokens, stage)

  def rollout(self, params, ctx, state, keys, stage, count, *, greedy=False):
    if not self.rollout_model:
      return super().rollout(params, ctx, state, keys, stage, count, greedy=greedy)
    if isinstance(stage, int):
      count = min(count, self.num_stages - stage)  # the loop below must not run past the end
    else:
      stage = jnp.broadcast_to(stage, keys.shape)
    model = self.bind_part(params, 'rollout')

    def next_logits(state, t):
      fed = self.previous_tokens(state, t, self.vocab)
      return model.step(ctx['rollout'], state.cache, fed, t)

    start = state._replace(cache=model.prefill(ctx['rollout'], state.tokens, stage))
    choose = self.token_chooser(keys, greedy)
    finished = self.sample_tokens(start, stage, count, next_logits, choose)
    # the likelihood is the prior's, which has not read what the small model drew
    return finished._replace(log_probs=state.log_probs, cache=())

  def flops(self, op):
    streams = len(self.streams)
    if op == 'decode':
      return tokenizer.flops_decode(self._config('tokenizer'))
    if op == 'encode':
      flops = streams * prior.flops_text(self._config('prior'))
      if self.value_of:
        flops += value.flops_context(self._config('value'))
      return flops + (prior.flops_text(self._config('rollout')) if self.rollout_model else 0)
    if op == 'value':
      return value.flops_value(self._config('value'))
    if op == 'rollout_prefill':
      return prior.flops_prefill(self._config('rollout'))
    if op == 'rollout_step':
      return prior.flops_step(self._config('rollout'))
    count = {'step': prior.flops_step, 'prefill': prior.flops_prefill}[op]
    return streams * count(self._config('prior'))
