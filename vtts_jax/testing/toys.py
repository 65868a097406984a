"""Small parts with known answers, to try algorithms and laws on: a token and a flow generator, two
verifiers."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import components, core
from vtts_jax import token_sampling as sampling


def _hashes(texts) -> np.ndarray:
  return np.array([sum((i + 1) * ord(c) for i, c in enumerate(t)) % 997 for t in texts], np.int32)


class TokenState(NamedTuple):
  """Tokens `[B, N, T]`, log-probability `[B, N]`, and as its cache the running sum of token values
  `[B, N]`."""

  tokens: jax.Array
  logp: jax.Array
  cache: Any


@dataclasses.dataclass(frozen=True)
class Tokens(core.Generator):
  """T tokens of V values; the next one depends on the prompt, the position and a cached sum of all
  before.

  A picture is a column of T bars, one a token, as bright as the token's value; bars not yet drawn
  are grey.
  """

  length: int = 6
  vocab: int = 8
  anytime: bool = True
  coarse: bool = False  # a cheaper render: bars black or white
  value_of: str = ''  # 'target' for a value head
  rollout_policy: str = ''  # 'small' for a policy that draws any token alike

  @property
  def num_stages(self):
    return self.length

  @property
  def image_shape(self):
    return (self.length, 2, 3)

  def tokenize(self, texts):
    return {'hash': _hashes(texts)}

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
    return TokenState(tokens, state.logp + sampling.log_prob(logits, token), state.cache + token)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def one(state, t):
      logits = self.logits(ctx, state, t)
      token = (
        jnp.argmax(logits, -1).astype(jnp.int32)
        if greedy
        else sampling.draw(logits, core.fold(keys, t))
      )
      return self._push(state, token, logits, t)

    return core.run_stages(one, state, stage, count, self.length)

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    logits = self.logits(ctx, state, stage)
    if replace:
      tokens = sampling.draw(logits[:, :, None], core.fold(keys, stage))
    else:
      tokens = sampling.draw_distinct(logits, core.fold(keys[:, :, 0], stage), k)
    tokens = tokens.reshape(tokens.shape[0], -1)
    return self.slim(
      self._push(core.repeat(state, k), tokens, core.repeat(logits, k), stage)
    ), state

  def force(self, params, ctx, state, tokens):
    for t in range(tokens.shape[2]):
      state = self._push(state, tokens[:, :, t], self.logits(ctx, state, t), t)
    return state

  def slim(self, state):
    return state._replace(cache=())

  def fatten(self, params, ctx, slim, stage, like=None):
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    return slim._replace(cache=jnp.where(drawn, slim.tokens, 0).sum(-1).astype(jnp.float32))

  def render(self, params, ctx, state, stage):
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    bars = state.tokens / (self.vocab - 1)
    bars = jnp.where(drawn, jnp.round(bars) if self.coarse else bars, 0.5)
    return jnp.broadcast_to(bars[..., None, None], (*state.tokens.shape, 2, 3))

  def log_prob(self, state):
    return state.logp

  def value(self, params, ctx, slim, stage):
    if not self.value_of:
      return super().value(params, ctx, slim, stage)
    drawn = jnp.arange(self.length) < jnp.asarray(stage)[..., None]
    mean = jnp.where(drawn, slim.tokens, 0).sum(-1) / (self.length * self.vocab)
    return -0.1 - 0.1 * mean * (1 + jnp.sin(jnp.float32(ctx)))[:, None]

  def rollout(self, params, ctx, slim, keys, stage, count, *, greedy=False):
    if not self.rollout_policy:
      return super().rollout(params, ctx, slim, keys, stage, count, greedy=greedy)
    flat = jnp.zeros((*keys.shape, self.vocab))

    def one(tokens, t):
      token = jnp.argmax(flat, -1) if greedy else sampling.draw(flat, core.fold(keys, t))
      here = jnp.arange(self.length) == jnp.asarray(t)[..., None]
      return jnp.where(here, token[..., None], tokens)

    return slim._replace(tokens=core.run_stages(one, slim.tokens, stage, count, self.length))

  def cost(self, op, stage=0, count=1):
    evals = {'extend': count, 'fork': 1, 'force': count, 'fatten': 1, 'value': 1}
    evals = (evals | {'rollout': 1 + count}).get(op, 0)
    drawing = (1 if self.coarse else 100) * float(op == 'render')
    return core.Cost(generator=evals, render=drawing > 0, flops=self.vocab * evals + drawing)


@dataclasses.dataclass(frozen=True)
class Flow(core.Generator):
  """A stochastic flow of `steps` steps from noise to a prompt's colour; its picture is the
  predicted end point."""

  steps: int = 4
  noise: float = 0.3

  @property
  def num_stages(self):
    return self.steps

  @property
  def image_shape(self):
    return (2, 2, 3)

  def tokenize(self, texts):
    return {'hash': _hashes(texts)}

  def encode(self, params, prompt):
    return jnp.float32(prompt['hash'] % 10) / 9

  def init(self, params, ctx, keys):
    draw = jax.vmap(lambda k: jax.random.normal(k, self.image_shape))
    return draw(core.fold(keys, core.CHILD - 1).reshape(-1)).reshape(*keys.shape, *self.image_shape)

  def _end(self, ctx, x):
    return jax.nn.sigmoid(x) * 0.5 + ctx[:, None, None, None, None] * 0.5

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def one(x, t):
      draw = jax.vmap(lambda k: jax.random.normal(k, self.image_shape))
      eps = draw(core.fold(keys, t).reshape(-1)).reshape(x.shape)
      t = jnp.reshape(t, (*jnp.shape(t), 1, 1, 1))
      scale = 0.0 if greedy else self.noise * (self.steps - 1 - t) / self.steps
      return x + (self._end(ctx, x) - x) / (self.steps - t) + scale * eps

    return core.run_stages(one, state, stage, count, self.steps)

  def render(self, params, ctx, state, stage):
    return jnp.clip(self._end(ctx, state), 0, 1)

  def cost(self, op, stage=0, count=1):
    evals = {'extend': count, 'fork': 1}.get(op, 0)
    return core.Cost(generator=evals, render=float(op == 'render'), flops=12 * evals)


@dataclasses.dataclass(frozen=True)
class Target(core.Verifier):
  """Minus the squared distance of an image to the prompt's own random brightness pattern."""

  name: str = 'target'
  rows: int = 6
  poison: float = -1.0  # images whose first pixel is this bright score NaN

  @property
  def names(self):
    return (self.name,)

  def tokenize(self, texts):
    return {'hash': _hashes(texts)}

  def encode(self, params, prompt):
    phase = jnp.float32(prompt['hash'])[:, None] * 0.61 + jnp.arange(self.rows) * 2.3
    return 0.5 + 0.5 * jnp.sin(phase)  # [B, rows]

  def score(self, params, vctx, images, **signals):
    want = vctx[:, None, : images.shape[2], None, None]
    score = -((images - want) ** 2).mean((2, 3, 4))
    first = images[:, :, 0, 0, 0]
    return {self.name: jnp.where(jnp.abs(first - self.poison) < 1e-6, jnp.nan, score)}

  def features(self, params, images):
    return images.mean((3, 4))

  def cost(self, op):
    return core.Cost(verify=float(op == 'score'))


