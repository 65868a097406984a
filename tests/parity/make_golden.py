"""Writes tests/golden/*.npz from the torch classes, in the format of `vtts_jax.testing.replay`.

    python tests/parity/make_golden.py        # in an environment with the parity extra

Small copies of what tests/parity compares live, so that the default tests need no torch. The number
of an output in tolerances.json is what multiplying all weights by 1 + 1e-6 n changes.
"""

import json
import pathlib

import numpy as np
import reference
from reference import diffusers, torch, transformers

FOLDER = pathlib.Path(__file__).parents[1] / 'golden'
T5 = {
  'vocab_size': 40, 'd_model': 24, 'd_kv': 6, 'd_ff': 40, 'num_layers': 2, 'num_heads': 3,
  'relative_attention_num_buckets': 12, 'relative_attention_max_distance': 20,
  'layer_norm_epsilon': 1e-6, 'feed_forward_proj': 'gated-gelu',
}  # fmt: skip
KL = {
  'block_out_channels': [8, 16], 'layers_per_block': 1, 'latent_channels': 16,
  'norm_num_groups': 4, 'scaling_factor': 1.5, 'shift_factor': 0.25, 'use_quant_conv': False,
  'use_post_quant_conv': False,
}  # fmt: skip


def t5():
  model = transformers.T5EncoderModel(transformers.T5Config(**T5, dropout_rate=0.0))
  rng = np.random.default_rng(0)
  mask = (np.arange(9) < np.array([[9], [4]])).astype(np.int64)
  inputs = {'ids': rng.integers(0, T5['vocab_size'], (2, 9)), 'mask': mask}

  def outputs(model):
    ids, mask = (torch.from_numpy(inputs[k]) for k in ('ids', 'mask'))
    return {
      'last_hidden': model(ids, attention_mask=mask).last_hidden_state,
      'last_hidden_unmasked': model(ids).last_hidden_state,
    }

  return {'model': 't5', 'params': T5}, model, inputs, outputs


def autoencoderkl():
  blocks = {
    'down_block_types': ['DownEncoderBlock2D'] * 2,
    'up_block_types': ['UpDecoderBlock2D'] * 2,
  }
  model = diffusers.AutoencoderKL(**KL, **blocks)
  rng = np.random.default_rng(1)
  inputs = {
    'latents': rng.normal(size=(2, 16, 3, 4)).astype(np.float32),
    'images': rng.normal(size=(2, 3, 6, 8)).astype(np.float32),
  }

  def outputs(model):
    latents, images = (torch.from_numpy(inputs[k]) for k in ('latents', 'images'))
    posterior = model.encode(images).latent_dist
    scale, shift = KL['scaling_factor'], KL['shift_factor']
    return {
      'decoded': model.decode(latents).sample,
      'decoded_scaled': model.decode(latents / scale + shift).sample,
      'posterior_mean': posterior.mean,
      'posterior_logvar': posterior.logvar,
      'mode_scaled': (posterior.mode() - shift) * scale,
      'kl': posterior.kl(),
    }

  return {'model': 'autoencoderkl', 'params': KL}, model, inputs, outputs


def write(name, config, model, inputs, outputs):
  """One fixture; returns its tolerances."""
  reference.randomise(model, 7)
  state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
  with torch.no_grad():
    before = {k: v.numpy().copy() for k, v in outputs(model).items()}
    for value in model.parameters():
      value.mul_(1 + 1e-6 * torch.randn(value.shape))
    after = {k: v.numpy() for k, v in outputs(model).items()}
  np.savez_compressed(
    FOLDER / name,
    config=json.dumps(config),
    **{f'params/{k}': v for k, v in state.items()},
    **{f'in/{k}': v for k, v in inputs.items()},
    **{f'out/{k}': v for k, v in before.items()},
  )
  return {k: float(np.abs(after[k] - before[k]).max()) for k in before}


def add(numbers):
  """Puts the tolerances of files, {name: {output: number}}, beside those of the others."""
  path = FOLDER / 'tolerances.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | numbers, indent=1) + '\n')


if __name__ == '__main__':
  torch.manual_seed(0)
  files = {'t5_a.npz': t5, 'autoencoderkl_c16.npz': autoencoderkl}
  add({name: write(name, *make()) for name, make in files.items()})
