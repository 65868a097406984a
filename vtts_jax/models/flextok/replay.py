"""Replays golden files of FlexTok: every output of the reference, from our loader and model."""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.flextok import convert, flow, fsq, modeling


def _last(x):  # NCHW -> NHWC
  return x.transpose(0, 2, 3, 1)


def _first(x):
  return x.transpose(0, 3, 1, 2)


def replay(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{output name: array} of one golden file; arguments as `testing.replay` passes them."""
  settings = convert.config_of(
    source,
    patch=config['patch_size'],
    size=config['latent_size'],
    levels=tuple(config['fsq_levels']),
    head=config['head_dim'],
    qk_norm=config['qk_norm'],
    max_timestep=config['max_timestep'],
  )
  params = convert.load(source, settings)
  inputs = {
    k: jnp.asarray(v) if v.dtype.kind == 'f' else jnp.asarray(v, jnp.int32)
    for k, v in inputs.items()
  }

  def run(params, inputs):
    return _run(config, modules.bind_module(modeling.build, settings, params), inputs)

  return {name: np.asarray(value) for name, value in jax.jit(run)(params, inputs).items()}


def _run(config, model, inputs):
  encoder, decoder, levels = model.encoder, model.decoder, model.config.levels
  latents, noise = _last(inputs['latents']), _last(inputs['noise'])
  unquantized = encoder.unquantized(latents)
  codes, looked_up = fsq.quantize(inputs['fsq_z'], levels), fsq.codes_of(inputs['fsq_ids'], levels)
  ids = encoder(latents)
  out = {
    'fsq_codes': codes,
    'fsq_indices': fsq.ids_of(codes, levels),
    'fsq_ids_to_codes': looked_up,
    'fsq_codes_to_ids': fsq.ids_of(looked_up, levels),
    'enc_patch_tokens': encoder.project(latents),
    'enc_fsq_input': unquantized,
    'enc_codes': fsq.quantize(unquantized, levels),
    'enc_token_ids': ids,
  }
  t, scale = inputs['timesteps'], config['guidance_scale']
  full, some = decoder.condition(ids), decoder.condition(ids, inputs['keep_k'])
  out['time_freq_embedding'] = modeling.time_features(t, model.config.max_timestep)
  null = jnp.broadcast_to(decoder.null(), full.shape)
  for name, registers in (('full', full), ('trunc', some), ('uncond', null)):
    out[f'vel_{name}'] = _first(decoder(noise, t, registers))
  for name, registers, guidance, projected in (
    ('noguide', full, 1.0, False),
    ('cfg', full, scale, False),
    ('apg', full, scale, True),
    ('apg_trunc', some, scale, True),
  ):
    latents = flow.sample(decoder, registers, noise, config['sample_steps'], guidance, projected)
    out[f'sample_{name}'] = _first(latents)
  momentum = 0.0
  for i, (cond, uncond) in enumerate(zip(inputs['pred_cond'], inputs['pred_uncond'])):
    cond, uncond = _last(cond), _last(uncond)
    guided, momentum = flow.apg(cond, uncond, scale, momentum)
    out[f'apg_step{i + 1}'] = _first(guided)
    out['cfg_step'] = _first(flow.cfg(cond, uncond, scale))  # the file holds the last one
  return out