@dataclasses.dataclass(frozen=True)
class Brightness(core.Verifier):
  """Mean brightness: a score that has nothing to do with the prompt."""

  @property
  def names(self):
    return ('brightness',)

  def score(self, params, vctx, images, **signals):
    return {'brightness': images.mean((2, 3, 4))}

  def cost(self, op):
    return core.Cost(verify=float(op == 'score'))


PARTS = {'tokens': Tokens, 'flow': Flow, 'target': Target, 'brightness': Brightness}


def build(part: str, **settings):
  """A toy as a component: `{'name': 'vtts_jax.testing.toys', 'part': 'tokens', 'length': 6}`."""
  return components.build_dataclass(PARTS[part], **settings)


def prompts(count: int) -> list[dict]:
  """A prompt set of two categories."""
  return [{'prompt': f'prompt {i}', 'tag': 'even' if i % 2 == 0 else 'odd'} for i in range(count)]


def score(images: np.ndarray, metadata) -> np.ndarray:
  """A metric: is an image nearer than 0.1 (mean squared) to what its prompt asks for?"""
  ver = Target(rows=images.shape[1])
  want = np.asarray(ver.encode({}, ver.tokenize([m['prompt'] for m in metadata])))
  return ((images - want[:, :, None, None]) ** 2).mean((1, 2, 3)) < 0.1
