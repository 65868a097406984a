"""Small parts with known answers, to try algorithms and laws on: a generator of each kind (tokens,
scales, a flow, text with an end token) and verifiers of pictures and of text."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import components, core, token_sampling
from vtts_jax.core import Output
from vtts_jax.errors import ConfigError


def hash_prompts(prompts) -> np.ndarray:
  """A number of each prompt's text, `[B]` int32."""
  texts = core.texts_of(prompts)
  return np.array(
    [sum((i + 1) * ord(c) for i, c in enumerate(t)) % 997 for t in texts], np.int32
  )


class TokenState(NamedTuple):
  """Tokens `[B, N, T]`, log-probability `[B, N]`, and as its cache the running sum of token values
  `[B, N]`."""

  tokens: jax.Array
  log_prob: jax.Array
  cache: Any


@dataclasses.dataclass(frozen=True)
class Tokens(core.Generator):
  """T tokens of V values; the next one depends on the prompt, the position and a cached sum of all
  before.

  A picture is a column of T bars, one a token, as bright as the token's value; bars not yet drawn
  are grey.

  Attributes:
    length, vocab: T and V.
    prefixes_are_samples: whether an unfinished picture may be returned.
    coarse: a cheaper picture: bars black or white.
    value_of: 'target' for a value head.
    rollout_model: 'small' for a model that draws any token alike.
  """

  length: int = 6
  vocab: int = 8
  prefixes_are_samples: bool = True
  coarse: bool = False
  value_of: str = ''
  rollout_model: str = ''

  @property
  def num_stages(self):
    return self.length

  @property
  def outputs(self):
    number = Output('scalar', ())
    tokens = Output('tokens', (self.length,))
    image = Output('image', (self.length, 2, 3))
    return {'image': image, 'log_prob': number, 'length': number, 'tokens': tokens}

  @property
  def offers(self):
    offers = {'fork', 'fork_distinct', 'stochastic', 'tokens', 'rewind'}
    offers |= {'value'} if self.value_of else set()
    return frozenset(offers | ({'rollout'} if self.rollout_model else set()))

  def tokenize(self, prompts):
    return {'hash': hash_prompts(prompts)}

  def encode(self, params, prompt):
    return prompt['hash']

  def init(self, params, ctx, keys):
    none = jnp.zeros((*keys.shape, self.length), jnp.int32)
    return TokenState(none, jnp.zeros(keys.shape), jnp.zeros(keys.shape))

  def logits(self, ctx, state, stage):
    """Next-token logits `[B, N, V]`."""
    phase = jnp.float32(ctx)[:, None] * 0.37 + state.cache * 0.91 + jnp.asarray(stage) * 1.7
    return 2 * jnp.sin(phase[..., None] * (1 + jnp.arange(self.vocab)))

  def _push(self, state, token, logits, stage):
    here = jnp.arange(self.length) == jnp.asarray(stage)[..., None]
    tokens = jnp.where(here, token[..., None], state.tokens)
    log_prob = state.log_prob + token_sampling.token_log_prob(logits, token)
    return TokenState(tokens, log_prob, state.cache + token)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def one(state, t):
      logits = self.logits(ctx, state, t)
      if greedy:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
      else:
        token = token_sampling.draw_tokens(logits, core.fold(keys, t))
      return self._push(state, token, logits, t)

    return core.run_stages(one, state, stage, count, self.length)

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    logits = self.logits(ctx, state, stage)
    if replace:
      tokens = token_sampling.draw_tokens(logits[:, :, None], core.fold(keys, stage))
    else:
      tokens = token_sampling.draw_distinct(logits, core.fold(keys[:, :, 0], stage), k)
    tokens = tokens.reshape(tokens.shape[0], -1)
    children = self._push(core.repeat(state, k), tokens, core.repeat(logits, k), stage)
    return self.drop_cache(children), state

  def tokens(self, state):
    return state.tokens

  def extend_with_tokens(self, params, ctx, state, tokens, stage=0):
    for t in range(tokens.shape[2]):
      at = stage + t
      state = self._push(state, tokens[:, :, t], self.logits(ctx, state, at), at)
    return state

  def rewind(self, state, stage):
    """The log-probability of the prefix is not kept, so it is that of the whole."""
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    return TokenState(jnp.where(drawn, state.tokens, 0), state.log_prob, ())

  def drop_cache(self, state):
    return state._replace(cache=())

  def rebuild_cache(self, params, ctx, state, stage, share=None):
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    return state._replace(cache=jnp.where(drawn, state.tokens, 0).sum(-1).astype(jnp.float32))

  def observe(self, params, ctx, state, stage, names):
    lead = state.tokens.shape[:2]
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    bars = state.tokens / (self.vocab - 1)
    bars = jnp.where(drawn, jnp.round(bars) if self.coarse else bars, 0.5)
    seen = {
      'image': jnp.broadcast_to(bars[..., None, None], (*lead, self.length, 2, 3)),
      'log_prob': state.log_prob,
      'length': jnp.broadcast_to(jnp.asarray(stage, jnp.float32), lead),
      'tokens': jnp.where(drawn, state.tokens, 0),
    }
    return {name: seen[name] for name in names}

  def value(self, params, ctx, state, stage):
    if not self.value_of:
      return super().value(params, ctx, state, stage)
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    mean = jnp.where(drawn, state.tokens, 0).sum(-1) / (self.length * self.vocab)
    return -0.1 - 0.1 * mean * (1 + jnp.sin(jnp.float32(ctx)))[:, None]

  def rollout(self, params, ctx, state, keys, stage, count, *, greedy=False):
    if not self.rollout_model:
      return super().rollout(params, ctx, state, keys, stage, count, greedy=greedy)
    flat = jnp.zeros((*keys.shape, self.vocab))

    def one(tokens, t):
      drawn = token_sampling.draw_tokens(flat, core.fold(keys, t))
      token = jnp.zeros_like(drawn) if greedy else drawn
      here = jnp.arange(self.length) == jnp.asarray(t)[..., None]
      return jnp.where(here, token[..., None], tokens)

    return state._replace(tokens=core.run_stages(one, state.tokens, stage, count, self.length))

  def cost(self, op, stage=0, count=1):
    if op == 'observe:image':
      return core.Cost(observe=1, flops=1 if self.coarse else 100)
    evals = {
      'extend': count, 'fork': 1, 'extend_with_tokens': count, 'rebuild_cache': 1, 'value': 1,
      'rollout': 1 + min(count, self.length - stage),
    }.get(op, 0)  # fmt: skip
    return core.Cost(generator=evals, flops=self.vocab * evals)


