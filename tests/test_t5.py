"""T5 encoder: sizes, buckets, masks, and what its loader says; goldens are in test_replay.py."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.t5 import convert, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/t5_a.npz'
SMALL = modeling.Config(
  vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=3,
  relative_attention_num_buckets=8, relative_attention_max_distance=16,
)  # fmt: skip


def count(config):
  return modules.count_parameters(modules.abstract_module(lambda: modeling.build_model(config))[1])


def decoder(c):
  """Parameters of the other half of a whole T5 v1.1, with its untied head."""
  inner = c.num_heads * c.d_kv
  block = 8 * c.d_model * inner + 3 * c.d_model * c.d_ff + 3 * c.d_model
  position = c.relative_attention_num_buckets * c.num_heads
  return c.num_layers * block + position + c.d_model + c.vocab_size * c.d_model


@pytest.mark.parametrize(
  ('name', 'encoder', 'whole'),
  [
    ('flan_t5_xl', 1_223_527_424, 2_849_757_184),
    ('t5_v1_1_xl', 1_223_527_424, 2_849_757_184),
    ('t5_v1_1_xxl', 4_762_310_656, 11_135_332_352),
  ],
)
def test_released_sizes(name, encoder, whole):
  config = modeling.SIZES[name]
  assert count(config) == encoder
  assert encoder + decoder(config) == whole


def test_buckets_by_hand():
  """8 buckets up to 16: per direction 0, 1 exact, 2..5 and further logarithmic."""
  table = modeling.relative_buckets(20, 8, 16)
  assert table[0].tolist()[:8] == [0, 5, 6, 6, 6, 6, 7, 7] and table[0, 19] == 7
  assert table[:, 0].tolist()[:8] == [0, 1, 2, 2, 2, 2, 3, 3] and table[19, 0] == 3


def test_masked_tokens_are_not_seen():
  graphdef, params = modules.split_module(modeling.build_model(SMALL))
  model = jax.jit(lambda *args: modules.bind_graph(graphdef, params)(*args))
  ids = np.arange(12).reshape(2, 6)
  mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
  base, other = model(ids, mask), model(np.where(mask, ids, 20), mask)
  np.testing.assert_array_equal(base[0, :3], other[0, :3])
  np.testing.assert_allclose(base[0, :3], model(ids[:1, :3])[0], atol=1e-5)
  assert np.abs(model(ids)[0, :3] - base[0, :3]).max() > 1e-3


@pytest.fixture
def tensors():
  with np.load(GOLDEN) as file:
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}


def load(tensors, options=None):
  source = source_of_arrays(tensors, options)
  return convert.load_weights(source, convert.config_of(source))


def test_config_decides_then_keys(tensors):
  inferred = convert.config_of(source_of_arrays(tensors))
  assert (inferred.num_layers, inferred.num_heads, inferred.d_kv) == (2, 3, 6)
  said = {'layer_norm_epsilon': 1e-5, 'relative_attention_max_distance': 20, 'extra': 1}
  config = convert.config_of(source_of_arrays(tensors, said))
  assert config == dataclasses.replace(
    inferred, layer_norm_epsilon=1e-5, relative_attention_max_distance=20
  )


def test_tied_names(tensors):
  for gone in ('shared.weight', 'encoder.embed_tokens.weight'):
    tensors.setdefault('shared.weight', tensors['encoder.embed_tokens.weight'])
    params = load({k: v for k, v in tensors.items() if k != gone})
    np.testing.assert_array_equal(params['embed']['embedding'], tensors['shared.weight'])
  tensors['shared.weight'] = tensors['shared.weight'] + 1
  with pytest.raises(ValueError, match=r'both go to embed\.embedding and differ'):
    load(tensors)


def test_what_is_wrong_is_said(tensors):
  with pytest.raises(ValueError, match='has no T5 encoder'):
    load({'x': np.zeros(1)})
  with pytest.raises(ConfigError, match="feed_forward_proj='gated-silu': allowed are gated-gelu"):
    convert.config_of(source_of_arrays(tensors), options={'feed_forward_proj': 'gated-silu'})
  with pytest.raises(ValueError, match=r'blocks\.2\.feed\.wo\.kernel'):
    load(tensors, {'num_layers': 3})
