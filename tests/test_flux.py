"""FLUX: sizes, layouts, rotation, conditions, sampling; its golden file is in test_replay.py."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import convert as autoencoder
from vtts_jax.models.flux import convert, flow, modeling
from vtts_jax.models.pretrained import Pretrained

GOLDEN = pathlib.Path(__file__).parent / 'golden'
AXES = {'axes_dims_rope': [4, 6, 6]}
TINY = modeling.SIZES['tiny']


def read_golden(name, lead):
  with np.load(GOLDEN / name) as file:
    return {k[len(lead) :]: file[k] for k in file.files if k.startswith(lead)}


@pytest.fixture
def tensors():
  return read_golden('flux_c_schnell.npz', 'params/')


def to_diffusers(tensors):
  """The original's tensors as diffusers' class keeps them; one block of each kind."""
  D, out = tensors['img_in.weight'].shape[0], {}

  def move(old, *new, cut=None):
    for kind in ('weight', 'bias', 'scale'):
      if f'{old}.{kind}' in tensors:
        array = tensors[f'{old}.{kind}']
        pieces = np.split(array, cut or len(new), 0)
        ours = 'weight' if kind == 'scale' else kind
        out.update({f'{name}.{ours}': piece for name, piece in zip(new, pieces)})

  move('img_in', 'x_embedder')
  move('txt_in', 'context_embedder')
  for old, new in (('time_in', 'timestep'), ('vector_in', 'text'), ('guidance_in', 'guidance')):
    move(f'{old}.in_layer', f'time_text_embed.{new}_embedder.linear_1')
    move(f'{old}.out_layer', f'time_text_embed.{new}_embedder.linear_2')
  double, block = 'double_blocks.0.', 'transformer_blocks.0.'
  for old, norm, qkv, scale, proj, ffn in (
    ('img', 'norm1', 'to_{}', 'norm_{}', 'to_out.0', 'ff'),
    ('txt', 'norm1_context', 'add_{}_proj', 'norm_added_{}', 'to_add_out', 'ff_context'),
  ):
    move(f'{double}{old}_mod.lin', f'{block}{norm}.linear')
    move(f'{double}{old}_attn.qkv', *(f'{block}attn.{qkv.format(x)}' for x in 'qkv'))
    move(f'{double}{old}_attn.norm.query_norm', f'{block}attn.{scale.format("q")}')
    move(f'{double}{old}_attn.norm.key_norm', f'{block}attn.{scale.format("k")}')
    move(f'{double}{old}_attn.proj', f'{block}attn.{proj}')
    move(f'{double}{old}_mlp.0', f'{block}{ffn}.net.0.proj')
    move(f'{double}{old}_mlp.2', f'{block}{ffn}.net.2')
  single, block = 'single_blocks.0.', 'single_transformer_blocks.0.'
  move(f'{single}modulation.lin', f'{block}norm.linear')
  parts = [f'{block}attn.to_{x}' for x in 'qkv'] + [f'{block}proj_mlp']
  move(f'{single}linear1', *parts, cut=[D, 2 * D, 3 * D])
  move(f'{single}linear2', f'{block}proj_out')
  move(f'{single}norm.query_norm', f'{block}attn.norm_q')
  move(f'{single}norm.key_norm', f'{block}attn.norm_k')
  move('final_layer.linear', 'proj_out')
  for kind in ('weight', 'bias'):  # (shift, scale) there, (scale, shift) here
    halves = np.split(tensors[f'final_layer.adaLN_modulation.1.{kind}'], 2)
    out[f'norm_out.linear.{kind}'] = np.concatenate(halves[::-1])
  return out


def load(tensors, **options):
  source = source_of_arrays(tensors, AXES, 'here')
  config = convert.config_of(source)
  return config, convert.load_weights(source, config, **options)


def velocity(config, params):
  """The velocity of the golden file's inputs."""
  inputs = read_golden('flux_c_schnell.npz', 'in/')
  latents = inputs['latent'].transpose(0, 2, 3, 1)

  @jax.jit
  def run(params):
    model = modules.bind_module(modeling.build_model, config, params)
    return model(latents, inputs['t'], inputs['txt'], inputs['vec'])

  return np.asarray(run(params))


def tiny_model(config=TINY):
  graphdef, template = modules.structure_of(modeling.build_model, config)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
  return modules.bind_graph(graphdef, jax.tree.map(draw, template))


# -------------------------------------------------------------------------------- sizes, loading


def test_released_sizes():
  for name, count in (('dev', 11_901_408_320), ('schnell', 11_891_178_560)):
    _, params = modules.structure_of(modeling.build_model, modeling.SIZES[name])
    assert modules.count_parameters(params) == count
  # 1024 x 1024 pixels and 512 words: 6.46e9 weights are used by each token, then attention
  assert round(modeling.count_flops(modeling.SIZES['dev'], 128, 128, 512) / 1e12, 1) == 74.4


