"""Replays golden files of LlamaGen: every output of the reference, from our loaders and models.

Logits of given tokens come from `prefill`, greedy sequences from `feed_tokens` and its cache; the
reference uses a cache as well. Filtered distributions come from `vtts_jax.token_sampling`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import token_sampling
from vtts_jax.models import modules
from vtts_jax.models.llamagen import convert, modeling
from vtts_jax.models.llamagen.modeling import guide_logits
from vtts_jax.models.llamagen_vq import convert as vq_convert
from vtts_jax.models.llamagen_vq import modeling as vq_modeling

# the files hold filtered distributions of this token
FILTERED = 3


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  # the tokenizer's tensors stand beside the model's
  vq = source.select_prefix('params_vae/')
  header = {k: v for k, v in source.header.items() if not k.startswith('params_vae/')}
  gpt = dataclasses.replace(source, header=header, config=config['params'])
  sizes = convert.config_of(gpt)
  params = convert.load_weights(gpt, sizes)
  inputs = {k: v.astype(np.int32) if v.dtype.kind == 'i' else v for k, v in inputs.items()}

  @jax.jit
  def force(params):
    model = modules.bind_module(modeling.build_model, sizes, params)
    ctx, out = _encode_condition(model, inputs)
    hidden, _ = model.prefill(ctx, inputs['token_ids'][:, None])
    return ctx, out | {'logits': model.token_logits(hidden)[:, 0]}

  ctx, out = force(params)
  logits = out.pop('logits')  # [B, T, C, V]
  guided = guide_logits(logits, config['cfg_scale'])
  out |= {'logits_cond': logits[:, :, 0], 'logits_uncond': logits[:, :, 1], 'logits_cfg': guided}
  for name, filters in (('topk7', {'top_k': 7}), ('topp0.6', {'top_p': 0.6})):
    kept = token_sampling.truncate_logits(guided[:, FILTERED], temperature=0.8, **filters)
    out[f'probs_temp0.8_{name}'] = jax.nn.softmax(kept, -1)
  # the first token and steps 0 .. interval are guided
  for name, guided_tokens in (
    ('cfg', sizes.tokens), ('interval', config['cfg_interval'] + 2), ('nocfg', 0)
  ):  # fmt: skip
    ids, steps = _draw_greedily(sizes, params, ctx, config['cfg_scale'], guided_tokens)
    out |= {f'greedy_{name}_ids': ids, f'greedy_{name}_step_logits': steps}
  best = jax.lax.top_k(out['greedy_cfg_step_logits'], 2)[0]
  out['greedy_cfg_top1_minus_top2'] = best[..., 0] - best[..., 1]
  out |= _run_tokenizer(vq, inputs, out['greedy_cfg_ids'])
  return {name: np.asarray(value) for name, value in out.items()}


def _encode_condition(model, inputs):
  """Returns the context of prompt and null stream, and the outputs of the condition."""
  if model.config.classes:
    labels, W = inputs['labels'], 1
    ctx = model.class_context(jnp.stack([labels, jnp.full_like(labels, -1)], 1))
    out = {'cond_embedding': model.classes[...][labels][:, None]}
  else:
    states, mask = inputs['t5_features'], inputs['t5_mask']
    ctx, W = model.text_context(states, mask), mask.shape[1]
    states, mask = modeling.pad_left(states, mask)
    whole = jnp.concatenate([mask, jnp.ones((len(mask), model.config.tokens), mask.dtype)], 1)
    out = {
      'left_padded_features': states, 'left_padded_mask': mask,
      'cond_embedding': model.text_mlp(states),
      'attention_mask': modeling.visible_pairs(whole).astype(jnp.int32),
    }  # fmt: skip
  # rows of the condition are zero in the reference's table; pairs are (cos, sin)
  table = np.moveaxis(modeling.rotation_table(model.config), 0, -1)
  return ctx, out | {'freqs_cis': np.pad(table, ((W, 0), (0, 0), (0, 0)))}


def _draw_greedily(sizes, params, ctx, scale, guided_tokens):
  """Draws the most probable tokens, the first `guided_tokens` of them under guidance.

  Returns:
    (ids `[B, T]`, the logits that decided `[B, T, V]`).
  """

  @jax.jit
  def draw(params):
    model = modules.bind_module(modeling.build_model, sizes, params)
    cache = model.init_cache(ctx, 1)

    def step(carry, t):
      cache, token = carry
      hidden, cache = model.feed_tokens(ctx, cache, token, t)
      logits = model.token_logits(hidden)
      logits = jnp.where(t < guided_tokens, guide_logits(logits, scale), logits[..., 0, :])
      token = jnp.argmax(logits, -1)
      return (cache, token), (token[:, 0], logits[:, 0])

    start = cache, jnp.zeros((len(ctx['score']), 1), jnp.int32)
    return jax.lax.scan(step, start, jnp.arange(sizes.tokens))[1]

  return tuple(jnp.moveaxis(x, 0, 1) for x in draw(params))


def _run_tokenizer(source, inputs, drawn):
  """Returns the outputs of the tokenizer; its arrays are NCHW in the file and NHWC here."""
  sizes = vq_convert.config_of(source)
  params = vq_convert.load_weights(source, sizes)
  outside = lambda x: x.transpose(0, 3, 1, 2)

  @jax.jit
  def run(params):
    model = modules.bind_module(vq_modeling.build_model, sizes, params)
    latents = model.encode_latents(inputs['image'].transpose(0, 2, 3, 1))
    ids = model.encode(inputs['image'].transpose(0, 2, 3, 1))
    distances = -jax.lax.top_k(-model.code_distances(latents), 2)[0]
    codes, entry = (
      model.look_up(x).reshape(latents.shape) for x in (ids, inputs['code_ids'])
    )
    decoded = model.decode(jnp.concatenate([inputs['code_ids'], drawn]))
    # their margin is one of cosines, half of that of squared distances
    margin = (distances[..., 1] - distances[..., 0]) / 2
    return {
      'vq_h': outside(latents), 'vq_ids': ids, 'vq_quant': outside(codes),
      'vq_margin': margin.reshape(ids.shape), 'vq_codebook_entry': outside(entry),
      'vq_decoded_image': outside(decoded[: len(ids)]),
      'greedy_image': outside(decoded[len(ids) :]),
    }  # fmt: skip

  return run(params)
