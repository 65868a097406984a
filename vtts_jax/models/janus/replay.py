"""Replays golden files of Janus: every output of the reference, from our loader and model.

Logits of given tokens come from `run_tokens`, sequences from `feed_tokens` and its cache.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import token_sampling
from vtts_jax.models import modules
from vtts_jax.models.janus import convert, modeling
from vtts_jax.models.llamagen.modeling import guide_logits


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  options = {'language_config': config['llama'], 'num_image_tokens': config['grid'] ** 2}
  source = source.select_prefix('', options)
  sizes = convert.config_of(source)
  params = convert.load_weights(source, sizes)
  inputs = {k: v.astype(np.int32) if v.dtype.kind == 'i' else v for k, v in inputs.items()}
  tokens, scale = inputs['image_token_ids'], config['cfg_weight']
  prompt = np.repeat(inputs['prompt_ids'][None], len(tokens), 0)
  mask = np.ones_like(prompt)
  pair = np.stack([prompt, modeling.null_prompts(prompt, mask, config['pad_id'])], 1)

  @jax.jit
  def force(params):
    model = modules.bind_module(modeling.build_model, sizes, params)
    ctx = model.prompt_context(pair, mask)
    # the file holds the hidden states of all words
    words, _ = model.run_prompts(model.words[...][pair], mask)  # [B, C, W, D]
    hidden, _ = model.run_tokens(ctx, tokens[:, None])
    hidden = hidden[:, 0].swapaxes(1, 2)  # [B, C, T, D]
    # the last word predicts the first token
    logits = model.token_logits(jnp.concatenate([words[:, :, -1:], hidden], 2))
    hidden = jnp.concatenate([words, hidden], 2)
    return ctx, logits, hidden.reshape(-1, *hidden.shape[2:]), model.embed_tokens(tokens)

  ctx, logits, hidden, embedded = force(params)
  guided = guide_logits(logits.swapaxes(1, 2), scale)
  ids, steps = _draw_greedily(sizes, params, ctx, scale, config['gen_len'])
  best = jax.lax.top_k(steps, 2)[0]
  chosen = token_sampling.token_log_prob(steps / config['temperature'], ids)
  out = {
    'paired_prompt_ids': pair.reshape(-1, pair.shape[-1]), 'gen_img_embeds': embedded,
    'last_hidden': hidden, 'logits_cond': logits[:, 0], 'logits_uncond': logits[:, 1],
    'logits_cfg': guided, 'greedy_ids': ids, 'greedy_logprobs': chosen,
    'greedy_top1_minus_top2': best[..., 0] - best[..., 1],
  }  # fmt: skip
  # a picture that is not complete has token 0 in the rest
  drawn = jnp.pad(ids, ((0, 0), (0, sizes.tokens - ids.shape[1])))
  out |= _run_tokenizer(sizes, params, inputs, drawn)
  return {name: np.asarray(value) for name, value in out.items()}


def _draw_greedily(sizes, params, ctx, scale, count):
  """Draws the most probable tokens under guidance: (ids `[B, count]`, logits `[B, count, V]`)."""

  @jax.jit
  def draw(params):
    model = modules.bind_module(modeling.build_model, sizes, params)

    def step(carry, t):
      cache, token = carry
      hidden, cache = model.feed_tokens(ctx, cache, token, t)
      logits = guide_logits(model.token_logits(hidden), scale)
      token = jnp.argmax(logits, -1)
      return (cache, token), (token[:, 0], logits[:, 0])

    start = model.init_cache(ctx, 1), jnp.zeros((len(ctx['length']), 1), jnp.int32)
    return jax.lax.scan(step, start, jnp.arange(count))[1]

  return tuple(jnp.moveaxis(x, 0, 1) for x in draw(params))


def _run_tokenizer(sizes, params, inputs, drawn):
  """Returns the outputs of the tokenizer; its arrays are NCHW in the file and NHWC here."""
  outside = lambda x: x.transpose(0, 3, 1, 2)

  @jax.jit
  def run(params):
    vq = modules.bind_module(modeling.build_model, sizes, params).vq
    latents = vq.encode_latents(inputs['image'].transpose(0, 2, 3, 1))
    ids = vq.encode(inputs['image'].transpose(0, 2, 3, 1))
    distances = -jax.lax.top_k(-vq.code_distances(latents), 2)[0]
    codes, entry = (vq.look_up(x).reshape(latents.shape) for x in (ids, inputs['code_ids']))
    decoded = vq.decode(jnp.concatenate([inputs['code_ids'], drawn]))
    return {
      'vq_h': outside(latents), 'vq_ids': ids, 'vq_quant': outside(codes),
      'vq_margin': (distances[..., 1] - distances[..., 0]).reshape(ids.shape),
      'vq_codebook_entry': outside(entry),
      'vq_decoded_image': outside(decoded[: len(ids)]),
      'greedy_image': outside(decoded[len(ids) :]),
    }  # fmt: skip

  return run(params)
