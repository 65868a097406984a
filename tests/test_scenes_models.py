"""Scene models: weights files, the training loop, the prior with and without its cache, tokenizers,
FLOPs, cards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.checkpoints.files import read_metadata, read_weights, write_weights
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.scenes import models, oracle, world
from vtts_jax.scenes.models import flow, prior, tokenizer
from vtts_jax.train import loop

SMALL = prior.Config(tokens=8, codes=16, width=32, layers=2, heads=2, text_width=16)


@functools.cache
def small_prior():
  return modules.split_module(prior.build_model(SMALL, seed=3))


@functools.cache
def held(count):
  scenes = world.sample_scenes(12345, np.arange(count), 'held')
  return world.render_scenes(scenes), world.caption_prompts(scenes.captions)


def counted(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()['flops']


# ---- weights -----------------------------------------------------------------------------------


def test_weights_come_back_and_a_file_that_does_not_fit_names_both_sides(tmp_path):
  params = small_prior()[1]
  path = tmp_path / 'a.safetensors'
  write_weights(path, params, {'kind': 'prior', 'sizes': [1, 2]})
  back = read_weights(path, modules.abstract_module(lambda: prior.build_model(SMALL))[1])
  jax.tree.map(np.testing.assert_array_equal, params, back)
  assert read_metadata(path) == {'kind': 'prior', 'sizes': '[1, 2]'}
  assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors']  # no temporary file is left

  template = dict(params)
  template['extra'] = template.pop('head')
  with pytest.raises(ValueError, match=r'missing from the file: extra\.(.|\n)*unused: head\.'):
    read_weights(path, template)
  with pytest.raises(ValueError, match=r'head\.bias: file has shape \(16,\), model wants \(3,\)'):
    read_weights(path, {**params, 'head': {**params['head'], 'bias': np.zeros(3, np.float32)}})
  with pytest.raises(ValueError, match=r'head\.bias: file has dtype float32, model wants int32'):
    read_weights(path, {**params, 'head': {**params['head'], 'bias': np.zeros(16, np.int32)}})

  (tmp_path / 'cut').write_bytes(path.read_bytes()[:-1000])
  (tmp_path / 'text').write_text('not weights')
  for name in ('cut', 'text'):
    with pytest.raises(ValueError, match='truncated or no safetensors'):
      read_weights(tmp_path / name, params)
  with pytest.raises(FileNotFoundError, match='no weights at'):
    read_weights(tmp_path / 'absent', params)
  with pytest.raises(ConfigError, match="name='prior_3d' is no shipped scene model; allowed are"):
    models.load_model('prior_3d')


def test_a_resumed_training_run_ends_in_the_same_bits(tmp_path):
  start = {'layers': {0: {'w': jnp.ones((3, 3))}, 1: {'w': jnp.eye(3)}}, 'b': jnp.zeros(3)}

  def loss(params, batch, key, progress):
    y = batch @ params['layers'][0]['w'] @ params['layers'][1]['w'] + params['b']
    return jnp.mean((y - jax.random.normal(key)) ** 2), {}

  class KilledError(Exception):
    pass

  def batches(step, until=99):
    if step == until:
      raise KilledError
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)

  run = functools.partial(loop.train_model, loss, start, steps=6, every=2)
  whole = run(batches, folder=tmp_path / 'whole')
  with pytest.raises(KilledError):
    run(functools.partial(batches, until=5), folder=tmp_path / 'cut')
  jax.tree.map(np.testing.assert_array_equal, whole, run(batches, folder=tmp_path / 'cut'))


# ---- prior -------------------------------------------------------------------------------------


def test_prior_cached_steps_equal_prefill_and_teacher_forcing():
  graphdef, params = small_prior()
  rng = np.random.default_rng(0)
  text_ids = rng.integers(1, 38, (3, 12)).astype(np.int32)
  text_ids[1, 7:] = 0
  text_ids[2] = 0  # the null prompt
  tokens = rng.integers(0, SMALL.codes, (3, 2, SMALL.tokens)).astype(np.int32)
  call = lambda f: jax.jit(lambda p, *args: f(modules.bind_graph(graphdef, p), *args))
  text = call(lambda m, ids: m.encode_text(ids))(params, text_ids)
  step = call(lambda m, text, cache, t, i: m.feed_tokens(text, cache, t, i))
  cache = modules.bind_graph(graphdef, params).init_cache(3, 2)
  last, logits, caches = np.full((3, 2), SMALL.codes), [], []
  for t in range(SMALL.tokens):
    out, cache = step(params, text, cache, last, t)
    logits.append(out)
    caches.append(cache)
    last = tokens[:, :, t]
  logits = np.stack(logits, 2)
  forced = call(lambda m, ids, t: m(ids, t))
  for n in range(2):
    np.testing.assert_allclose(forced(params, text_ids, tokens[:, n]), logits[:, n], atol=1e-5)
  prefill = call(lambda m, text, t, length: m.prefill(text, t, length))
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  for length in (1, 5, SMALL.tokens):
    jax.tree.map(close, prefill(params, text, tokens, length), caches[length - 1])
  assert all((layer['k'] == 0).all() for layer in prefill(params, text, tokens, 0))

  changed = tokens.copy()
  changed[:, :, 4:] = 0  # tokens 4.. are not seen before position 5
  np.testing.assert_array_equal(
    forced(params, text_ids, tokens[:, 0])[:, :5], forced(params, text_ids, changed[:, 0])[:, :5]
  )
  padded = np.concatenate([text_ids[1:2], text_ids[1:2]])
  other = call(lambda m, ids: m.encode_text(ids))(params, padded)
  np.testing.assert_allclose(other[0]['k'][1], text[0]['k'][1], atol=1e-6)


def counted_calls(module, config):
  """`count(method, *shapes)`: FLOPs that XLA counts in a method of a model, or in its call."""
  graphdef, params = modules.abstract_module(lambda: module.build_model(config))

  def call(method, params, *args):
    model = modules.bind_graph(graphdef, params)
    return (getattr(model, method) if method else model)(*args)

  def count(method, *args):
    return counted(functools.partial(call, method), params, *args)

  return count, lambda method, *args: jax.eval_shape(
    functools.partial(call, method), params, *args
  )


def test_flops_formulas_agree_with_the_compiler():
  shape, number = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((), jnp.int32)
  B, N = 2, 3
  sizes = prior.Config(layers=2, text_layers=1)
  count, shapes = counted_calls(prior, sizes)
  ids, last = shape((B, 12), jnp.int32), shape((B, N), jnp.int32)
  text = shapes('encode_text', ids)
  cache = jax.eval_shape(lambda: prior.build_model(sizes).init_cache(B, N))
  tokens = shape((B, N, sizes.tokens), jnp.int32)
  measured = {
    prior.count_text_flops(sizes): count('encode_text', ids) / B,
    prior.count_step_flops(sizes): count('feed_tokens', text, cache, last, number) / B / N,
    prior.count_prefill_flops(sizes): count('prefill', text, tokens, number) / B / N,
  }
  sizes = tokenizer.Config()  # both orders have the same decoder
  count, _ = counted_calls(tokenizer, sizes)
  ids = shape((64, sizes.tokens), jnp.int32)
  measured[tokenizer.count_decode_flops(sizes)] = count('decode', ids, number) / 64
  sizes = flow.Config(blocks=2)
  count, shapes = counted_calls(flow, sizes)
  text = shapes('embed_texts', shape((8, 12), jnp.int32))
  images, times = shape((8, 32, 32, 3), jnp.float32), shape((8,), jnp.float32)
  measured[flow.count_picture_flops(sizes)] = count('', images, times, text) / 8
  for formula, compiled in measured.items():
    assert compiled == pytest.approx(formula, rel=0.05)


# ---- tokenizers --------------------------------------------------------------------------------


@functools.cache
def shipped_tokenizer(order):
  """(parameters, compiled `encode(params, images)`, compiled `decode(params, ids, keep)`)."""
  graphdef, params = models.load_model(f'tokenizer_{order}')
  encode = jax.jit(lambda p, x: modules.bind_graph(graphdef, p).encode(x))
  return params, encode, jax.jit(lambda p, i, k: modules.bind_graph(graphdef, p).decode(i, k))


@pytest.mark.parametrize('order', ['1d', '2d'])
def test_tokenizer_prefixes_and_quality(order):
  config = models.read_config(f'tokenizer_{order}')
  params, encode, decode = shipped_tokenizer(order)
  images, prompts = held(96)
  ids = np.array(encode(params, images))
  assert ids.shape == (96, config.tokens) and ids.dtype == np.int32
  assert ids.min() >= 0 and ids.max() < config.codes
  full = decode(params, ids, config.tokens)
  assert full.shape == images.shape and full.min() >= 0 and full.max() <= 1
  assert oracle.report_grades(full, prompts)['overall'] >= 0.85  # the card: >= 0.90 of 1200 scenes

  cut = ids.copy()
  cut[:, 10:] = (cut[:, 10:] + 1) % config.codes  # what is not kept does not matter
  np.testing.assert_array_equal(decode(params, ids, 10), decode(params, cut, 10))
  each = decode(params, ids, np.where(np.arange(96) < 48, 10, config.tokens))
  np.testing.assert_allclose(each[:48], decode(params, cut, 10)[:48], atol=1e-5)
  np.testing.assert_allclose(each[48:], full[48:], atol=1e-5)

  if order == '2d':  # a token knows its neighbourhood only
    other = images.copy()
    other[:, 24:] = 0.5
    np.testing.assert_array_equal(np.array(encode(params, other))[:, :12], ids[:, :12])


def test_the_two_orders_are_comparable_and_differ_in_their_prefixes():
  one, two = (models.read_config(f'tokenizer_{order}') for order in ('1d', '2d'))
  assert (one.tokens, one.codes) == (two.tokens, two.codes)
  images, _ = held(96)
  error = {}
  for order in ('1d', '2d'):
    params, encode, decode = shipped_tokenizer(order)
    half = decode(params, encode(params, images), 12)
    error[order] = float(((half - images) ** 2).mean())
  assert error['1d'] < 0.5 * error['2d']  # 12 of 32 tokens: a whole picture against a third of one


# ---- what is shipped ---------------------------------------------------------------------------


def test_cards_say_what_was_measured_and_the_targets_are_met():
  cards = {name: models.read_card(name) for name in models.model_names()}
  names = {'detector', 'tokenizer_1d', 'tokenizer_2d', 'prior_1d', 'prior_2d', 'flow'}
  assert names <= set(cards)
  for name in names:
    assert {'kind', 'config', 'metrics', 'seed'} <= set(cards[name])
    params = models.load_model(name)[1]
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))
  rate = {order: cards[f'prior_{order}']['metrics']['pass_at_1'] for order in ('1d', '2d')}
  assert all(0.2 <= r <= 0.7 for r in rate.values())
  assert abs(rate['1d'] - rate['2d']) <= 0.15
  assert sum(f.stat().length for f in models.ASSETS.iterdir()) <= 10e6