@dataclasses.dataclass(frozen=True)
class Scales(core.Generator):
  """Next-scale tokens: stage s draws the 2 ** s tokens of its scale, given the scales before.

  A picture is the mean of the scales that are drawn, each stretched to the finest one. Stages do
  different amounts of work, so they are static and common to all candidates.
  """

  scales: int = 3
  vocab: int = 8

  uniform_stages = False
  prefixes_are_samples = True

  @property
  def num_stages(self):
    return self.scales

  @property
  def width(self):
    """Tokens of the finest scale."""
    return 2 ** (self.scales - 1)

  @property
  def outputs(self):
    return {'image': Output('image', (self.width, 2, 3))}

  def tokenize(self, prompts):
    return {'hash': hash_prompts(prompts)}

  def encode(self, params, prompt):
    return prompt['hash']

  def init(self, params, ctx, keys):
    return jnp.zeros((*keys.shape, 2**self.scales - 1), jnp.int32)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    if not isinstance(stage, int):
      raise ConfigError(f'generator Scales: stage={stage!r} must be an integer for all candidates')
    for s in range(stage, min(stage + count, self.scales)):
      low, high = 2**s - 1, 2 ** (s + 1) - 1
      phase = jnp.float32(ctx)[:, None] * 0.29 + state[..., :low].sum(-1) * 0.83 + s
      place = jnp.arange(high - low) * 1.3
      logits = 2 * jnp.sin(
        (phase[..., None, None] + place[:, None]) * (1 + jnp.arange(self.vocab))
      )  # [B, N, tokens of the scale, V]
      if greedy:
        drawn = jnp.argmax(logits, -1)
      else:
        draw = jax.vmap(lambda key, row: jax.random.categorical(key, row))
        rows = logits.reshape(-1, *logits.shape[2:])
        drawn = draw(core.fold(keys, s).reshape(-1), rows).reshape(logits.shape[:3])
      state = state.at[..., low:high].set(drawn.astype(jnp.int32))
    return state

  def observe(self, params, ctx, state, stage, names):
    stage = jnp.broadcast_to(jnp.asarray(stage), state.shape[:2])[..., None]
    total, drawn = jnp.zeros((*state.shape[:2], self.width)), jnp.zeros(stage.shape)
    for s in range(self.scales):
      scale = state[..., 2**s - 1 : 2 ** (s + 1) - 1] / (self.vocab - 1)
      scale = jnp.repeat(scale, self.width // 2**s, axis=-1)
      total, drawn = total + jnp.where(s < stage, scale, 0), drawn + (s < stage)
    bars = jnp.where(drawn > 0, total / jnp.maximum(drawn, 1), 0.5)
    return {'image': jnp.broadcast_to(bars[..., None, None], (*bars.shape, 2, 3))}

  def cost(self, op, stage=0, count=1):
    # the default fork runs a stage for each of its `count` children
    stages, copies = {'extend': (count, 1), 'fork': (1, count)}.get(op, (0, 0))
    first, last = stage, min(stage + stages, self.scales)
    return core.Cost(
      generator=stages * copies,
      observe=float(op == 'observe:image'),
      flops=(2**last - 2**first) * self.vocab * copies,
    )


@dataclasses.dataclass(frozen=True)
class Flow(core.Generator):
  """A stochastic flow of `steps` steps from noise to a prompt's colour; its picture is the
  predicted end point."""

  steps: int = 4
  noise: float = 0.3

  offers = frozenset({'fork', 'stochastic', 'noise', 'perturb', 'renoise'})

  SHAPE = (2, 2, 3)

  @property
  def num_stages(self):
    return self.steps

  @property
  def outputs(self):
    return {'image': Output('image', self.SHAPE)}

  def tokenize(self, prompts):
    return {'hash': hash_prompts(prompts)}

  def encode(self, params, prompt):
    return jnp.float32(prompt['hash'] % 10) / 9

  def _normal(self, keys):
    draw = jax.vmap(lambda key: jax.random.normal(key, self.SHAPE))
    return draw(keys.reshape(-1)).reshape(*keys.shape, *self.SHAPE)

  def init(self, params, ctx, keys):
    return self._normal(core.fold(keys, core.CHILD - 1))

  def _end(self, ctx, x):
    return jax.nn.sigmoid(x) * 0.5 + ctx[:, None, None, None, None] * 0.5

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def one(x, t):
      fresh = self._normal(core.fold(keys, t))
      t = jnp.reshape(t, (*jnp.shape(t), 1, 1, 1))
      scale = 0.0 if greedy else self.noise * (self.steps - 1 - t) / self.steps
      return x + (self._end(ctx, x) - x) / (self.steps - t) + scale * fresh

    return core.run_stages(one, state, stage, count, self.steps)

  def observe(self, params, ctx, state, stage, names):
    return {'image': jnp.clip(self._end(ctx, state), 0, 1)}

  def initial_noise(self, state):
    return state

  def start_state(self, noise):
    return noise

  def perturb(self, state, keys, scale, stage=0):
    """At stage 0 the noise turns towards a fresh draw, later a tenth of one is added."""
    fresh, scale = self._normal(core.fold(keys, core.CHILD - 2)), self._per_picture(scale)
    length = lambda x: jnp.sqrt((x**2).sum((2, 3, 4), keepdims=True))
    unit = state / length(state)
    across = fresh - (fresh * unit).sum((2, 3, 4), keepdims=True) * unit
    across = across * length(state) / length(across)
    turned = jnp.cos(scale) * state + jnp.sin(scale) * across
    moved = state + 0.1 * scale * fresh
    return jnp.where(self._per_picture(stage) == 0, turned, moved)

  def renoise(self, state, keys, stage, to, noise=None):
    """The share to / stage of the state is kept."""
    fresh = self._normal(core.fold(keys, core.CHILD - 3)) if noise is None else noise
    share = self._per_picture(to) / jnp.maximum(self._per_picture(stage), 1)
    share = jnp.where(self._per_picture(stage) == self._per_picture(to), 1.0, share)
    return share * state + jnp.sqrt(1 - share**2) * fresh

  def _per_picture(self, value):
    """A scalar or `[B, N]`, given axes that broadcast against pictures."""
    return jnp.reshape(jnp.asarray(value), (*jnp.shape(value), 1, 1, 1))

  def cost(self, op, stage=0, count=1):
    evals = {'extend': count, 'fork': count}.get(op, 0)
    return core.Cost(generator=evals, observe=float(op == 'observe:image'), flops=12 * evals)


@dataclasses.dataclass(frozen=True)
class Words(core.Generator):
  """Text of at most T letters, of which each may be the last: an end token finishes a candidate.

  The state is the letters `[B, N, T]`, 0 for the end and after it.
  """

  length: int = 5
  vocab: int = 6

  ALPHABET = b'\0abcdefghijklmnopqrstuvwxyz'

  @property
  def num_stages(self):
    return self.length

  @property
  def outputs(self):
    return {'text': Output('text', (self.length,)), 'length': Output('scalar', ())}

  def tokenize(self, prompts):
    return {'hash': hash_prompts(prompts)}

  def encode(self, params, prompt):
    return prompt['hash']

  def init(self, params, ctx, keys):
    return jnp.zeros((*keys.shape, self.length), jnp.int32)

  def stages_done(self, state, stage):
    """The end token is a stage too."""
    done = jnp.broadcast_to(jnp.asarray(stage, jnp.int32), state.shape[:2])
    letters = jnp.cumprod(state > 0, axis=-1).sum(-1)
    return jnp.minimum(done, jnp.minimum(letters + 1, self.length))

  def finished(self, state, stage):
    done = jnp.broadcast_to(jnp.asarray(stage, jnp.int32), state.shape[:2])
    ended = self.stages_done(state, stage) < done
    last = jnp.take_along_axis(state, jnp.maximum(done - 1, 0)[..., None], 2)[..., 0]
    return ended | (done >= self.length) | ((done > 0) & (last == 0))

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def one(state, t):
      at = jnp.broadcast_to(jnp.asarray(t), state.shape[:2])
      phase = jnp.float32(ctx)[:, None] * 0.41 + state.sum(-1) * 0.77 + at
      logits = 2 * jnp.sin(phase[..., None] * (1 + jnp.arange(self.vocab)))
      if greedy:
        letter = jnp.argmax(logits, -1)
      else:
        letter = token_sampling.draw_tokens(logits, core.fold(keys, t))
      here = (jnp.arange(self.length) == at[..., None]) & ~self.finished(state, at)[..., None]
      return jnp.where(here, letter[..., None].astype(jnp.int32), state)

    return core.run_stages(one, state, stage, count, self.length)

  def observe(self, params, ctx, state, stage, names):
    letters = jnp.asarray(np.frombuffer(self.ALPHABET, np.uint8))[state]
    length = self.stages_done(state, stage).astype(jnp.float32)
    return {name: {'text': letters, 'length': length}[name] for name in names}

  def cost(self, op, stage=0, count=1):
    evals = {'extend': count, 'fork': count}.get(op, 0)
    return core.Cost(generator=evals, observe=float(op == 'observe:text'), flops=self.vocab * evals)


@dataclasses.dataclass(frozen=True)
class Target(core.Verifier):
  """Minus the squared distance of an image to the prompt's own random brightness pattern.

  Attributes:
    name: of the score.
    rows: of the pattern, at most.
    poison: images whose first pixel is this bright score NaN.
  """

  name: str = 'target'
  rows: int = 6
  poison: float = -1.0

  gives = frozenset({'features', 'gradient'})

  @property
  def names(self):
    return (self.name,)

  def tokenize(self, prompts):
    return {'hash': hash_prompts(prompts)}

  def encode(self, params, prompt):
    phase = jnp.float32(prompt['hash'])[:, None] * 0.61 + jnp.arange(self.rows) * 2.3
    return 0.5 + 0.5 * jnp.sin(phase)  # [B, rows]

  def score(self, params, vctx, observed):
    images = observed['image']
    want = vctx[:, None, : images.shape[2], None, None]
    score = -((images - want) ** 2).mean((2, 3, 4))
    first = images[:, :, 0, 0, 0]
    return {self.name: jnp.where(jnp.abs(first - self.poison) < 1e-6, jnp.nan, score)}

  def embed_images(self, params, images):
    return images.mean((3, 4))


@dataclasses.dataclass(frozen=True)
class Brightness(core.Verifier):
  """Mean brightness: a score that has nothing to do with the prompt."""

  gives = frozenset({'gradient'})

  @property
  def names(self):
    return ('brightness',)

  def score(self, params, vctx, observed):
    return {'brightness': observed['image'].mean((2, 3, 4))}


@dataclasses.dataclass(frozen=True)
class Letters(core.Verifier):
  """How many letters of a text are 'a' or 'b', less a little for each letter."""

  needs = frozenset({'text', 'length'})

  @property
  def names(self):
    return ('letters',)

  def score(self, params, vctx, observed):
    text = observed['text']
    wanted = (text == ord('a')) | (text == ord('b'))
    return {'letters': wanted.sum(-1) - 0.1 * observed['length']}


PARTS = {
  'tokens': Tokens, 'scales': Scales, 'flow': Flow, 'words': Words, 'target': Target,
  'brightness': Brightness, 'letters': Letters,
}  # fmt: skip


def build(part: str, **settings):
  """A toy as a component: `{'name': 'vtts_jax.testing.toys', 'part': 'tokens', 'length': 6}`."""
  return components.build_component(PARTS[part], **settings)


def prompts(count: int) -> list[dict]:
  """A prompt set of two categories."""
  return [{'text': f'prompt {i}', 'tag': 'even' if i % 2 == 0 else 'odd'} for i in range(count)]


def grade(images: np.ndarray, prompts) -> np.ndarray:
  """A metric: is an image nearer than 0.1 (mean squared) to what its prompt asks for?"""
  images = images / 255 if images.dtype == np.uint8 else images
  ver = Target(rows=images.shape[1])
  want = np.asarray(ver.encode({}, ver.tokenize(prompts)))
  return ((images - want[:, :, None, None]) ** 2).mean((1, 2, 3)) < 0.1
