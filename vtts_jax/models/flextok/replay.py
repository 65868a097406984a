"""Replays golden files of FlexTok: every output of the reference, from our loader and model."""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.flextok import convert, flow, fsq, modeling


def _channels_last(x):
  return x.transpose(0, 2, 3, 1)


def _channels_first(x):
  return x.transpose(0, 3, 1, 2)


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  settings = convert.config_of(
    source,
    patch=config['patch_size'],
    size=config['latent_size'],
    levels=tuple(config['fsq_levels']),
    head=config['head_dim'],
    qk_norm=config['qk_norm'],
    max_timestep=config['max_timestep'],
  )
  params = convert.load_weights(source, settings)
  # fixtures hold int64 ids, where jax has int32
  inputs = {
    k: jnp.asarray(v) if v.dtype.kind == 'f' else jnp.asarray(v, jnp.int32)
    for k, v in inputs.items()
  }

  @jax.jit
  def run_model(params, inputs):
    return _run_model(config, modules.bind_module(modeling.build_model, settings, params), inputs)

  return {name: np.asarray(value) for name, value in run_model(params, inputs).items()}


def _run_model(config, model, inputs):
  encoder, decoder, levels = model.encoder, model.decoder, model.config.levels
  latents, noise = _channels_last(inputs['latents']), _channels_last(inputs['noise'])
  unquantized = encoder.unquantized_codes(latents)
  codes = fsq.quantize_codes(inputs['fsq_z'], levels)
  looked_up = fsq.codes_of(inputs['fsq_ids'], levels)
  ids = encoder(latents)
  out = {
    'fsq_codes': codes,
    'fsq_indices': fsq.ids_of(codes, levels),
    'fsq_ids_to_codes': looked_up,
    'fsq_codes_to_ids': fsq.ids_of(looked_up, levels),
    'enc_patch_tokens': encoder.embed_patches(latents),
    'enc_fsq_input': unquantized,
    'enc_codes': fsq.quantize_codes(unquantized, levels),
    'enc_token_ids': ids,
  }
  t, scale = inputs['timesteps'], config['guidance_scale']
  full, some = decoder.embed_registers(ids), decoder.embed_registers(ids, inputs['keep_k'])
  out['time_freq_embedding'] = modeling.time_features(t, model.config.max_timestep)
  null = jnp.broadcast_to(decoder.null_registers(), full.shape)
  for name, registers in (('full', full), ('trunc', some), ('uncond', null)):
    out[f'vel_{name}'] = _channels_first(decoder(noise, t, registers))
  for name, registers, guidance, projected in (
    ('noguide', full, 1.0, False),
    ('cfg', full, scale, False),
    ('apg', full, scale, True),
    ('apg_trunc', some, scale, True),
  ):
    steps = config['sample_steps']
    latents = flow.sample_latents(decoder, registers, noise, steps, guidance, projected)
    out[f'sample_{name}'] = _channels_first(latents)
  # guidance alone, step by step, on predictions that the fixture gives
  momentum = 0.0
  for i, (cond, uncond) in enumerate(zip(inputs['pred_cond'], inputs['pred_uncond'])):
    cond, uncond = _channels_last(cond), _channels_last(uncond)
    guided, momentum = flow.projected_guidance(cond, uncond, scale, momentum)
    out[f'apg_step{i + 1}'] = _channels_first(guided)
    # the file holds this output of the last step only
    out['cfg_step'] = _channels_first(flow.plain_guidance(cond, uncond, scale))
  return out
