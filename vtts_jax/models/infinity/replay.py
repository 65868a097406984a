"""Replays golden files of Infinity: every output of the reference, from our loaders and models.

Logits of given inputs come from one pass over all scales, drawn pictures from one pass a scale with
the cache. The reference is asked for the more probable value of each bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.infinity import convert, modeling
from vtts_jax.models.infinity.schedules import Schedule
from vtts_jax.models.infinity_vae import convert as vae_convert
from vtts_jax.models.infinity_vae import modeling as vae_modeling
from vtts_jax.models.var_vq import pyramid

# the reference pads its table of rotations with zeros to a multiple of this
PADDED = 128


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  # the tokenizer's tensors stand beside the model's
  vae = source.select_prefix('params_vae/')
  header = {k: v for k, v in source.header.items() if not k.startswith('params_vae/')}
  prior = dataclasses.replace(source, header=header)
  vae_sizes, sizes = vae_convert.config_of(vae), convert.config_of(prior)
  params = {
    'prior': convert.load_weights(prior, sizes), 'vae': vae_convert.load_weights(vae, vae_sizes)
  }  # fmt: skip
  grids = tuple((h, w) for _, h, w in config['scale_schedule'])
  schedule = Schedule(grids, grids[-1])
  states, mask = _pad_words(inputs['text_compact'], inputs['text_lens'])

  @jax.jit
  def run(params):
    prior = modules.bind_module(modeling.build_model, sizes, params['prior'])
    vae = modules.bind_module(vae_modeling.build_model, vae_sizes, params['vae'])
    # the tokenizer's own grids are those of cells, of which a token may be 2 x 2
    side = vae_modeling.cells_of_token(vae_sizes, sizes.bits)
    cells = tuple((side * h, side * w) for h, w in grids)
    out = _run_tokenizer(vae, inputs['image'].transpose(0, 2, 3, 1), cells)
    ctx = prior.text_context(states, mask)
    cache = prior.init_cache(ctx, 1, schedule)
    given = inputs['x_in'][:, None]
    hidden, _ = prior.feed_scales(ctx, cache, given, schedule, 0, len(grids))
    logits = prior.bit_logits(ctx, hidden)[:, 0]
    logits = logits.reshape(*logits.shape[:3], -1)
    words = prior.project_text(prior.norm_text(states))
    out |= {
      'sos_cond': ctx['start'][:, 0], 'text_kv': words[mask != 0],
      'logits': logits[:, :, 0], 'logits_uncond': logits[:, :, 1],
    }  # fmt: skip
    drawn = _draw_greedily(prior, vae, ctx, cache, schedule, config)
    # guidance at the output of the last block
    guide = (sizes.layers - 1, config['cfg'])
    last = _draw_greedily(prior, vae, ctx, cache, schedule, config, guide)
    return out | drawn | {'infer_cfglayer_logits_last': last[f'infer_logits_{len(grids) - 1}']}

  table = modeling.rotation_table(sizes, schedule)
  pad = -table.shape[1] % PADDED
  out = run(params) | {'rope_grid': np.pad(table, ((0, 0), (0, pad), (0, 0)))}
  return {name: np.asarray(value) for name, value in out.items()}


def _pad_words(compact, lengths):
  """Texts one after another `[words, E]` -> `[B, W, E]` padded on the right, and mask `[B, W]`."""
  mask = np.arange(lengths.max()) < lengths[:, None]
  states = np.zeros((*mask.shape, compact.shape[-1]), compact.dtype)
  states[mask] = compact
  return states, mask


def _outside(x):
  """NHWC -> the file's NCHW."""
  return jnp.moveaxis(x, -1, -3)


def _decode(vae, latents):
  return _outside(jnp.clip(vae.decode_latents(latents), -1, 1))


def _run_tokenizer(vae, images, grids):
  """Returns the outputs of the tokenizer for pictures."""
  latents = vae.encode_latents(images)
  bits, sums = vae.quantise(latents, grids)
  # pictures of the reference have an axis of time, of length 1
  clip = lambda x: _outside(x)[:, :, None]
  out = {f'bsq_bits_{s}': x[:, None].astype(jnp.int32) for s, x in enumerate(bits)}
  for s, x in enumerate(sums[:-1]):
    # the tokenizer's own inputs for training are means, those of drawing are not
    means = pyramid.resize_grid(x, grids[s + 1], 'area')
    out[f'bsq_next_input_{s}'] = clip(means)
  return out | {
    'vae_h': _outside(latents), 'bsq_quantized': _outside(sums[-1]),
    'bsq_codes_last': clip(vae.codes_of_bits(bits[-1])), 'bsq_summed_codes': clip(sums[-1]),
    'vae_decoded': _decode(vae, sums[-1]),
  }  # fmt: skip


def _draw_greedily(prior, vae, ctx, cache, schedule, config, guide=None):
  """Returns what the reference draws with guidance and the more probable value of every bit."""
  grids, out, gaps = schedule.grids, {}, []
  nothing = jnp.zeros((len(ctx['start']), 1, pyramid.scale_ends(grids)[-1], prior.config.bits))
  latents = vae.sum_scales(nothing, grids, 0)
  for s, grid in enumerate(grids):
    # the first scale reads the text alone
    inputs = vae.shrink_latents(latents, grid, prior.config.bits)[:, :, : None if s else 0]
    hidden, cache = prior.feed_scales(ctx, cache, inputs, schedule, s, s + 1, guide)
    # with a guided layer the text's stream alone has logits
    logits = prior.bit_logits(ctx, hidden) / config['tau']
    logits = modeling.guide_logits(logits, config['cfg'] if guide is None else 1.0)
    bits = jnp.argmax(logits, -1)
    latents = latents + vae.expand_scale(bits, grid, grids[-1])
    gaps.append(jnp.abs(logits[..., 0] - logits[..., 1]).min())
    out |= {f'infer_logits_{s}': logits[:, 0], f'infer_bits_{s}': bits[:, 0]}
  return out | {
    'infer_summed_codes': _outside(latents[:, 0]), 'infer_min_bit_margin': jnp.stack(gaps),
    'infer_image_float': _decode(vae, latents[:, 0]),
  }  # fmt: skip
