"""Gemma-2 against transformers: its parts, its states, and a whole language model's file."""

import jax
import numpy as np
import pytest
import reference
from reference import torch, transformers

from vtts_jax.models import modules
from vtts_jax.models.gemma2 import convert, modeling

CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
R, W, D = 3, 13, 24
SMALL = {
  'vocab_size': 50, 'hidden_size': D, 'intermediate_size': 40, 'num_hidden_layers': 5,
  'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8, 'query_pre_attn_scalar': 12,
  'sliding_window': 4,
}  # fmt: skip
VARIANTS = {
  'window': {},
  'uncapped': {'attn_logit_softcapping': None, 'sliding_window': 64},
  # a low cap and large weights: most scores are cut
  'capped': {'attn_logit_softcapping': 2.0, 'rope_parameters': {'rope_theta': 50.0}},
}


@pytest.fixture(scope='module', params=VARIANTS)
def pair(request):
  options = {**SMALL, **VARIANTS[request.param]}
  if 'rope_parameters' in options:
    options['rope_parameters'] = {'rope_type': 'default', **options['rope_parameters']}
  config = transformers.Gemma2Config(**options, attn_implementation='eager')
  theirs = reference.randomise(transformers.Gemma2Model(config), 1, 0.4)
  return theirs, reference.bind_port(convert, modeling, reference.source(theirs, config.to_dict()))


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer_of(model, number):
  """One block out of the stack."""
  graphdef, params = modules.split_module(model.blocks)
  return modules.bind_graph(graphdef, jax.tree.map(lambda x: x[number], params))


def test_parts(pair):
  theirs, ours = pair
  x, layer = data(R, W, D), theirs.layers[2]
  block = layer_of(ours, 2)
  want = reference.run(layer.pre_feedforward_layernorm, x)
  np.testing.assert_allclose(block.norm_ffn(x), want, **CLOSE)
  np.testing.assert_allclose(block.ffn(x), reference.run(layer.mlp, x), **CLOSE)
  places = torch.arange(W)[None]
  rotation = theirs.rotary_emb(torch.from_numpy(x), places)
  found = modeling.rotation_table(W, ours.config.head_dim, ours.config.rope_theta)
  for have, want in zip(found, rotation):
    np.testing.assert_allclose(have, want[0, :, : want.shape[-1] // 2], atol=1e-6)
  seen = modeling.visible_tokens(W, ours.config.sliding_window)
  for number in (0, 1):  # with a window, and without
    mask = np.where(seen[:, number], 0, np.finfo(np.float32).min)[:, None].astype(np.float32)
    with torch.no_grad():
      want = theirs.layers[number].self_attn(
        torch.from_numpy(x), position_embeddings=rotation, attention_mask=torch.from_numpy(mask)
      )[0].numpy()  # fmt: skip
    have = layer_of(ours, number).attn(x, found, seen[:, number])
    np.testing.assert_allclose(have, want, **CLOSE)


@pytest.mark.parametrize('lengths', [None, (13, 5, 1)])
def test_states(pair, lengths):
  theirs, ours = pair
  ids = np.random.default_rng(2).integers(0, 50, (R, W))
  mask = None if lengths is None else np.arange(W) < np.array(lengths)[:, None]
  options = {} if mask is None else {'attention_mask': torch.from_numpy(mask.astype(np.int64))}
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids), **options).last_hidden_state.numpy()
  graphdef, params = modules.split_module(ours)
  have = jax.jit(lambda p, i, m: modules.bind_graph(graphdef, p)(i, m))(params, ids, mask)
  real = np.ones((R, W), bool) if mask is None else mask
  print('largest difference', np.abs(have - want)[real].max())
  np.testing.assert_allclose(np.asarray(have)[real], want[real], **CLOSE)


def test_a_whole_language_model(pair):
  """The file of a causal model has its body under 'model.'; its head is the embedding."""
  theirs, ours = pair
  whole = transformers.Gemma2ForCausalLM(theirs.config)
  whole.model.load_state_dict(theirs.state_dict())
  source = reference.source(whole, theirs.config.to_dict())
  assert 'lm_head.weight' in source
  config = convert.config_of(source)
  assert config == ours.config
  params = convert.load_weights(source, config)
  jax.tree.map(np.testing.assert_array_equal, params, modules.split_module(ours)[1])


def test_released_sizes():
  """As many parameters as transformers' class on the meta device."""
  c = modeling.SIZES['gemma_2_2b']
  with torch.device('meta'):
    theirs = transformers.Gemma2Model(transformers.Gemma2Config())
  count = sum(p.numel() for p in theirs.parameters())
  _, template = modules.structure_of(modeling.build_model, c)
  assert modules.count_parameters(template) == count == 2_614_341_888
