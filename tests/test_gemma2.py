"""Gemma-2: sizes, states against a plain loop over tokens and heads, its file, what is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.gemma2 import convert, modeling
from vtts_jax.models.pretrained import Pretrained

WIDTH, INNER, HIDDEN, WORDS, LAYERS, HEADS, SHARED, HEAD = 12, 16, 20, 30, 3, 4, 2, 4
SAID = {
  'model_type': 'gemma2', 'hidden_activation': 'gelu_pytorch_tanh', 'head_dim': HEAD,
  'query_pre_attn_scalar': 6, 'sliding_window': 3, 'attn_logit_softcapping': 1.5,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0}, 'rms_norm_eps': 1e-5,
}  # fmt: skip


@pytest.fixture(scope='module')
def tensors():
  """Random weights under the names of transformers."""
  rng = np.random.default_rng(0)
  shapes = {'embed_tokens.weight': (WORDS, WIDTH), 'norm.weight': (WIDTH,)}
  for i in range(LAYERS):
    shapes |= {f'layers.{i}.{name}.weight': (WIDTH,) for name in convert.NORMS}
    shapes |= {f'layers.{i}.{name}.weight': shape for name, shape in (
      ('self_attn.q_proj', (INNER, WIDTH)), ('self_attn.k_proj', (SHARED * HEAD, WIDTH)),
      ('self_attn.v_proj', (SHARED * HEAD, WIDTH)), ('self_attn.o_proj', (WIDTH, INNER)),
      ('mlp.gate_proj', (HIDDEN, WIDTH)), ('mlp.up_proj', (HIDDEN, WIDTH)),
      ('mlp.down_proj', (WIDTH, HIDDEN)),
    )}  # fmt: skip
  return {k: rng.normal(0, 0.5, shape).astype(np.float32) for k, shape in shapes.items()}


def states_by_loops(tensors, ids, length):
  """The last states of one text, of which `length` tokens are real, token by token."""
  w = {name.removesuffix('.weight'): value.astype(np.float64) for name, value in tensors.items()}
  norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * (1 + w[name])

  def rotate(head, place):
    pairs = head[: HEAD // 2] + 1j * head[HEAD // 2 :]
    turned = pairs * np.exp(1j * place * 100.0 ** (-np.arange(0, HEAD, 2) / HEAD))
    return np.concatenate([turned.real, turned.imag])

  x = w['embed_tokens'][ids] * WIDTH**0.5
  for i in range(LAYERS):
    at = f'layers.{i}.'
    y = norm(x, at + 'input_layernorm')
    q, k, v = ((y @ w[f'{at}self_attn.{p}_proj'].T).reshape(len(ids), -1, HEAD) for p in 'qkv')
    mixed = np.zeros((len(ids), HEADS, HEAD))
    for t in range(len(ids)):
      seen = [s for s in range(t + 1) if s < length and (i % 2 or t - s < 3)]
      for h in range(HEADS if seen else 0):
        # heads 0 and 1 share a key, heads 2 and 3 the other
        keys = [rotate(k[s, h // 2], s) for s in seen]
        scores = np.array([rotate(q[t, h], t) @ key for key in keys]) / 6**0.5
        weights = np.exp(1.5 * np.tanh(scores / 1.5))
        mixed[t, h] = weights @ v[seen, h // 2] / weights.sum()
    branch = mixed.reshape(len(ids), -1) @ w[at + 'self_attn.o_proj'].T
    x = x + norm(branch, at + 'post_attention_layernorm')
    y = norm(x, at + 'pre_feedforward_layernorm')
    gate, value = y @ w[at + 'mlp.gate_proj'].T, y @ w[at + 'mlp.up_proj'].T
    gelu = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    branch = gelu * value @ w[at + 'mlp.down_proj'].T
    x = x + norm(branch, at + 'post_feedforward_layernorm')
  return norm(x, 'norm')


def load(tensors, options=SAID):
  source = source_of_arrays(tensors, options)
  config = convert.config_of(source)
  return config, convert.load_weights(source, config)


def test_states(tensors):
  """Against the loop, whole and padded; what is masked is not read; bfloat16 stays near."""
  config, params = load(tensors)
  bind = lambda params: modules.bind_module(modeling.build_model, config, params)
  run = jax.jit(lambda params, ids, mask: bind(params)(ids, mask))
  ids = np.random.default_rng(1).integers(0, WORDS, (2, 7))
  mask = np.arange(7) < np.array([[7], [4]])
  found = np.asarray(run(params, ids, mask))
  for row, length in enumerate((7, 4)):
    want = states_by_loops(tensors, ids[row], length)
    np.testing.assert_allclose(found[row, :length], want[:length], atol=2e-5)
  other = run(params, np.where(mask, ids, 5), mask)
  np.testing.assert_array_equal(found[mask], other[mask])
  half = run(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), ids, mask)
  assert half.dtype == jnp.bfloat16
  assert np.abs(half - found)[mask].mean() < 0.05 * np.abs(found).mean()
  # a control: gate and value confused
  enter = params['blocks']['ffn']['enter']['kernel']
  turned = jax.tree.map(lambda x: x, params)
  turned['blocks']['ffn']['enter']['kernel'] = jnp.roll(enter, HIDDEN, -1)
  assert np.abs(run(turned, ids, mask) - found).max() > 0.1


def test_released_size_and_flops():
  c = modeling.SIZES['gemma_2_2b']
  _, template = modules.structure_of(modeling.build_model, c)
  count = modules.count_parameters(template)
  assert count == 2_614_341_888  # as published: 2.61 billion
  # a product takes two operations for each weight and token; attention comes on top
  weights = count - c.vocab_size * c.hidden_size - (4 * c.num_hidden_layers + 1) * c.hidden_size
  assert modeling.count_flops(c, 300) == 300 * (2 * weights + 26 * 4 * 300 * 8 * 256)
  mesh = jax.make_mesh((1, 1), ('data', 'model'))
  places = modules.shardings_by_rule(template, mesh, convert.SHARDING)
  assert places['blocks']['attn']['qkv']['kernel'].spec == PartitionSpec(None, None, 'model')
  assert places['embed']['embedding'].spec == PartitionSpec(None, 'model')


def test_the_file_decides(tensors, tmp_path):
  """Shapes first, then the options; a whole model's file and a pipeline's folder."""
  config, params = load(tensors)
  assert config == modeling.Config(
    WORDS, WIDTH, HIDDEN, LAYERS, HEADS, SHARED, HEAD, 6, 3, 1.5, 100.0, 1e-5
  )
  uncapped = load(tensors, SAID | {'attn_logit_softcapping': None})[0]
  assert uncapped == dataclasses.replace(config, attn_logit_softcapping=None)
  whole = {f'model.{name}': value for name, value in tensors.items()}
  whole['lm_head.weight'] = tensors['embed_tokens.weight']
  same, again = load(whole)
  assert same == config
  jax.tree.map(np.testing.assert_array_equal, again, params)
  (tmp_path / 'text_encoder').mkdir()
  write_weights(tmp_path / 'text_encoder/model.safetensors', whole, SAID)
  model = Pretrained('gemma2', str(tmp_path))
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, model.load(), params)


def test_what_is_wrong_is_said(tensors):
  with pytest.raises(ValueError, match='has no Gemma-2: no .*embed_tokens'):
    load({'x': np.zeros(1)})
  first = {k: v for k, v in tensors.items() if 'feedforward' not in k}
  with pytest.raises(ValueError, match='has no Gemma-2: no .*post_feedforward'):
    load(first)
  for said, message in (
    ({'model_type': 'gemma'}, "model_type='gemma': allowed is 'gemma2'"),
    ({'hidden_activation': 'gelu'}, "hidden_activation='gelu': allowed is 'gelu_pytorch_tanh'"),
    ({'layer_types': ['full_attention'] * 3}, 'layer_types=.*: allowed is .*sliding_attention'),
    ({'use_bidirectional_attention': True}, 'use_bidirectional_attention=True: allowed is False'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type='yarn': allowed is 'default'"),
    ({'head_dim': 5}, 'head_dim=5: must divide 16, the width of q_proj'),
  ):
    with pytest.raises(ConfigError, match=message):
      load(tensors, SAID | said)
  for change, message in (
    ({'num_key_value_heads': 3}, 'num_key_value_heads=3: must divide num_attention_heads=8'),
    ({'head_dim': 5}, 'head_dim=5: must be even'),
  ):
    with pytest.raises(ConfigError, match=message):
      modeling.Config(**change)
  with pytest.raises(ValueError, match=r'unused by the model: layers\.\*\.self_attn\.q_norm'):
    load(tensors | {f'layers.{i}.self_attn.q_norm.weight': np.zeros(4) for i in range(LAYERS)})
  lost = {k: v for k, v in tensors.items() if k != 'layers.1.mlp.down_proj.weight'}
  with pytest.raises(ValueError, match=r'has no layers\.\*\.mlp\.down_proj\.weight for layers \[1'):
    load(lost)
