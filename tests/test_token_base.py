"""The base of autoregressive generators on a toy whose probabilities can be written down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token import TokenGenerator
from vtts_jax.testing import laws, toys

KEY = jax.random.key(5)
LENGTH, VOCAB = 5, 4
LEAD = (2, 3)


@dataclasses.dataclass(frozen=True)
class Sums(TokenGenerator):
  """A token's logits are a row of a table, that of the token before it, and the sum of all before
  times another row; the null stream has no sum. The cache is that sum."""

  prior: str = 'ar'

  num_stages, vocab = LENGTH, VOCAB
  published_guidance = 2.0
  decoded_output = core.Output('image', (LENGTH, 1, 3))

  @property
  def guidance_streams(self):
    return () if self.prior == 'uniform' else super().guidance_streams

  def load(self):
    table = jax.random.normal(jax.random.key(0), (VOCAB + 1, VOCAB))
    return {'table': table, 'slope': jnp.linspace(-1, 1, VOCAB)}

  def tokenize(self, prompts):
    return {'hash': toys.hash_prompts(prompts)}

  def encode(self, params, prompt):
    return prompt['hash'] % 7

  def init_cache(self, params, ctx, lead):
    return jnp.zeros(lead)

  def next_logits(self, params, ctx, state, stage):
    fed = self.previous_tokens(state, stage, VOCAB)
    total = state.cache + jnp.where(fed == VOCAB, 0, fed)
    null = params['table'][fed]
    prompt = null + 0.1 * (total + ctx[:, None])[..., None] * params['slope']
    logits = {'prompt': prompt, 'null': null}
    return self.guide_logits(jnp.stack([logits[s] for s in self.guidance_streams], -2)), total

  def prefill(self, params, ctx, state, stage):
    read = jnp.arange(LENGTH) < jnp.asarray(stage)[..., None] - 1
    return jnp.where(read, state.tokens, 0).sum(-1).astype(jnp.float32)

  def decode(self, params, ctx, state, stage):
    drawn = jnp.arange(LENGTH) < jnp.asarray(stage)[..., None]
    bars = jnp.where(drawn, state.tokens / VOCAB, 0.5)
    return jnp.broadcast_to(bars[..., None, None], (*state.tokens.shape, 1, 3))

  def count_flops(self, op):
    return {'encode': 0, 'step': 10 * len(self.guidance_streams), 'prefill': 30, 'decode': 5}[op]


def log_probs_of(gen, params, ctx, tokens):
  """Log-probability of each of one candidate's tokens, without a cache or a batch."""
  table, slope = np.asarray(params['table']), np.asarray(params['slope'])
  found, before, total = [], VOCAB, 0
  for token in tokens:
    total += 0 if before == VOCAB else before
    logits = table[before] + gen.guidance_scale * 0.1 * (total + ctx) * slope
    found.append(logits[token] - np.log(np.exp(logits).sum()))
    before = token
  return np.array(found)


@pytest.fixture(scope='module')
def drawn():
  """(generator, parameters, context, keys, complete candidates)."""
  gen = Sums()
  params, ctx = gen.load(), jnp.array([1, 5])
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(3))
  return gen, params, ctx, keys, gen.extend(params, ctx, gen.init(params, ctx, keys), keys, 0, 5)


@pytest.mark.parametrize('settings', [{}, {'top_k': 2, 'guidance': 0.0}, {'prior': 'uniform'}])
def test_a_family_of_a_few_lines_keeps_the_laws(settings):
  laws.check_generator(Sums(**settings), ['a', 'bc'], KEY)


