"""AutoencoderKL: sizes, options, what its loader reads and says."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import convert, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/autoencoderkl_c16.npz'


@pytest.mark.parametrize(
  ('names', 'channels', 'size'),
  [
    (('sd1', 'sdxl', 'flextok_vae_c4'), 4, 83_653_863),
    (('flextok_vae_c8',), 8, 83_709_419),
    (('flextok_vae_c16',), 16, 83_821_011),
    (('sd3', 'flux'), 16, 83_819_683),
  ],
)
def test_released_sizes(names, channels, size):
  configs = [modeling.SIZES[name] for name in names]
  no_factor = {
    dataclasses.replace(config, scaling_factor=None, shift_factor=0.0) for config in configs
  }
  assert len(no_factor) == 1  # of one size, they differ in their factors only
  config = configs[0]
  assert (config.latent_channels, config.downscale) == (channels, 8)
  _, params = modules.abstract_module(lambda: modeling.build_model(config))
  assert modules.count_parameters(params) == size


def test_released_shapes():
  config = modeling.part_of(modeling.SIZES['flextok_vae_c16'], 'decoder')
  graphdef, template = modules.abstract_module(lambda: modeling.build_model(config))
  run = lambda p, x: modules.bind_graph(graphdef, p).decode(x)
  out = jax.eval_shape(run, template, jax.ShapeDtypeStruct((2, 32, 32, 16), jnp.float32))
  assert out.shape == (2, 256, 256, 3)


@pytest.fixture
def tensors():
  with np.load(GOLDEN) as file:
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}


def load(tensors, options, part=''):
  source = source_of_arrays(tensors, options)
  config = convert.config_of(source, part)
  return config, convert.load_weights(source, config)


OPTIONS = {'_class_name': 'AutoencoderKL', 'norm_num_groups': 4}


def test_config_decides_then_keys(tensors):
  config = convert.config_of(source_of_arrays(tensors, OPTIONS))
  assert config == modeling.Config(
    latent_channels=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.18215,
  )  # fmt: skip
  said = {'norm_num_groups': 4, 'shift_factor': 0.5}
  bare = convert.config_of(source_of_arrays(tensors, said))
  assert bare == dataclasses.replace(config, scaling_factor=None, shift_factor=0.5)
  model = modules.bind_module(modeling.build_model, *load(tensors, said))
  with pytest.raises(ConfigError, match='scaling_factor=None'):
    model.unscale_latents(jnp.zeros((1, 2, 2, 16)))


def test_scale_and_back():
  tiny = modeling.SIZES['tiny']
  config = dataclasses.replace(tiny, scaling_factor=2.0, shift_factor=0.5, encoder=False)
  model = modules.bind_graph(*modules.abstract_module(lambda: modeling.build_model(config)))
  assert model.scale_latents(1.0) == 1.0 and model.unscale_latents(1.0) == 1.0
  assert model.scale_latents(3.0) == 5.0 and model.unscale_latents(5.0) == 3.0


def test_decoder_alone(tensors):
  sizes, params = load(tensors, OPTIONS)
  config, own = load(tensors, OPTIONS, 'decoder')
  whole = modules.bind_module(modeling.build_model, sizes, params)
  half = modules.bind_module(modeling.build_model, config, own)
  assert config == dataclasses.replace(sizes, encoder=False) and own.keys() == {'decoder'}
  jax.tree.map(np.testing.assert_array_equal, own['decoder'], params['decoder'])
  with pytest.raises(ConfigError, match='encoder=False'):
    half.encode(jnp.zeros((1, 4, 4, 3)))
  with pytest.raises(ConfigError, match=r'image size=\(5, 4\): multiples of 2'):
    whole.encode(jnp.zeros((1, 5, 4, 3)))


@pytest.mark.parametrize('convolutions', [False, True])
def test_old_attention_names(tensors, convolutions):
  names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  old = {}
  for key, value in tensors.items():
    for new, name in names.items():
      if f'attentions.0.{new}.' in key:
        key = key.replace(f'.{new}.', f'.{name}.')
        value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
    old[key] = value
  assert any('proj_attn' in key for key in old)
  new, old = (load(t, OPTIONS)[1] for t in (tensors, old))
  jax.tree.map(np.testing.assert_array_equal, new, old)


def test_posterior():
  mean, spread = jnp.full((20_000, 1, 1, 1), 2.0), jnp.full((20_000, 1, 1, 1), jnp.log(9.0))
  drawn = modeling.sample_posterior(jax.random.key(0), mean, spread)
  assert abs(drawn.mean() - 2) < 0.1 and abs(drawn.std() - 3) < 0.1
  np.testing.assert_allclose(
    modeling.kl_divergence(mean, spread)[0], 0.5 * (4 + 9 - 1 - np.log(9.0)), rtol=1e-6
  )


def test_what_is_wrong_is_said(tensors):
  with pytest.raises(ValueError, match='has no AutoencoderKL'):
    load({'x': np.zeros(1)}, None)
  for options, say in (
    ({'_class_name': 'AutoencoderTiny'}, "_class_name='AutoencoderTiny'"),
    ({'act_fn': 'relu'}, "act_fn='relu': allowed is 'silu'"),
    ({'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']}, 'down_block_types='),
    ({'norm_num_groups': 5}, r'block_out_channels=\(8, 16\): .* norm_num_groups=5'),
    ({'block_out_channels': []}, 'at least one block'),
  ):
    with pytest.raises(ConfigError, match=say):
      convert.config_of(source_of_arrays(tensors), options=options)
  with pytest.raises(ValueError, match=r'wanted by the model: quant_conv\.kernel'):
    load(tensors, OPTIONS | {'use_quant_conv': True})
