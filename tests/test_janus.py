"""Janus: sizes, prompts, cache, reading, files; parity in tests/parity and the golden file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_flops import count_traced_flops

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.janus import convert, modeling
from vtts_jax.models.llamagen_vq import modeling as llamagen_vq

TINY = modeling.SIZES['tiny']
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(TINY.codes, size=(2, 2, TINY.tokens))  # [B, N, T]
IDS, MASK = RNG.integers(3, TINY.vocab, size=(2, 5)), np.array([[1, 1, 1, 0, 0], [1] * 5])


@functools.cache
def draw_parameters():
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, modules.structure_of(modeling.build_model, TINY)[1])


def bind(params):
  return modules.bind_module(modeling.build_model, TINY, params)


@jax.jit
def force(params, ids, mask, tokens):
  """(context, hidden `[B, N, T, C, D]`, cache) of given tokens."""
  ctx = bind(params).prompt_context(ids, mask)
  return ctx, *bind(params).prefill(ctx, tokens)


@jax.jit
def feed(params, ctx, cache, tokens, position):
  return bind(params).feed_tokens(ctx, cache, tokens, position)


PAIR = np.stack([IDS, modeling.null_prompts(IDS, MASK, 2)], 1)


@pytest.mark.parametrize(
  ('name', 'billions'), [('janus_1.3b', 2.09), ('janus_pro_1b', 2.09), ('janus_pro_7b', 7.42)]
)
def test_released_sizes(name, billions):
  """The files hold 4.18 and 14.84 GB of bfloat16."""
  config = modeling.SIZES[name]
  # a small tokenizer in place of VQ-16, whose 150 convolutions take seconds to trace
  small = dataclasses.replace(config.vq, ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=32)
  config, vq16 = dataclasses.replace(config, vq=small), 71_883_403
  count = modules.count_parameters(modules.structure_of(modeling.build_model, config)[1])
  _, params = modules.structure_of(llamagen_vq.build_model, small)
  count += vq16 - modules.count_parameters(params)
  # the files also hold the pool that SigLIP scores with
  D = config.vision.width
  pool = 12 * D * D + 13 * D
  assert round((count + pool) / 1e9, 2) == billions


def test_null_prompts():
  np.testing.assert_array_equal(PAIR[0, 1], [IDS[0, 0], 2, *IDS[0, 2:]])
  np.testing.assert_array_equal(PAIR[1, 1], [IDS[1, 0], 2, 2, 2, IDS[1, 4]])


def test_one_token_at_a_time_is_all_at_once():
  params = draw_parameters()
  ctx, hidden, whole = force(params, PAIR, MASK, TOKENS)
  cache = jax.tree.map(jnp.zeros_like, whole)
  for t in range(TINY.tokens):
    found, cache = feed(params, ctx, cache, TOKENS[..., t - 1], jnp.asarray(t))
    np.testing.assert_allclose(found, hidden[:, :, t], atol=3e-5)
  for name in 'kv':  # the last token is not fed
    np.testing.assert_allclose(cache[name][..., :-1, :], whole[name][..., :-1, :], atol=3e-5)
  # candidates at different positions, from a cache whose later slots hold rubbish
  at = jnp.array([[4, 7], [1, 0]])
  before = np.take_along_axis(TOKENS, np.maximum(at - 1, 0)[..., None], 2)[..., 0]
  found, _ = feed(params, ctx, whole, before, at)
  want = np.take_along_axis(np.asarray(hidden), np.asarray(at)[..., None, None, None], 2)[:, :, 0]
  np.testing.assert_allclose(found, want, atol=3e-5)


def test_padding_does_not_matter_and_words_do():
  params = draw_parameters()
  hidden = force(params, PAIR, MASK, TOKENS)[1]
  other = PAIR.copy()
  other[0, :, 3:] = 7
  np.testing.assert_array_equal(force(params, other, MASK, TOKENS)[1], hidden)
  other[0, 0, 1] = 7 if other[0, 0, 1] != 7 else 8
  changed = np.abs(force(params, other, MASK, TOKENS)[1] - hidden).max((1, 2, 4))  # [B, C]
  assert changed[0, 0] > 1e-2 and changed[0, 1] == 0 and (changed[1] == 0).all()
  # the shorter prompt alone
  short = force(params, PAIR[:1, :, :3], MASK[:1, :3], TOKENS[:1])[1]
  np.testing.assert_allclose(short, hidden[:1], atol=3e-5)


def test_reading():
  params, rng = draw_parameters(), np.random.default_rng(1)
  pictures = rng.random((2, 32, 32, 3), np.float32)
  ids = np.array([[1, 9, 9, 9, 9, 5, 0, 0], [1, 4, 9, 9, 9, 9, 5, 6]])  # 9 for a patch
  mask = np.array([[1] * 6 + [0] * 2, [1] * 8])

  @jax.jit
  def answer(params, ids, mask, pictures):
    model = bind(params)
    seen = model.embed_pictures(modeling.preprocess(TINY, pictures))
    return model.answer_logits(ids, mask, seen, 9)

  logits = answer(params, ids, mask, pictures)
  assert logits.shape == (2, TINY.vocab) and logits.dtype == jnp.float32
  ids[0, 6:] = 3
  np.testing.assert_allclose(answer(params, ids, mask, pictures), logits, atol=1e-5)
  changed = np.abs(answer(params, ids, mask, pictures[[1, 1]]) - logits).max(1)
  assert changed[0] > 1e-2 and changed[1] < 1e-5
  traced = jax.make_jaxpr(answer)(params, ids[:1], mask[:1], pictures[:1])
  # the picture's side is 32 already, and is resized by a product
  resized = count_traced_flops(
    jax.make_jaxpr(lambda x: modeling.preprocess(TINY, x))(pictures[:1]).jaxpr
  )
  count = modeling.count_flops(TINY, 'answer', 8)
  assert count_traced_flops(traced.jaxpr) == count + resized


def test_bfloat16_and_flops():
  params = draw_parameters()
  ctx, hidden, cache = force(params, PAIR, MASK, TOKENS)
  want = bind(params).token_logits(hidden)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  have = bind(low).token_logits(force(low, PAIR, MASK, TOKENS)[1])
  assert have.dtype == jnp.float32
  assert 0 < np.abs(have - want).mean() < 0.1 * np.abs(want).mean()
  trace = lambda f, *args: count_traced_flops(jax.make_jaxpr(f)(*args).jaxpr)
  one = lambda tree: jax.tree.map(lambda x: x[:1], tree)
  step = lambda ctx, cache: bind(params).feed_tokens(ctx, cache, TOKENS[:1, :, 0], 3)
  found = trace(step, one(ctx), one(cache))
  mlp = 2 * TINY.width * (TINY.vq.codebook_embed_dim + TINY.width)
  # two candidates of two streams, which read the same embedded token
  assert found == 4 * modeling.count_flops(TINY, 'step', 5, TINY.tokens) - 2 * mlp
  prompt = lambda p: bind(p).prompt_context(PAIR[:1], MASK[:1])
  assert trace(prompt, params) == 2 * modeling.count_flops(TINY, 'prompt', 5)
  head = lambda x: bind(params).token_logits(x)
  assert trace(head, jnp.ones((1, TINY.width))) == modeling.count_flops(TINY, 'head', 0)


def test_names_of_both_layouts():
  layer = 'model.vision_model.encoder.layers.3.'
  for theirs, ours in (
    ('aligner.layers.2.bias', 'aligner.1.bias'),
    ('gen_aligner.layers.0.weight', 'gen_aligner.0.weight'),
    ('model.aligner.hidden_layers.0.bias', 'aligner.1.bias'),
    ('model.generation_aligner.fc1.weight', 'gen_aligner.0.weight'),
    ('lm_head.weight', 'language_model.lm_head.weight'),
    (layer + 'layer_norm2.bias', 'vision_model.vision_tower.blocks.3.norm2.bias'),
    (layer + 'self_attn.q_proj.bias', 'vision_model.vision_tower.blocks.3.attn.q_proj.bias'),
    (layer + 'mlp.fc1.bias', 'vision_model.vision_tower.blocks.3.mlp.fc1.bias'),
    ('model.vqmodel.decoder.up.0.block.1.norm1.bias',
     'gen_vision_model.decoder.conv_blocks.0.res.1.norm1.bias'),
    ('model.vqmodel.decoder.up.0.upsample.conv.bias',
     'gen_vision_model.decoder.conv_blocks.0.upsample.conv.bias'),
    ('model.vqmodel.encoder.mid.attn_1.q.bias', 'gen_vision_model.encoder.mid.1.q.bias'),
    ('model.vqmodel.quantize.embedding.weight', 'gen_vision_model.quantize.embedding.weight'),
  ):  # fmt: skip
    assert convert._rename(theirs) == ours


def test_what_is_wrong_is_said():
  with pytest.raises(ValueError, match='here is no Janus: no language_model'):
    convert.config_of(source_of_arrays({'x': np.zeros(1)}, {}, 'here'))
  with pytest.raises(ConfigError, match=r'width=16: must be a multiple of 2 \* heads=6'):
    dataclasses.replace(TINY, heads=3)
  assert modeling.part_of(TINY, 'drawing').vision is None
