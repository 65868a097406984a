"""RandAR: sizes, orders, parallel drawing, files; its golden file is in test_replay.py."""

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
from vtts_jax.models.llamagen import modeling as llamagen
from vtts_jax.models.randar import convert, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/randar_a.npz'
TINY = modeling.SIZES['tiny']
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(TINY.codes, size=(1, 2, TINY.tokens))  # [B, N, T]
ORDERS = np.stack([RNG.permutation(TINY.tokens) for _ in range(2)])[None]


@functools.cache
def draw_parameters():
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, modules.structure_of(modeling.build_model, TINY)[1])


def bind(params, config=TINY):
  return modules.bind_module(modeling.build_model, config, params)


@jax.jit
def force(params, tokens, order):
  """(context, hidden `[B, N, T, C, D]`, cache) of given tokens."""
  ctx = bind(params).class_context(jnp.array([[2, -1]]))
  return ctx, *bind(params).prefill(ctx, tokens, order)


@functools.partial(jax.jit, static_argnums=6)
def feed(params, ctx, cache, tokens, order, place, count):
  return bind(params).feed_tokens(ctx, cache, tokens, order, place, count)


@pytest.mark.parametrize(
  ('name', 'count'),
  [('0.3b_llamagen', 342_912_000), ('0.7b_llamagen', 774_700_800), ('0.3b_maskgit', 311_454_720)],
)
def test_released_sizes(name, count):
  _, params = modules.structure_of(modeling.build_model, modeling.SIZES[f'randar_{name}'])
  assert modules.count_parameters(params) == count


def test_parallel_counts():
  assert modeling.parallel_counts(16, 6) == (1, 2, 2, 3, 4, 4)  # the golden file's
  counts = modeling.parallel_counts(256, 88)
  assert len(counts) == 88 and sum(counts) == 256 and counts[0] == 1 and max(counts) <= 6
  for steps in (-1, 9):
    assert modeling.parallel_counts(9, steps) == (1,) * 9
  for steps in (0, 1, 10):
    with pytest.raises(ConfigError, match=rf'steps={steps}: must be in 2 \.\. 9, or -1'):
      modeling.parallel_counts(9, steps)


def test_one_token_at_a_time_is_all_at_once():
  params = draw_parameters()
  ctx, hidden, whole = force(params, TOKENS, ORDERS)
  cache = jax.tree.map(jnp.zeros_like, whole)
  for place in range(TINY.tokens):
    fed = TOKENS[..., place - 1 : place] if place else TOKENS[..., :1] * 0
    found, cache = feed(params, ctx, cache, fed, ORDERS, jnp.asarray(place), 1)
    np.testing.assert_allclose(found[:, :, 0], hidden[:, :, place], atol=2e-5)
  for name in 'kv':  # slot 0 is never seen
    np.testing.assert_allclose(cache[name][..., 1:, :], whole[name][..., 1:, :], atol=2e-5)
  # candidates at different places, from a cache whose later slots hold rubbish
  fed = TOKENS[:, [0, 1], [3, 6]][..., None]
  found, _ = feed(params, ctx, whole, fed, ORDERS, jnp.array([[4, 7]]), 1)
  np.testing.assert_allclose(found[0, [0, 1], 0], hidden[0, [0, 1], [4, 7]], atol=2e-5)


def test_tokens_drawn_together_leave_the_cache_of_training():
  params = draw_parameters()
  ctx, hidden, whole = force(params, TOKENS, ORDERS)
  cache, fed, place = bind(params).init_cache(ctx, 2), TOKENS[..., :0], 0
  for count in (1, 3, 3):
    found, cache = feed(params, ctx, cache, fed, ORDERS, place, count)
    # the first of them knows all tokens before it, the others do not
    np.testing.assert_allclose(found[:, :, 0], hidden[:, :, place], atol=2e-5)
    if count > 1:
      assert np.abs(found[:, :, 1] - hidden[:, :, place + 1]).max() > 1e-2
    fed, place = TOKENS[..., place : place + count], place + count
  # the instruction of the last step's first place is the last that stands right
  for name in 'kv':
    np.testing.assert_allclose(cache[name][..., 1:10, :], whole[name][..., 1:10, :], atol=2e-5)


def test_bfloat16_and_flops():
  params = draw_parameters()
  ctx, hidden, cache = force(params, TOKENS, ORDERS)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  have = bind(low).token_logits(force(low, TOKENS, ORDERS)[1])
  want = bind(params).token_logits(hidden)
  assert have.dtype == jnp.float32
  assert 0 < np.abs(have - want).mean() < 0.05 * np.abs(want).mean()
  step = lambda ctx, cache: bind(params).feed_tokens(
    ctx, cache, TOKENS[:, :1, :1], ORDERS[:, :1], 3
  )
  cache = jax.tree.map(lambda x: x[:, :1], cache)
  count = 2 * 2 * modeling.count_flops(TINY, 'step', 2 * TINY.tokens)  # two streams, two inputs
  assert count_traced_flops(jax.make_jaxpr(step)(ctx, cache).jaxpr) == count


def test_files():
  with np.load(GOLDEN) as file:
    golden = {k: file[k] for k in file.files}
  tensors = {k[7:]: v for k, v in golden.items() if k.startswith('params/')}
  options = {'n_head': 3, 'block_size': 16}
  source = source_of_arrays(tensors, options, 'here')
  config = convert.config_of(source)
  params = convert.load_weights(source, config)
  # an instruction that is not turned is seen
  told = bind(params, config).embed_instructions(golden['in/token_order'])
  want = golden['out/position_instruction_tokens']
  assert np.abs(told - want).max() < 1e-6 < 0.1 < np.abs(params['instruction'] - want).max()
  assert convert.config_of(source_of_arrays(tensors, {'n_head': 3})).tokens == 256
  with pytest.raises(ValueError, match='here is no RandAR: no pos_instruct_embeddings'):
    convert.config_of(source_of_arrays({'x': np.zeros(1)}, {}, 'here'))
  lost = {k: v for k, v in tensors.items() if k != 'norm.weight'} | {'odd': np.zeros(2)}
  with pytest.raises(ValueError, match=r'(?s)wanted by the model: norm\.weight.*unused.*odd'):
    convert.load_weights(source_of_arrays(lost, options, 'here'), config)
  with pytest.raises(ConfigError, match='classes=0: RandAR draws pictures of classes'):
    modeling.build_model(llamagen.SIZES['tiny_t2i'])
