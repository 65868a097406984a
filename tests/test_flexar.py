"""FlexTok AR: cached steps against teacher forcing, pools, sizes, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vtts_jax.checkpoints.source import Source, source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.flexar import convert, modeling

SMALL = modeling.Config(
  width=16, layers=2, heads=2, tokens=7, codes=13, text_width=8, hidden=24, qk_norm=True
)
B, N, C, W = 2, 3, 2, 4
MASK = np.arange(W) < np.array([[4, 1], [2, 1]])[..., None]  # [B, C, W]


@functools.cache
def small(**options):
  build = lambda: modeling.FlexAR(dataclasses.replace(SMALL, **options), rngs=nnx.Rngs(1))
  graphdef, template = modules.abstract_module(build)
  rng = np.random.default_rng(0)  # and no initialisation: every part matters
  draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)
  return modules.bind_graph(graphdef, jax.tree.map(draw, template))


@functools.cache
def case():
  """(model, context, tokens `[B, N, T]`) with text of different lengths."""
  rng = np.random.default_rng(0)
  states = jnp.asarray(rng.normal(size=(B, C, W, SMALL.text_width)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, SMALL.codes, (B, N, SMALL.tokens)), jnp.int32)
  return small(), jax.jit(small().text_context)(states, jnp.asarray(MASK)), tokens


@functools.cache
def prefill():
  return jax.jit(small().prefill)


@functools.cache
def step():
  return jax.jit(small().feed_tokens)


@functools.cache
def forced():
  _, ctx, tokens = case()
  return prefill()(ctx, tokens)


def close(a, b):
  np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_steps_and_prefill_agree_on_predictions_and_caches():
  model, ctx, tokens = case()
  cache = model.init_cache(B, N, C)
  seen = []
  for t in range(SMALL.tokens):
    hidden, cache = step()(ctx, cache, tokens[:, :, max(t - 1, 0), None], t)
    seen.append(hidden[:, :, 0])
  hidden, kv = forced()
  close(jnp.stack(seen, 2), hidden)
  jax.tree.map(close, cache, kv)
  assert not np.allclose(hidden[:, :, :, 0], hidden[:, :, :, 1], atol=1e-2)  # streams differ
  # the first prediction reads no token, later ones do
  close(hidden[:, 0, 0], hidden[:, 1, 0])
  assert not np.allclose(hidden[:, 0, 2], hidden[:, 1, 2], atol=1e-2)


def test_candidates_of_different_depth_in_one_step():
  _, ctx, tokens = case()
  hidden, kv = forced()
  depth = jnp.array([[0, 3, 6], [2, 5, 1]])
  late = jnp.arange(SMALL.tokens) >= depth[:, :, None]  # slots from there on hold rubbish
  cache = {n: jnp.where(late[:, :, None, None, :, None], 9.0, kv[n]) for n in kv}
  fed = jnp.take_along_axis(tokens, jnp.maximum(depth - 1, 0)[..., None], 2)
  out, after = step()(ctx, cache, fed, depth[..., None])
  close(out[:, :, 0], jnp.take_along_axis(hidden, depth[:, :, None, None, None], 2)[:, :, 0])
  done = jnp.arange(SMALL.tokens) <= depth[:, :, None]
  for n in kv:
    close(*(jnp.where(done[:, :, None, None, :, None], x[n], 0) for x in (after, kv)))


def test_one_pool_for_all_candidates_moves_indices_and_not_caches():
  model, ctx, _ = case()
  rng = np.random.default_rng(1)
  T, S = SMALL.tokens, N * SMALL.tokens
  pool = model.init_cache(B, 1, C, S)
  visible = np.zeros((B, 1, N, S), bool)  # the slots of a row's ancestors
  tokens = np.zeros((B, N, T), np.int32)
  for t in range(T):
    fed = tokens[:, :, max(t - 1, 0)][:, None]  # [B, 1, N]
    own = np.eye(N, S, t * N, dtype=bool)
    out, pool = step()(ctx, pool, fed, t, t * N, visible | own)
    close(out[:, 0], prefill()(ctx, tokens)[0][:, :, t])
    parents = rng.integers(0, N, (B, N))  # beams are reordered, some doubled
    visible = np.take_along_axis(visible | own, parents[:, None, :, None], 2)
    tokens = np.take_along_axis(tokens, parents[:, :, None], 1)
    tokens[:, :, t] = rng.integers(0, SMALL.codes, (B, N))


def test_masked_words_do_not_matter():
  _, ctx, tokens = case()
  rubbish = {n: jnp.where(MASK[:, :, None, :, None], ctx[n], 7.0) for n in 'kv'}
  close(prefill()(ctx | rubbish, tokens)[0], forced()[0])


def test_bfloat16_weights_give_bfloat16_caches_and_float32_logits():
  graphdef, params = modules.split_module(small())
  low = modules.bind_graph(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  states, mask = jnp.ones((B, C, W, SMALL.text_width)), jnp.ones((B, C, W))

  def run(model):
    ctx = model.text_context(states, mask)
    hidden, cache = model.prefill(ctx, case()[2])
    hidden, cache = model.feed_tokens(ctx, cache, case()[2][..., 5:6], 6)
    return model.token_logits(hidden), cache

  shapes = jax.eval_shape(lambda: run(low))
  assert shapes[0].dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(shapes[1])} == {jnp.dtype(jnp.bfloat16)}


def test_classes_and_no_class():
  model = small(classes=5)
  ctx = model.class_context(jnp.array([[3, -1], [0, -1]]))
  np.testing.assert_array_equal(ctx['start'][:, 1], jnp.stack([model.start[...]] * 2))
  np.testing.assert_array_equal(ctx['start'][0, 0], model.start[...] + model.classes[3])
  assert set(ctx) == {'start'} and not hasattr(model.blocks, 'cross_attn')


def test_guidance():
  logits = jnp.array([[[1.0, 2.0], [3.0, 1.0]]])  # [1, C, V]
  np.testing.assert_array_equal(modeling.guide_logits(logits, 3.0), [[-3.0, 4.0]])
  np.testing.assert_array_equal(modeling.guide_logits(logits[:, :1], 3.0), [[1.0, 2.0]])


# Published sizes, in millions, count the trunk. For the class model 1150 is published as for the
# text model, whose cross-attention it does not have: README.md.
@pytest.mark.parametrize(
  ('name', 'trunk', 'all_of_it'),
  [
    ('flexar_113m', 113, 218),
    ('flexar_382m', 382, 537),
    ('flexar_1b', 1152, 1373),
    ('flexar_3b', 3058, 3362),
    ('gridar_3b', 3058, 3362),
    ('flexar_1b_c2i', 864, 1079),
  ],
)
def test_released_sizes(name, trunk, all_of_it):
  config = modeling.SIZES[name]
  _, params = modules.abstract_module(lambda: modeling.build_model(config))
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
  assert round(modules.count_parameters(params['blocks']) / 1e6) == trunk
  assert round(modules.count_parameters(params) / 1e6) == all_of_it
  assert config.width // config.heads == 64


def test_flops_are_those_of_the_compiled_program():
  model, ctx, tokens = case()
  run = lambda *args: model.token_logits(model.feed_tokens(*args)[0])
  lowered = jax.jit(run).lower(ctx, model.init_cache(B, N, C), tokens[..., :1], 3)
  counted = lowered.compile().cost_analysis()['flops'] / (B * N * C)
  trunk = modeling.count_trunk_flops(SMALL, SMALL.tokens, W)
  exact = trunk / SMALL.layers + modeling.count_head_flops(SMALL)  # XLA counts a loop body once
  assert exact < counted < 1.35 * exact  # the rest: norms, softmax, gates at a width of 16


def header(name):
  """What the header of a released text checkpoint says: {torch name: shape}; no array behind it."""
  c = modeling.SIZES[name]
  D, F, ar = c.width, c.hidden, 'models.ar_image_model.'
  block = {f'norm_{i}': (D,) for i in (1, 2, 3)}
  block |= {'self_attn.qkv': (3 * D, D), 'mlp.fc1': (F, D), 'mlp.fc2': (D, F), 'mlp.fc3': (F, D)}
  block |= {f'cross_attn.W{x}': (D, D) for x in 'qkv'}
  for kind in ('self_attn', 'cross_attn'):
    block |= {f'{kind}.proj': (D, D), f'{kind}.q_norm': (64,), f'{kind}.k_norm': (64,)}
  names = {f'{ar}trunk.blocks.{i}.{k}.weight': v for i in range(c.layers) for k, v in block.items()}
  return names | {
    f'{ar}preprocessor.positional_embedding': (256, D),
    f'{ar}preprocessor.sos_token_embed': (1, 1, D),
    f'{ar}preprocessor.embedding.weight': (64000, D),
    f'{ar}trunk.post_trunk_norm.weight': (D,),
    f'{ar}head.linear.weight': (64000, D),
    'models.text_encoder.mlp.fc1.weight': (2048, 2048),
    'models.text_encoder.mlp.fc2.weight': (D, 2048),
  }


def test_headers_of_released_checkpoints_give_the_released_configs():
  def read(name):
    raise AssertionError(f'{name} was read')

  for name in ('flexar_113m', 'flexar_3b'):
    shapes = {k: (v, 'bfloat16') for k, v in header(name).items()}
    source = Source('here', shapes, read)
    assert convert.config_of(source) == modeling.SIZES[name]
  with pytest.raises(AssertionError, match='was read'):  # names and shapes fit: it starts to read
    convert.load_weights(source, modeling.SIZES[name])
  lost = {k: v for k, v in shapes.items() if '.7.cross_attn.Wk' not in k}
  with pytest.raises(ValueError, match=r'here has no .*cross_attn.Wk.weight for layers \[7\]'):
    convert.load_weights(Source('here', lost, read), modeling.SIZES[name])


def test_errors_name_setting_value_and_what_is_allowed():
  with pytest.raises(ConfigError, match='width=20: must be a multiple of heads=3'):
    modeling.Config(width=20, heads=3)
  with pytest.raises(ConfigError, match="norm='batch': must be one of"):
    modeling.Config(norm='batch')
  source = source_of_arrays({'a.blocks.0.w': np.zeros(2), 'b': np.zeros(2)}, where='here')
  with pytest.raises(ValueError, match='here is no FlexTok AR checkpoint: no models.ar_image'):
    convert.config_of(source)
