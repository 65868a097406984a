"""TiTok: sizes, both kinds of models, files; its golden files are in test_replay.py."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_flops import count_traced_flops

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.titok import convert, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/titok_a.npz'
OPTIONS = {'heads': 3}


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    return {k: file[k] for k in file.files}


@pytest.fixture(scope='module')
def tensors(golden):
  return {k[7:]: v for k, v in golden.items() if k.startswith('params/')}


def load(tensors, part=''):
  source = source_of_arrays(tensors, OPTIONS, 'here')
  config = convert.config_of(source, part)
  params = convert.load_weights(source, config)
  return modules.bind_module(modeling.build_model, config, params)


def test_released_sizes():
  """Those of the first models are published: 641, 204 and 83 million."""
  for name, count in (
    ('l32', 641_054_735), ('b64', 204_814_095), ('s128', 83_674_639), ('bl64_vq8k', 390_016_148),
    ('sl256_vq8k', 330_260_884),
  ):  # fmt: skip
    _, params = modules.structure_of(modeling.build_model, modeling.SIZES[f'titok_{name}'])
    assert modules.count_parameters(params) == count, name


def test_encoder(golden, tensors):
  """Memory is read as [D, K]; a transposition is seen."""
  model = load(tensors)
  images = golden['in/image'].transpose(0, 2, 3, 1)
  want = golden['out/enc_z'][:, :, 0].swapaxes(1, 2)
  difference = lambda: np.abs(np.asarray(model.encoder(images)) - want).max()
  assert difference() < 1e-5
  model.encoder.config = dataclasses.replace(model.config, legacy=False, pixels=None)
  assert difference() > 0.1


def test_decoder(golden, tensors):
  """Without the encoder; the most probable code instead of the mean is seen."""
  model = load(tensors, 'decoder')
  assert model.encoder is None
  logits = golden['out/pixel_logits'].transpose(0, 2, 3, 1)
  want = golden['out/pixel_latent'].transpose(0, 2, 3, 1)
  assert np.abs(model.mix_codes(logits) - want).max() < 1e-5
  assert np.abs(model.pixels.look_up(logits.argmax(-1)) - want).max() > 0.1
  config = model.config
  params = modules.structure_of(modeling.build_model, config)[1]
  run = lambda p, ids: modules.bind_module(modeling.build_model, config, p).decode(ids)
  traced = jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((1, config.tokens), jnp.int32))
  assert count_traced_flops(traced.jaxpr) == modeling.count_decode_flops(config)


def test_files(tensors):
  source = source_of_arrays(tensors, OPTIONS | {'model': {'vq_model': {'use_l2_norm': False}}})
  assert not convert.config_of(source).unit_sphere and load(tensors).config.unit_sphere
  stage = {k: v for k, v in tensors.items() if not k.startswith('pixel')}
  with pytest.raises(ValueError, match='here is no complete TiTok: no pixel_quantize'):
    load(stage)
  lost = {k: v for k, v in tensors.items() if k != 'latent_tokens'}
  with pytest.raises(ValueError, match='no complete TiTok: no latent_tokens'):
    load(lost)
  with pytest.raises(ValueError, match='unused by the model: odd'):
    load(tensors | {'odd': np.zeros(2)})
  tiny = modeling.SIZES['tiny']
  for changes, say in (
    ({'size': 9}, 'size=9: must be a multiple of patch=2'),
    ({'legacy': False}, 'legacy=False: only a legacy model'),
    ({'patch': 4}, 'patch=4: must be the side of a token of pixels, 2'),
  ):
    with pytest.raises(ConfigError, match=say):
      dataclasses.replace(tiny, **changes)
