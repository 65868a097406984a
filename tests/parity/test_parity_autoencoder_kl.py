"""AutoencoderKL block by block against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import diffusers, nchw, nhwc, torch

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import convert, modeling

CLOSE = {'atol': 5e-5, 'rtol': 5e-5}
OLD = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
VARIANTS = {
  '4': {'latent_channels': 4},
  '8': {'latent_channels': 8, 'layers_per_block': 2, 'block_out_channels': (8, 8, 16)},
  '16': {
    'latent_channels': 16, 'use_quant_conv': False, 'use_post_quant_conv': False,
    'scaling_factor': 1.5, 'shift_factor': 0.06,
  },
  'no_attention': {'latent_channels': 4, 'mid_block_add_attention': False, 'norm_num_groups': 2},
}  # fmt: skip


@pytest.fixture(scope='module', params=VARIANTS)
def pair(request):
  options = {'block_out_channels': (8, 16), 'layers_per_block': 1, 'norm_num_groups': 4}
  options |= VARIANTS[request.param]
  n = len(options['block_out_channels'])
  theirs = diffusers.AutoencoderKL(
    down_block_types=('DownEncoderBlock2D',) * n, up_block_types=('UpDecoderBlock2D',) * n,
    **options,
  )  # fmt: skip
  theirs = reference.randomise(theirs, 3)
  source = reference.source(theirs, dict(theirs.config))
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(ours, theirs, x, **options):
  np.testing.assert_allclose(nchw(ours(nhwc(x))), reference.run(theirs, x, **options), **CLOSE)


def test_resnets(pair):
  theirs, ours = pair
  for a, b in (
    (ours.encoder.down_blocks[1].resnets[0], theirs.encoder.down_blocks[1].resnets[0]),
    (ours.decoder.up_blocks[-1].resnets[0], theirs.decoder.up_blocks[-1].resnets[0]),
    (ours.decoder.mid_block.resnets[1], theirs.decoder.mid_block.resnets[1]),
  ):
    same(a, b, data(2, b.in_channels, 5, 7), temb=None)


def test_attention(pair):
  theirs, ours = pair
  if ours.encoder.mid_block.attention is None:
    assert theirs.encoder.mid_block.attentions[0] is None
  else:
    same(ours.encoder.mid_block.attention, theirs.encoder.mid_block.attentions[0],
         data(2, 16, 3, 5))  # fmt: skip
  same(ours.encoder.mid_block, theirs.encoder.mid_block, data(2, 16, 3, 5))


def test_resampling(pair):
  theirs, ours = pair
  x = data(2, ours.config.block_out_channels[0], 6, 8)
  same(ours.encoder.down_blocks[0].downsample, theirs.encoder.down_blocks[0].downsamplers[0], x)
  same(ours.encoder.down_blocks[0], theirs.encoder.down_blocks[0], x)
  same(ours.decoder.up_blocks[0], theirs.decoder.up_blocks[0], data(2, 16, 3, 4))


def test_encoder_and_decoder(pair):
  theirs, ours = pair
  f, c = ours.config.downscale, ours.config.latent_channels
  same(ours.encoder, theirs.encoder, data(2, 3, 4 * f, 2 * f))
  same(ours.decoder, theirs.decoder, data(2, c, 4, 2))


def test_whole(pair):
  theirs, ours = pair
  f, c = ours.config.downscale, ours.config.latent_channels
  images, latents = data(2, 3, 4 * f, 2 * f), data(2, c, 4, 2)
  with torch.no_grad():
    posterior = theirs.encode(torch.from_numpy(images)).latent_dist
    decoded = theirs.decode(torch.from_numpy(latents)).sample.numpy()
  graphdef, params = modules.split_module(ours)
  encode = jax.jit(lambda p, x: modules.bind_graph(graphdef, p).encode(x))
  mean, spread = encode(params, nhwc(images))
  np.testing.assert_allclose(nchw(mean), posterior.mean.numpy(), **CLOSE)
  np.testing.assert_allclose(nchw(spread), posterior.logvar.numpy(), **CLOSE)
  kl = modeling.kl_divergence(mean, spread)
  np.testing.assert_allclose(kl, posterior.kl().numpy(), rtol=1e-4)
  have = jax.jit(lambda p, x: modules.bind_graph(graphdef, p).decode(x))(params, nhwc(latents))
  np.testing.assert_allclose(nchw(have), decoded, **CLOSE)
  assert ours.config.scaling_factor == theirs.config.scaling_factor
  assert ours.config.shift_factor == (theirs.config.shift_factor or 0)


@pytest.mark.parametrize('as_convolution', [False, True])
def test_old_attention_names(pair, as_convolution):
  theirs, ours = pair
  state = {}
  for name, value in theirs.state_dict().items():
    value = value.numpy()
    for new, old in OLD.items():
      if f'.{new}.' in name and as_convolution and value.ndim == 2:
        value = value[:, :, None, None]
      name = name.replace(f'.{new}.', f'.{old}.')
    state[name] = value
  params = convert.load_weights(source_of_arrays(state, dict(theirs.config)), ours.config)
  jax.tree.map(np.testing.assert_array_equal, params, modules.split_module(ours)[1])


def test_bfloat16_stays_near(pair):
  theirs, ours = pair
  latents = data(1, ours.config.latent_channels, 4, 4)
  graphdef, params = modules.split_module(ours)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  have = modules.bind_graph(graphdef, half).decode(nhwc(latents).astype(jnp.bfloat16))
  assert have.dtype == jnp.bfloat16
  with torch.no_grad():
    want = theirs.decode(torch.from_numpy(latents)).sample.numpy()
  error = np.abs(nchw(have).astype(np.float32) - want).mean() / np.abs(want).mean()
  assert error < 0.05


@pytest.mark.parametrize('name', ['sd1', 'sd3'])
def test_released_configs(name):
  """As many parameters as diffusers' class on the meta device."""
  c = modeling.SIZES[name]
  with torch.device('meta'):
    theirs = diffusers.AutoencoderKL(
      down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
      block_out_channels=c.block_out_channels, layers_per_block=c.layers_per_block,
      latent_channels=c.latent_channels, use_quant_conv=c.use_quant_conv,
      use_post_quant_conv=c.use_post_quant_conv,
    )  # fmt: skip
  count = sum(p.numel() for p in theirs.parameters())
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  assert modules.count_parameters(template) == count
