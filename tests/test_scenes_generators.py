"""The embedded generators keep the protocol, with their shipped weights; 1D is in test_value."""

import jax
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.engine import search as run
from vtts_jax.errors import ConfigError
from vtts_jax.testing import laws

KEY = jax.random.key(4)
PROMPTS = ['a photo of a circle', 'a drawing of a red square and a blue ring']
GENERATORS = {
  '2d': ('scenes.ar', {'order': '2d', 'guidance': 1.0, 'top_k': 20, 'top_p': 0.9}),
  'uniform': ('scenes.ar', {'prior': 'uniform'}),
  'flow': ('scenes.flow', {'steps': 4, 'eta': 0.3, 'early_at': 2}),
}


@pytest.mark.parametrize('name', GENERATORS)
def test_scenes_generators_conform(name):
  path, settings = GENERATORS[name]
  laws.check_generator(components.load(path, **settings), PROMPTS, KEY)


def test_a_search_on_scenes_keeps_the_laws():
  gen = components.load('scenes.ar')
  ver = components.load('scenes.clip', which='b')
  algo = components.load('search.beam', width=2, branch=2, schedule=(16, 32))
  laws.check_algorithm(algo, gen, ver, PROMPTS, KEY, shapes=False)


def test_a_flow_sample_is_compared_with_its_early_prediction():
  gen = components.load('scenes.flow', steps=3, early_at=1)
  ver = components.load('verifiers.self_consistency', random='tiny')
  algo = components.load('search.best_of_n', n=3)
  params = laws.parameters(gen, ver)
  found = run.search(algo, gen, ver, params, PROMPTS[:1], KEY, trace=True)
  shown = found.steps[0].shown
  images = gen.render({}, {}, shown, 3), gen.early({}, {}, shown)
  assert np.abs(images[0] - images[1]).max() > 0.1
  want = ver.score(params['verifier'], {}, images[0], early=images[1])
  for name, value in want.items():
    np.testing.assert_allclose(found.steps[0].scores[name], value, atol=1e-5)
  spent = laws.counted(algo, gen, ver, params, PROMPTS[:1], KEY)
  assert spent == sum(found.costs, core.Cost()) and spent.render == 7
  with pytest.raises(ConfigError, match='early_at above 0'):
    run.validate(algo, components.load('scenes.flow'), ver)


def test_guidance_runs_as_many_streams_as_it_needs():
  costs = {
    g: components.load('scenes.ar', guidance=g).cost('extend', 0, 4)
    for g in (0.0, 1.0, 2.0)
  }
  assert costs[0.0] == costs[1.0] and costs[2.0].generator == costs[1.0].generator == 4
  assert costs[2.0].flops == 2 * costs[1.0].flops > 0
  assert components.load('scenes.ar', prior='uniform').cost('extend', 0, 4).flops == 0


def test_the_null_stream_ignores_the_prompt():
  gen, ver = (
    components.load('scenes.ar', guidance=0.0),
    components.load('verifiers.likelihood'),
  )
  algo = components.load('search.best_of_n', n=2)
  params = laws.parameters(gen, ver)
  found = [run.search(algo, gen, ver, params, [p], KEY) for p in PROMPTS]
  np.testing.assert_array_equal(found[0].best.state.tokens, found[1].best.state.tokens)


@pytest.mark.parametrize(
  ('text', 'message'),
  [('a photo of a dog', "word 'dog' is not in the scene world"), ('a ' * 13, 'at most 12')],
)
def test_texts_outside_the_grammar_are_named(text, message):
  gen = components.load('scenes.ar')
  with pytest.raises(ValueError, match=message):
    gen.tokenize([text])
