"""The base of generators that draw a picture scale by scale (VAR, Infinity).

A stage is a scale: all its tokens are drawn at once, each for itself, given the scales before. So
stages do different amounts of work, and `stage` is a Python integer that all candidates share. A
token is one of V codes, or several choices of V (bits). Children of a candidate share one network
call and one cache, because the logits of a scale do not depend on what is drawn there.

The author of a family writes `model_parts`, `tokenize`, `encode`, `init_cache`, `decode` as for a
`TokenGenerator`, `next_logits(.., stage)` with logits `[B, N, n, *token_shape, V]` of the tokens of
a scale, `prefill`, `forced_logits` with logits `[B, N, T, *token_shape, V]`, `count_flops(op,
stage)`, and the facts `scale_tokens`, `token_shape`, `vocab` and `decoded_output`.

Letters: B prompts, N candidates, K children, S scales, n tokens of a scale, T tokens of all scales,
V choices.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core, token_sampling
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token.base import State, TokenGenerator


@dataclasses.dataclass(frozen=True)
class NextScaleGenerator(TokenGenerator):
  """See the head of the file.

  `State.tokens` is `[B, N, T, *token_shape]` and `State.log_probs` `[B, N, T]`. After s stages the
  caches have read the inputs of the first s scales, so they know the tokens of s - 1 of them.
  """

  uniform_stages = False
  prefixes_are_samples = True
  token_shape = ()  # (P,) where a token is P choices

  # ------------------------------------------------------------------------- what an author writes

  @property
  def scale_tokens(self) -> tuple[int, ...]:
    """Tokens of each scale."""
    raise NotImplementedError

  def forced_logits(self, params, ctx, state):
    raise NotImplementedError

  def count_flops(self, op, stage=0):
    """FLOPs of 'encode' and 'decode'; 'step', one scale at `stage`; 'prefill', the first `stage`
    scales in one pass."""
    raise NotImplementedError

  # ------------------------------------------------------------------------------------- the facts

  @property
  def num_stages(self):
    return len(self.scale_tokens)

  @property
  def scale_ends(self) -> tuple[int, ...]:
    """Tokens up to the end of each scale, with a 0 in front."""
    return (0, *np.cumsum(self.scale_tokens).tolist())

  @property
  def token_words(self) -> int:
    """Numbers of 32 bits that a token is shown as."""
    return -(-math.prod(self.token_shape) // 32)

  @property
  def outputs(self):
    shown = core.Output('tokens', (self.scale_ends[-1] * self.token_words,))
    return {**super().outputs, 'tokens': shown}

  @property
  def offers(self):
    # a token is no stage: what cuts and continues by tokens does not apply
    return frozenset({'fork', 'stochastic', 'log_prob_gradient'})

  # ---------------------------------------------------------------------------------- the protocol

  def init(self, params, ctx, keys):
    shape = *keys.shape, self.scale_ends[-1]
    tokens = jnp.zeros((*shape, *self.token_shape), jnp.int32)
    extra = self.init_extra(params, ctx, keys)
    return State(tokens, jnp.zeros(shape), extra, self.init_cache(params, ctx, keys.shape))

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    stage = self._static_stage(stage)
    for s in range(stage, min(stage + count, self.num_stages)):
      logits, cache = self.next_logits(params, ctx, state, s)
      drawn = jnp.argmax(logits, -1) if greedy else self._draw_scale(logits, keys, s)
      state = self._append_scale(state, drawn, logits, cache, s)
    return state

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    if not replace:
      raise ConfigError(f"search: {type(self).__name__} does not offer 'fork_distinct'")
    stage = self._static_stage(stage)
    logits, cache = self.next_logits(params, ctx, state, stage)
    drawn = self._draw_scale(logits[:, :, None], keys, stage)  # [B, N, K, n, ...]
    drawn = drawn.reshape(drawn.shape[0], -1, *drawn.shape[3:])
    # children get no cache: `rebuild_cache(share=owner)` gives it to those that survive
    parents = core.repeat(self.drop_cache(state), k)
    children = self._append_scale(parents, drawn, core.repeat(logits, k), (), stage)
    return children, state._replace(cache=cache)

  def rebuild_cache(self, params, ctx, state, stage, share=None):
    return super().rebuild_cache(params, ctx, state, self._static_stage(stage), share)

  def observe(self, params, ctx, state, stage, names):
    found = super().observe(params, ctx, state, stage, [n for n in names if n != 'tokens'])
    if 'tokens' in names:
      drawn = jnp.repeat(self._drawn_positions(stage), self.token_words, axis=-1)
      found['tokens'] = jnp.where(drawn, self._pack_tokens(state.tokens), 0)
    return found

  def transition_log_probs(self, params, ctx, trajectory):
    """Log-probability `[B, N, S]` of each scale of complete candidates (the state `trajectory`)
    under the guided distribution at temperature 1."""
    logits = self.forced_logits(params, ctx, trajectory)
    tokens = self._token_log_probs(logits, trajectory.tokens)
    ends = self.scale_ends
    return jnp.stack([tokens[..., a:b].sum(-1) for a, b in zip(ends, ends[1:])], -1)

  def tokens(self, state):
    return core.Generator.tokens(self, state)  # refused, as `offers` says

  def extend_with_tokens(self, params, ctx, state, tokens, stage=0):
    return core.Generator.extend_with_tokens(self, params, ctx, state, tokens, stage)

  def rewind(self, state, stage):
    return core.Generator.rewind(self, state, stage)

  def cost(self, op, stage=0, count=1):
    if op == 'rebuild_cache':
      return core.Cost(generator=1, flops=self.count_flops('prefill', stage))
    if op not in ('extend', 'fork'):
      return super().cost(op, stage, count)
    # of a fork all children share the call
    last = min(stage + (count if op == 'extend' else 1), self.num_stages)
    flops = sum(self.count_flops('step', s) for s in range(stage, last))
    return core.Cost(generator=last - stage, flops=flops)

  # ------------------------------------------------------------------------------------- own parts

  def _static_stage(self, stage) -> int:
    if not isinstance(stage, int | np.integer):
      raise ConfigError(
        f'generator {type(self).__name__}: stage={stage!r} must be an integer for all candidates'
      )
    return int(stage)

  def _draw_scale(self, logits, keys, stage):
    """Tokens `[*keys, n, ...]` from logits `[*keys (or 1), n, ..., V]`."""
    # one draw of noise a scale: given the scales before, its tokens depend on nothing else
    shape = logits.shape[keys.ndim :]
    noise = token_sampling.gumbel_noise(core.fold(keys, stage), math.prod(shape))
    drawn = jnp.argmax(self._truncate_logits(logits) + noise.reshape(*keys.shape, *shape), -1)
    return drawn.astype(jnp.int32)

  def _append_scale(self, state, drawn, logits, cache, stage):
    """The state with `drawn [B, N, n, ...]` written at `stage`; `logits` give its log-probability.
    """
    log_probs, start = self._token_log_probs(logits, drawn), self.scale_ends[stage]
    write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), start, 2
    )
    tokens, log_probs = write(state.tokens, drawn), write(state.log_probs, log_probs)
    return State(tokens, log_probs, state.extra, cache)

  def _token_log_probs(self, logits, tokens):
    """Log-probabilities `[B, N, n]` of tokens; those of a token's choices add up."""
    found = token_sampling.token_log_prob(logits, tokens)
    return found.sum(tuple(range(3, found.ndim)))

  def _drawn_positions(self, stage):
    """Mask of the tokens of the first `stage` scales: `[T]`, or `[B, N, T]`."""
    done = jnp.asarray(self.scale_ends)[jnp.asarray(stage)]
    return jnp.arange(self.scale_ends[-1]) < done[..., None]

  def _pack_tokens(self, tokens):
    """Tokens as they are shown, `[B, N, T * token_words]` int32."""
    if not self.token_shape:
      return tokens
    # choice j has the weight 2 ** j in its word; the last bit of 32 is the sign
    pad = self.token_words * 32 - tokens.shape[-1]
    bits = jnp.pad(tokens.astype(jnp.uint32), ((0, 0),) * (tokens.ndim - 1) + ((0, pad),))
    bits = bits.reshape(*tokens.shape[:-2], -1, 32)
    words = (bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)
