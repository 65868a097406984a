"""The base of autoregressive generators: one token after another, with a cache and guidance.

The author of a family writes what is particular to its models, for all guidance streams at once:

  model_parts()                                  the models
  tokenize(prompts) · encode(params, prompt)     prompts to a context
  init_cache(params, ctx, lead)                  empty caches `[B, N, ...]`, lead = (B, N)
  next_logits(params, ctx, state, stage)         logits of the token at `stage`, and the new caches
  prefill(params, ctx, state, stage)             the caches after `stage` stages, in one pass
  decode(params, ctx, state, stage)              what the first `stage` tokens show
  count_flops(op)                                of 'encode', 'step', 'prefill', 'decode'; with a
                                                 value head 'value'; with a rollout model
                                                 'rollout_prefill', 'rollout_step'

and the facts `num_stages`, `vocab` and `decoded_output`. The base adds the rest: sampling, forks,
given tokens, rewinding, caches, likelihoods and costs. A `stage` is a Python integer, a traced
scalar, or one number for each candidate `[B, N]`. A generator without streams has no network: it
draws tokens uniformly, at no network evaluation.

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
    tokens: `[B, N, T]` int32; 0 where no token is drawn yet.
    log_probs: `[B, N, T]` float32, of each drawn token under the guided distribution at
      temperature 1; 0 where no token is drawn yet.
    extra: what else identifies a candidate (the seed of a decoder's noise, an order of positions).
    cache: the caches of `init_cache`, or (). After s stages they hold the begin token and the first
      s - 1 tokens.
  """

  tokens: jax.Array
  log_probs: jax.Array
  extra: Any
  cache: Any


