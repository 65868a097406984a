"""Replays golden files of FlexTok AR: every output of the reference, from our loader and model.

Sequences are generated with the cache (`feed_tokens`), where the reference runs the whole prefix
anew. Log-probabilities and filtered distributions come from `vtts_jax.token_sampling`.

One defect of the reference is replayed here and nowhere else: its class embedding overwrites the
label -1 (no class) by 0 in the caller's array. So from the second token of a call on, the null
stream of guidance is class 0.

Letters: B prompts · T tokens · C streams of guidance · V codes · k candidates.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import token_sampling
from vtts_jax.models import modules
from vtts_jax.models.flexar import convert, modeling
from vtts_jax.models.flexar.modeling import FlexAR, guide_logits
from vtts_jax.models.t5 import convert as t5_convert
from vtts_jax.models.t5.modeling import build_model as t5_build

T5 = 'models.text_encoder.t5_embedder.model.'
# the fixtures branch into three candidates at the last token
BRANCHES = 3


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  options = {'heads': config['num_heads'], 'eps': config['norm_eps']}
  sizes = convert.config_of(source, **options)
  run = Runner(sizes, convert.load_weights(source, sizes))
  inputs = {name: jnp.asarray(value, jnp.int32) for name, value in inputs.items()}
  tokens, scale, length = inputs['token_ids'][:, None], config['cfg_factor'], config['gen_tokens']
  if config['conditioning'] == 'text':
    t5 = dataclasses.replace(source.select_prefix(T5), config=config['t5'])
    ctx, out = _encode_texts(config, run, t5, inputs)
    after = ctx
  else:
    labels, out = inputs['class_ids'], {}
    # the second context has the reference's defect: its null stream is class 0
    ctx, after = (
      run.class_context(jnp.stack([labels, jnp.full_like(labels, null)], 1)) for null in (-1, 0)
    )
  # the input embeddings belong to the tokens fed: a start, then all but the last
  fed = jnp.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0)))
  places = jnp.broadcast_to(jnp.arange(fed.shape[-1]), fed.shape)
  out['input_embeddings'] = run.embed_tokens(ctx, fed, places)[:, 0, :, 0]
  logits = run.forced_logits(ctx, tokens)[0]
  out['logits_cond'], out['logits_uncond'] = logits[:, :, 0], logits[:, :, 1]
  out['logits_cfg'] = guided = guide_logits(logits, scale)
  for kind, factor in (('cfg', scale), ('nocfg', None)):
    for name, ids, logp in _draw_greedily(run, ctx, after, tokens, 0, length, factor):
      out[f'{name}_{kind}_ids'], out[f'{name}_{kind}_logprob'] = ids, logp
  (_, ids, logp), _ = _draw_greedily(run, ctx, after, tokens, 3, length, scale)
  out['greedy_prefix3_cfg_ids'], out['greedy_prefix3_cfg_logprob'] = ids, logp
  ids = tokens.at[:, 0, :length].set(out['greedy_cfg_ids'])
  best = jax.lax.top_k(guide_logits(run.forced_logits(ctx, ids)[0], scale)[:, :length], 2)[0]
  out['greedy_cfg_top1_minus_top2'] = best[..., 0] - best[..., 1]
  for name, filters in (('topk7', {'top_k': 7}), ('topp0.6', {'top_p': 0.6})):
    kept = token_sampling.truncate_logits(guided[:, -1:], temperature=0.8, **filters)
    out[f'probs_temp0.8_{name}'] = jax.nn.softmax(kept, -1)
  return {name: np.asarray(value) for name, value in out.items()}


class Runner:
  """The model's methods, each compiled once for each shape.

  `forced_logits(ctx, tokens)` and `next_logits(ctx, ids, cache, t)` are the functions below; the
  other attributes are methods of `FlexAR`.
  """

  def __init__(self, config, params):
    def compile_method(method):
      @jax.jit
      def run_method(params, *args):
        return method(modules.bind_module(modeling.build_model, config, params), *args)

      return functools.partial(run_method, params)

    self.forced_logits = compile_method(_forced_logits)
    self.next_logits = compile_method(_next_logits)
    self.embed_tokens = compile_method(FlexAR.embed_tokens)
    self.text_mlp = compile_method(lambda model, x: model.text_mlp(x))
    self.text_context = compile_method(FlexAR.text_context)
    self.class_context = compile_method(FlexAR.class_context)


def _forced_logits(model, ctx, tokens):
  """Returns the logits `[B, T, C, V]` of `tokens [B, 1, T]`, and the cache."""
  hidden, cache = model.prefill(ctx, tokens)
  return model.token_logits(hidden)[:, 0], cache


def _next_logits(model, ctx, ids, cache, t):
  """Returns the logits `[B, C, V]` of token t of `ids [B, 1, T]`, and the cache."""
  fed = jax.lax.dynamic_slice_in_dim(ids, t - 1, 1, 2)
  hidden, cache = model.feed_tokens(ctx, cache, fed, t)
  return model.token_logits(hidden)[:, 0, 0], cache


def _encode_texts(config, run, t5, inputs):
  """Returns the context of the prompts and the empty text, and the outputs of the text side."""
  batch = len(inputs['text_ids'])
  sizes = t5_convert.config_of(t5)
  params = t5_convert.load_weights(t5, sizes)

  @jax.jit
  def encode(params, ids, mask):
    return modules.bind_module(t5_build, sizes, params)(ids, mask)

  ids, mask = (
    jnp.concatenate([inputs[f'text_{x}'], inputs[f'uncond_text_{x}']]) for x in ('ids', 'mask')
  )
  states = encode(params, ids, mask)
  # streams are the prompt and the empty text, which the concatenation put at index `batch`
  pairs = np.stack([np.arange(batch), np.full(batch, batch)], 1)
  ctx, projected = run.text_context(states[pairs], mask[pairs]), run.text_mlp(states)
  # the files hold -1 for -inf
  bias = jnp.maximum(ctx['bias'][:, 0], -1)
  return ctx, {
    't5_last_hidden': states[:batch],
    'text_embeddings_projected': projected[:batch],
    'uncond_text_embeddings_projected': projected[batch:],
    'text_attn_bias': jnp.broadcast_to(bias[:, None], (batch, config['num_tokens'], bias.shape[1])),
  }


def _draw_greedily(run, ctx, after, tokens, known, length, scale):
  """Continues sequences with the most probable tokens.

  Args:
    run: a `Runner`.
    ctx, after: contexts of the first drawn token, and of those after it.
    tokens: `[B, 1, T]`, of which the first `known` are kept.
    length: tokens of a finished sequence.
    scale: guidance scale; None for the stream of the prompt alone.

  Returns:
    (name, ids `[B * k, length]`, summed log-probability `[B * k, 1]` of the drawn tokens) for
    'greedy', with k = 1, and for 'topk', where the last token branches into its k most probable.
  """
  ids = jnp.where(jnp.arange(tokens.shape[-1]) < known, tokens, 0)
  logp, cache = jnp.zeros((len(ids), 1)), None
  for t in range(known, length):
    # the reference calls its model with `ctx` for the first token, and its defect shows after that
    if t == known:
      logits = run.forced_logits(ctx, ids)[0][:, t]
    else:
      # the cache of the known prefix is made when the first token after it is fed
      cache = run.forced_logits(after, ids)[1] if cache is None else cache
      logits, cache = run.next_logits(after, ids, cache, t)
    logits = logits[:, 0] if scale is None else guide_logits(logits, scale)
    counts = (1, BRANCHES) if t == length - 1 else (1,)
    rows = [_append_best(ids, logp, logits, t, k) for k in counts]
    ids, logp = rows[0]
  return [
    (name, ids[..., :length].reshape(-1, length), logp.reshape(-1, 1))
    for name, (ids, logp) in zip(('greedy', 'topk'), rows)
  ]


@functools.partial(jax.jit, static_argnames='k')
def _append_best(ids, logp, logits, t, k):
  """Puts the k most probable tokens at t; returns rows `[B, k, T]`, log-probabilities `[B, k]`."""
  best = jax.lax.top_k(logits, k)[1]
  ids = jax.lax.dynamic_update_slice_in_dim(jnp.repeat(ids, k, 1), best[..., None], t, 2)
  return ids, logp + token_sampling.token_log_prob(logits[:, None], best)
