"""The base of diffusion and flow generators: steps from noise to a picture.

The author of a family writes what is particular to its models:

  model_parts()                                 the models
  tokenize(prompts) · encode(params, prompt)    prompts to a context, leaves `[B, C, ...]`
  predict(params, ctx, x, t)                    the network, on all guidance streams at once
  decode(params, x)                             data `[B, N, ...]` to pictures
  count_flops(op)                               of 'encode', 'predict' (all streams), 'decode'

and the facts `data_shape` and `decoded_output`. Four small frozen dataclasses define the rest: the
family sets `path` and `predictor`, the settings make `stepper` and `guidance_rule`; `schedules` has
the `step_times` of each release. A stage is a group of `steps_per_stage` steps. A candidate shows
the decoded data that its last step predicted.

Letters: B prompts, N candidates, C streams.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import guidance, paths, schedules, steppers
from vtts_jax.generators.guided_models import GuidedModels

# A step folds its number 0, 1 ... into the candidate's key. These tags are far above any number of
# steps, so no other draw repeats the noise of a step.
INITIAL, PERTURB, RENOISE = core.CHILD - 1, core.CHILD - 2, core.CHILD - 3


class State(NamedTuple):
  """Candidates; leaves `[B, N, *data_shape]`, float32.

  Attributes:
    x: the current point on the path.
    noise: the initial noise; it determines the candidate where steps draw no noise.
    end: the data that the last step predicted; 0 before the first step.
    early: the data that step `early_at` predicted (the latest step before it, until then); () if
      none are kept.
    end_time: `[B, N]`, the time at which `end` was predicted, -1 before the first step: with `end`
      all that a multistep method reads; () for the others.
    memory: what guidance with momentum remembers of earlier steps; () for the others.
  """

  x: jax.Array
  noise: jax.Array
  end: jax.Array
  early: Any = ()
  end_time: Any = ()
  memory: Any = ()


@dataclasses.dataclass(frozen=True)
class DiffusionGenerator(GuidedModels, core.Generator):
  """See the head of the file.

  Attributes:
    steps: number of denoising steps.
    steps_per_stage: steps of one stage; it must divide `steps` and does not change the sample.
    eta: share of the noise that each step draws fresh, in [0, 1].
    inner_steps: above 0, a step samples the flow's own transition by so many network calls of an
      ODE inside it (GLASS, `steppers.GlassStepper`) instead of by the family's stepper; eta is 0.
    correlation: of the noises before and after such a step, in [0, 1); -1 is DDPM's.
    early_at: number of steps after which the predicted data are kept, to be shown as 'early_image'
      (`verifiers.self_consistency` needs it); 0 keeps none.
  """

  steps: int = 24
  steps_per_stage: int = 1
  eta: float = 0.0
  inner_steps: int = 0
  correlation: float = 0.4
  early_at: int = 0

  path = paths.LinearPath()
  predictor = guidance.VelocityPredictor()
  sampled_path = None  # where steps are taken, if not on `path`, which the network was trained on
  noise_scale = 1.0  # of the initial noise: the first sigma on EDM's path

  def __post_init__(self):
    super().__post_init__()
    for name, low, high in (
      ('steps', 1, None), ('inner_steps', 0, None), ('early_at', 0, self.steps),
    ):  # fmt: skip
      value = getattr(self, name)
      if not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f'in {low} .. {high}' if high is not None else f'>= {low}'
        raise ConfigError(f'generator.{name}={value!r}: must be an integer {allowed}')
    size = self.steps_per_stage
    if not isinstance(size, int) or size < 1 or self.steps % size:
      raise ConfigError(f'generator.steps_per_stage={size!r}: must divide steps={self.steps}')
    if not 0 <= self.eta <= 1:
      raise ConfigError(f'generator.eta={self.eta}: must be in [0, 1]')
    if self.inner_steps and self.eta:
      raise ConfigError(f'generator.eta={self.eta}: must be 0 with inner_steps={self.inner_steps}')
    if self.correlation != -1 and not 0 <= self.correlation < 1:
      raise ConfigError(f'generator.correlation={self.correlation}: must be in [0, 1), or -1')

  # ------------------------------------------------------------------------- what an author writes

  @property
  def data_shape(self) -> tuple[int, ...]:
    """The shape of one x, such as (H, W, C) of a latent."""
    raise NotImplementedError

  @property
  def decoded_output(self) -> core.Output:
    """What `decode` returns; its kind is also its name among the outputs."""
    raise NotImplementedError

  def predict(self, params, ctx, x: jax.Array, t: jax.Array) -> jax.Array:
    """The network's output, shaped like x, at x `[B, C, N, *data_shape]` and times t `[B, C, N]`;
    leaves of ctx are `[B, C, ...]`. `flatten_rows` turns all three into rows."""
    raise NotImplementedError

  def decode(self, params, x: jax.Array) -> jax.Array:
    """Data `[B, N, *data_shape]` to outputs `[B, N, *decoded_output.shape]`."""
    raise NotImplementedError

  @property
  def step_times(self) -> np.ndarray:
    """Times `[steps + 1]` float32 between the steps, from 0 to 1; a family may shift them."""
    return schedules.even_times(self.steps)

  @property
  def landing_times(self) -> np.ndarray:
    """Times `[steps]` where the steps end: where the next one starts, except with diffusers' DDIM
    (`schedules.ddim_times`)."""
    return self.step_times[1:]

  # ------------------------------------------------------------------------------------- the facts

  @property
  def stepper(self):
    return steppers.EulerStepper(self.eta)

  @property
  def step_rule(self):
    """The stepper that is used: the family's, or GLASS's where `inner_steps` asks for it."""
    if self.inner_steps:
      return steppers.GlassStepper(self.inner_steps, self.correlation)
    return self.stepper

  @property
  def guidance_rule(self):
    return guidance.ClassifierFreeGuidance(self.guidance_scale)

  @property
  def num_stages(self):
    return self.steps // self.steps_per_stage

  @property
  def outputs(self):
    shown = self.decoded_output
    # the second output exists only where a step keeps what it shows
    early = {f'early_{shown.kind}': shown} if self.early_at else {}
    return {shown.kind: shown, **early}

  @property
  def offers(self):
    drawn = {'stochastic'} if self.step_rule.is_stochastic else set()
    return frozenset({'fork', 'noise', 'perturb', 'renoise'} | drawn)

  # ---------------------------------------------------------------------------------- the protocol

  def init(self, params, ctx, keys):
    # folded, so that the initial noise and the noise of step 0 differ
    return self.start_state(self._draw_noise(core.fold(keys, INITIAL)))

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    stepper = self.step_rule.deterministic if greedy else self.step_rule
    size = self.steps_per_stage
    denoise = functools.partial(self._denoise, params, ctx, keys, stepper)
    # a gradient through the sampler keeps the states between the steps and runs each step again;
    # without a gradient `checkpoint` changes nothing
    denoise = jax.checkpoint(denoise, prevent_cse=False)
    # run_stages counts steps here, so a stage per candidate becomes a step per candidate
    return core.run_stages(denoise, state, stage * size, count * size, self.steps)

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    """As in `core.Generator`. Children of one parent start from one x, so where the stepper allows
    it the first network call is made once for all of them."""
    if not replace:
      return super().fork(params, ctx, state, keys, stage, k, replace=replace)
    keys = keys.reshape(len(keys), -1)
    first = jnp.repeat(stage, k, axis=1) if jnp.ndim(stage) else stage
    first, size = first * self.steps_per_stage, self.steps_per_stage
    denoise = functools.partial(self._denoise, params, ctx, keys, self.step_rule)
    together = functools.partial(denoise, copies=k)
    children = core.run_stages(together, core.repeat(state, k), first, 1, self.steps)
    if size > 1:
      children = core.run_stages(denoise, children, first + 1, size - 1, self.steps)
    return children, state

  def observe(self, params, ctx, state, stage, names):
    shown = {self.decoded_output.kind: state.end, f'early_{self.decoded_output.kind}': state.early}
    for name in names:
      if name not in self.outputs:
        raise ConfigError(f'output {name!r}: {type(self).__name__} shows {", ".join(self.outputs)}')
    return {name: self.decode(params, shown[name]) for name in names}

  def initial_noise(self, state):
    return state.noise

  def perturb(self, state, keys, scale, stage=0):
    """Neighbours of candidates with `stage` stages done; `scale` and `stage` are scalars or
    `[B, N]` and may be traced.

    At stage 0 the initial noise of the candidates (which may be at any stage) is rotated by the
    angle `scale` (radians) in a random direction. A rotation keeps the norm. Gaussian noise in many
    dimensions has a nearly constant norm, and the model has seen no other in training. An angle of
    pi / 2 gives an independent draw. At a later stage `scale` times the noise that the reverse SDE
    draws in its last step is added to x (EvoSearch's mutation, He et al. 2025, arXiv 2505.17618).
    """
    fresh = self._draw_noise(core.fold(keys, PERTURB))
    turned = self.start_state(self._rotate_noise(state.noise, fresh, scale))
    if isinstance(stage, int) and stage == 0:
      return turned
    # the last step before the stage; any at stage 0, where the result is not used
    step = jnp.maximum(jnp.asarray(stage) * self.steps_per_stage - 1, 0)
    t, after = (self._broadcast_to_data(jnp.asarray(a)[step]) for a in
                (self.step_times, self.landing_times))  # fmt: skip
    drawn = steppers.posterior_deviation(self._step_path, t, after)
    x = state.x + self._broadcast_to_data(jnp.asarray(scale)) * drawn * fresh
    moved = self._forget_steps(state._replace(x=x))
    at_start = jnp.broadcast_to(jnp.asarray(stage) == 0, keys.shape)
    choose = lambda a, b: jnp.where(at_start.reshape(at_start.shape + (1,) * (a.ndim - 2)), a, b)
    return jax.tree.map(choose, turned, moved)

  def renoise(self, state, keys, stage, to, noise=None):
    """As in `core.Generator`, with `to` <= `stage`; both may be traced. A candidate taken back to
    stage 0 gets its x as new initial noise, others keep their own."""
    times, size = jnp.asarray(self.step_times), self.steps_per_stage
    t, earlier = (self._broadcast_to_data(times[jnp.asarray(s) * size]) for s in (stage, to))
    fresh = self._draw_noise(core.fold(keys, RENOISE)) if noise is None else noise
    x = paths.return_to(self._step_path, state.x, t, earlier, fresh)
    at_start = self._broadcast_to_data(jnp.asarray(to) == 0)
    state = state._replace(x=x, noise=jnp.where(at_start, x / self.noise_scale, state.noise))
    return self._forget_steps(state)

  def step_log_probs(self, params, ctx, x, landed, step) -> jax.Array:
    """The log-density `[B, N]`, float32, of the point `landed` at which denoising step `step` (may
    be traced) from x ended, both `[B, N, *data_shape]`; differentiable in params. Steps without
    noise give 0.

    Raises:
      ConfigError: the stepper's step is not Gaussian, or needs the step before.
    """
    if self.step_rule.is_multistep or self.guidance_rule.momentum:
      raise ConfigError(f'generator: {self.step_rule} has a step that x alone does not determine')
    t, after = (self._broadcast_to_data(jnp.asarray(a)[step]) for a in
                (self.step_times, self.landing_times))  # fmt: skip
    split = self._bind_split(params, ctx, ())
    mean, deviation, _ = self.step_rule.transition(split, self._step_path, x, t, after)
    return steppers.gaussian_log_prob(landed, mean, deviation, tuple(range(2, x.ndim)))

  def cost(self, op, stage=0, count=1):
    if op == 'encode':
      return core.Cost(flops=self.count_flops('encode'))
    if op.startswith('observe:'):
      return core.Cost(observe=1, flops=self.count_flops('decode'))
    # these calls run no network
    if op in ('rebuild_cache', 'perturb', 'renoise'):
      return core.Cost()
    calls = self.step_rule.evaluations
    evals = count * self.steps_per_stage * calls
    # the children of a fork share the first call of their first step, or do not
    if op == 'fork' and self.step_rule.shares_first:
      evals -= count - 1
    return core.Cost(generator=evals, flops=evals * self.count_flops('predict'))

  # ------------------------------------------------------------------------------------- own parts

  def _denoise(self, params, ctx, keys, stepper, state, i, copies=1):
    """Step i of all candidates. Of `copies` neighbours that are alike, one stands for all in the
    first network call."""
    times, landings = jnp.asarray(self.step_times), jnp.asarray(self.landing_times)
    t, after = (self._broadcast_to_data(a[i]) for a in (times, landings))
    fresh = self._draw_noise(core.fold(keys, i)) if stepper.is_stochastic else None
    split = self._bind_split(params, ctx, state.memory, copies if stepper.shares_first else 1)
    before = self._step_before(state) if stepper.is_multistep else None
    x, end = stepper.take_step(split, self._step_path, state.x, t, after, fresh, before)
    early, end_time = state.early, state.end_time
    if self.early_at:
      early = jnp.where(self._broadcast_to_data(i < self.early_at), end, early)
    if self.step_rule.is_multistep:
      end_time = jnp.broadcast_to(times[i], x.shape[:2])
    memory = split.memories[0] if self.guidance_rule.momentum else ()
    return State(x, state.noise, end, early, end_time, memory)

  def start_state(self, noise):
    """A state at stage 0 of initial noise `[B, N, *data_shape]`."""
    # copies: a donated state must not hold one buffer twice
    zeros = lambda wanted: jnp.zeros_like(noise) if wanted else ()
    end_time = jnp.full(noise.shape[:2], -1.0) if self.step_rule.is_multistep else ()
    memory = zeros(self.guidance_rule.momentum)
    x = noise * self.noise_scale
    return State(x, jnp.copy(noise), jnp.zeros_like(noise), zeros(self.early_at), end_time, memory)

  def _rotate_noise(self, noise, fresh, angle):
    """Noise turned by `angle` towards the part of a fresh draw that is orthogonal to it."""
    axes = tuple(range(2, noise.ndim))
    dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    angle = self._broadcast_to_data(jnp.asarray(angle))
    across = fresh - noise * dot(fresh, noise) / dot(noise, noise)
    across = across * jnp.sqrt(dot(noise, noise) / dot(across, across))
    return jnp.cos(angle) * noise + jnp.sin(angle) * across

  def _forget_steps(self, state):
    """The state of a candidate that was moved: what earlier steps predicted lies on another
    trajectory, so multistep methods and momentum start anew."""
    restart = {}
    if self.step_rule.is_multistep:
      restart['end_time'] = jnp.full_like(state.end_time, -1)
    if self.guidance_rule.momentum:
      restart['memory'] = jnp.zeros_like(state.memory)
    return state._replace(**restart)

  @property
  def _step_path(self):
    return self.sampled_path or self.path

  def _step_before(self, state):
    return steppers.Before(state.end, self._broadcast_to_data(state.end_time))

  def _draw_noise(self, keys):
    """Standard normal `[B, N, *data_shape]`, one draw for each key `[B, N]`."""
    draw = jax.vmap(lambda key: jax.random.normal(key, self.data_shape))
    return draw(keys.reshape(-1)).reshape(*keys.shape, *self.data_shape)

  def _broadcast_to_data(self, value):
    """A scalar or `[B, N]`, given trailing axes that broadcast against x."""
    return jnp.reshape(value, (*jnp.shape(value), *(1 for _ in self.data_shape)))

  def _bind_split(self, params, ctx, memory, copies=1):
    """The function `(x, t) -> (data, noise)`, of x `[B, N, ...]`, that the guided network is; a
    list `memories` on it collects what guidance remembers of each call. Its first call evaluates
    one of every `copies` neighbours."""

    def evaluate(x, t, memory):
      # the same candidates may take another path to their data, where fresh noise spreads them more
      x, t = paths.change_path(x, t, self.sampled_path, self.path) if self.sampled_path else (x, t)
      lead, streams = x.shape[:2], len(self.guidance_streams)
      # all streams run as one batch: one larger network call instead of two
      rows = jnp.repeat(x[:, None], streams, axis=1)
      times = jnp.broadcast_to(t.reshape(t.shape[: -len(self.data_shape)]), lead)
      outputs = self.predict(params, ctx, rows, jnp.repeat(times[:, None], streams, axis=1))
      output, kept = self.guidance_rule.combine_streams(outputs, t, memory)
      return self.predictor.split_output(self.path, x, t, output), kept

    def split(x, t):
      if copies > 1 and not split.memories:
        # the time may be one for all candidates, and then has no axis of them
        alike = (x, memory) if t.ndim < x.ndim else (x, memory, t)
        x, first, *own_time = jax.tree.map(lambda leaf: leaf[:, ::copies], alike)
        found, kept = core.repeat(evaluate(x, own_time[0] if own_time else t, first), copies)
      else:
        found, kept = evaluate(x, t, memory)
      split.memories.append(kept)
      return found

    # a second call of the same step starts from the same memory; the first call's result lasts
    split.memories = []
    return split


def flatten_rows(ctx, x: jax.Array, t: jax.Array):
  """Flattens ctx leaves `[B, C, ...]`, x `[B, C, N, ...]` and t `[B, C, N]` to rows `[R, ...]`, one
  row for each stream of each candidate; returns (ctx, x, t)."""

  def repeat_rows(leaf):
    return jnp.repeat(leaf.reshape(-1, *leaf.shape[2:]), t.shape[2], axis=0)

  return jax.tree.map(repeat_rows, ctx), x.reshape(-1, *x.shape[3:]), t.reshape(-1)
