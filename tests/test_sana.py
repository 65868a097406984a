"""SANA: sizes, linear attention, positions, masks, bfloat16; its golden is in test_replay.py."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.sana import convert, modeling
from vtts_jax.models.sd3.modeling import position_table
from vtts_jax.testing import replay

GOLDEN = pathlib.Path(__file__).parent / 'golden/sana_sprint_a.npz'


def count_by_hand(c):
  """Parameters by the layer list of the facts."""
  D, F, inner = c.width, c.hidden, c.cross_width
  line = lambda before, after: before * after + after
  own = 3 * D * D + line(D, D) + c.qk_norm * 2 * D
  cross = line(D, inner) + 2 * line(D, inner) + line(inner, D) + c.qk_norm * 2 * inner
  ffn = line(D, 2 * F) + 2 * F * 9 + 2 * F + F * D
  times = (1 + c.guidance_embeds) * (line(256, D) + line(D, D)) + line(D, 6 * D)
  caption = line(c.caption_channels, D) + line(D, D) + D
  ends = line(c.in_channels, D) + line(D, c.out_channels) + 2 * D
  return c.num_layers * (6 * D + own + cross + ffn) + times + caption + ends


@pytest.mark.parametrize(
  ('name', 'size'),
  [
    ('sana_600m_1024', 591_747_872),
    ('sana_1600m_1024', 1_604_462_752),
    ('sana1_5_1600m_1024', 1_604_641_952),
    ('sana1_5_4800m_1024', 4_721_825_952),
    ('sana_sprint_600m_1024', 593_501_216),
    ('sana_sprint_1600m_1024', 1_610_237_472),
  ],
)
def test_released_sizes(name, size):
  config = modeling.SIZES[name]
  _, params = modules.structure_of(modeling.build_model, config)
  assert modules.count_parameters(params) == count_by_hand(config) == size


def test_linear_attention_is_relu_attention_normalised():
  q, k, v = np.random.default_rng(0).normal(size=(3, 2, 7, 3, 4)).astype(np.float32)
  q[0, 0, 0] = -1  # all cut off: zeros, not nan
  scores = np.einsum('rtnd,rsnd->rnts', np.maximum(q, 0), np.maximum(k, 0))
  shares = scores / (scores.sum(-1, keepdims=True) + 1e-15)
  want = np.einsum('rnts,rsnd->rtnd', shares, v)
  found = modeling.linear_attention(*map(jnp.asarray, (q, k, v)))
  np.testing.assert_allclose(found, want, atol=1e-5)
  assert not found[0, 0, 0].any()


@pytest.mark.parametrize('side', [3, 5])
def test_depthwise_conv(side):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 5, 4, 6)), rng.normal(size=(side, side, 6))
  want = jax.lax.conv_general_dilated(
    jnp.asarray(x, jnp.float32), jnp.asarray(kernel[:, :, None], jnp.float32), (1, 1), 'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=6,
  )  # fmt: skip
  found = modeling.depthwise_conv(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
  np.testing.assert_allclose(found, want, atol=1e-5)
  torch_layout = kernel.transpose(2, 0, 1)[None, :, None]  # stacked, F 1 s s
  np.testing.assert_array_equal(convert.depthwise_filters(torch_layout)[0], kernel)


def test_positions_of_the_larger_models():
  """The column's sines, then cosines, then the row's; sides stretched to the network's own."""
  table = position_table(2, 4, 8, base=4, scale=2.0)
  angles = lambda place: np.array([place, place * 0.01])
  for row, column in ((0, 0), (1, 3)):
    across, down = angles(column / 2), angles(row * 2 / 2)
    want = [*np.sin(across), *np.cos(across), *np.sin(down), *np.cos(down)]
    np.testing.assert_allclose(table[row, column], want, atol=1e-6)
  plain = modeling.SIZES['tiny']
  placed = dataclasses.replace(plain, interpolation_scale=2.0)
  x = np.ones((1, 2, 4, 4), np.float32)
  _, template = modules.structure_of(modeling.build_model, plain)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
  embed = lambda c: modules.bind_module(modeling.build_model, c, params).embed_patches(x)[0]
  found = [embed(c) for c in (plain, placed)]
  want = position_table(2, 4, 16, 4, 2.0).reshape(8, 16)
  np.testing.assert_allclose(found[1] - found[0], want, atol=1e-5)


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
def run(golden):
  """The network on the fixture's inputs, compiled for a dtype once: `run(params, **changed)`."""
  config, _ = load(golden[1], golden[0])

  @jax.jit
  def call(params, latents, timestep, text, text_mask):
    model = modules.bind_module(modeling.build_model, config, params)
    guidance = jnp.full(len(latents), 4.5)
    return model(latents, timestep, model.caption(text), text_mask, guidance)

  names = ('latents', 'timestep', 'text', 'text_mask')
  return lambda params, **changed: call(params, **{k: golden[2][k] for k in names} | changed)