@dataclasses.dataclass(frozen=True)
class TokenGenerator(GuidedModels, core.Generator):
  """See the head of the file.

  Attributes:
    temperature, top_k, top_p: see `token_sampling`; top_k 0 switches it off. Rollouts use them too.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    # only `check` compares them with the vocabulary, which may have to be read from a checkpoint
    token_sampling.check_sampling(self.temperature, self.top_k, self.top_p)

  # ------------------------------------------------------------------------- what an author writes

  @property
  def decoded_output(self) -> core.Output:
    """What `decode` returns; its kind is also its name among the outputs."""
    raise NotImplementedError

  def init_cache(self, params, ctx, lead: tuple[int, int]) -> Any:
    """Empty caches for `lead` = (B, N) candidates."""
    raise NotImplementedError

  def init_extra(self, params, ctx, keys) -> Any:
    """`State.extra` of candidates with keys `[B, N]`."""
    return ()

  def next_logits(self, params, ctx, state: State, stage):
    """(guided logits `[B, N, V]` float32 of the token at `stage`, caches that have read the token
    before it); `guide_logits` and `previous_tokens` help to write it."""
    raise NotImplementedError

  def prefill(self, params, ctx, state: State, stage) -> Any:
    """Caches after `stage` stages, of a state without caches; ignores tokens from `stage` on."""
    raise NotImplementedError

  def forced_logits(self, params, ctx, state: State) -> jax.Array:
    """Guided logits `[B, N, T, V]` at every position of complete candidates (teacher forcing);
    differentiable in the parameters.

    This loop stores one cache per token for the backward pass. A family whose model can read all
    positions in one pass overrides it.
    """

    # recompute the network in the backward pass: its activations at all T tokens do not fit
    @jax.checkpoint
    def force_token(cache, t):
      logits, cache = self.next_logits(params, ctx, state._replace(cache=cache), t)
      return cache, logits

    start = self.init_cache(params, ctx, state.tokens.shape[:2])
    logits = jax.lax.scan(force_token, start, jnp.arange(self.num_stages))[1]
    return jnp.moveaxis(logits, 0, 2)

  def decode(self, params, ctx, state: State, stage) -> jax.Array:
    """Outputs `[B, N, *decoded_output.shape]` of the first `stage` tokens; ignores the others."""
    raise NotImplementedError

  # ---------------------------------------------------------------------------- helpers for authors

  def guide_logits(self, logits: jax.Array) -> jax.Array:
    """Joins the logits of the streams `[..., C, V]` to guided logits `[..., V]`."""
    if logits.shape[-2] == 1:
      return logits[..., 0, :]
    prompt, null = logits[..., 0, :], logits[..., 1, :]
    return null + self.guidance_scale * (prompt - null)

  def previous_tokens(self, state: State, stage, begin: int = 0) -> jax.Array:
    """The tokens `[B, N]` before `stage`, which the network reads there; `begin` at stage 0."""
    # a shared stage reads one slice; only a stage per candidate needs the gather, which TPUs do
    # slowly
    before = jnp.maximum(stage - 1, 0)
    if jnp.ndim(stage):
      previous = jnp.take_along_axis(state.tokens, before[..., None], axis=2)[..., 0]
    else:
      previous = jax.lax.dynamic_index_in_dim(state.tokens, before, axis=2, keepdims=False)
    return jnp.where(stage == 0, begin, previous)

  def sample_tokens(self, state: State, stage, count: int, next_logits, choose_tokens) -> State:
    """Runs `count` stages from `stage`.

    Args:
      next_logits: `(state, t) -> (logits [B, N, V], cache)`, of the full or of a small model.
      choose_tokens: `(logits, t) -> tokens [B, N]`.
    """

    def sample_one(state, t):
      logits, cache = next_logits(state, t)
      return self._append_token(state, choose_tokens(logits, t), logits, cache, t)

    return core.run_stages(sample_one, state, stage, count, self.num_stages)

  def token_chooser(self, keys: jax.Array, greedy: bool):
    """Returns `(logits [B, N, V], t) -> tokens [B, N]`: samples with keys `[B, N]`, or takes the
    most likely token."""

    def choose_tokens(logits, t):
      if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
      # folded with the stage: a token depends on its candidate's key and place, not on how the
      # stages were grouped into calls
      return token_sampling.draw_tokens(self._truncate_logits(logits), core.fold(keys, t))

    return choose_tokens

  # ------------------------------------------------------------------------------------- the facts

  def check(self):
    token_sampling.check_sampling(self.temperature, self.top_k, self.top_p, self.vocab)

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
    return frozenset(found | ({'log_prob_gradient'} if self.guidance_streams else set()))

  # ---------------------------------------------------------------------------------- the protocol

  def init(self, params, ctx, keys):
    cache = self.init_cache(params, ctx, keys.shape) if self.guidance_streams else ()
    shape = (*keys.shape, self.num_stages)
    extra = self.init_extra(params, ctx, keys)
    return State(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), extra, cache)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    choose = self.token_chooser(keys, greedy)
    return self.sample_tokens(state, stage, count, self._bound_logits(params, ctx), choose)

  def extend_with_tokens(self, params, ctx, state, tokens, stage=0):
    def choose_given(logits, t):
      # a complete candidate may ask outside the given tokens; what it gets is dropped
      here = jnp.broadcast_to(t - stage, tokens.shape[:2])[..., None]
      return jnp.take_along_axis(tokens, here, axis=2, mode='clip')[..., 0]

    next_logits = self._bound_logits(params, ctx)
    return self.sample_tokens(state, stage, tokens.shape[2], next_logits, choose_given)

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    # one network call per parent serves all K children
    logits, cache = self._bound_logits(params, ctx)(state, stage)
    truncated = self._truncate_logits(logits)
    if replace:
      at = stage[..., None] if jnp.ndim(stage) else stage
      drawn = token_sampling.draw_tokens(truncated[:, :, None], core.fold(keys, at))
    else:
      # distinct children come from one joint draw, so the first child's key is enough
      drawn = token_sampling.draw_distinct(truncated, core.fold(keys[:, :, 0], stage), k)
    # children get no cache: `rebuild_cache(share=owner)` gives it to those that survive
    parents = core.repeat(self.drop_cache(state), k)
    at = jnp.repeat(stage, k, axis=1) if jnp.ndim(stage) else stage
    drawn = drawn.reshape(drawn.shape[0], -1)
    children = self._append_token(parents, drawn, core.repeat(logits, k), (), at)
    return children, state._replace(cache=cache)

  def drop_cache(self, state):
    return state._replace(cache=())

  def rebuild_cache(self, params, ctx, state, stage, share=None):
    if share is not None:
      return state._replace(cache=share.cache)
    cache = self.prefill(params, ctx, state, stage) if self.guidance_streams else ()
    return state._replace(cache=cache)

  def tokens(self, state):
    return state.tokens

  def rewind(self, state, stage):
    kept = self._drawn_positions(stage)
    tokens = jnp.where(kept, state.tokens, 0)
    return State(tokens, jnp.where(kept, state.log_probs, 0.0), state.extra, ())

  def observe(self, params, ctx, state, stage, names):
    found = {}
    for name in names:
      if name == 'log_prob':
        found[name] = jnp.where(self._drawn_positions(stage), state.log_probs, 0.0).sum(axis=-1)
      elif name == 'length':
        found[name] = self.stages_done(state, stage).astype(jnp.float32)
      elif name == 'tokens':
        found[name] = jnp.where(self._drawn_positions(stage), state.tokens, 0)
      elif name == self.decoded_output.kind:
        found[name] = self.decode(params, ctx, self.drop_cache(state), stage)
      else:
        raise ConfigError(f'output {name!r}: {type(self).__name__} shows {", ".join(self.outputs)}')
    return found

  def transition_log_probs(self, params, ctx, trajectory):
    """Log-probability `[B, N, T]` of each token of complete candidates (the state `trajectory`)
    under the guided distribution at temperature 1."""
    if not self.guidance_streams:
      return super().transition_log_probs(params, ctx, trajectory)
    logits = self.forced_logits(params, ctx, trajectory)
    return token_sampling.token_log_prob(logits, trajectory.tokens)

  def cost(self, op, stage=0, count=1):
    # log-probabilities, lengths and tokens are in the state and cost nothing
    if op.startswith('observe:'):
      decoded = op == f'observe:{self.decoded_output.kind}'
      return core.Cost(observe=1, flops=self.count_flops('decode')) if decoded else core.Cost()
    if not self.guidance_streams:
      return core.Cost()
    if op == 'encode':
      return core.Cost(flops=self.count_flops('encode'))
    if op == 'rebuild_cache':
      return core.Cost(generator=1, flops=self.count_flops('prefill'))
    if op == 'value':
      return core.Cost(generator=1, flops=self.count_flops('value'))
    if op == 'rollout':
      # one evaluation reads the candidate; stages past the end are not run
      count = min(count, self.num_stages - stage)
      flops = self.count_flops('rollout_prefill') + count * self.count_flops('rollout_step')
      return core.Cost(generator=1 + count, flops=flops)
    evals = {'extend': count, 'extend_with_tokens': count, 'fork': 1}[op]
    return core.Cost(generator=evals, flops=evals * self.count_flops('step'))

  # ------------------------------------------------------------------------------------- own parts

  def _bound_logits(self, params, ctx):
    """`(state, t) -> (logits, cache)` of the full model; uniform logits without one."""
    if self.guidance_streams:
      return lambda state, t: self.next_logits(params, ctx, state, t)
    return lambda state, t: (jnp.zeros((*state.tokens.shape[:2], self.vocab)), state.cache)

  def _append_token(self, state, token, logits, cache, stage):
    """The state with `token [B, N]` written at `stage`; `logits` give its log-probability."""
    log_prob = token_sampling.token_log_prob(logits, token)
    tokens = _write_at(state.tokens, token, stage)
    return State(tokens, _write_at(state.log_probs, log_prob, stage), state.extra, cache)

  def _truncate_logits(self, logits):
    return token_sampling.truncate_logits(logits, self.temperature, self.top_k, self.top_p)

  def _drawn_positions(self, stage):
    """Mask of the first `stage` tokens: `[T]`, or `[B, N, T]` if each candidate has a stage."""
    return jnp.arange(self.num_stages) < jnp.asarray(stage)[..., None]


def _write_at(values, new, stage):
  """Values `[B, N, T]` with `new [B, N]` written at `stage`."""
  if jnp.ndim(stage):
    # a mask instead of a scatter, which is slow on TPUs
    here = jnp.arange(values.shape[2]) == stage[..., None]
    return jnp.where(here, new[..., None], values)
  return jax.lax.dynamic_update_slice_in_dim(values, new[..., None], stage, axis=2)