def test_flops_are_those_of_the_program():
  config = dataclasses.replace(
    TINY, width=32, hidden=96, double_layers=1, single_layers=1, axes=(8, 4, 4)
  )  # XLA counts one loop body
  graphdef, template = modules.structure_of(modeling.build_model, config)
  run = lambda p, *given: modules.bind_graph(graphdef, p)(*given)
  given = [jax.ShapeDtypeStruct(s, 'f') for s in ((1, 8, 8, 3), (1,), (1, 10, 8), (1, 16), (1,))]
  lowered = jax.jit(run).lower(template, *given)
  counted = lowered.cost_analysis()['flops']
  exact = modeling.count_flops(config, 8, 8, 10)
  assert exact < counted < 1.15 * exact


def test_both_layouts_are_the_same_model(tensors):
  config, params = load(tensors)
  assert config == modeling.Config(
    channels=4, out_channels=4, width=32, heads=2, hidden=128, double_layers=1, single_layers=1,
    text_width=16, pooled_width=12, axes=(4, 6, 6), has_guidance=False,
  )  # fmt: skip
  theirs = to_diffusers(tensors)
  assert sum(x.size for x in theirs.values()) == sum(x.size for x in tensors.values())
  other, same = load(theirs)
  assert other == config
  jax.tree.map(np.testing.assert_array_equal, params, same)


def test_halves_that_are_swapped_are_seen(tensors):
  want = read_golden('flux_c_schnell.npz', 'out/')['velocity']
  found = {}
  for kind in ('final', 'modulation', 'rotation'):
    config, params = load(tensors)
    if kind == 'final':
      project = params['last_modulation']['project']
      params['last_modulation']['project'] = {k: v[..., ::-1, :] for k, v in project.items()}
    elif kind == 'modulation':
      project = params['single_blocks']['modulation']['project']
      project['kernel'] = project['kernel'][:, :, jnp.array([1, 0, 2])]
    else:  # the order of the file's pairs, unchanged
      attn = params['single_blocks']['attn']
      rows = tensors['single_blocks.0.linear1.weight'][:96]
      attn['qkv']['kernel'] = jnp.asarray(rows.T.reshape(1, 32, 3, 32))
    have = modeling.pack_latents(velocity(config, params))
    found[kind] = float(np.abs(have - want).max())
  assert min(found.values()) > 0.01, found


def test_a_pipeline_s_folder_and_one_file(tensors, tmp_path):
  folder, file = tmp_path / 'transformer', tmp_path / 'flux1.safetensors'
  folder.mkdir()
  write_weights(folder / 'diffusion_pytorch_model.safetensors', to_diffusers(tensors))
  (folder / 'config.json').write_text(json.dumps(AXES))
  write_weights(file, tensors, AXES)
  found = [Pretrained('flux', str(place)).config for place in (tmp_path, folder, file)]
  assert found == [load(tensors)[0]] * 3


