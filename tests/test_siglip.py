"""SigLIP: released sizes and the verifier on it; its golden file is in test_replay.py."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from vtts_jax import components
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.siglip import convert, modeling
from vtts_jax.testing import laws

GOLDEN = pathlib.Path(__file__).parent / 'golden/siglip.npz'
COUNTS = {  # under siglip_
  'b16_224': 203_155_970, 'b16_256': 203_202_050, 'b16_384': 203_447_810,
  'b16_512': 203_791_874, 'l16_256': 652_150_786, 'l16_384': 652_478_466,
  'so400m14_224': 877_360_306, 'so400m14_384': 877_960_498, 'b16_256_i18n': 370_626_050,
  'so400m16_256_i18n': 1_128_758_962,
  'v2_b32_256': 376_856_066, 'v2_b16_224': 375_187_970, 'v2_b16_256': 375_234_050,
  'v2_b16_384': 375_479_810, 'v2_b16_512': 375_823_874, 'v2_l16_256': 881_526_786,
  'v2_l16_384': 881_854_466, 'v2_l16_512': 882_313_218, 'v2_so400m14_224': 1_135_463_602,
  'v2_so400m14_384': 1_136_008_498, 'v2_so400m16_256': 1_135_670_962,
  'v2_so400m16_384': 1_136_039_602, 'v2_so400m16_512': 1_136_555_698,
  'v2_giant16_256': 1_871_393_906, 'v2_giant16_384': 1_871_885_426,
}  # fmt: skip
PICTURES = np.random.default_rng(0).random((2, 3, 36, 40, 3), np.float32)


@pytest.fixture
def tensors():
  with np.load(GOLDEN) as file:
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}


def test_released_sizes():
  assert {f'siglip_{name}' for name in ('tiny', *COUNTS)} == modeling.SIZES.keys()
  traced = {}  # of sizes that differ by the picture's side one is traced
  for name, count in COUNTS.items():
    config = modeling.SIZES[f'siglip_{name}']
    key = dataclasses.replace(config, image_size=256, preprocessing=modeling.PREPROCESSING)
    if key not in traced:
      _, params = modules.structure_of(modeling.build_model, key)
      traced[key] = modules.count_parameters(params)
    assert traced[key] + (config.tokens - key.tokens) * config.image.width == count, name


def test_verifier():
  ver = components.load('verifiers.clip', weights='random:siglip_tiny', output='logit')
  assert ver.names == ('siglip_tiny_random_logit',)
  laws.check_verifier(ver, ['a red cat', 'two dogs'], {'image': PICTURES})


def test_texts_of_version_2_are_lower_cased(monkeypatch):
  """Its tokenizer is Gemma's, which keeps capitals; version 1's lowers them itself."""
  ver = components.load('verifiers.clip', weights='random:siglip_tiny')
  capitals, small = (ver.token_ids([text])[0].tolist() for text in ('A Cat', 'a cat'))
  assert capitals != small
  # SigLIP's pipelines leave quotes as they are
  assert ver.token_ids(['a cat\u2019s'])[0].tolist() != ver.token_ids(["a cat's"])[0].tolist()
  monkeypatch.setattr(modeling, 'SECOND', modeling.SIZES['siglip_tiny'].vocab)
  assert ver.token_ids(['A Cat'])[0].tolist() == small


def test_a_checkpoint(tmp_path, tensors):
  """A file through the verifier that is CLIP's: which of the two it is, its header says."""
  path = tmp_path / 'siglip.safetensors'
  heads = {'num_attention_heads': 2}
  write_weights(path, tensors, {'text_config': heads, 'vision_config': heads})
  ver = components.load('verifiers.clip', weights=str(path), output='cosine')
  params = ver.load()
  ids = np.arange(16).reshape(2, 8)
  run = jax.jit(lambda p, seen: ver.score(p, ver.encode(p, {'ids': ids}), seen)['siglip_cosine'])
  found = np.asarray(run(params, {'image': PICTURES}))
  assert np.abs(found).max() <= 1 and np.ptp(found) > 1e-3
  with pytest.raises(ConfigError, match=r'verifier\.weights=.*has no CLIP'):
    components.load('verifiers.pickscore', weights=str(path)).check()


def test_what_a_file_says(tensors):
  found = convert.config_of(source_of_arrays(tensors))
  assert (found.image_size, found.patch, found.length, found.vocab) == (12, 4, 8, 30)
  assert (found.image.act, found.image.eps) == ('gelu_tanh', 1e-6)
  assert found.preprocessing == modeling.PREPROCESSING
  said = {'vision_config': {'image_size': 15}}  # a rest of three pixels
  assert convert.config_of(source_of_arrays(tensors, said)).image_size == 15
  with pytest.raises(ValueError, match='9 positions do not fit pictures of 16 in patches of 4'):
    convert.config_of(source_of_arrays(tensors, {'vision_config': {'image_size': 16}}))
  del tensors['vision_model.head.probe']
  with pytest.raises(ValueError, match=r'has no SigLIP: no .*head\.probe'):
    convert.config_of(source_of_arrays(tensors))