def test_log_probabilities_are_those_of_each_token(drawn):
  gen, params, ctx, _, whole = drawn
  for b, n in np.ndindex(*LEAD):
    want = log_probs_of(gen, params, int(ctx[b]), np.asarray(whole.tokens)[b, n])
    np.testing.assert_allclose(whole.log_probs[b, n], want, atol=1e-5)
  again = gen.transition_log_probs(params, ctx, gen.drop_cache(whole))
  np.testing.assert_allclose(again, whole.log_probs, atol=1e-6)
  stages = jnp.array([[1, 2, 5]] * 2)
  seen = gen.observe(params, ctx, whole, stages, ('log_prob', 'length', 'tokens'))
  sums = np.stack([whole.log_probs[:, i, :s].sum(-1) for i, s in enumerate((1, 2, 5))], 1)
  np.testing.assert_allclose(seen['log_prob'], sums, atol=1e-6)
  np.testing.assert_array_equal(seen['length'], stages)
  np.testing.assert_array_equal(seen['tokens'][:, 0, 1:], 0)


def test_transitions_have_the_gradient_of_the_formula(drawn):
  gen, params, ctx, _, whole = drawn
  total = lambda slope: gen.transition_log_probs(
    params | {'slope': slope}, ctx, gen.drop_cache(whole)
  ).sum()
  slope, step = params['slope'], 1e-2 * jnp.eye(VOCAB)
  steps = [(total(slope + d) - total(slope - d)) / 2e-2 for d in step]
  np.testing.assert_allclose(jax.grad(total)(slope), steps, rtol=1e-2, atol=1e-2)


def test_given_tokens_continue_from_any_stage(drawn):
  gen, params, ctx, keys, whole = drawn
  start, end = gen.init(params, ctx, keys), gen.drop_cache(whole)
  two = gen.extend_with_tokens(params, ctx, start, whole.tokens[:, :, :2])
  five = gen.extend_with_tokens(params, ctx, two, whole.tokens[:, :, 2:], 2)
  laws.assert_same(gen.drop_cache(five), end, 'from a common stage')
  stage = jnp.array([[0, 2, 4]] * 2)
  ready = gen.rebuild_cache(params, ctx, gen.rewind(whole, stage), stage)
  place = jnp.minimum(stage[..., None] + jnp.arange(5), 4)
  rest = jnp.take_along_axis(whole.tokens, place, 2)
  grown = gen.extend_with_tokens(params, ctx, ready, rest, stage)
  laws.assert_same(gen.drop_cache(grown), end, 'from a stage for each candidate')


def test_candidates_of_different_stages_fork(drawn):
  gen, params, ctx, keys, whole = drawn
  stage = jnp.array([[0, 2, 4]] * 2)
  ready = gen.rebuild_cache(params, ctx, gen.rewind(whole, stage), stage)
  for replace in (True, False):
    many, _ = gen.fork(
      params, ctx, ready, core.child_keys(keys, stage, 3), stage, 3, replace=replace
    )
    for i, s in enumerate((0, 2, 4)):
      one = jax.tree.map(lambda x, i=i: x[:, i : i + 1], ready)
      alone, _ = gen.fork(
        params, ctx, one, core.child_keys(keys[:, i : i + 1], s, 3), s, 3, replace=replace
      )
      laws.assert_same(
        core.take(many, jnp.broadcast_to(jnp.arange(3 * i, 3 * i + 3), (2, 3))), alone, 'a fork'
      )


def test_the_bill_counts_streams_and_stages():
  both, one, none = Sums(), Sums(guidance=1.0), Sums(prior='uniform')
  assert both.cost('extend', 1, 3) == core.Cost(generator=3, flops=60)
  assert one.cost('extend_with_tokens', 0, 2) == core.Cost(generator=2, flops=20)
  assert both.cost('fork', 0, 9) == core.Cost(generator=1, flops=20)
  assert both.cost('observe:image') == core.Cost(observe=1, flops=5)
  assert both.cost('observe:log_prob') == none.cost('extend', 0, 5) == core.Cost()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'guidance': -2.0}, 'generator.guidance=-2.0: must be >= 0'),
    ({'temperature': 0.0}, 'generator.temperature=0.0: must be above 0'),
    ({'top_k': 5}, 'generator.top_k=5: must be in 0'),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    Sums(**settings).check()


def test_an_output_that_is_not_there_is_named(drawn):
  gen, params, ctx, _, whole = drawn
  with pytest.raises(ConfigError, match="'video': Sums shows image, log_prob, length, tokens"):
    gen.observe(params, ctx, whole, 5, ('video',))
