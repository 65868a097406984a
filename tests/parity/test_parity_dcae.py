"""DC-AE block by block against diffusers."""

import numpy as np
import pytest
import reference
from reference import diffusers, nchw, nhwc, torch

from vtts_jax.models import modules
from vtts_jax.models.dcae import convert, modeling

CLOSE = {'atol': 2e-4, 'rtol': 2e-4}
KINDS = ('ResBlock', 'ResBlock', 'EfficientViTBlock')
SHUFFLED = {
  'upsample_block_type': 'pixel_shuffle', 'downsample_block_type': 'pixel_unshuffle',
}  # fmt: skip
VARIANTS = {
  'sana': {'upsample_block_type': 'interpolate', 'downsample_block_type': 'Conv'},
  'shuffled': SHUFFLED,
  'imagenet': {
    **SHUFFLED, 'encoder_layers_per_block': (0, 2, 1), 'decoder_layers_per_block': (0, 1, 2),
    'decoder_norm_types': ('batch_norm', 'batch_norm', 'rms_norm'),
    'decoder_act_fns': ('relu', 'relu', 'silu'),
    'encoder_qkv_multiscales': ((), (), ()), 'decoder_qkv_multiscales': ((), (), ()),
  },
  'two_scales': {**SHUFFLED, 'decoder_qkv_multiscales': ((), (), (3, 5))},
}  # fmt: skip


def make_theirs(**options):
  return diffusers.AutoencoderDC(
    **{
      'latent_channels': 8, 'attention_head_dim': 8, 'encoder_block_types': KINDS,
      'decoder_block_types': KINDS, 'encoder_block_out_channels': (8, 16, 32),
      'decoder_block_out_channels': (8, 16, 32), 'encoder_layers_per_block': (1, 1, 1),
      'decoder_layers_per_block': (1, 2, 1), 'encoder_qkv_multiscales': ((), (), (5,)),
      'decoder_qkv_multiscales': ((), (), (5,)), 'scaling_factor': 0.41407, **options,
    }
  )  # fmt: skip


@pytest.fixture(scope='module', params=VARIANTS)
def pair(request):
  theirs = reference.randomise(make_theirs(**VARIANTS[request.param]), 3)
  source = reference.source(theirs, dict(theirs.config))
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('sides', [(8, 6), (2, 2)])
def test_attention(pair, sides):
  """Few cells take the quadratic form in the reference, with the same values."""
  theirs, ours = pair
  stage, x = ours.encoder.stages[-1], data(2, 32, *sides)
  want = reference.run(theirs.encoder.down_blocks[-1], x)
  np.testing.assert_allclose(nchw(stage.run_blocks(nhwc(x))), want, **CLOSE)


def test_resampling(pair):
  theirs, ours = pair
  x = data(2, 16, 6, 8)
  down, up = theirs.encoder.down_blocks[1][-1], theirs.decoder.up_blocks[1][0]
  np.testing.assert_allclose(
    nchw(ours.encoder.stages[-2].resample(nhwc(x))), reference.run(down, x), **CLOSE
  )
  x = data(2, 32, 3, 4)
  np.testing.assert_allclose(
    nchw(ours.decoder.stages[-2].resample(nhwc(x))), reference.run(up, x), **CLOSE
  )


def test_whole(pair):
  theirs, ours = pair
  image, latents = data(2, 3, 16, 32), data(2, 8, 4, 8)
  with torch.no_grad():
    encoded = theirs.encode(torch.from_numpy(image)).latent.numpy()
    decoded = theirs.decode(torch.from_numpy(latents)).sample.numpy()
  np.testing.assert_allclose(nchw(ours.encode(nhwc(image))), encoded, **CLOSE)
  np.testing.assert_allclose(nchw(ours.decode(nhwc(latents))), decoded, **CLOSE)
  assert ours.config.scaling_factor == theirs.config.scaling_factor


def test_released_config():
  """As many parameters as diffusers' class on the meta device."""
  with torch.device('meta'):
    theirs = diffusers.AutoencoderDC(
      encoder_block_types=('ResBlock',) * 3 + ('EfficientViTBlock',) * 3,
      decoder_block_types=('ResBlock',) * 3 + ('EfficientViTBlock',) * 3,
      downsample_block_type='conv', upsample_block_type='interpolate',
    )  # fmt: skip
  count = sum(p.numel() for p in theirs.parameters())
  _, template = modules.structure_of(modeling.build_model, modeling.SIZES['f32c32_sana'])
  assert modules.count_parameters(template) == count
