"""The base of autoregressive generators: tokens one by one, with a cache and guidance.

The author of a family writes what its models do, for all streams of guidance at once:

  model_parts()                                  which models there are
  tokenize(prompts) · encode(params, prompt)     prompts to a context
  init_cache(params, ctx, lead)                  empty caches `[B, N, ...]`, lead = (B, N)
  next_logits(params, ctx, state, stage)         logits of the token of `stage`, and the caches
  prefill(params, ctx, state, stage)             the caches after `stage` stages, in one pass
  decode(params, ctx, state, stage)              what the first `stage` tokens show
  flops(op)                                      of 'encode', 'step', 'prefill', 'decode'; with a
                                                 value head 'value'; with a rollout model
                                                 'rollout_prefill', 'rollout_step'

and the facts `num_stages`, `vocab` and `decoded_output`. The base makes a generator of it: drawing,
forking, given tokens, going back, caches, likelihoods and the bill. A `stage` is a Python integer,
a traced scalar, or one for each candidate `[B, N]`. A generator without streams has no model: it
draws all tokens alike, at no network evaluation.

Letters: B prompts, N candidates, K children, T tokens, V codes, C streams.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core, token_sampling
from vtts_jax.errors import ConfigError
from vtts_jax.generators.guided_models import GuidedModels


class State(NamedTuple):
  """Candidates.

  Attributes:
    tokens: `[B, N, T]` int32; those that are not drawn yet are 0.
    log_probs: `[B, N, T]` float32, of each drawn token under the guided distribution at
      temperature 1; 0 where none is drawn.
    extra: what else identifies a candidate (the seed of a decoder's noise, an order of positions).
    cache: what `init_cache` gives, () without. After s stages it has read s - 1 tokens, and the
      begin before them.
  """

  tokens: jax.Array
  log_probs: jax.Array
  extra: Any
  cache: Any


@dataclasses.dataclass(frozen=True)
class TokenGenerator(GuidedModels, core.Generator):
  """See above.

  Attributes:
    temperature, top_k, top_p: see `token_sampling`; top_k 0 is off. They hold for rollouts too.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  # ------------------------------------------------------------------------- what an author writes

  @property
  def decoded_output(self) -> core.Output:
    """What `decode` gives; its kind is its name among the outputs."""
    raise NotImplementedError

  def init_cache(self, params, ctx, lead: tuple[int, int]) -> Any:
    raise NotImplementedError

  def init_extra(self, params, ctx, keys) -> Any:
    """`State.extra` of candidates with keys `[B, N]`."""
    return ()

  def next_logits(self, params, ctx, state: State, stage):
    """(guided logits `[B, N, V]` float32 of the token of `stage`, caches that have read the token
    before it); `guide_logits` and `previous_tokens` help."""
    raise NotImplementedError

  def prefill(self, params, ctx, state: State, stage) -> Any:
    """Caches after `stage` stages of a state without them; tokens from `stage` on do not matter."""
    raise NotImplementedError

  def forced_logits(self, params, ctx, state: State) -> jax.Array:
    """Guided logits `[B, N, T, V]` of every token of complete candidates, each after those before
    it (teacher forcing); differentiable in the parameters.

    This loop keeps a cache for each token for the backward pass. A family whose model has a pass
    over all positions at once does better.
    """

    @jax.checkpoint
    def force_token(cache, t):
      logits, cache = self.next_logits(params, ctx, state._replace(cache=cache), t)
      return cache, logits

    start = self.init_cache(params, ctx, state.tokens.shape[:2])
    logits = jax.lax.scan(force_token, start, jnp.arange(self.num_stages))[1]
    return jnp.moveaxis(logits, 0, 2)

  def decode(self, params, ctx, state: State, stage) -> jax.Array:
    """`[B, N, *decoded_output.shape]`; tokens from `stage` on do not matter."""
    raise NotImplementedError

  # ------------------------------------------------------------------------------ for its use there

  def guide_logits(self, logits: jax.Array) -> jax.Array:
    """Logits by stream `[..., C, V]` to guided ones `[..., V]`."""
    if logits.shape[-2] == 1:
      return logits[..., 0, :]
    prompt, null = logits[..., 0, :], logits[..., 1, :]
    return null + self.guidance_scale * (prompt - null)

  def previous_tokens(self, state: State, stage, begin: int = 0) -> jax.Array:
    """Tokens `[B, N]` that are fed at `stage`: the ones before it, `begin` at stage 0."""
    before = jnp.maximum(stage - 1, 0)
    if jnp.ndim(stage):
      previous = jnp.take_along_axis(state.tokens, before[..., None], axis=2)[..., 0]
    else:
      previous = jax.lax.dynamic_index_in_dim(state.tokens, before, axis=2, keepdims=False)
    return jnp.where(stage == 0, begin, previous)

  def sample_tokens(self, state: State, stage, count: int, next_logits, choose_tokens) -> State:
    """`count` stages from `stage`.

    Args:
      next_logits: `(state, t) -> (logits [B, N, V], cache)`, of the full model or of a small one.
      choose_tokens: `(logits, t) -> tokens [B, N]`.
    """

    def sample_one(state, t):
      logits, cache = next_logits(state, t)
      return self._append(state, choose_tokens(logits, t), logits, cache, t)

    return core.run_stages(sample_one, state, stage, count, self.num_stages)

  def token_chooser(self, keys: jax.Array, greedy: bool):
    """`(logits [B, N, V], t) -> tokens [B, N]`: drawn with keys `[B, N]`, or the most likely."""

    def choose_tokens(logits, t):
      if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
      return token_sampling.draw(self._adjust(logits), core.fold(keys, t))

    return choose_tokens

  # ------------------------------------------------------------------------------------- the facts

  def check(self):
    token_sampling.check(self.temperature, self.top_k, self.top_p, self.vocab)

  @property
  def outputs(self):
    return {
      self.decoded_output.kind: self.decoded_output,
      'log_prob': core.Output('scalar', ()),
      'length': core.Output('scalar', ()),
      'tokens': core.Output('tokens', (self.num_stages,)),
    }

  @property
  def offers(self):
    found = {'fork', 'fork_distinct', 'stochastic', 'tokens', 'rewind'}
    return frozenset(found | ({'log_prob_gradient'} if self.streams else set()))

  # ---------------------------------------------------------------------------------- the protocol

  def init(self, params, ctx, keys):
    cache = self.init_cache(params, ctx, keys.shape) if self.streams else ()
    shape = (*keys.shape, self.num_stages)
    extra = self.init_extra(params, ctx, keys)
    return State(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), extra, cache)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    choose = self.token_chooser(keys, greedy)
    return self.sample_tokens(state, stage, count, self._bound_logits(params, ctx), choose)

  def extend_with_tokens(self, params, ctx, state, tokens, stage=0):
    def choose_given(logits, t):
      here = jnp.broadcast_to(t - stage, tokens.shape[:2])[..., None]
      return jnp.take_along_axis(tokens, here, axis=2, mode='clip')[..., 0]

    next_logits = self._bound_logits(params, ctx)
    return self.sample_tokens(state, stage, tokens.shape[2], next_logits, choose_given)

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    logits, cache = self._bound_logits(params, ctx)(state, stage)
    if replace:
      at = stage[..., None] if jnp.ndim(stage) else stage
      drawn = token_sampling.draw(self._adjust(logits)[:, :, None], core.fold(keys, at))
    else:
      first = core.fold(keys[:, :, 0], stage)
      drawn = token_sampling.draw_distinct(self._adjust(logits), first, k)
    parents = core.repeat(self.drop_cache(state), k)
    at = jnp.repeat(stage, k, axis=1) if jnp.ndim(stage) else stage
    drawn = drawn.reshape(drawn.shape[0], -1)
    children = self._append(parents, drawn, core.repeat(logits, k), (), at)
    return children, state._replace(cache=cache)

  def drop_cache(self, state):
    return state._replace(cache=())

  def rebuild_cache(self, params, ctx, state, stage, share=None):
    if share is not None:
      return state._replace(cache=share.cache)
    cache = self.prefill(params, ctx, state, stage) if self.streams else ()
    return state._replace(cache=cache)

  def tokens(self, state):
    return state.tokens

  def rewind(self, state, stage):
    kept = self._drawn(stage)
    tokens = jnp.where(kept, state.tokens, 0)
    return State(tokens, jnp.where(kept, state.log_probs, 0.0), state.extra, ())

  def observe(self, params, ctx, state, stage, names):
    found = {}
    for name in names:
      if name == 'log_prob':
        found[name] = jnp.where(self._drawn(stage), state.log_probs, 0.0).sum(axis=-1)
      elif name == 'length':
        found[name] = self.stages_done(state, stage).astype(jnp.float32)
      elif name == 'tokens':
        found[name] = jnp.where(self._drawn(stage), state.tokens, 0)
      elif name == self.decoded_output.kind:
        found[name] = self.decode(params, ctx, self.drop_cache(state), stage)
      else:
        raise ConfigError(f'output {name!r}: {type(self).__name__} shows {", ".join(self.outputs)}')
    return found

  def transition_log_probs(self, params, ctx, trajectory):
    """Log-probability of each token `[B, N, T]` under the guided distribution at temperature 1;
    `trajectory` is a state of complete candidates."""
    if not self.streams:
      return super().transition_log_probs(params, ctx, trajectory)
    logits = self.forced_logits(params, ctx, trajectory)
    return token_sampling.log_prob(logits, trajectory.tokens)

  def cost(self, op, stage=0, count=1):
    if op.startswith('observe:'):
      decoded = op == f'observe:{self.decoded_output.kind}'
      return core.Cost(observe=1, flops=self.flops('decode')) if decoded else core.Cost()
    if not self.streams:
      return core.Cost()
    if op == 'encode':
      return core.Cost(flops=self.flops('encode'))
    if op == 'rebuild_cache':
      return core.Cost(generator=1, flops=self.flops('prefill'))
    if op == 'value':
      return core.Cost(generator=1, flops=self.flops('value'))
    if op == 'rollout':
      count = min(count, self.num_stages - stage)
      flops = self.flops('rollout_prefill') + count * self.flops('rollout_step')
      return core.Cost(generator=1 + count, flops=flops)
    evals = {'extend': count, 'extend_with_tokens': count, 'fork': 1}[op]
    return core.Cost(generator=evals, flops=evals * self.flops('step'))

  # ------------------------------------------------------------------------------------- own parts

  def _bound_logits(self, params, ctx):
    """`(state, t) -> (logits, cache)` of the generator itself."""
    if self.streams:
      return lambda state, t: self.next_logits(params, ctx, state, t)
    return lambda state, t: (jnp.zeros((*state.tokens.shape[:2], self.vocab)), state.cache)

  def _append(self, state, token, logits, cache, stage):
    """The state with `token [B, N]`, drawn from `logits`, at `stage`."""
    log_prob = token_sampling.log_prob(logits, token)
    tokens = _write_at(state.tokens, token, stage)
    return State(tokens, _write_at(state.log_probs, log_prob, stage), state.extra, cache)

  def _adjust(self, logits):
    return token_sampling.adjust(logits, self.temperature, self.top_k, self.top_p)

  def _drawn(self, stage):
    """Which tokens the first `stage` are: `[T]`, or `[B, N, T]` of a stage for each candidate."""
    return jnp.arange(self.num_stages) < jnp.asarray(stage)[..., None]


def _write_at(values, new, stage):
  """Values `[B, N, T]` with `new [B, N]` at `stage`."""
  if jnp.ndim(stage):
    here = jnp.arange(values.shape[2]) == stage[..., None]
    return jnp.where(here, new[..., None], values)
  return jax.lax.dynamic_update_slice_in_dim(values, new[..., None], stage, axis=2)
