"""Replays golden files of FlexTok AR: every output of the reference, from our loader and model.

Sequences are generated with the cache (`step`) where the reference runs the whole prefix anew, and
log-probabilities and filtered distributions come from `vtts_jax.sampling`.

One defect of the reference is replayed here and nowhere else: its class embedding overwrites the
label -1 (no class) by 0 in the caller's array, so that from the second token of a call on the null
stream of guidance is class 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import sampling, weights
from vtts_jax.models.flexar import convert
from vtts_jax.models.flexar.modeling import guide
from vtts_jax.models.t5 import convert as t5_convert

T5 = 'models.text_encoder.t5_embedder.model.'
BRANCHES = 3  # candidates of the last token in the `topk` outputs


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{output name: array} of one golden file; arguments as `testing.replay` passes them."""
  options = {'heads': config['num_heads'], 'eps': config['norm_eps']}
  model = weights.merge(*convert.load(source, convert.config_of(source, **options)))
  tokens = jnp.asarray(inputs['token_ids'], jnp.int32)[:, None]  # [B, 1, T]
  out = {}
  if config['conditioning'] == 'text':
    ctx, out = _text(config, source, model, inputs)
    after = ctx
  else:
    labels = jnp.asarray(inputs['class_ids'], jnp.int32)
    ctx, after = (
      model.class_context(jnp.stack([labels, jnp.full_like(labels, null)], 1)) for null in (-1, 0)
    )
  fed = jnp.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0)))
  places = jnp.broadcast_to(jnp.arange(fed.shape[-1]), fed.shape)
  out['input_embeddings'] = model.embed(ctx, fed, places)[:, 0, :, 0]
  forced = jax.jit(lambda ctx, tokens: model.logits(model.prefill(ctx, tokens)[0])[:, 0])
  logits = forced(ctx, tokens)  # [B, T, C, V]
  out['logits_cond'], out['logits_uncond'] = logits[:, :, 0], logits[:, :, 1]
  out['logits_cfg'] = guided = guide(logits, config['cfg_factor'])
  step = jax.jit(lambda *args: _next(model, *args))
  greedy = lambda *args: _greedy(step, model, ctx, after, config['gen_tokens'], *args)
  for kind, scale in (('cfg', config['cfg_factor']), ('nocfg', None)):
    for name, k in (('greedy', 1), ('topk', BRANCHES)):
      out[f'{name}_{kind}_ids'], out[f'{name}_{kind}_logprob'] = greedy(tokens[..., :0], scale, k)
  ids, logp = greedy(tokens[..., :3], config['cfg_factor'], 1)
  out['greedy_prefix3_cfg_ids'], out['greedy_prefix3_cfg_logprob'] = ids, logp
  best = guide(forced(ctx, out['greedy_cfg_ids'][:, None]), config['cfg_factor'])
  best = jax.lax.top_k(best, 2)[0]
  out['greedy_cfg_top1_minus_top2'] = best[..., 0] - best[..., 1]
  for name, filters in (('topk7', {'top_k': 7}), ('topp0.6', {'top_p': 0.6})):
    kept = sampling.adjust(guided[:, -1:], temperature=0.8, **filters)
    out[f'probs_temp0.8_{name}'] = jax.nn.softmax(kept, -1)
  return {name: np.asarray(value) for name, value in out.items()}


def _text(config, source, model, inputs):
  """Context of the prompts and the empty text, and the outputs of the text side."""
  t5 = dataclasses.replace(source.part(T5), config=config['t5'])
  encoder = weights.merge(*t5_convert.load(t5))
  batch = len(inputs['text_ids'])
  states, masks = {}, {}
  for name in ('text', 'uncond_text'):
    ids, masks[name] = (jnp.asarray(inputs[f'{name}_{x}'], jnp.int32) for x in ('ids', 'mask'))
    states[name] = jax.jit(encoder.__call__)(ids, masks[name])
  both = lambda x: jnp.stack(
    [x['text'], jnp.broadcast_to(x['uncond_text'], (batch, *x['uncond_text'].shape[1:]))], 1
  )
  ctx = jax.jit(model.text_context)(both(states), both(masks))
  bias = jnp.maximum(ctx['bias'][:, 0], -1)  # the files hold -1 for -inf
  return ctx, {
    't5_last_hidden': states['text'],
    'text_embeddings_projected': model.text_mlp(states['text']),
    'uncond_text_embeddings_projected': model.text_mlp(states['uncond_text']),
    'text_attn_bias': jnp.broadcast_to(bias[:, None], (batch, config['num_tokens'], bias.shape[1])),
  }


def _next(model, ctx, cache, ids, t):
  """Logits `[B, C, V]` of token t of `ids [B, 1, T]`, and the cache."""
  fed = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(t - 1, 0), 1, 2)
  hidden, cache = model.step(ctx, cache, fed, t)
  return model.logits(hidden)[:, 0, 0], cache


def _greedy(step, model, ctx, after, length, prefix, scale, k):
  """The most probable tokens up to `length`, at the last one the k most probable as k rows.

  Args:
    ctx, after: contexts of the first token and of those after it.
    prefix: `[B, 1, T0]`. scale: of guidance, or None for the prompt's stream alone.

  Returns:
    ids `[B * k, length]` and the summed log-probability `[B * k, 1]` of those drawn here.
  """
  if scale is None:
    ctx, after = (jax.tree.map(lambda x: x[:, :1], c) for c in (ctx, after))
  batch, _, known = prefix.shape
  ids = jnp.pad(prefix, ((0, 0), (0, 0), (0, length - known)))
  new_cache = lambda: model.init_cache(batch, 1, ctx['start'].shape[1], length)
  cache, logp = new_cache(), jnp.zeros((batch, 1))
  for t in range(known):
    _, cache = step(ctx, cache, ids, t)
  for t in range(known, length):
    logits, cache = step(ctx if t == known else after, cache, ids, t)
    if t == known and after is not ctx:
      cache = new_cache()
      for u in range(t + 1):
        _, cache = step(after, cache, ids, u)
    logits = guide(logits, scale)
    last = jax.lax.top_k(logits, k if t == length - 1 else 1)[1]
    logp = logp + sampling.log_prob(logits[:, None], last)
    ids = jnp.repeat(ids, last.shape[1], 1).at[:, :, t].set(last)
  return ids.reshape(-1, length), logp.reshape(-1, 1)
