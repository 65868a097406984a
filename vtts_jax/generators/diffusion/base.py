"""The base of diffusion and flow generators: from noise to a picture in steps.

The author of a family writes what its models do:

  model_parts()                                 which models there are
  tokenize(prompts) · encode(params, prompt)    prompts to a context, leaves `[B, C, ...]`
  predict(params, ctx, x, t)                    the network, for all streams of guidance at once
  decode(params, x)                             data `[B, N, ...]` to pictures
  flops(op)                                     of 'encode', 'predict' (all streams), 'decode'

and the facts `data_shape` and `decoded_output`. Four small frozen dataclasses say the rest: `path`
and `predictor`, which a family sets, `stepper` and `guide`, which settings make. A stage is a group
of `steps_per_stage` steps. What is shown is the decoded end point that the last step predicted.

Letters: B prompts, N candidates, C streams.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import guidance, paths, steppers
from vtts_jax.generators.guided_models import GuidedModels

# what is folded into a candidate's key besides the steps 0, 1 ...: all different
INITIAL, PERTURB, RENOISE = core.CHILD - 1, core.CHILD - 2, core.CHILD - 3


class State(NamedTuple):
  """Candidates; leaves `[B, N, *data_shape]`, float32.

  Attributes:
    x: the point on the path.
    noise: the initial noise, which is the candidate where no step draws any.
    end: the data predicted by the last step; 0 before the first.
    early: the same of step `early_at` at most, or ().
  """

  x: jax.Array
  noise: jax.Array
  end: jax.Array
  early: Any = ()


@dataclasses.dataclass(frozen=True)
class DiffusionGenerator(GuidedModels, core.Generator):
  """See above.

  Attributes:
    steps: of the sampler.
    steps_per_stage: how many of them are a stage; it must divide `steps`. A sample does not depend
      on it.
    eta: share of the noise that each step draws afresh, in [0, 1].
    early_at: the last step whose predicted end point is kept, to be shown as 'early_image' (of
      `verifiers.self_consistency`); 0 keeps none.
  """

  steps: int = 24
  steps_per_stage: int = 1
  eta: float = 0.0
  early_at: int = 0

  path = paths.LinearPath()
  predictor = guidance.VelocityPredictor()

  def __post_init__(self):
    super().__post_init__()
    for name, low, high in (('steps', 1, None), ('early_at', 0, self.steps)):
      value = getattr(self, name)
      if not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f'in {low} .. {high}' if high is not None else f'>= {low}'
        raise ConfigError(f'generator.{name}={value!r}: must be an integer {allowed}')
    size = self.steps_per_stage
    if not isinstance(size, int) or size < 1 or self.steps % size:
      raise ConfigError(f'generator.steps_per_stage={size!r}: must divide steps={self.steps}')
    if not 0 <= self.eta <= 1:
      raise ConfigError(f'generator.eta={self.eta}: must be in [0, 1]')

  # ------------------------------------------------------------------------- what an author writes

  @property
  def data_shape(self) -> tuple[int, ...]:
    """Of one x, such as (H, W, C) of a latent."""
    raise NotImplementedError

  @property
  def decoded_output(self) -> core.Output:
    """What `decode` gives; its kind is its name among the outputs."""
    raise NotImplementedError

  def predict(self, params, ctx, x: jax.Array, t: jax.Array) -> jax.Array:
    """The network's output like x at x `[B, C, N, *data_shape]` and times t `[B, C, N]`; leaves of
    ctx are `[B, C, ...]`. `flatten_rows` makes rows of them."""
    raise NotImplementedError

  def decode(self, params, x: jax.Array) -> jax.Array:
    """`[B, N, *decoded_output.shape]` of data `[B, N, *data_shape]`."""
    raise NotImplementedError

  @property
  def times(self) -> np.ndarray:
    """Times `[steps + 1]` float32 of the sampler, from 0 to 1; a family may shift them."""
    return np.arange(self.steps + 1, dtype=np.float32) / np.float32(self.steps)

  # ------------------------------------------------------------------------------------- the facts

  @property
  def stepper(self):
    return steppers.EulerStepper(self.eta)

  @property
  def guide(self):
    return guidance.ClassifierFreeGuidance(self.guidance_scale)

  @property
  def num_stages(self):
    return self.steps // self.steps_per_stage

  @property
  def outputs(self):
    shown = self.decoded_output
    early = {f'early_{shown.kind}': shown} if self.early_at else {}
    return {shown.kind: shown, **early}

  @property
  def offers(self):
    drawn = {'stochastic'} if self.stepper.is_stochastic else set()
    return frozenset({'fork', 'perturb', 'renoise'} | drawn)

  # ---------------------------------------------------------------------------------- the protocol

  def init(self, params, ctx, keys):
    return self._start(self._draw_noise(core.fold(keys, INITIAL)))

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    times = jnp.asarray(self.times)
    split = lambda x, t: self._split(params, ctx, x, t)

    def step(state, i):
      t, after = (self._spread(times[j]) for j in (i, i + 1))
      draws = self.stepper.is_stochastic and not greedy
      fresh = self._draw_noise(core.fold(keys, i)) if draws else None
      x, end = self.stepper.step(split, self.path, state.x, t, after, fresh)
      early = ()
      if self.early_at:
        early = jnp.where(self._spread(i < self.early_at), end, state.early)
      return State(x, state.noise, end, early)

    size = self.steps_per_stage
    return core.run_stages(step, state, stage * size, count * size, self.steps)

  def observe(self, params, ctx, state, stage, names):
    shown = {self.decoded_output.kind: state.end, f'early_{self.decoded_output.kind}': state.early}
    for name in names:
      if name not in self.outputs:
        raise ConfigError(f'output {name!r}: {type(self).__name__} shows {", ".join(self.outputs)}')
    return {name: self.decode(params, shown[name]) for name in names}

  def perturb(self, state, keys, scale):
    """Neighbours at stage 0, whose initial noise is that of the candidates (at any stage) turned by
    the angle `scale` (radians, a scalar or `[B, N]`) in a random direction.

    The norm is kept, since that of Gaussian noise is nearly constant: noise of another norm is none
    that the model was trained on. An angle of pi / 2 is an independent draw.
    """
    axes = tuple(range(2, state.noise.ndim))
    dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    noise, angle = state.noise, self._spread(jnp.asarray(scale))
    fresh = self._draw_noise(core.fold(keys, PERTURB))
    across = fresh - noise * dot(fresh, noise) / dot(noise, noise)
    across = across * jnp.sqrt(dot(noise, noise) / dot(across, across))
    return self._start(jnp.cos(angle) * noise + jnp.sin(angle) * across)

  def renoise(self, state, keys, stage, to):
    """See `core.Generator`; `to` <= `stage`, both may be traced. The noise that is at the start of
    the path is the initial noise of a candidate; one that is taken back to `to` > 0 keeps its
    own."""
    times = jnp.asarray(self.times)
    t, earlier = (self._spread(times[jnp.asarray(s) * self.steps_per_stage]) for s in (stage, to))
    fresh = self._draw_noise(core.fold(keys, RENOISE))
    x = paths.return_to(self.path, state.x, t, earlier, fresh)
    at_start = self._spread(jnp.asarray(to) == 0)
    return state._replace(x=x, noise=jnp.where(at_start, x, state.noise))

  def cost(self, op, stage=0, count=1):
    if op == 'encode':
      return core.Cost(flops=self.flops('encode'))
    if op.startswith('observe:'):
      return core.Cost(observe=1, flops=self.flops('decode'))
    if op in ('rebuild_cache', 'perturb', 'renoise'):  # no network is run
      return core.Cost()
    stages = {'extend': count, 'fork': 1}[op]
    evals = stages * self.steps_per_stage * self.stepper.evaluations
    return core.Cost(generator=evals, flops=evals * self.flops('predict'))

  # ------------------------------------------------------------------------------------- own parts

  def _start(self, noise):
    # four buffers: a state that is donated must not hold one of them twice
    early = jnp.zeros_like(noise) if self.early_at else ()
    return State(noise, jnp.copy(noise), jnp.zeros_like(noise), early)

  def _draw_noise(self, keys):
    """Standard normal `[B, N, *data_shape]`, one draw for each key `[B, N]`."""
    draw = jax.vmap(lambda key: jax.random.normal(key, self.data_shape))
    return draw(keys.reshape(-1)).reshape(*keys.shape, *self.data_shape)

  def _spread(self, value):
    """A scalar or `[B, N]` with axes that broadcast against x."""
    return jnp.reshape(value, (*jnp.shape(value), *(1 for _ in self.data_shape)))

  def _split(self, params, ctx, x, t):
    """(data, noise) that the guided network believes in at x `[B, N, ...]`."""
    lead, streams = x.shape[:2], len(self.streams)
    rows = jnp.repeat(x[:, None], streams, axis=1)
    times = jnp.broadcast_to(t.reshape(t.shape[: -len(self.data_shape)]), lead)
    outputs = self.predict(params, ctx, rows, jnp.repeat(times[:, None], streams, axis=1))
    return self.predictor.split(self.path, x, t, self.guide.combine(outputs))


def flatten_rows(ctx, x: jax.Array, t: jax.Array):
  """One row for each stream of each candidate: (leaves `[R, ...]` of ctx, x `[R, ...]`, t `[R]`),
  of ctx leaves `[B, C, ...]`, x `[B, C, N, ...]`, t `[B, C, N]`."""
  rows = lambda leaf: jnp.repeat(leaf.reshape(-1, *leaf.shape[2:]), t.shape[2], axis=0)
  return jax.tree.map(rows, ctx), x.reshape(-1, *x.shape[3:]), t.reshape(-1)
