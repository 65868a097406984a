"""Flow matching in the scene world's pixels: a stage is one step from noise to picture.

x_t = (1 - t) noise + t data (scenes/models/flow.py). A step predicts the end point and the noise,
then puts both together again at the next time, with a share `eta` of the noise drawn afresh (0:
the Euler step of the ODE, so a candidate is its initial noise; above 0 candidates diverge on the
way, as particle methods need). What is shown is the predicted end point, which costs no evaluation.
Letters: B prompts, N candidates, T steps, H W image.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.scenes import models as models
from vtts_jax.scenes import world as scenes
from vtts_jax.scenes.models import flow

MODEL = 'flow'
_config, _card = functools.cache(models.config), functools.cache(models.card)
INITIAL = core.CHILD - 1  # folded in for the initial noise; stages fold in 0 .. T - 1


class State(NamedTuple):
  """The point on the path, the end point predicted there, and that of step `early_at` at most (or
  ()), each `[B, N, H, W, 3]` in about -1 .. 1."""

  x: jax.Array
  end: jax.Array
  early: Any = ()


@dataclasses.dataclass(frozen=True)
class ScenesFlow(core.Generator):
  """The embedded flow model.

  Attributes:
    steps: T.
    guidance: classifier-free guidance scale >= 0; 1 runs the prompt alone; -1 is the shipped scale.
    eta: share of the noise that each step draws afresh, in [0, 1].
    early_at: the last step whose predicted end point is kept for `verifiers.self_consistency`;
      0 keeps none.
  """

  steps: int = 24
  guidance: float = -1.0
  eta: float = 0.0
  early_at: int = 0

  def __post_init__(self):
    if not isinstance(self.steps, int) or self.steps < 1:
      raise ConfigError(f'generator.steps={self.steps!r}: must be an integer >= 1')
    if not (self.guidance >= 0 or self.guidance == -1):
      raise ConfigError(
        f'generator.guidance={self.guidance}: must be >= 0, or -1 (as shipped)'
      )
    if not isinstance(self.early_at, int) or not 0 <= self.early_at <= self.steps:
      raise ConfigError(
        f'generator.early_at={self.early_at!r}: must be an integer in 0 .. {self.steps}'
      )
    if not 0 <= self.eta <= 1:
      raise ConfigError(f'generator.eta={self.eta}: must be in [0, 1]')

  @property
  def num_stages(self):
    return self.steps

  @property
  def image_shape(self):
    return (scenes.SIZE, scenes.SIZE, 3)

  @property
  def stochastic(self):
    return self.eta > 0

  @property
  def keeps_early(self):
    return self.early_at > 0

  @property
  def scale(self) -> float:
    """The guidance scale in force."""
    return float(self.guidance if self.guidance >= 0 else _card(MODEL)['guidance'])

  def load(self):
    return models.load(MODEL)[1]

  def tokenize(self, texts):
    return {'text': scenes.tokenize(texts)}

  def encode(self, params, prompt):
    model = modules.merge(models.load(MODEL)[0], params)
    text = prompt['text']
    return {'prompt': model.text(text), 'null': model.text(jnp.zeros_like(text))}

  def _noise(self, keys):
    draw = jax.vmap(lambda key: jax.random.normal(key, self.image_shape))
    return draw(keys.reshape(-1)).reshape(*keys.shape, *self.image_shape)

  def init(self, params, ctx, keys):
    x = self._noise(core.fold(keys, INITIAL))
    return State(x, jnp.zeros_like(x), jnp.zeros_like(x) if self.early_at else ())

  def _velocity(self, params, ctx, x, t):
    """Guided velocity `[B, N, H, W, 3]` at time t."""
    model = modules.merge(models.load(MODEL)[0], params)
    b, n = x.shape[:2]
    rows = x.reshape(b * n, *x.shape[2:])
    streams = {0.0: ('null',), 1.0: ('prompt',)}.get(self.scale, ('prompt', 'null'))
    text = jnp.concatenate([jnp.repeat(ctx[s], n, axis=0) for s in streams])
    rows = jnp.concatenate([rows] * len(streams))
    times = jnp.tile(jnp.broadcast_to(t, (b, n)).reshape(-1), len(streams))
    v = jnp.split(model(rows, times, text), len(streams))
    v = v[0] if len(v) == 1 else v[1] + self.scale * (v[0] - v[1])
    return v.reshape(x.shape)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    def one(state, i):
      t, after = i / self.steps, (i + 1) / self.steps
      v = self._velocity(params, ctx, state.x, t)
      t, after = (jnp.reshape(y, (*jnp.shape(y), 1, 1, 1)) for y in (t, after))
      end, noise = state.x + (1 - t) * v, state.x - t * v
      if self.eta and not greedy:
        fresh = self._noise(core.fold(keys, i))
        noise = jnp.sqrt(1 - self.eta**2) * noise + self.eta * fresh
      early = ()
      if self.early_at:
        here = jnp.reshape(i < self.early_at, (*jnp.shape(i), 1, 1, 1))
        early = jnp.where(here, end, state.early)
      return State(after * end + (1 - after) * noise, end, early)

    return core.run_stages(one, state, stage, count, self.steps)

  def render(self, params, ctx, state, stage):
    return jnp.clip((state.end + 1) / 2, 0, 1)

  def early(self, params, ctx, state):
    return jnp.clip((state.early + 1) / 2, 0, 1)

  def cost(self, op, stage=0, count=1):
    config = _config(MODEL)
    streams = 1 if self.scale in (0.0, 1.0) else 2
    evals = {'extend': count, 'fork': 1}.get(op, 0)
    flops = evals * streams * flow.flops_velocity(config)
    if op == 'encode':
      flops = 2 * flow.flops_text(config)
    return core.Cost(generator=evals, render=float(op == 'render'), flops=flops)


def build(**given) -> ScenesFlow:
  return components.build_dataclass(ScenesFlow, **given)
