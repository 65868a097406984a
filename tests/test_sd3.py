"""SD3: sizes, both layouts, skipped layers, bfloat16; its golden is in test_replay.py."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.sd3 import convert, modeling
from vtts_jax.testing import replay

GOLDEN = pathlib.Path(__file__).parent / 'golden/sd3_a.npz'


def count_by_hand(c):
  """Parameters by the layer list of the facts, table of positions included."""
  D, line = c.width, lambda inner, outer: inner * outer + outer
  attention = line(D, 3 * D) + line(D, D)
  stream = line(D, 6 * D) + attention + line(D, 4 * D) + line(4 * D, D)
  total = (2 * c.num_layers - 1) * stream + line(D, 2 * D) + line(D, 3 * D)  # the last text stream
  total += len(c.dual_attention_layers) * (line(D, 3 * D) + attention)
  norms = 2 * c.num_layers + len(c.dual_attention_layers)
  total += c.qk_norm * norms * 2 * c.attention_head_dim
  total += c.pos_embed_max_size**2 * D + line(c.patch_size**2 * c.in_channels, D)
  total += line(256, D) + line(c.pooled_projection_dim, D) + 2 * line(D, D)
  total += line(c.joint_attention_dim, D)
  return total + line(D, 2 * D) + line(D, c.patch_size**2 * c.out_channels)


@pytest.mark.parametrize(
  ('name', 'size'),
  [
    ('sd3_medium', 2_084_951_104),
    ('sd3_5_medium', 2_469_663_936),
    ('sd3_5_large', 8_146_280_768),
  ],
)
def test_released_sizes(name, size):
  config = modeling.SIZES[name]
  _, params = modules.structure_of(modeling.build_model, config)
  assert modules.count_parameters(params) == count_by_hand(config) == size


def test_runs_of_equal_blocks():
  runs = modeling.SIZES['sd3_5_medium'].runs
  assert runs == (tuple(range(13)), tuple(range(13, 23)))
  mixed = dataclasses.replace(modeling.SIZES['tiny'], num_layers=5, dual_attention_layers=(1, 4))
  assert mixed.runs == ((0,), (1,), (2, 3))


@pytest.fixture(scope='module')
def golden():
  config, source, inputs, _ = replay.read(str(GOLDEN))
  tensors = {name: source.read_tensor(name) for name in source.tensor_names()}
  inputs['latents'] = inputs['latents'].transpose(0, 2, 3, 1)
  return config['params'], tensors, inputs


def load(tensors, options=None):
  source = source_of_arrays(tensors, options)
  config = convert.config_of(source)
  return config, convert.load_weights(source, config)


@pytest.fixture(scope='module')
def loaded(golden):
  return load(golden[1], golden[0])


def run_model(config, params, inputs, **options):
  def call(params, *args):
    return modules.bind_module(modeling.build_model, config, params)(*args, **options)

  return jax.jit(call)(params, *(inputs[k] for k in ('latents', 'timestep', 'text', 'pooled')))


ENDS = {
  'pos_embed.proj': 'x_embedder.proj', 'context_embedder': 'context_embedder',
  'time_text_embed.timestep_embedder.linear_1': 't_embedder.mlp.0',
  'time_text_embed.timestep_embedder.linear_2': 't_embedder.mlp.2',
  'time_text_embed.text_embedder.linear_1': 'y_embedder.mlp.0',
  'time_text_embed.text_embedder.linear_2': 'y_embedder.mlp.2',
  'norm_out.linear': 'final_layer.adaLN_modulation.1', 'proj_out': 'final_layer.linear',
}  # fmt: skip
BLOCK = {
  'norm1.linear': 'x_block.adaLN_modulation.1', 'attn.to_q': 'x_block.attn.qkv',
  'attn.to_out.0': 'x_block.attn.proj', 'attn.norm_q': 'x_block.attn.ln_q',
  'attn.norm_k': 'x_block.attn.ln_k', 'attn2.to_q': 'x_block.attn2.qkv',
  'attn2.to_out.0': 'x_block.attn2.proj', 'attn2.norm_q': 'x_block.attn2.ln_q',
  'attn2.norm_k': 'x_block.attn2.ln_k', 'ff.net.0.proj': 'x_block.mlp.fc1',
  'ff.net.2': 'x_block.mlp.fc2', 'norm1_context.linear': 'context_block.adaLN_modulation.1',
  'attn.add_q_proj': 'context_block.attn.qkv', 'attn.to_add_out': 'context_block.attn.proj',
  'attn.norm_added_q': 'context_block.attn.ln_q', 'attn.norm_added_k': 'context_block.attn.ln_k',
  'ff_context.net.0.proj': 'context_block.mlp.fc1', 'ff_context.net.2': 'context_block.mlp.fc2',
}  # fmt: skip


def as_stability_writes(tensors):
  """The tensors as the single file has them: q, k and v in one, pairs as (shift, scale)."""
  single = {'pos_embed': tensors['pos_embed.pos_embed']}
  for name, value in tensors.items():
    stem, _, kind = name.rpartition('.')
    layer = re.match(r'transformer_blocks\.(\d+)\.', stem)
    ours = BLOCK.get(stem[layer.end() :]) if layer else ENDS.get(stem)
    if ours is None:
      continue  # a key or a value, taken with its query
    if ours.endswith('qkv'):
      parts = [re.sub(r'_q(_proj)?\.(weight|bias)$', rf'_{x}\1.\2', name) for x in 'qkv']
      value = np.concatenate([tensors[part] for part in parts])
    if re.match(r'norm_out|transformer_blocks\.2\.norm1_context', name):
      value = np.concatenate([value[32:], value[:32]])
    single[f'joint_blocks.{layer[1]}.{ours}.{kind}' if layer else f'{ours}.{kind}'] = value
  lead = 'model.diffusion_model.'
  vae = {'first_stage_model.encoder.conv_in.weight': np.zeros(1)}
  return vae | {lead + name: value for name, value in single.items()}


def test_random_weights_begin_with_the_table_that_files_hold(loaded):
  config, params = loaded
  made = modeling.position_table(6, 6, config.width, config.sample_size // config.patch_size)
  np.testing.assert_allclose(params['positions'], made, atol=1e-6)


def test_stability_layout(golden, loaded):
  config, params = load(as_stability_writes(golden[1]))
  assert config == dataclasses.replace(loaded[0], sample_size=128)  # its side is not in the file
  jax.tree.map(np.testing.assert_array_equal, params, loaded[1])


def test_a_skipped_layer_is_as_if_it_were_not_there(golden, loaded):
  """Layer 1 of two stacked ones; and the halves of the final modulation must not be confused."""
  config, params = loaded
  found = run_model(config, params, golden[2], skip_layers=(1,))
  shorter = dataclasses.replace(config, num_layers=2, dual_attention_layers=(0,))
  run = jax.tree.map(lambda x: x[:1], params['runs'])
  want = run_model(shorter, params | {'runs': run}, golden[2])
  np.testing.assert_allclose(found, want, atol=1e-5)
  head = params['modulation']
  turned = {'kernel': jnp.roll(head['kernel'], 32, -1), 'bias': jnp.roll(head['bias'], 32)}
  wrong = run_model(shorter, params | {'runs': run, 'modulation': turned}, golden[2])
  assert np.abs(wrong - want).max() > 1


def test_bfloat16_stays_near(golden, loaded):
  config, params = loaded
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  want, found = (run_model(config, p, golden[2]) for p in (params, half))
  assert found.dtype == jnp.float32
  assert np.abs(found - want).mean() < 0.05 * np.abs(want).mean()


def test_what_is_wrong_is_said(golden):
  options, tensors, _ = golden
  with pytest.raises(ValueError, match='has no SD3: no .*pos_embed'):
    load({'x': np.zeros(1)})
  for said, message in (
    ({'_class_name': 'FluxTransformer2DModel'}, "_class_name='FluxTransformer2DModel': allowed is"),
    ({'qk_norm': 'layer_norm'}, "qk_norm='layer_norm': allowed are None and 'rms_norm'"),
  ):
    with pytest.raises(ConfigError, match=message):
      load(tensors, options | said)
  with pytest.raises(ValueError, match=r'unused by the model: mask_token \(1,\)'):
    load(tensors | {'mask_token': np.zeros(1)}, options)
  with pytest.raises(ValueError, match=r'wanted by the model: last\.image\.up\.bias'):
    load({k: v for k, v in tensors.items() if k != 'transformer_blocks.2.ff.net.0.proj.bias'})
  model = modules.bind_graph(
    *modules.abstract_module(lambda: modeling.build_model(modeling.SIZES['tiny']))
  )
  for size in ((1, 5, 4, 4), (1, 4, 14, 4)):
    with pytest.raises(ConfigError, match=r'latent size=.* multiples of 2 up to 12'):
      model.embed_patches(jnp.zeros(size))
  with pytest.raises(ConfigError, match=r'dual_attention_layers=\(2,\): must be in 0'):
    modeling.Config(num_layers=2, dual_attention_layers=(2,))
