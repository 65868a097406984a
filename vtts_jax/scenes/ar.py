"""Autoregressive scene tokens, 1D ordered or 2D grid, with guidance and a KV cache; or no model at
all.

A stage is a token. A prefix of 1D tokens decodes to a whole but blurred picture, good enough to
look at and not to hand out: only finished candidates are returned, of either order. The prompt's
keys and values are computed once per prompt and shared by all of its candidates; each candidate
keeps its own tokens' and, with classifier-free guidance, a second stream's.
Letters: B prompts, N candidates, K children, T tokens, V codes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax import token_sampling as sampling
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.scenes import models as models
from vtts_jax.scenes import world as scenes
from vtts_jax.scenes.models import prior, tokenizer, value

ORDERS = ('1d', '2d')
VALUES, ROLLOUTS = ('scenes_clip_a',), ('small',)
_config, _card = functools.cache(models.config), functools.cache(models.card)


class State(NamedTuple):
  """Tokens `[B, N, T]` int32 (those not drawn yet are 0), log-probability `[B, N]`, caches by
  stream.

  The log-probability is that of the drawn tokens under the guided distribution at temperature 1.
  After s stages the caches hold sequence positions 0 .. s - 1 (BOS and the first s - 1 tokens).
  """

  tokens: jax.Array
  logp: jax.Array
  cache: Any


@dataclasses.dataclass(frozen=True)
class ScenesAR(core.Generator):
  """The embedded generators.

  Attributes:
    order: '1d' (every prefix decodes to a picture) or '2d' (raster grid).
    prior: 'ar' or 'uniform' (tokens drawn without a model, at no network evaluation).
    guidance: classifier-free guidance scale >= 0; 1 runs a single stream, 0 ignores the prompt, -1
      is the scale that the weights were shipped with.
    temperature, top_k, top_p: see `sampling`; top_k 0 is off. They hold for rollouts too.
    value_of: 'scenes_clip_a' for the value head that foretells this score of the completions that
      the shipped guidance draws at temperature 1; '' loads and computes nothing.
    rollout_policy: 'small' for the policy distilled from the shipped guidance; '' as above.
  """

  order: str = '1d'
  prior: str = 'ar'
  guidance: float = -1.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  value_of: str = ''
  rollout_policy: str = ''

  def __post_init__(self):
    if self.order not in ORDERS:
      raise ConfigError(f'generator.order={self.order!r}: must be one of {ORDERS}')
    if self.prior not in ('ar', 'uniform'):
      raise ConfigError(f"generator.prior={self.prior!r}: must be 'ar' or 'uniform'")
    if not (self.guidance >= 0 or self.guidance == -1):
      raise ConfigError(
        f'generator.guidance={self.guidance}: must be >= 0, or -1 (as shipped)'
      )
    for name, allowed in (('value_of', VALUES), ('rollout_policy', ROLLOUTS)):
      given = getattr(self, name)
      if given and (given not in allowed or self.prior != 'ar'):
        raise ConfigError(
          f"generator.{name}={given!r}: must be '' or, with generator.prior='ar', one of {allowed}"
        )
    sampling.check(self.temperature, self.top_k, self.top_p, self.vocab)

  # ------------------------------------------------------------------------------------ static
  # facts

  @property
  def _config(self):
    return _config(f'tokenizer_{self.order}')

  @property
  def num_stages(self):
    return self._config.tokens

  @property
  def vocab(self):
    return self._config.codes

  @property
  def image_shape(self):
    return (scenes.SIZE, scenes.SIZE, 3)

  @property
  def scale(self) -> float:
    """The guidance scale in force."""
    if self.prior == 'uniform':
      return 1.0
    return self.guidance if self.guidance >= 0 else _card(f'prior_{self.order}')['guidance']

  @property
  def streams(self) -> tuple[str, ...]:
    """Which conditionings run: with the prompt, without it, or both for guidance."""
    if self.prior == 'uniform':
      return ()
    return {0.0: ('null',), 1.0: ('prompt',)}.get(float(self.scale), ('prompt', 'null'))

  def _model(self, params, part):
    return modules.merge(models.load(f'{part}_{self.order}')[0], params[part])

  # ----------------------------------------------------------------------------------------
  # protocol

  def load(self):
    parts = {
      'tokenizer': True,
      'prior': self.prior == 'ar',
      'value': self.value_of,
      'rollout': self.rollout_policy,
    }
    return {part: models.load(f'{part}_{self.order}')[1] for part in parts if parts[part]}

  def tokenize(self, texts):
    return {'text': scenes.tokenize(texts)}

  def encode(self, params, prompt):
    text = prompt['text']
    inputs = {'prompt': text, 'null': jnp.zeros_like(text)}
    model = self._model(params, 'prior') if self.streams else None
    ctx = {stream: model.text(inputs[stream]) for stream in self.streams} | {'rows': text[:, 0]}
    if self.value_of:
      ctx['value'] = self._model(params, 'value').context(text)
    if self.rollout_policy:
      ctx['rollout'] = self._model(params, 'rollout').text(text)
    return ctx

  def init(self, params, ctx, keys):
    model = self._model(params, 'prior') if self.streams else None
    cache = {stream: model.init_cache(*keys.shape) for stream in self.streams}
    tokens = jnp.zeros((*keys.shape, self.num_stages), jnp.int32)
    return State(tokens, jnp.zeros(keys.shape), cache)

  def _previous(self, state, stage):
    """Token `[B, N]` that is fed at `stage`: the one before it, the begin id at 0."""
    before = jnp.maximum(stage - 1, 0)
    if jnp.ndim(stage):
      previous = jnp.take_along_axis(state.tokens, before[..., None], axis=2)[..., 0]
    else:
      previous = jax.lax.dynamic_index_in_dim(state.tokens, before, axis=2, keepdims=False)
    return jnp.where(stage == 0, self.vocab, previous)

  def _next(self, params, ctx, state, stage):
    """Guided logits `[B, N, V]` of the token of `stage`, and the caches with the one before it."""
    if not self.streams:
      return jnp.zeros((*state.logp.shape, self.vocab)), state.cache
    previous = self._previous(state, stage)
    model = self._model(params, 'prior')
    out = {s: model.step(ctx[s], state.cache[s], previous, stage) for s in self.streams}
    cache = {s: kv for s, (_, kv) in out.items()}
    if len(out) == 1:
      return next(iter(out.values()))[0], cache
    null = out['null'][0]
    return null + self.scale * (out['prompt'][0] - null), cache

  def _put(self, state, token, stage):
    """Tokens `[B, N, T]` with `token [B, N]` at `stage`."""
    if jnp.ndim(stage):
      here = jnp.arange(self.num_stages) == stage[..., None]
      return jnp.where(here, token[..., None], state.tokens)
    return jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], stage, axis=2)

  def _push(self, state, cache, logits, token, stage):
    tokens = self._put(state, token, stage)
    return State(tokens, state.logp + sampling.log_prob(logits, token), cache)

  def _adjust(self, logits):
    return sampling.adjust(logits, self.temperature, self.top_k, self.top_p)

  def _run(self, params, ctx, state, stage, count, choose):
    """`count` stages from `stage`; `choose(logits, t)` says which token comes next."""

    def one(state, t):
      logits, cache = self._next(params, ctx, state, t)
      return self._push(state, cache, logits, choose(logits, t), t)

    return core.run_stages(one, state, stage, count, self.num_stages)

  def _choose(self, keys, greedy):
    """The function of logits `[B, N, V]` and a stage that says which token comes there."""

    def choose(logits, t):
      if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
      return sampling.draw(self._adjust(logits), core.fold(keys, t))

    return choose

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    return self._run(params, ctx, state, stage, count, self._choose(keys, greedy))

  def value(self, params, ctx, slim, stage):
    if not self.value_of:
      return super().value(params, ctx, slim, stage)
    return self._model(params, 'value').value(ctx['value'], slim.tokens, stage)

  def rollout(self, params, ctx, slim, keys, stage, count, *, greedy=False):
    if not self.rollout_policy:
      return super().rollout(params, ctx, slim, keys, stage, count, greedy=greedy)
    if isinstance(stage, int):
      count = min(count, self.num_stages - stage)  # the loop below must not run past the end
    else:
      stage = jnp.broadcast_to(stage, keys.shape)
    model, choose = self._model(params, 'rollout'), self._choose(keys, greedy)

    def one(state, t):
      logits, cache = model.step(ctx['rollout'], state.cache, self._previous(state, t), t)
      return State(self._put(state, choose(logits, t), t), state.logp, cache)

    start = slim._replace(cache=model.prefill(ctx['rollout'], slim.tokens, stage))
    return self.slim(core.run_stages(one, start, stage, count, self.num_stages))

  def force(self, params, ctx, state, tokens):
    return self._run(params, ctx, state, 0, tokens.shape[2], lambda _, t: tokens[:, :, t])

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    logits, cache = self._next(params, ctx, state, stage)
    if replace:
      drawn = sampling.draw(self._adjust(logits)[:, :, None], core.fold(keys, stage))
    else:
      drawn = sampling.draw_distinct(self._adjust(logits), core.fold(keys[:, :, 0], stage), k)
    children = core.repeat(self.slim(state), k)
    flat = drawn.reshape(drawn.shape[0], -1)
    children = self._push(children, (), core.repeat(logits, k), flat, stage)
    return children, state._replace(cache=cache)

  def slim(self, state):
    return state._replace(cache=())

  def fatten(self, params, ctx, slim, stage, like=None):
    if like is not None:
      return slim._replace(cache=like.cache)
    model = self._model(params, 'prior') if self.streams else None
    cache = {s: model.prefill(ctx[s], slim.tokens, stage) for s in self.streams}
    return slim._replace(cache=cache)

  def render(self, params, ctx, state, stage):
    rows = state.tokens.reshape(-1, self.num_stages)
    keep = jnp.broadcast_to(stage, state.tokens.shape[:2]).reshape(-1)
    images = self._model(params, 'tokenizer').decode(rows, keep)
    return images.reshape(*state.tokens.shape[:2], *self.image_shape)

  def log_prob(self, state):
    return state.logp

  def cost(self, op, stage=0, count=1):
    if op == 'render':
      return core.Cost(render=1, flops=tokenizer.flops_decode(self._config))
    if not self.streams:
      return core.Cost()
    if op in ('value', 'rollout'):
      return self._cost_ahead(op, min(count, self.num_stages - stage))
    config = _config(f'prior_{self.order}')
    if op == 'encode':
      flops = len(self.streams) * prior.flops_text(config)
      if self.value_of:
        flops += value.flops_context(_config(f'value_{self.order}'))
      if self.rollout_policy:
        flops += prior.flops_text(_config(f'rollout_{self.order}'))
      return core.Cost(flops=flops)
    if op == 'fatten':
      return core.Cost(generator=1, flops=len(self.streams) * prior.flops_prefill(config))
    evals = {'extend': count, 'force': count, 'fork': 1}[op]
    return core.Cost(generator=evals, flops=evals * len(self.streams) * prior.flops_step(config))

  def _cost_ahead(self, op, count):
    config = _config(f'{op}_{self.order}')
    if op == 'value':
      return core.Cost(generator=1, flops=value.flops_value(config))
    flops = prior.flops_prefill(config) + count * prior.flops_step(config)
    return core.Cost(generator=1 + count, flops=flops)


def build(**given) -> ScenesAR:
  return components.build_dataclass(ScenesAR, **given)