def test_controls(golden, run):
  """Masked words are not read; value and gate must not be confused; bfloat16 stays near."""
  options, tensors, inputs = golden
  params = load(tensors, options)[1]
  want = run(params)
  mask = inputs['text_mask']
  assert not mask.all()
  other = np.where(mask[..., None], inputs['text'], 7).astype(np.float32)
  np.testing.assert_allclose(run(params, text=other), want, atol=1e-5)
  assert np.abs(run(params, text_mask=np.ones_like(mask)) - want).max() > 0.1
  blocks = params['blocks']
  turned = blocks['ffn'] | {'offset': jnp.roll(blocks['ffn']['offset'], 80, -1)}
  turned['filters'] = jnp.roll(turned['filters'], 80, -1)
  enter = turned['enter']
  turned['enter'] = {k: jnp.roll(v, 80, -1) for k, v in enter.items()}
  wrong = run(params | {'blocks': blocks | {'ffn': turned}})
  assert np.abs(wrong - want).max() > 0.1
  half = run(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  assert half.dtype == jnp.float32
  assert np.abs(half - want).mean() < 0.05 * np.abs(want).mean()


def test_a_plain_file(golden):
  """Other names of the time, no guidance, no norms of queries and keys; heads by the width."""
  tensors = {
    name.replace('time_embed.timestep', 'time_embed.emb.timestep'): value
    for name, value in golden[1].items()
    if 'guidance' not in name and '.norm_' not in name
  }
  config, _ = load(tensors)
  assert (config.num_attention_heads, config.num_cross_attention_heads) == (1, 1)
  assert not (config.qk_norm or config.guidance_embeds or config.attention_bias)
  said = {'attention_head_dim': 8, 'interpolation_scale': 1.0, 'sample_size': 6}
  config, params = load(tensors, said)
  assert (config.num_attention_heads, config.interpolation_scale, config.sample_size) == (4, 1, 6)
  model = modules.bind_module(modeling.build_model, config, params)
  with pytest.raises(ConfigError, match='guidance: the network has guidance_embeds=False'):
    model.embed_time(jnp.ones(1), jnp.ones(1))


def test_what_is_wrong_is_said(golden):
  options, tensors, _ = golden
  with pytest.raises(ValueError, match='has no SANA: no .*patch_embed'):
    load({'x': np.zeros(1)})
  for said, message in (
    ({'_class_name': 'PixArt'}, "_class_name='PixArt': must be one of 'SanaTransformer2DModel'"),
    ({'qk_norm': 'layer_norm'}, "qk_norm='layer_norm': must be one of None, 'rms_norm_across"),
    ({'attention_head_dim': 5}, 'attention_head_dim=5: must divide 32'),
  ):
    with pytest.raises(ConfigError, match=message):
      load(tensors, options | said)
  with pytest.raises(ValueError, match=r'unused by the model: pos_embed \(1,\)'):
    load(tensors | {'pos_embed': np.zeros(1)}, options)
  lost = [name for name in tensors if name.endswith('ff.conv_depth.bias')]
  with pytest.raises(ValueError, match=r'wanted by the model: blocks\.ffn\.offset'):
    load({k: v for k, v in tensors.items() if k not in lost}, options)
