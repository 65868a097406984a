"""RAR and MaskGIT's tokenizer: sizes, cache, files; the golden file is in test_replay.py."""

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
from vtts_jax.models.maskgit_vq import convert as vq_convert
from vtts_jax.models.maskgit_vq import modeling as vq_modeling
from vtts_jax.models.rar import convert, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/rar_a.npz'
TINY = modeling.SIZES['tiny']
TOKENS = np.random.default_rng(0).integers(TINY.codes, size=(1, 2, TINY.tokens))  # [B, N, T]


@functools.cache
def draw_parameters(build=modeling.build_model, config=TINY):
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, modules.structure_of(build, config)[1])


def bind(params, config=TINY):
  return modules.bind_module(modeling.build_model, config, params)


@jax.jit
def force(params, tokens):
  """(context, hidden `[B, N, T, C, D]`, cache) of given tokens."""
  ctx = bind(params).class_context(jnp.array([[2, -1]]))
  return ctx, *bind(params).prefill(ctx, tokens)


@jax.jit
def feed(params, ctx, cache, tokens, position):
  return bind(params).feed_tokens(ctx, cache, tokens, position)


@pytest.mark.parametrize(
  ('name', 'millions'), [('rar_b', 261), ('rar_l', 461), ('rar_xl', 955), ('rar_xxl', 1499)]
)
def test_released_sizes(name, millions):
  """The published numbers: rounded, and of rar_l cut."""
  _, params = modules.structure_of(modeling.build_model, modeling.SIZES[name])
  assert abs(modules.count_parameters(params) / 1e6 - millions) < 0.7


def test_one_token_at_a_time_is_all_at_once():
  params = draw_parameters()
  ctx, hidden, whole = force(params, TOKENS)
  cache = jax.tree.map(jnp.zeros_like, whole)
  for t in range(TINY.tokens):
    found, cache = feed(params, ctx, cache, TOKENS[..., t - 1], jnp.asarray(t))
    np.testing.assert_allclose(found, hidden[:, :, t], atol=3e-5)
  for name in 'kv':  # the last token is not fed
    np.testing.assert_allclose(cache[name][..., :-1, :], whole[name][..., :-1, :], atol=3e-5)
  # candidates at different positions, from a cache whose later slots hold rubbish
  found, _ = feed(params, ctx, whole, TOKENS[:, [0, 1], [3, 6]], jnp.array([[4, 7]]))
  np.testing.assert_allclose(found[0, [0, 1]], hidden[0, [0, 1], [4, 7]], atol=3e-5)


def test_guidance_and_bfloat16():
  scales = modeling.guidance_at(np.arange(16), 16, 4.0, 1.5)
  assert scales[0] == 1 and (np.diff(scales) > 0).all() and scales[-1] < 4
  np.testing.assert_allclose(modeling.guidance_at(np.arange(16), 16, 4.0, 0.0), 4)
  params = draw_parameters()
  want = bind(params).token_logits(force(params, TOKENS)[1])
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  have = bind(low).token_logits(force(low, TOKENS)[1])
  assert have.dtype == jnp.float32
  assert 0 < np.abs(have - want).mean() < 0.1 * np.abs(want).mean()


def test_flops_are_those_of_the_traced_program():
  params = draw_parameters()
  ctx, _, cache = jax.eval_shape(force, params, TOKENS[:, :1])
  trace = lambda f, *args: count_traced_flops(jax.make_jaxpr(f)(*args).jaxpr)
  count = functools.partial(modeling.count_flops, TINY)
  assert trace(lambda p: bind(p).class_context(jnp.array([[2, -1]])), params) == 2 * count('prefix')
  step = lambda ctx, cache: bind(params).feed_tokens(ctx, cache, TOKENS[:, :1, 0], 3)
  assert trace(step, ctx, cache) == 2 * count('step', keys=9)
  assert trace(bind(params).token_logits, jnp.ones((1, TINY.width))) == count('head')


def test_files():
  with np.load(GOLDEN) as file:
    golden = {k: file[k] for k in file.files}
  tensors = {k[7:]: v for k, v in golden.items() if k.startswith('params/')}
  source = source_of_arrays(tensors, {}, 'here')
  config = convert.config_of(source)
  params = convert.load_weights(source, config)
  labels, tokens = golden['in/labels'], golden['in/token_ids'][:, None]

  @jax.jit
  def run(params):
    model = bind(params, config)
    ctx = model.class_context(labels[:, None])
    return model.token_logits(model.prefill(ctx, tokens)[0])[:, 0, :, 0]

  difference = lambda params: np.abs(run(params) - golden['out/logits_cond']).max()
  assert difference(params) < 1e-5
  # the head's scale and shift exchanged; positions of the next token off by one
  head = params['head_modulation']
  swapped = params | {'head_modulation': jax.tree.map(lambda x: jnp.roll(x, 48, -1), head)}
  assert difference(swapped) > 0.1
  later = params | {'next_positions': jnp.roll(params['next_positions'], 1, 0)}
  assert difference(later) > 0.1
  with pytest.raises(ValueError, match='here is no RAR: no lm_head.weight'):
    convert.config_of(source_of_arrays({'x': np.zeros(1)}, {}, 'here'))
  lost = {k: v for k, v in tensors.items() if k != 'cls_token'} | {'odd': np.zeros(2)}
  with pytest.raises(ValueError, match=r'(?s)wanted by the model: begin.*unused.*odd'):
    convert.load_weights(source_of_arrays(lost, {}, 'here'), config)


def test_tokenizer():
  config = vq_modeling.SIZES['imagenet_f16_256']
  _, params = modules.structure_of(vq_modeling.build_model, config)
  assert config.downscale == 16 and modules.count_parameters(params) == 54_515_587
  run = lambda p, ids: modules.bind_module(vq_modeling.build_model, config, p).decode(ids)
  traced = jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((1, 16), jnp.int32))
  assert traced.out_avals[0].shape == (1, 64, 64, 3)
  assert count_traced_flops(traced.jaxpr) == vq_modeling.count_decode_flops(config, 4)
  tiny = vq_modeling.SIZES['tiny']
  model = modules.bind_module(
    vq_modeling.build_model, tiny, draw_parameters(vq_modeling.build_model, tiny)
  )
  distances = vq_modeling.code_distances(model.look_up(jnp.arange(16)), model.codebook[...])
  ids = jnp.argmin(distances, -1)
  np.testing.assert_array_equal(ids, np.arange(16))
  with pytest.raises(ConfigError, match='8 tokens of a picture: must be a square'):
    model.decode(jnp.zeros((1, 8), jnp.int32))
  with pytest.raises(ValueError, match='here is no MaskGIT tokenizer'):
    vq_convert.config_of(source_of_arrays({'x': np.zeros(1)}, {}, 'here'))
