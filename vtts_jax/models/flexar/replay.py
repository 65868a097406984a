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
  graphdef, params = convert.load(source, convert.config_of(source, **options))
  t5, encoder = (), ()
  if config['conditioning'] == 'text':
    t5, encoder = t5_convert.load(dataclasses.replace(source.part(T5), config=config['t5']))
  inputs = {name: jnp.asarray(value, jnp.int32) for name, value in inputs.items()}

  @jax.jit
  def run(params, encoder, inputs):
    return _run(config, weights.merge(graphdef, params), encoder and weights.merge(t5, encoder),
                inputs)  # fmt: skip

  return {name: np.asarray(value) for name, value in run(params, encoder, inputs).items()}


def _run(config, model, t5, inputs):
  tokens, scale = inputs['token_ids'][:, None], config['cfg_factor']  # [B, 1, T]
  if t5:
    ctx, out = _text(config, model, t5, inputs)
    after = ctx
  else:
    labels, out = inputs['class_ids'], {}
    ctx, after = (
      model.class_context(jnp.stack([labels, jnp.full_like(labels, null)], 1)) for null in (-1, 0)
    )
  fed = jnp.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0)))
  places = jnp.broadcast_to(jnp.arange(fed.shape[-1]), fed.shape)
  out['input_embeddings'] = model.embed(ctx, fed, places)[:, 0, :, 0]
  logits = _forced(model, ctx, tokens)
  out['logits_cond'], out['logits_uncond'] = logits[:, :, 0], logits[:, :, 1]
  out['logits_cfg'] = guided = guide(logits, scale)
  prompt = [jax.tree.map(lambda x: x[:, :1], c) for c in (ctx, after)]
  for kind, contexts in (('cfg', (ctx, after)), ('nocfg', prompt)):
    for name, ids, logp in _greedy(model, *contexts, tokens[..., :0], config['gen_tokens'], scale):
      out[f'{name}_{kind}_ids'], out[f'{name}_{kind}_logprob'] = ids, logp
  (_, ids, logp), _ = _greedy(model, ctx, after, tokens[..., :3], config['gen_tokens'], scale)
  out['greedy_prefix3_cfg_ids'], out['greedy_prefix3_cfg_logprob'] = ids, logp
  best = guide(_forced(model, ctx, out['greedy_cfg_ids'][:, None]), scale)
  best = jax.lax.top_k(best, 2)[0]
  out['greedy_cfg_top1_minus_top2'] = best[..., 0] - best[..., 1]
  for name, filters in (('topk7', {'top_k': 7}), ('topp0.6', {'top_p': 0.6})):
    kept = sampling.adjust(guided[:, -1:], temperature=0.8, **filters)
    out[f'probs_temp0.8_{name}'] = jax.nn.softmax(kept, -1)
  return out


def _text(config, model, t5, inputs):
  """Context of the prompts and the empty text, and the outputs of the text side."""
  batch = len(inputs['text_ids'])
  states = {n: t5(inputs[f'{n}_ids'], inputs[f'{n}_mask']) for n in ('text', 'uncond_text')}
  both = lambda prompts, empty: jnp.stack(
    [prompts, jnp.broadcast_to(empty, (batch, *empty.shape[1:]))], 1
  )
  ctx = model.text_context(
    both(*states.values()), both(inputs['text_mask'], inputs['uncond_text_mask'])
  )
  bias = jnp.maximum(ctx['bias'][:, 0], -1)  # the files hold -1 for -inf
  return ctx, {
    't5_last_hidden': states['text'],
    'text_embeddings_projected': model.text_mlp(states['text']),
    'uncond_text_embeddings_projected': model.text_mlp(states['uncond_text']),
    'text_attn_bias': jnp.broadcast_to(bias[:, None], (batch, config['num_tokens'], bias.shape[1])),
  }


def _forced(model, ctx, tokens):
  """Logits `[B, T, C, V]` of `tokens [B, 1, T]`."""
  return model.logits(model.prefill(ctx, tokens)[0])[:, 0]


def _greedy(model, ctx, after, prefix, length, scale):
  """The most probable tokens after `prefix [B, 1, T0]` up to `length`, from the cache.

  Args:
    ctx, after: contexts of the first token and of those after it.

  Returns:
    (name, ids `[B * k, length]`, summed log-probability `[B * k, 1]` of those drawn here) for
    'greedy', k = 1, and 'topk', where the last token branches into its k most probable.
  """
  batch, _, known = prefix.shape
  ids = jnp.pad(prefix, ((0, 0), (0, 0), (0, length - known)))
  logits = guide(_forced(model, ctx, ids)[:, known], scale)  # [B, V]

  def choose(ids, logp, logits, t, k=1):
    best = jax.lax.top_k(logits, k)[1]
    put = lambda ids, best: jax.lax.dynamic_update_slice_in_dim(ids, best, t, 2)
    return put(jnp.repeat(ids, k, 1), best[..., None]), logp + sampling.log_prob(
      logits[:, None], best
    )

  def step(carry, t):
    ids, logp, cache = carry
    fed = jax.lax.dynamic_slice_in_dim(ids, t - 1, 1, 2)
    hidden, cache = model.step(after, cache, fed, t)
    logits = guide(model.logits(hidden)[:, 0, 0], scale)
    return (*choose(ids, logp, logits, t), cache), (ids, logp, logits)

  ids, logp = choose(ids, jnp.zeros((batch, 1)), logits, known)
  cache = model.prefill(after, ids)[1]
  _, before = jax.lax.scan(step, (ids, logp, cache), jnp.arange(known + 1, length))
  last = jax.tree.map(lambda x: x[-1], before)
  for name, k in (('greedy', 1), ('topk', BRANCHES)):
    ids, logp = choose(*last, length - 1, k)
    yield name, ids.reshape(-1, length), logp.reshape(-1, 1)
