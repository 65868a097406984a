"""Replays golden files of the family `unet`: their arrays are NCHW, ours NHWC."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.unet import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every output of a fixture: the embeddings, the output of the middle, and predictions at the
  fixture's steps, without the text, and guided."""
  options = {'_class_name': 'UNet2DConditionModel', **config['params']}  # constructor arguments
  settings = convert.config_of(source, options=options)
  params = convert.load_weights(source, settings)
  latents = inputs['latents'].transpose(0, 2, 3, 1)
  outside = lambda x: np.asarray(x).transpose(0, 3, 1, 2)

  def stages(params, t, text, pooled, time_ids):
    model = modules.bind_module(modeling.build_model, settings, params)
    features = modeling.time_features(t, settings.block_out_channels[0])
    out = {'time_proj': features, 'time_embedding': model.time_embedding(features)}
    if pooled is not None:
      out['add_embedding'] = model.embed_added(pooled, time_ids)
    out['mid'], _ = model.run_down(latents, model.embed_time(t, pooled, time_ids), text)
    return out, model(latents, t, text, pooled, time_ids)

  run = jax.jit(stages)
  t, time_ids = inputs['timestep'].astype(np.float32), inputs.get('time_ids')
  cond = inputs['text'], inputs.get('pooled'), time_ids
  uncond = inputs['uncond_text'], inputs.get('uncond_pooled'), time_ids
  out, noise = run(params, t, *cond)
  without = run(params, t, *uncond)[1]
  out = {name: np.asarray(value) for name, value in out.items()}
  out |= {'mid': outside(out['mid']), 'noise_pred': outside(noise)}
  out['noise_pred_cfg'] = outside(without + config['guidance_scale'] * (noise - without))
  for i, step in enumerate(config['timesteps']):
    out[f'noise_pred_t{i}'] = outside(run(params, np.full_like(t, step), *cond)[1])
  return out
