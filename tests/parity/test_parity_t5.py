"""T5 block by block against transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
from reference import torch, transformers

from vtts_jax.models import modules
from vtts_jax.models.t5 import convert, modeling

CLOSE = {'atol': 2e-5, 'rtol': 2e-5}
R, W, D = 3, 11, 24


@pytest.fixture(scope='module', params=['gated-gelu', 'relu'])
def pair(request):
  config = transformers.T5Config(
    vocab_size=50, d_model=D, d_kv=6, d_ff=40, num_layers=3, num_heads=5,
    relative_attention_num_buckets=12, relative_attention_max_distance=20,
    feed_forward_proj=request.param, dropout_rate=0.0,
  )  # fmt: skip
  theirs = reference.randomise(transformers.T5EncoderModel(config), 1)
  source = reference.source(theirs, config.to_dict())
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('width', [1, 17, 300])
@pytest.mark.parametrize(('count', 'farthest'), [(32, 128), (12, 20), (8, 64)])
def test_buckets(width, count, farthest):
  attention = transformers.models.t5.modeling_t5.T5Attention
  offset = torch.arange(width)[None] - torch.arange(width)[:, None]
  want = attention._relative_position_bucket(offset, True, count, farthest)
  np.testing.assert_array_equal(modeling.relative_buckets(width, count, farthest), want.numpy())


def test_norm(pair):
  theirs, ours = pair
  x = data(R, W, D)
  want = reference.run(theirs.encoder.final_layer_norm, x)
  np.testing.assert_allclose(ours.norm(x), want, **CLOSE)


def test_attention(pair):
  theirs, ours = pair
  x = data(R, W, D)
  layer = theirs.encoder.block[0].layer[0].SelfAttention
  bias = layer.compute_bias(W, W)
  np.testing.assert_allclose(ours.position_bias(W), bias.detach().numpy(), **CLOSE)
  for i in (0, 2):
    layer = theirs.encoder.block[i].layer[0].SelfAttention
    want = reference.run(layer, x, position_bias=bias)
    np.testing.assert_allclose(ours.blocks[i].attention(x, ours.position_bias(W)), want, **CLOSE)


def test_feed_forward(pair):
  theirs, ours = pair
  x = data(R, W, D)
  want = reference.run(theirs.encoder.block[1].layer[1].DenseReluDense, x)
  np.testing.assert_allclose(ours.blocks[1].feed(x), want, **CLOSE)


def test_block(pair):
  theirs, ours = pair
  x = data(R, W, D)
  bias = theirs.encoder.block[0].layer[0].SelfAttention.compute_bias(W, W)
  want = reference.run(theirs.encoder.block[1], x, position_bias=bias)
  np.testing.assert_allclose(ours.blocks[1](x, ours.position_bias(W)), want, **CLOSE)


@pytest.mark.parametrize('lengths', [None, (11, 4, 1)])
def test_encoder(pair, lengths):
  theirs, ours = pair
  ids = np.random.default_rng(2).integers(0, 50, (R, W))
  mask = None if lengths is None else (np.arange(W) < np.array(lengths)[:, None]).astype(np.int64)
  options = {} if mask is None else {'attention_mask': torch.from_numpy(mask)}
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids), **options).last_hidden_state.numpy()
  graphdef, params = modules.split_module(ours)
  have = jax.jit(lambda p, i, m: modules.bind_graph(graphdef, p)(i, m))(params, ids, mask)
  np.testing.assert_allclose(have, want, **CLOSE)


def test_whole_model_files_load(pair):
  theirs, ours = pair
  whole = transformers.T5ForConditionalGeneration(theirs.config)
  whole.encoder.load_state_dict(theirs.encoder.state_dict())
  whole.shared.load_state_dict(theirs.shared.state_dict())
  source = reference.source(whole)
  params = convert.load_weights(source, convert.config_of(source))
  jax.tree.map(np.testing.assert_array_equal, params, modules.split_module(ours)[1])


def test_released_configs():
  """The released sizes have as many parameters as transformers' class on the meta device."""
  for config in modeling.SIZES.values():
    sizes = dataclasses.asdict(config)
    with torch.device('meta'):
      theirs = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    count = sum(p.numel() for p in theirs.parameters())
    _, params = modules.abstract_module(lambda c=config: modeling.build_model(c))
    assert modules.count_parameters(params) == count
