"""The scene generators keep the laws; those with a value head and rollouts are in test_value."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_scenes import tiny_models

from vtts_jax import components, core
from vtts_jax.engine import sharding
from vtts_jax.engine.search import search, validate
from vtts_jax.errors import ConfigError
from vtts_jax.testing import laws

KEY = jax.random.key(4)
PROMPTS = ['a photo of a circle', 'a drawing of a red square and a blue ring']
GENERATORS = {
  'uniform': ('scenes.ar', {'prior': 'uniform'}),
  'flow': ('scenes.flow', {'steps': 4, 'eta': 0.3, 'early_at': 2}),
}


@pytest.fixture
def tiny(tmp_path):
  with tiny_models(tmp_path):
    yield


@pytest.mark.parametrize('name', GENERATORS)
def test_scenes_generators_conform(name, tiny):
  path, settings = GENERATORS[name]
  laws.check_generator(components.load(path, **settings), PROMPTS, KEY)


def test_a_search_on_scenes_keeps_the_laws(tiny):
  algo = components.load('search.beam', width=2, branch=2, schedule=(4, 8))
  gen, ver = components.load('scenes.ar'), components.load('scenes.clip', which='b')
  laws.check_algorithm(algo, gen, ver, PROMPTS, KEY)


def test_a_flow_sample_is_compared_with_its_early_prediction(tiny):
  gen = components.load('scenes.flow', steps=3, early_at=1)
  ver = components.load('verifiers.self_consistency', weights='random:tiny')
  algo = components.load('search.best_of_n', n=3)
  found = search(algo, gen, ver, PROMPTS[:1], seed=KEY, collect=('states',))
  shown = gen.observe(gen.load(), {}, found.steps[0].states, 3, ('image', 'early_image'))
  assert np.abs(shown['image'] - shown['early_image']).max() > 0.1
  for name, value in jax.jit(ver.score)(ver.load(), {}, shown).items():
    np.testing.assert_allclose(found.steps[0].scores[name], value, atol=1e-5)
  spent = laws.counted_cost(algo, gen, ver, PROMPTS[:1], KEY)
  assert spent == sum(found.costs, core.Cost()) and spent.observe == 7
  with pytest.raises(ConfigError, match='needs early_image, which ScenesFlow does not show'):
    validate(algo, components.load('scenes.flow'), ver)


def test_guidance_runs_as_many_streams_as_it_needs():
  costs = {
    g: components.load('scenes.ar', guidance=g).cost('extend', 0, 4)
    for g in (0.0, 1.0, 2.0)
  }
  assert costs[0.0] == costs[1.0] and costs[2.0].generator == costs[1.0].generator == 4
  assert costs[2.0].flops == 2 * costs[1.0].flops > 0
  assert components.load('scenes.ar', prior='uniform').cost('extend', 0, 4).flops == 0


def test_the_null_stream_ignores_the_prompt():
  gen = components.load('scenes.ar', guidance=0.0)
  params, keys = gen.load(), core.candidate_keys(core.prompt_keys(KEY, np.arange(1)), np.arange(2))

  @jax.jit
  def tokens(prompt):
    ctx = gen.encode(params, prompt)
    return gen.extend(params, ctx, gen.init(params, ctx, keys), keys, 0, 32).tokens

  found = [tokens(gen.tokenize(core.as_prompts([text]))) for text in PROMPTS]
  np.testing.assert_array_equal(*found)


def test_weights_are_split_over_the_model_axis():
  mesh = sharding.make_mesh(model=1, devices=jax.devices()[:1])
  gen = components.load('scenes.ar', value_of='scenes_clip_a')
  params, places = gen.load(), gen.shardings(mesh)
  assert jax.tree.structure(params) == jax.tree.structure(places)
  for part in ('prior', 'value'):
    block = places[part]['blocks'][0]
    assert block['qkv']['kernel'].spec == block['mlp']['up']['kernel'].spec
    assert block['qkv']['kernel'].spec == PartitionSpec(None, 'model')
    assert block['out']['kernel'].spec == PartitionSpec('model', None)
    assert block['mlp']['down']['kernel'].spec == PartitionSpec('model', None)
    assert places[part]['head']['kernel'].spec == PartitionSpec()
  split = [x for x in jax.tree.leaves(places['tokenizer']) if x.spec != PartitionSpec()]
  assert not split, 'the tokenizer is small: every device has all of it'


@pytest.mark.parametrize(
  ('text', 'message'),
  [('a photo of a dog', "word 'dog' is not in the scene world"), ('a ' * 13, 'at most 12')],
)
def test_texts_outside_the_grammar_are_named(text, message):
  gen = components.load('scenes.ar')
  with pytest.raises(ConfigError, match=message):
    gen.tokenize([{'text': text}])
