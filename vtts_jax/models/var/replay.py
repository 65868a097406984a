"""Replays golden files of VAR: every output of the reference, from our loaders and models.

Logits of given tokens come from one pass over all scales, drawn pictures from one pass a scale with
the cache. The reference is asked for the most probable token. Filtered distributions come from
`vtts_jax.token_sampling`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import token_sampling
from vtts_jax.models import modules
from vtts_jax.models.var import convert, modeling
from vtts_jax.models.var_vq import convert as vq_convert
from vtts_jax.models.var_vq import modeling as vq_modeling
from vtts_jax.models.var_vq import pyramid

# the files hold filtered distributions of this many tokens of the last scale
FILTERED = 2


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  # the tokenizer's tensors stand beside the model's
  vq = source.select_prefix('params_vae/', config['vae'] | {'patch_nums': config['patch_nums']})
  header = {k: v for k, v in source.header.items() if not k.startswith('params_vae/')}
  prior = dataclasses.replace(source, header=header)
  vq_sizes, sizes = vq_convert.config_of(vq), convert.config_of(prior)
  params = {
    'prior': convert.load_weights(prior, sizes), 'vq': vq_convert.load_weights(vq, vq_sizes)
  }  # fmt: skip
  scales = len(sizes.patch_nums)
  given = np.concatenate([inputs[f'gt_idx_{s}'] for s in range(scales)], 1).astype(np.int32)
  labels = np.stack([inputs['labels'].astype(np.int32), np.full(len(given), -1, np.int32)], 1)

  @jax.jit
  def run(params):
    prior = modules.bind_module(modeling.build_model, sizes, params['prior'])
    vq = modules.bind_module(vq_modeling.build_model, vq_sizes, params['vq'])
    out = _run_tokenizer(vq, inputs['image'].transpose(0, 2, 3, 1), given)
    ctx = prior.class_context(labels)
    cache = prior.init_cache(ctx, 1)
    hidden, _ = prior.feed_scales(ctx, cache, out['var_input'][:, None], 0, scales)
    logits = prior.token_logits(ctx, hidden)[:, 0]
    out |= {'logits_cond': logits[:, :, 0], 'logits_uncond': logits[:, :, 1]}
    return out | _draw_greedily(prior, vq, ctx, cache, config['cfg'])

  out = run(params)
  last = out[f'infer_logits_{scales - 1}']
  for name, filters in (('topk9', {'top_k': 9}), ('topp0.7', {'top_p': 0.7})):
    kept = token_sampling.truncate_logits(last[:, :FILTERED], **filters)
    out[f'probs_{name}'] = jax.nn.softmax(kept, -1)
  return {name: np.asarray(value) for name, value in out.items()}


def _outside(x):
  """NHWC -> the file's NCHW."""
  return jnp.moveaxis(x, -1, -3)


def _run_tokenizer(vq, images, given):
  """Returns the outputs of the tokenizer, for pictures and for given ids `[R, T]`."""
  latents = vq.encode_latents(images)
  ids, distances = vq.quantise(latents)
  ends = pyramid.scale_ends(vq.config.grids)
  margins = [-jax.lax.top_k(-d, 2)[0] for d in distances]
  sums = [vq.sum_scales(ids, stage) for stage in (1, 2, len(distances))]
  partial = [_outside(jnp.clip(vq.decode_latents(x), -1, 1)) for x in sums]
  total = vq.sum_scales(given, len(distances))
  decoded = _outside(vq.decode_latents(total))
  return {
    'vae_f': _outside(latents), 'vae_fhat_0': _outside(sums[0]), 'vae_fhat_last': _outside(sums[2]),
    **{f'vae_idx_{s}': ids[:, a:b] for s, (a, b) in enumerate(zip(ends, ends[1:]))},
    'vae_recon_partial0': partial[0], 'vae_recon_partial1': partial[1],
    'vae_recon_last': partial[2],
    'vae_code_margin_per_scale': jnp.stack([(m[..., 1] - m[..., 0]).min() for m in margins]),
    'gt_fhat': _outside(total), 'gt_decoded_unclamped': decoded,
    'gt_image': jnp.clip(decoded, -1, 1),
    'var_input': vq.inputs_of_scales(given, len(distances))[0],
  }  # fmt: skip


def _draw_greedily(prior, vq, ctx, cache, strength):
  """Returns what the reference draws with guidance and its most probable tokens."""
  scales, out, gaps = len(vq.config.patch_nums), {}, []
  latents = jnp.zeros((len(ctx['start']), 1, *vq.config.grids[-1], vq.config.z_channels))
  for s in range(scales):
    # the first scale reads the class alone
    inputs = vq.shrink_latents(latents, s)[:, :, : None if s else 0]
    hidden, cache = prior.feed_scales(ctx, cache, inputs, s, s + 1)
    ramp = modeling.guidance_ramp(strength, s, scales)
    logits = modeling.guide_logits(prior.token_logits(ctx, hidden), ramp)
    ids = jnp.argmax(logits, -1)
    latents = latents + vq.expand_scale(ids, s)
    best = jax.lax.top_k(logits, 2)[0]
    gaps.append((best[..., 0] - best[..., 1]).min())
    out |= {f'infer_logits_{s}': logits[:, 0], f'infer_idx_{s}': ids[:, 0]}
  picture = jnp.clip(vq.decode_latents(latents[:, 0]), -1, 1)
  return out | {
    'infer_fhat': _outside(latents[:, 0]), 'infer_image': _outside(picture * 0.5 + 0.5),
    'infer_top1_minus_top2': jnp.stack(gaps),
  }  # fmt: skip
