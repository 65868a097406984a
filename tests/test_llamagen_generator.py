"""LlamaGen as a generator: protocol, streams of guidance, prompts, configs."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.cli import run
from vtts_jax.errors import ConfigError
from vtts_jax.generators.llamagen import TINY, LlamaGen
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
KEY = jax.random.key(3)
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
classes = functools.partial(LlamaGen, **TINY)
texts = functools.partial(LlamaGen, **TINY | {'prior_weights': 'random:tiny_t2i'})


def test_conformance():
  laws.check_generator(texts(), ['a cat', 'red dogs'], KEY)


def test_greedy_tokens_are_those_of_a_loop_without_a_cache():
  gen = classes(guidance=3.0)
  params = gen.load()
  ctx = gen.encode(params, gen.tokenize([{'text': '2'}]))
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(1)), jnp.arange(1))
  state = gen.extend(params, ctx, gen.init(params, ctx, keys), keys, 0, 9, greedy=True)
  prior, tokens = gen.bind_part(params, 'prior'), np.zeros((1, 1, 9), np.int32)
  logits = jax.jit(lambda ids: prior.token_logits(prior.prefill(ctx, ids)[0])[0, 0])
  for t in range(9):
    prompt, null = np.asarray(logits(tokens))[t]
    tokens[0, 0, t] = np.argmax(null + 3.0 * (prompt - null))
  np.testing.assert_array_equal(state.tokens, tokens)
  # cells that are not drawn hold token 0, whatever stands in the state
  seen = gen.decode(params, ctx, state, 4)
  bare = state._replace(tokens=state.tokens.at[..., 4:].set(0))
  np.testing.assert_array_equal(seen, gen.decode(params, ctx, bare, 9))


def test_streams():
  params, found = texts().load(), {}
  for guidance in (-1, 1, 0):
    gen = texts(guidance=guidance)
    found[guidance] = gen.encode(params, gen.tokenize([{'text': 'a cat'}]))['values']
  assert found[-1].shape[:2] == (1, 2)
  np.testing.assert_array_equal(found[1], found[-1][:, :1])
  np.testing.assert_array_equal(found[0], found[-1][:, 1:])
  assert (texts().guidance_scale, classes().guidance_scale) == (7.5, 4.0)
  assert set(texts().model_parts()) - set(classes().model_parts()) == {'text'}


def test_what_is_wrong_is_said():
  with pytest.raises(ConfigError, match='generator: the words of the prior=4: .* has 5 tokens'):
    texts().tokenize([{'text': 'a very red'}])
  with pytest.raises(ConfigError, match='prompt 0 .* is no class; must be in 0 .. 4'):
    classes().tokenize([{'text': '5'}])
  with pytest.raises(ConfigError, match='tokenizer_weights: has codebook_size=16384, the prior'):
    classes(tokenizer_weights='random:vq16').check()


@pytest.mark.parametrize(('name', 'evals'), [('bon', 36), ('beam', 72), ('tokens', 17)])
def test_configs(name, evals):
  where = f'--config={CONFIGS}/llamagen_coco.py:{name}'
  (arm,) = build_study(run.read_config([f'{where},runlocal'])).arms
  assert arm.cost.generator == evals and arm.gen.check() is None
  published = run.read_config([f'{where},stage2'])
  assert published['generator']['prior_weights'] == 't2i_XL_stage2_512.safetensors'
  with pytest.raises(ConfigError, match='must be one of bon, beam, tokens, then'):
    run.read_config([f'{where},imagenet'])
