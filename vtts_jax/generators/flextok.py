"""FlexTok AR: ordered picture tokens drawn from text or a class, every prefix of them a picture.

The generator of "(1D) Ordered Tokens Enable Efficient Test-Time Search" (arXiv 2604.15453): a
causal transformer (`models.flexar`) with T5 states or a class in front, FlexTok's flow decoder
(`models.flextok`) and a VAE (`models.autoencoder_kl`) behind. A stage is a token; the schedule (1,
2, 4 .. 256) is the algorithm's. The models are held to their references by golden files; here,
tests/test_flextok_ar.py holds the published beam, token by token, to a loop without a cache.

Prompts are encoded once. A candidate that branches at the last token costs one token: its caches
are its parent's until it is chosen. Guidance runs as a second stream in the same batch.
Letters: B prompts, N candidates, K children, T tokens, V codes, C streams, W words.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import components, core
from vtts_jax import token_sampling as sampling
from vtts_jax.errors import ConfigError
from vtts_jax.generators import flextok_parts as parts
from vtts_jax.models.autoencoder_kl import modeling as autoencoder_kl
from vtts_jax.models.flexar import modeling as flexar
from vtts_jax.models.flextok import flow
from vtts_jax.models.flextok import modeling as flextok
from vtts_jax.models.t5 import modeling as t5


class State(NamedTuple):
  """Tokens `[B, N, T]` int32 (those not drawn yet are 0), log-probability `[B, N]`, the seed of the
  decoder's noise `[B, N, 2]` uint32, and {'k', 'v': `[B, N, C, L, T, D]`}, () without a prior.

  The log-probability is that of the drawn tokens under the guided distribution at temperature 1.
  After s stages the cache holds positions 0 .. s - 1 (the start and the first s - 1 tokens).
  """

  tokens: jax.Array
  logp: jax.Array
  noise: jax.Array
  cache: Any


@dataclasses.dataclass(frozen=True)
class FlexTokAR(core.Generator):
  """The FlexTok AR and GridTok AR family.

  Attributes:
    prior_from, tokenizer_from, vae_from, text_from: checkpoints; a file, a folder or a repository
      of the hub (`owner/name@revision`). `text_from` is a T5 with its tokenizer beside it.
    random: '' loads those; else seeded random weights and no file at all: 'tiny', the name of a
      released prior ('flexar_113m'), or prior and tokenizer ('flexar_113m/small').
    prior: 'ar', or 'uniform' for tokens drawn without a model, at no network evaluation.
    condition: 'text', 'class' (a prompt is a number, or a name of `class_names`) or 'none' (prompts
      are not read).
    class_names: a text file with the name of class i in line i; '' where prompts are numbers.
    words: W, to which texts are padded; a longer text is an error.
    guidance: classifier-free guidance scale >= 0 of the tokens; 1 runs a single stream, 0 ignores
      the prompt, -1 is the published scale: 3 for text, 1.5 for classes.
    temperature, top_k, top_p: see `sampling`; top_k 0 is off.
    decode_steps: Euler steps of the decoder, at least 1. The fewest that the verifier tolerates.
    decode_guidance: scale > 0 of the decoder's projected guidance; 1 halves its cost, -1 is the
      published scale: 7.5 for ordered tokens, 5 for grids.
    noise: 'prompt' for one decoder noise shared by the candidates that start together, 'candidate'
      for one each, which its children keep.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  prior_from: str = 'EPFL-VILAB/FlexAR-3B-T2I'
  tokenizer_from: str = 'EPFL-VILAB/flextok_d18_d28_dfn'
  vae_from: str = 'EPFL-VILAB/flextok_vae_c16'
  text_from: str = 'google/flan-t5-xl'
  random: str = ''
  prior: str = 'ar'
  condition: str = 'text'
  class_names: str = ''
  words: int = 128
  guidance: float = -1.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  decode_steps: int = 20
  decode_guidance: float = -1.0
  noise: str = 'prompt'
  dtype: str = 'float32'

  def __post_init__(self):
    for name, allowed in (
      ('prior', ('ar', 'uniform')),
      ('condition', ('text', 'class', 'none')),
      ('noise', ('prompt', 'candidate')),
      ('dtype', ('float32', 'bfloat16')),
    ):
      if getattr(self, name) not in allowed:
        raise ConfigError(
          f'generator.{name}={getattr(self, name)!r}: must be one of {", ".join(allowed)}'
        )
    for name in ('words', 'decode_steps'):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f'generator.{name}={value!r}: must be an integer >= 1')
    if not (self.guidance >= 0 or self.guidance == -1):
      raise ConfigError(
        f'generator.guidance={self.guidance}: must be >= 0, or -1 (as published)'
      )
    if not (self.decode_guidance > 0 or self.decode_guidance == -1):
      raise ConfigError(
        f'generator.decode_guidance={self.decode_guidance}: must be > 0, or -1 (as published)'
      )
    parts.check_random(self.random)

  # --------------------------------------------------------------------------------- static facts

  @property
  def configs(self) -> parts.Configs:
    """The models' sizes; of a checkpoint they are read off its header once."""
    text = self.text_from if self.condition != 'class' else ''
    return parts.configs(
      self.random,
      (self.prior_from if self.prior == 'ar' else '', self.tokenizer_from, self.vae_from, text),
      self.prior == 'ar',
      self.condition,
    )

  @property
  def num_stages(self):
    return self.configs.tokenizer.tokens

  @property
  def vocab(self):
    return self.configs.tokenizer.codes

  @property
  def image_shape(self):
    side = self.configs.tokenizer.size * self.configs.vae.downscale
    return (side, side, 3)

  @property
  def anytime(self):
    return self.configs.tokenizer.registers > 0

  @property
  def scale(self) -> float:
    """The guidance scale of the tokens in force."""
    if self.guidance >= 0:
      return float(self.guidance)
    return 1.5 if self.condition == 'class' else 3.0

  @property
  def decode_scale(self) -> float:
    """The guidance scale of the decoder in force."""
    if self.decode_guidance > 0:
      return float(self.decode_guidance)
    return 7.5 if self.anytime else 5.0

  @property
  def streams(self) -> tuple[str, ...]:
    """Which conditionings run: with the prompt, without it, or both for guidance."""
    if self.prior == 'uniform':
      return ()
    if self.condition == 'none' or self.scale == 0:
      return ('null',)
    return ('prompt',) if self.scale == 1 else ('prompt', 'null')

  def check(self):
    configs = self.configs
    parts.check_fit(configs, self.condition)
    sampling.check(self.temperature, self.top_k, self.top_p, self.vocab)

  def _model(self, params, part):
    return parts.merge(getattr(self.configs, part), params[part])

  # --------------------------------------------------------------------------------------- prompts

  def load(self):
    froms = {
      'prior': self.prior_from,
      'tokenizer': self.tokenizer_from,
      'vae': self.vae_from,
      'text': self.text_from,
    }
    return {
      part: parts.load(part, config, '' if self.random else froms[part], self.dtype)
      for part, config in self.configs._asdict().items()
      if config is not None
    }

  def tokenize(self, texts):
    """Prompt arrays: {'ids', 'mask': `[B, W]`, 'null': `[B, 1]`} of a text model, {'labels':
    `[B]`} of a class model, {'rows': `[B]`} without a prior.

    Raises:
      ConfigError: a text of more than `words` tokens, or a class that there is none of.
    """
    rows, configs = len(texts), self.configs
    if not self.streams:
      return {'rows': np.zeros(rows, np.int32)}
    if configs.prior.classes:
      if self.condition == 'none':
        return {'labels': np.full(rows, -1, np.int32)}
      return {'labels': parts.labels(texts, configs.prior.classes, self.class_names)}
    null = np.full((rows, 1), parts.END, np.int32)
    if self.condition == 'none':
      return {'null': null}
    ids, mask = parts.words(texts, self.words, '' if self.random else self.text_from)
    return {'ids': ids, 'mask': mask, 'null': null}

  def encode(self, params, prompt):
    """The context of `models.flexar`, whose leaves are `[B, C, ...]`; T5 runs here only."""
    if not self.streams:
      return prompt
    model = self._model(params, 'prior')
    if 'labels' in prompt:
      null = jnp.full_like(prompt['labels'], -1)
      of = {'prompt': prompt['labels'], 'null': null}
      return model.class_context(jnp.stack([of[s] for s in self.streams], axis=1))
    text, out = self._model(params, 'text'), {}
    if 'prompt' in self.streams:
      out['prompt'] = text(prompt['ids'], prompt['mask']), prompt['mask']
    if 'null' in self.streams:
      # the end token alone, unpadded: what pads would add is masked, there and in the prior
      states, pad = text(prompt['null']), self._null_words - 1
      mask = jnp.pad(jnp.ones_like(prompt['null']), ((0, 0), (0, pad)))
      out['null'] = jnp.pad(states, ((0, 0), (0, pad), (0, 0))), mask
    states, mask = (jnp.stack(x, axis=1) for x in zip(*(out[s] for s in self.streams)))
    return model.text_context(states, mask)

  @property
  def _null_words(self):
    """Words of the context: one suffices where no prompt is read."""
    return self.words if 'prompt' in self.streams else 1

  # ------------------------------------------------------------------------------------ candidates

  def init(self, params, ctx, keys):
    cache = ()
    if self.streams:
      model = self._model(params, 'prior')
      cache = model.init_cache(*keys.shape, len(self.streams), self.num_stages)
    tokens = jnp.zeros((*keys.shape, self.num_stages), jnp.int32)
    owners = keys if self.noise == 'candidate' else jnp.broadcast_to(keys[:, :1], keys.shape)
    return State(tokens, jnp.zeros(keys.shape), parts.noise_seed(owners), cache)

  def _next(self, params, ctx, state, stage):
    """Guided logits `[B, N, V]` of the token of `stage`, and the cache with the one before it."""
    if not self.streams:
      return jnp.zeros((*state.logp.shape, self.vocab)), state.cache
    model, many = self._model(params, 'prior'), jnp.ndim(stage) > 0
    before = jnp.broadcast_to(jnp.maximum(stage - 1, 0), state.logp.shape)[..., None]
    fed = jnp.take_along_axis(state.tokens, before, axis=2)
    hidden, cache = model.step(ctx, state.cache, fed, stage[..., None] if many else stage)
    return flexar.guide(model.logits(hidden[:, :, 0]), self.scale), cache

  def _push(self, state, cache, logits, token, stage):
    """`token [B, N]`, drawn from `logits`, at `stage`."""
    here = jnp.arange(self.num_stages) == jnp.asarray(stage)[..., None]
    tokens = jnp.where(here, token[..., None], state.tokens)
    logp = state.logp + sampling.log_prob(logits, token)
    return state._replace(tokens=tokens, logp=logp, cache=cache)

  def _adjust(self, logits):
    return sampling.adjust(logits, self.temperature, self.top_k, self.top_p)

  def _run(self, params, ctx, state, stage, count, choose):
    """`count` stages from `stage`; `choose(logits, t)` says which token comes next."""

    def one(state, t):
      logits, cache = self._next(params, ctx, state, t)
      return self._push(state, cache, logits, choose(logits, t), t)

    return core.run_stages(one, state, stage, count, self.num_stages)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def choose(logits, t):
      if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
      return sampling.draw(self._adjust(logits), core.fold(keys, t))

    return self._run(params, ctx, state, stage, count, choose)

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
    at = jnp.repeat(stage, k, axis=1) if jnp.ndim(stage) else stage
    return self._push(children, (), core.repeat(logits, k), flat, at), state._replace(cache=cache)

  def slim(self, state):
    return state._replace(cache=())

  def fatten(self, params, ctx, slim, stage, like=None):
    if like is not None:
      return slim._replace(cache=like.cache)
    if not self.streams:
      return slim
    # all positions at once; those from `stage` on are never looked at before they are rewritten
    return slim._replace(cache=self._model(params, 'prior').prefill(ctx, slim.tokens)[1])

  def latents(self, params, state, stage):
    """What the VAE decodes, `[B N, H, W, C]`."""
    config, lead = self.configs.tokenizer, state.tokens.shape[:2]
    decoder = self._model(params, 'tokenizer')
    keep = jnp.broadcast_to(stage, lead).reshape(-1)
    registers = decoder.condition(state.tokens.reshape(-1, config.tokens), keep)
    shape = (config.size, config.size, config.channels)
    noise = parts.noise(state.noise.reshape(-1, 2), shape)
    return flow.sample(decoder, registers, noise, self.decode_steps, self.decode_scale)

  def render(self, params, ctx, state, stage):
    vae = self._model(params, 'vae')
    images = vae.decode(vae.unscale(self.latents(params, state, stage))).astype(jnp.float32)
    return jnp.clip((images + 1) / 2, 0, 1).reshape(*state.logp.shape, *self.image_shape)

  def log_prob(self, state):
    return state.logp

  # ------------------------------------------------------------------------------------------ cost

  def cost(self, op, stage=0, count=1):
    c, streams = self.configs, len(self.streams)
    if op == 'render':
      passes = self.decode_steps * (1 if self.decode_scale == 1 else 2)
      flops = passes * flextok.flops_decode(c.tokenizer)
      return core.Cost(render=1, flops=flops + autoencoder_kl.flops_decode(c.vae, c.tokenizer.size))
    if not streams:
      return core.Cost()
    words = 0 if c.prior.classes else self._null_words
    if op == 'encode':
      flops = streams * flexar.flops_text(c.prior, words)
      if c.text is not None:
        width = {'prompt': self.words, 'null': 1}
        flops += sum(t5.flops(c.text, width[s]) for s in self.streams)
      return core.Cost(flops=flops)
    trunk = flexar.flops_trunk(c.prior, self.num_stages, words)
    if op == 'fatten':
      return core.Cost(generator=1, flops=streams * self.num_stages * trunk)
    evals = {'extend': count, 'force': count, 'fork': 1}[op]
    return core.Cost(evals, flops=evals * streams * (trunk + flexar.flops_head(c.prior)))


def build(**given) -> FlexTokAR:
  return components.build_dataclass(FlexTokAR, **given)
