"""LlamaGen and its tokenizer: sizes, cache, prefix, files; its golden file is in test_replay.py."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_flops import count_traced_flops

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.llamagen import convert, modeling
from vtts_jax.models.llamagen_vq import convert as vq_convert
from vtts_jax.models.llamagen_vq import modeling as vq_modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/llamagen_t2i_a.npz'
OPTIONS = {'n_head': 3, 'block_size': 16}
T2I = modeling.SIZES['tiny_t2i']
TOKENS = jnp.array([[[3, 1, 4, 1, 5, 9, 2, 6, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4]]])  # [B, N, T]


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    return {k: file[k] for k in file.files}


def take(golden, lead):
  return {k.removeprefix(lead): v for k, v in golden.items() if k.startswith(lead)}


def load(tensors, options=OPTIONS):
  source = source_of_arrays(tensors, options, 'here')
  config = convert.config_of(source)
  return config, convert.load_weights(source, config)


@functools.cache
def draw_parameters(config=T2I):
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, modules.structure_of(modeling.build_model, config)[1])


def bind(params, config=T2I):
  return modules.bind_module(modeling.build_model, config, params)


STATES = np.random.default_rng(1).normal(size=(1, T2I.words, T2I.text_width)).astype(np.float32)


@jax.jit
def force(params, states, mask, tokens):
  """(context, hidden `[B, N, T, C, D]`, cache) of given tokens."""
  ctx = bind(params).text_context(states, mask)
  return ctx, *bind(params).prefill(ctx, tokens)


@jax.jit
def feed(params, ctx, cache, tokens, position):
  return bind(params).feed_tokens(ctx, cache, tokens, position)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
  ('name', 'millions', 'digits'),
  [
    ('c2i_b_256', 111, 0), ('c2i_l_384', 343, 0), ('c2i_xl_384', 775, 0), ('c2i_xxl_384', 1400, -2),
    ('c2i_3b_384', 3100, -2), ('t2i_xl_512', 775, 0),
  ],
)  # fmt: skip
def test_released_sizes(name, millions, digits):
  _, params = modules.structure_of(modeling.build_model, modeling.SIZES[name])
  count = modules.count_parameters(params) / 1e6
  # the text model has an MLP for a table of classes, and the same published number
  assert round(count, digits) == millions or (name.startswith('t2i') and abs(count - 775) < 10)


def test_widths_of_the_feed_forward_layer():
  widths = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 3200: 8704}
  assert all(modeling.swiglu_width(width) == hidden for width, hidden in widths.items())


def test_flops_are_those_of_the_traced_program():
  mask = np.ones((1, T2I.words), int)
  params = draw_parameters()
  ctx, _, cache = jax.eval_shape(force, params, STATES, mask, TOKENS[:, :1])
  trace = lambda f, *args: count_traced_flops(jax.make_jaxpr(f)(*args).jaxpr)
  count = functools.partial(modeling.count_flops, T2I)
  prefix = lambda p: bind(p).text_context(STATES, mask)
  assert trace(prefix, params) == 2 * count('prefix')
  # of the slot for the prefix the scores are free
  step = lambda ctx, cache: bind(params).feed_tokens(ctx, cache, TOKENS[:, :1, 0], 3)
  assert trace(step, ctx, cache) == 2 * count('step', keys=9)
  head = lambda x: bind(params).token_logits(x)
  assert trace(head, jnp.ones((1, T2I.width))) == count('head')


# ------------------------------------------------------------------------------------------- cache


def test_one_token_at_a_time_is_all_at_once():
  params, mask = draw_parameters(), np.array([[1, 1, 1, 0]])
  ctx, hidden, whole = force(params, STATES, mask, TOKENS)
  cache = jax.tree.map(jnp.zeros_like, whole)
  for t in range(TOKENS.shape[2]):
    found, cache = feed(params, ctx, cache, TOKENS[..., t - 1], jnp.asarray(t))
    np.testing.assert_allclose(found, hidden[:, :, t], atol=2e-5)
  for name in 'kv':  # the last token is not fed
    np.testing.assert_allclose(cache[name][..., :-1, :], whole[name][..., :-1, :], atol=2e-5)
  # candidates at different positions, from a cache whose later slots hold rubbish
  found, _ = feed(params, ctx, whole, TOKENS[:, [0, 1], [3, 6]], jnp.array([[4, 7]]))
  np.testing.assert_allclose(found[0, 0], hidden[0, 0, 4], atol=2e-5)
  np.testing.assert_allclose(found[0, 1], hidden[0, 1, 7], atol=2e-5)


def test_padding_does_not_matter_and_words_do():
  params, mask = draw_parameters(), np.array([[1, 1, 1, 0]])
  ctx, hidden, _ = force(params, STATES, mask, TOKENS)
  np.testing.assert_allclose(ctx['score'], np.log([[3, 3]]), rtol=1e-6)
  other = STATES.copy()
  other[:, 3] = 9.0
  np.testing.assert_array_equal(force(params, other, mask, TOKENS)[1], hidden)
  other[:, 2] = 9.0
  changed = np.abs(force(params, other, mask, TOKENS)[1] - hidden).max((0, 1, 2, 4))
  assert changed[0] > 1e-2 and changed[1] == 0  # the null stream reads no words


def test_bfloat16_stays_near():
  params, mask = draw_parameters(), np.ones((1, 4), int)
  want = bind(params).token_logits(force(params, STATES, mask, TOKENS)[1])
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  have = bind(low).token_logits(force(low, STATES, mask, TOKENS)[1])
  assert have.dtype == jnp.float32
  assert 0 < np.abs(have - want).mean() < 0.05 * np.abs(want).mean()


def test_classes():
  config = modeling.SIZES['tiny']
  model = bind(draw_parameters(config), config)
  ctx = model.class_context(jnp.array([[2, -1], [5, 5]]))
  assert (np.asarray(ctx['score']) == 0).all()
  np.testing.assert_allclose(ctx['hidden'][0, 1], ctx['hidden'][1, 0], atol=1e-6)  # the null class
  assert np.abs(ctx['values'][0, 0] - ctx['values'][0, 1]).max() > 1e-2


# ------------------------------------------------------------------------------------------- files


def test_wrong_rotations_are_seen(golden, monkeypatch):
  """Channels in another order, rows and columns of the grid exchanged: both move the logits."""
  config, params = load(take(golden, 'params/'))
  states, mask, tokens = (golden[f'in/{name}'] for name in ('t5_features', 't5_mask', 'token_ids'))

  @jax.jit
  def run(params, tokens):
    model = bind(params, config)
    hidden, _ = model.prefill(model.text_context(states, mask), tokens[:, None])
    return model.token_logits(hidden)[:, 0, :, 0]

  difference = lambda params: np.abs(run(params, tokens) - golden['out/logits_cond']).max()
  assert difference(params) < 1e-4
  kernel = params['blocks']['attn']['qkv']['kernel']
  # gathering twice more is no identity for a head of 16: it is another order
  shuffled = convert._gather_pairs(np.asarray(kernel), config.heads)
  broken = jax.tree.map(lambda x: x, params)
  broken['blocks']['attn']['qkv']['kernel'] = shuffled
  assert difference(broken) > 0.1
  table = modeling.rotation_table(config)
  swapped = np.roll(table, table.shape[-1] // 2, -1)
  monkeypatch.setattr(modeling, 'rotation_table', lambda c: swapped)
  run.clear_cache()
  assert difference(params) > 0.1


def test_what_is_wrong_is_said(golden):
  tensors = take(golden, 'params/')
  for options, say in (
    ({'n_head': 3}, 'here: no tensor tells block_size: a config.json beside it must'),
    ({'block_size': 16}, 'here: no tensor tells n_head'),
  ):
    with pytest.raises(ValueError, match=say):
      load(tensors, options)
  for options, say in (
    ({'block_size': 15}, 'tokens=15: must be a square'),
    ({'n_head': 5}, r'width=48: must be a multiple of 4 \* heads=20'),
  ):
    with pytest.raises(ConfigError, match=say):
      load(tensors, OPTIONS | options)
  # a class model's table is not a text model's
  with pytest.raises(ValueError, match='unused by the model: cls_embedding.odd'):
    load(tensors | {'cls_embedding.odd': np.zeros(2)})
  kept = {k: v for k, v in tensors.items() if k != 'layers.1.ffn_norm.weight'}
  with pytest.raises(ValueError, match=r'has no layers\.\*\.ffn_norm\.weight for layers \[1\]'):
    load(kept)
  with pytest.raises(ValueError, match='here is no LlamaGen: no tok_embeddings.weight'):
    load({'x': np.zeros(1)})
  load(tensors | {'freqs_cis': np.zeros((22, 8, 2))})  # a table of old files


# --------------------------------------------------------------------------------------- tokenizer


def test_tokenizers():
  config = vq_modeling.SIZES['vq16']
  assert (config.downscale, vq_modeling.SIZES['vq8'].downscale) == (16, 8)
  _, params = modules.structure_of(vq_modeling.build_model, config)
  run = lambda p, ids: modules.bind_module(vq_modeling.build_model, config, p).decode(ids)
  traced = jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((1, 64), jnp.int32))
  out = traced.out_avals[0]
  assert out.shape == (1, 128, 128, 3) and out.dtype == jnp.float32
  assert count_traced_flops(traced.jaxpr) == vq_modeling.count_decode_flops(config, 8)


def test_nearest_codes(golden):
  source = source_of_arrays(take(golden, 'params_vae/'))
  config = vq_convert.config_of(source)
  params = vq_convert.load_weights(source, config)
  model = modules.bind_module(vq_modeling.build_model, config, params)
  codes = model.look_up(jnp.arange(config.codebook_size))
  found = jnp.argmin(model.code_distances(3 * codes), -1)  # length does not matter
  np.testing.assert_array_equal(found, np.arange(config.codebook_size))
  twins = params | {'codebook': params['codebook'].at[9].set(2 * params['codebook'][4])}
  model = modules.bind_module(vq_modeling.build_model, config, twins)
  assert jnp.argmin(model.code_distances(codes[4]), -1) == 4  # of equals the first
  with pytest.raises(ConfigError, match='width=5: must divide the 16 tokens'):
    model.decode(jnp.zeros((1, 16), jnp.int32), width=5)
  with pytest.raises(ValueError, match='no VQ tokenizer: it lacks encoder'):
    vq_convert.config_of(source_of_arrays({'x': np.zeros(1)}))
  assert dataclasses.replace(config, ch=64).widths == (64, 64)
