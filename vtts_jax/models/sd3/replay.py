"""Replays golden files of the family `sd3`: their arrays are NCHW, ours NHWC."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.models import modules
from vtts_jax.models.sd3 import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every output of a fixture: tokens, condition, the first block, velocities, guidance."""
  # the constructor arguments have the names of a released config.json
  settings = convert.config_of(dataclasses.replace(source, config=config['params']))
  params = convert.load_weights(source, settings)

  def stages(params, x, t, text, pooled):
    model = modules.bind_module(modeling.build_model, settings, params)
    tokens, temb = model.embed_patches(x), model.embed_condition(t, pooled)
    image, words = first_block(model)(tokens, model.embed_words(text), jax.nn.silu(temb))
    return {
      'patch_tokens': tokens,
      'temb': temb,
      'block0_hidden': image,
      'block0_context': words,
      'velocity': model(x, t, text, pooled),
    }

  run = jax.jit(stages)
  x, t = inputs['latents'].transpose(0, 2, 3, 1), inputs['timestep']
  prompt = inputs['text'], inputs['pooled']
  out = run(params, x, t, *prompt)
  velocity = lambda t, text, pooled: run(params, x, t, text, pooled)['velocity']
  for i, time in enumerate(config['timesteps']):
    out[f'velocity_t{i}'] = velocity(np.full_like(t, time), *prompt)
  # guidance at the rows' own times, as the files hold it
  null = velocity(t, inputs['uncond_text'], inputs['uncond_pooled'])
  out['velocity_cfg'] = null + config['guidance_scale'] * (out['velocity'] - null)
  outside = lambda x: jnp.transpose(x, (0, 3, 1, 2))
  return {
    name: np.asarray(outside(value) if name.startswith('velocity') else value)
    for name, value in out.items()
  }


def first_block(model):
  """Block 0, out of its stacked run."""
  if not model.runs:
    return model.last
  graphdef, state = nnx.split(model.runs[0])
  return nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