@pytest.mark.parametrize('layout', [dict, to_diffusers])
def test_checkpoints_that_do_not_fit(tensors, layout):
  given = layout(tensors)
  lost = next(name for name in given if name.endswith(('img_mlp.2.bias', 'ff.net.2.bias')))
  with pytest.raises(ValueError, match=r'missing from the checkpoint.*image\.ffn\.down\.bias'):
    load({k: v for k, v in given.items() if k != lost})
  with pytest.raises(ValueError, match=r'unused by the model: odd\.weight'):
    load(given | {'odd.weight': np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match='here has no FLUX: it lacks'):
    load({'x': np.zeros(1)})
  with pytest.raises(ValueError, match='heads of 16 need axes_dims_rope'):
    convert.config_of(source_of_arrays(given))


def test_bfloat16_stays_near(tensors):
  config, params = load(tensors)
  _, low = load(tensors, dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype('bfloat16')}
  exact, near = velocity(config, params), velocity(config, low)
  assert near.dtype == np.float32
  assert np.abs(near - exact).mean() < 0.03 * np.abs(exact).mean()


# ------------------------------------------------------------------------- positions, conditions


def test_rotation_is_that_of_neighbouring_pairs():
  """Scores of queries and keys equal those of complex numbers made of dimensions 2 i, 2 i + 1."""
  config = dataclasses.replace(TINY, axes=(2, 2, 4))
  positions = modeling.token_positions(2, 3, 2)
  assert positions.shape == (8, 3) and not positions[:2].any()
  np.testing.assert_array_equal(positions[2:, 1], [0, 0, 1, 1, 2, 2])
  x = np.random.default_rng(0).normal(size=(2, 8, 8))  # queries and keys of a head
  turn = np.exp(1j * (positions[:, [0, 1, 2, 2]] * 10000.0 ** -np.array([0, 0, 0, 0.5])))
  q, k = (x[..., ::2] + 1j * x[..., 1::2]) * turn
  want = (q @ k.conj().T).real
  halves = convert._pairs_to_halves(x, 8)
  cos, sin = modeling.rotary_tables(config, positions)
  a, b = np.split(halves, 2, -1)
  q, k = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
  np.testing.assert_allclose(q @ k.T, want, atol=1e-5)


def test_patches_come_back_and_channels_count_slowest():
  latents = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  patches = modeling.pack_latents(latents)
  np.testing.assert_array_equal(modeling.unpack_latents(patches, 4, 6), latents)
  np.testing.assert_array_equal(patches[0, 1, :4], latents[0, :2, 2:4, 0].ravel())


def test_guidance_is_read_where_the_model_has_it():
  model, rows = tiny_model(), jnp.ones((2, 16))
  embed = lambda scale: model.embed_condition(jnp.array([0.5]), rows, scale)
  np.testing.assert_allclose(embed(3.5), embed(jnp.array([3.5, 3.5])), atol=1e-5)
  added = embed(3.5) - embed(1.0)
  features = modeling.time_features(jnp.array([3.5, 1.0]))
  np.testing.assert_allclose(added[:1], -jnp.diff(model.guidance_in(features), axis=0), atol=1e-5)
  assert jnp.abs(added).max() > 1e-2
  with pytest.raises(ConfigError, match='guidance=None: must be a number'):
    embed(None)
  model = tiny_model(dataclasses.replace(TINY, has_guidance=False))
  with pytest.raises(ConfigError, match='guidance=1.0: must be None'):
    embed(1.0)
  with pytest.raises(ConfigError, match='latents of 3 x 4 cells: both must be multiples of 2'):
    model(jnp.zeros((1, 3, 4, 3)), jnp.ones(1), jnp.zeros((1, 2, 8)), rows[:1])


def test_times_and_steps():
  middle = np.exp(1.15) / (1 + np.exp(1.15))
  np.testing.assert_allclose(flow.sampling_times(2, 4096), [1, middle, 0])
  np.testing.assert_allclose(flow.sampling_times(4, 9, shifted=False), [1, 0.75, 0.5, 0.25, 0])
  assert np.isclose(flow.time_shift(256), 0.5)
  noise = jnp.ones((2, 2, 2, 3))
  fake = lambda x, t, text, pooled, guidance: x * t + text + pooled + guidance
  found = flow.sample_latents(fake, noise, 1.0, 2.0, [1.0, 0.5, 0.0], 3.0)
  x = 1 - 0.5 * (1 * 1 + 6)
  np.testing.assert_allclose(found, np.full(noise.shape, x - 0.5 * (x * 0.5 + 6)), rtol=1e-6)


def test_what_a_config_may_not_be():
  for options, message in (
    ({'heads': 3}, 'width=16: must be a multiple of heads=3'),
    ({'axes': (4, 3, 1)}, r'axes=\(4, 3, 1\): must be three even numbers'),
    ({'axes': (4, 4)}, 'whose sum is width / heads = 8'),
  ):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(TINY, **options)


# ---------------------------------------------------------------------------------- autoencoder


def to_original(tensors):
  """An autoencoder's tensors as `ae.safetensors` names them; of two blocks."""
  out = {}
  for name, array in tensors.items():
    side, rest = name.split('.', 1)
    for new, old in (
      ('resnets.', 'block.'), ('samplers.0.conv', 'sample.conv'), ('conv_shortcut', 'nin_shortcut'),
      ('mid_block.block.0', 'mid.block_1'), ('mid_block.block.1', 'mid.block_2'),
      ('mid_block.attentions.0.group_norm', 'mid.attn_1.norm'), ('conv_norm_out', 'norm_out'),
      ('mid_block.attentions.0.to_out.0', 'mid.attn_1.proj_out'),
      ('mid_block.attentions.0.to_', 'mid.attn_1.'), ('down_blocks.', 'down.'),
      ('up_blocks.0', 'up.one'), ('up_blocks.1', 'up.0'), ('up.one', 'up.1'),
    ):  # fmt: skip
      rest = rest.replace(new, old)
    is_matrix = 'attn_1' in rest and array.ndim == 2
    rest = rest.replace('downsamples', 'downsample').replace('upsamples', 'upsample')
    out[f'{side}.{rest}'] = array[:, :, None, None] if is_matrix else array
  return out


def test_autoencoder_in_the_original_layout():
  tensors = read_golden('autoencoderkl_c16.npz', 'params/')
  said = {'norm_num_groups': 4}
  old = to_original(tensors)
  assert {'decoder.up.1.upsample.conv.weight', 'encoder.mid.attn_1.q.weight'} <= old.keys()
  found = []
  for given in (tensors, old):
    for part in ('', 'decoder'):
      source = source_of_arrays(given, said)
      config = autoencoder.config_of(source, part)
      found.append((config, autoencoder.load_weights(source, config)))
  for (config, params), (other, same) in zip(found[:2], found[2:]):
    # no file holds the factors: a bare diffusers file leaves them open, an original one is FLUX's
    assert config.scaling_factor is None and other.scaling_factor == 0.3611
    assert other == dataclasses.replace(config, scaling_factor=0.3611, shift_factor=0.1159)
    jax.tree.map(np.testing.assert_array_equal, params, same)
