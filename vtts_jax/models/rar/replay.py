"""Replays golden files of RAR and its tokenizer: every output of the reference.

Logits of given tokens come from `prefill`, sequences from `feed_tokens` and its cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.llamagen.modeling import guide_logits
from vtts_jax.models.maskgit_vq import convert as vq_convert
from vtts_jax.models.maskgit_vq import modeling as vq_modeling
from vtts_jax.models.rar import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  # the tokenizer's tensors stand beside the model's
  vq = source.select_prefix('params_vae/')
  header = {k: v for k, v in source.header.items() if not k.startswith('params_vae/')}
  source = dataclasses.replace(source, header=header)
  sizes = convert.config_of(source)
  params = convert.load_weights(source, sizes)
  inputs = {k: v.astype(np.int32) if v.dtype.kind == 'i' else v for k, v in inputs.items()}
  labels, tokens, order = (inputs[name] for name in ('labels', 'token_ids', 'token_order'))

  @jax.jit
  def force(params, order):
    model = modules.bind_module(modeling.build_model, sizes, params)
    streams = jnp.stack([labels, jnp.full_like(labels, -1)], 1)
    ctx = model.class_context(streams, jnp.repeat(order[:, :1], 2, 1))
    # the file's tokens are row by row
    drawn = jnp.take_along_axis(tokens, order, -1)
    hidden, _ = model.prefill(ctx, drawn[:, None], order[:, None])
    return ctx, model.token_logits(hidden)[:, 0]

  raster = np.broadcast_to(np.arange(sizes.tokens, dtype=np.int32), order.shape)
  ctx, logits = force(params, raster)
  named = sizes.codes + 1 + np.stack([labels, np.full_like(labels, sizes.classes)])
  scale, power, temperature = (
    config[name] for name in ('guidance_scale', 'guidance_scale_pow', 'randomize_temperature')
  )
  out = {
    'condition_ids': named[0], 'none_condition_ids': named[1],
    'logits_cond': logits[:, :, 0], 'logits_uncond': logits[:, :, 1],
    'logits_ordered': force(params, order)[1][:, :, 0],
    'cfg_scale_per_step': modeling.guidance_at(np.arange(sizes.tokens), sizes.tokens, scale, power),
  }  # fmt: skip
  for name, strength in (('greedy', scale), ('greedy_nocfg', 0.0)):
    ids, steps = _draw_greedily(sizes, params, ctx, strength, power)
    probs = jax.nn.softmax(steps / temperature, -1)
    out |= {f'{name}_ids': ids, f'{name}_step_probs': probs}
  best = jax.lax.top_k(out['greedy_step_probs'], 2)[0]
  out['greedy_top1_minus_top2'] = best[..., 0] - best[..., 1]
  # a file of the transformer alone is half as large
  out |= _run_tokenizer(vq, inputs, out['greedy_ids']) if vq.tensor_names() else {}
  return {name: np.asarray(value) for name, value in out.items()}


def _draw_greedily(sizes, params, ctx, scale, power):
  """Draws the most probable tokens; scale 0 is no guidance.

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
      # both rows run in the reference, too; without guidance the class alone decides
      guided = guide_logits(logits, modeling.guidance_at(t, sizes.tokens, scale, power))
      logits = guided if scale else logits[..., 0, :]
      token = jnp.argmax(logits, -1)
      return (cache, token), (token[:, 0], logits[:, 0])

    start = cache, jnp.zeros((len(ctx['class']), 1), jnp.int32)
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
    distances = -jax.lax.top_k(-vq_modeling.code_distances(latents, model.codebook[...]), 2)[0]
    codes = model.look_up(ids).reshape(latents.shape)
    entry = model.look_up(inputs['code_ids']).reshape(latents.shape)
    return {
      'vq_h': outside(latents), 'vq_ids': ids, 'vq_quant': outside(codes),
      'vq_margin': (distances[..., 1] - distances[..., 0]).reshape(ids.shape),
      'vq_decoded_unclamped': outside(model.decode_latents(entry)),
      'vq_decoded_image': outside(model.decode(inputs['code_ids'])),
      'greedy_image': outside(model.decode(drawn)),
    }  # fmt: skip

  return run(params)
