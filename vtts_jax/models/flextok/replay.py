"""Replays golden files of FlexTok: every output of the reference, from our loader and model."""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import weights
from vtts_jax.models.flextok import convert, flow, fsq
from vtts_jax.models.flextok.modeling import time_features


def _last(x):  # NCHW -> NHWC
  return jnp.asarray(x).transpose(0, 2, 3, 1)


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
  model = weights.merge(*convert.load(source, settings))
  encoder, decoder, levels = model.encoder, model.decoder, settings.levels
  codes = fsq.quantize(jnp.asarray(inputs['fsq_z']), levels)
  looked_up = fsq.codes_of(jnp.asarray(inputs['fsq_ids']), levels)
  latents, noise = _last(inputs['latents']), _last(inputs['noise'])
  unquantized = jax.jit(encoder.unquantized)(latents)
  ids = fsq.ids_of(fsq.quantize(unquantized, levels), levels)
  out = {
    'fsq_codes': codes,
    'fsq_indices': fsq.ids_of(codes, levels),
    'fsq_ids_to_codes': looked_up,
    'fsq_codes_to_ids': fsq.ids_of(looked_up, levels),
    'enc_patch_tokens': encoder.project(latents),
    'enc_fsq_input': unquantized,
    'enc_codes': fsq.codes_of(ids, levels),
    'enc_token_ids': ids,
  }
  t = jnp.asarray(inputs['timesteps'])
  full, some = decoder.condition(ids), decoder.condition(ids, jnp.asarray(inputs['keep_k']))
  null = jnp.broadcast_to(decoder.null(), full.shape)
  velocity = jax.jit(decoder.__call__)
  for name, registers in (('full', full), ('trunc', some), ('uncond', null)):
    out[f'vel_{name}'] = _first(velocity(noise, t, registers))
  out['time_freq_embedding'] = time_features(t, settings.max_timestep)
  scale = config['guidance_scale']
  runs = {
    'noguide': (full, 1.0, False),
    'cfg': (full, scale, False),
    'apg': (full, scale, True),
    'apg_trunc': (some, scale, True),
  }
  for name, (registers, guidance, projected) in runs.items():
    run = jax.jit(
      lambda r, x, g=guidance, p=projected: flow.sample(decoder, r, x, config['sample_steps'], g, p)
    )
    out[f'sample_{name}'] = _first(run(registers, noise))
  cond, uncond = ([_last(x) for x in inputs[f'pred_{n}']] for n in ('cond', 'uncond'))
  out['cfg_step'] = _first(flow.cfg(cond[-1], uncond[-1], scale))
  momentum = 0.0
  for i in range(2):
    guided, momentum = flow.apg(cond[i], uncond[i], scale, momentum)
    out[f'apg_step{i + 1}'] = _first(guided)
  return {name: np.asarray(value) for name, value in out.items()}
