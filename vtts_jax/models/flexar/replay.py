"""Replays golden files of FlexTok AR: every output of the reference, from our loader and model.

Sequences are generated with the cache (`step`) where the reference runs the whole prefix anew, and
log-probabilities and filtered distributions come from `vtts_jax.token_sampling`.

One defect of the reference is replayed here and nowhere else: its class embedding overwrites the
label -1 (no class) by 0 in the caller's array, so that from the second token of a call on the null
stream of guidance is class 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import token_sampling as sampling
from vtts_jax.models import modules
from vtts_jax.models.flexar import convert, modeling
from vtts_jax.models.flexar.modeling import FlexAR, guide
from vtts_jax.models.t5 import convert as t5_convert
from vtts_jax.models.t5.modeling import build as t5_build

T5 = 'models.text_encoder.t5_embedder.model.'
BRANCHES = 3  # candidates of the last token in the `topk` outputs


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{output name: array} of one golden file; arguments as `testing.replay` passes them."""
  options = {'heads': config['num_heads'], 'eps': config['norm_eps']}
  sizes = convert.config_of(source, **options)
  run = Runner(sizes, convert.load(source, sizes))
  inputs = {name: jnp.asarray(value, jnp.int32) for name, value in inputs.items()}
  tokens, scale, length = inputs['token_ids'][:, None], config['cfg_factor'], config['gen_tokens']
  if config['conditioning'] == 'text':
    t5 = dataclasses.replace(source.part(T5), config=config['t5'])
    ctx, out = _text(config, run, t5, inputs)
    after = ctx
  else:
    labels, out = inputs['class_ids'], {}
    ctx, after = (
      run.class_context(jnp.stack([labels, jnp.full_like(labels, null)], 1)) for null in (-1, 0)
    )
  fed = jnp.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0)))
  places = jnp.broadcast_to(jnp.arange(fed.shape[-1]), fed.shape)
  out['input_embeddings'] = run.embed(ctx, fed, places)[:, 0, :, 0]
  logits = run.forced(ctx, tokens)[0]
  out['logits_cond'], out['logits_uncond'] = logits[:, :, 0], logits[:, :, 1]
  out['logits_cfg'] = guided = guide(logits, scale)
  for kind, factor in (('cfg', scale), ('nocfg', None)):
    for name, ids, logp in _greedy(run, ctx, after, tokens, 0, length, factor):
      out[f'{name}_{kind}_ids'], out[f'{name}_{kind}_logprob'] = ids, logp
  (_, ids, logp), _ = _greedy(run, ctx, after, tokens, 3, length, scale)
  out['greedy_prefix3_cfg_ids'], out['greedy_prefix3_cfg_logprob'] = ids, logp
  ids = tokens.at[:, 0, :length].set(out['greedy_cfg_ids'])
  best = jax.lax.top_k(guide(run.forced(ctx, ids)[0], scale)[:, :length], 2)[0]
  out['greedy_cfg_top1_minus_top2'] = best[..., 0] - best[..., 1]
  for name, filters in (('topk7', {'top_k': 7}), ('topp0.6', {'top_p': 0.6})):
    kept = sampling.adjust(guided[:, -1:], temperature=0.8, **filters)
    out[f'probs_temp0.8_{name}'] = jax.nn.softmax(kept, -1)
  return {name: np.asarray(value) for name, value in out.items()}


class Runner:
  """The model's methods, each compiled once for a shape."""

  def __init__(self, config, params):
    def compiled(call):
      bind = lambda params: modules.bind_module(modeling.build, config, params)
      run = jax.jit(lambda params, *args: call(bind(params), *args))
      return lambda *args: run(params, *args)

    def forced(model, ctx, tokens):
      """Logits `[B, T, C, V]` of `tokens [B, 1, T]`, and the cache."""
      hidden, cache = model.prefill(ctx, tokens)
      return model.logits(hidden)[:, 0], cache

    def step(model, ctx, ids, cache, t):
      """Logits `[B, C, V]` of token t of `ids [B, 1, T]`, and the cache."""
      fed = jax.lax.dynamic_slice_in_dim(ids, t - 1, 1, 2)
      hidden, cache = model.step(ctx, cache, fed, t)
      return model.logits(hidden)[:, 0, 0], cache

    self.forced, self.step = compiled(forced), compiled(step)
    self.embed, self.text_mlp = compiled(FlexAR.embed), compiled(lambda m, x: m.text_mlp(x))
    self.text_context = compiled(FlexAR.text_context)
    self.class_context = compiled(FlexAR.class_context)


def _text(config, run, t5, inputs):
  """Context of the prompts and the empty text, and the outputs of the text side."""
  batch = len(inputs['text_ids'])
  sizes = t5_convert.config_of(t5)
  params = t5_convert.load(t5, sizes)
  encode = jax.jit(lambda params, *args: modules.bind_module(t5_build, sizes, params)(*args))
  ids, mask = (
    jnp.concatenate([inputs[f'text_{x}'], inputs[f'uncond_text_{x}']]) for x in ('ids', 'mask')
  )
  states = encode(params, ids, mask)
  pairs = np.stack([np.arange(batch), np.full(batch, batch)], 1)  # the prompt, the empty text
  ctx, projected = run.text_context(states[pairs], mask[pairs]), run.text_mlp(states)
  bias = jnp.maximum(ctx['bias'][:, 0], -1)  # the files hold -1 for -inf
  return ctx, {
    't5_last_hidden': states[:batch],
    'text_embeddings_projected': projected[:batch],
    'uncond_text_embeddings_projected': projected[batch:],
    'text_attn_bias': jnp.broadcast_to(bias[:, None], (batch, config['num_tokens'], bias.shape[1])),
  }


def _greedy(run, ctx, after, tokens, known, length, scale):
  """The most probable tokens after `known` of `tokens [B, 1, T]` up to `length`.

  Args:
    ctx, after: contexts of the first token and of those after it.
    scale: of guidance; None for the stream of the prompt alone.

  Returns:
    (name, ids `[B * k, length]`, summed log-probability `[B * k, 1]` of those drawn here) for
    'greedy', k = 1, and 'topk', where the last token branches into its k most probable.
  """
  ids = jnp.where(jnp.arange(tokens.shape[-1]) < known, tokens, 0)
  logp, cache = jnp.zeros((len(ids), 1)), None
  for t in range(known, length):
    if t == known:
      logits = run.forced(ctx, ids)[0][:, t]
    else:
      cache = run.forced(after, ids)[1] if cache is None else cache
      logits, cache = run.step(after, ids, cache, t)
    logits = logits[:, 0] if scale is None else guide(logits, scale)
    rows = [_put(ids, logp, logits, t, k) for k in ((1, BRANCHES) if t == length - 1 else (1,))]
    ids, logp = rows[0]
  return [
    (name, ids[..., :length].reshape(-1, length), logp.reshape(-1, 1))
    for name, (ids, logp) in zip(('greedy', 'topk'), rows)
  ]


@functools.partial(jax.jit, static_argnames='k')
def _put(ids, logp, logits, t, k):
  """The k most probable tokens at t, as rows `[B, k, T]`, and their log-probability `[B, k]`."""
  best = jax.lax.top_k(logits, k)[1]
  ids = jax.lax.dynamic_update_slice_in_dim(jnp.repeat(ids, k, 1), best[..., None], t, 2)
  return ids, logp + sampling.log_prob(logits[:, None], best)
