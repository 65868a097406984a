"""Replays golden files of RandAR: every output of the reference, from our loader and model.

Logits of given tokens come from `prefill`; sequences, one by one and in parallel, from
`feed_tokens` and its cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.llamagen.modeling import guide_logits, rotation_table
from vtts_jax.models.randar import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  source = source.select_prefix('', config['params'])
  sizes = convert.config_of(source)
  params = convert.load_weights(source, sizes)
  labels, tokens, order = (
    inputs[name].astype(np.int32) for name in ('labels', 'token_ids', 'token_order')
  )

  @jax.jit
  def force(params, order):
    model = modules.bind_module(modeling.build_model, sizes, params)
    ctx = model.class_context(jnp.stack([labels, jnp.full_like(labels, -1)], 1))
    # the file's tokens are row by row
    drawn = jnp.take_along_axis(tokens, order, -1)
    hidden, _ = model.prefill(ctx, drawn[:, None], order[:, None])
    return ctx, model.token_logits(hidden)[:, 0], model.embed_instructions(order)

  ctx, logits, told = force(params, order)
  raster = np.broadcast_to(np.arange(sizes.tokens, dtype=np.int32), order.shape)
  out = {
    # the class has zeros; pairs are (cos, sin)
    'freqs_cis': np.pad(np.moveaxis(rotation_table(sizes), 0, -1), ((1, 0), (0, 0), (0, 0))),
    'position_instruction_tokens': told,
    'token_logits_cond': logits[:, :, 0],
    'token_logits_uncond': logits[:, :, 1],
    'token_logits_raster': force(params, raster)[1][:, :, 0],
  }
  draw = functools.partial(_draw_greedily, sizes, params, ctx, order)
  parallel = modeling.parallel_counts(sizes.tokens, config['num_inference_steps'])
  scales = tuple(config['cfg_scales'])
  # guidance that ends at 1 or below is none
  guided = scales if scales[1] > 1 else None
  for name, counts, guidance in (
    ('seq_cfg', (1,) * sizes.tokens, guided), ('par_cfg', parallel, guided),
    ('par_nocfg', parallel, None),
  ):  # fmt: skip
    ids, steps = draw(counts, guidance)
    best = jax.lax.top_k(steps, 2)[0]
    out |= {
      f'{name}_ids': modeling.to_raster(ids, order), f'{name}_step_logits': steps,
      f'{name}_tokens_per_call': np.array(counts),
      f'{name}_top1_minus_top2': best[..., 0] - best[..., 1],
    }  # fmt: skip
  before = np.cumsum((0, *parallel[:-1]))
  scale = modeling.guidance_at(scales, before, sizes.tokens)
  return {k: np.asarray(v) for k, v in (out | {'par_cfg_scale_per_call': scale}).items()}


def _draw_greedily(sizes, params, ctx, order, counts, scales):
  """Draws the most probable tokens, `counts` at a time; guided by `scales` if there are any.

  Returns:
    (ids `[B, T]` by place, the logits that decided `[B, T, V]`).
  """

  @jax.jit
  def draw(params):
    model = modules.bind_module(modeling.build_model, sizes, params)
    cache, orders = model.init_cache(ctx, 1), order[:, None]
    tokens, found, place = jnp.zeros((len(order), 1, 0), jnp.int32), [], 0
    # calls have different shapes, so that this loop cannot be a scan
    for count in counts:
      hidden, cache = model.feed_tokens(ctx, cache, tokens, orders, place, count)
      logits = model.token_logits(hidden)
      if scales is None:
        logits = logits[..., 0, :]
      else:
        scale = modeling.guidance_at(scales, place, sizes.tokens)
        logits = guide_logits(logits, scale)
      tokens, place = jnp.argmax(logits, -1), place + count
      found.append((tokens[:, 0], logits[:, 0]))
    return tuple(jnp.concatenate(x, 1) for x in zip(*found))

  return draw(params)
