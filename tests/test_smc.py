"""Particle search: resamplers against closed forms, weights against the enumerated target, laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.engine import fused, step
from vtts_jax.engine.program import SearchProgram
from vtts_jax.engine.search import search, validate
from vtts_jax.errors import ConfigError
from vtts_jax.search import select
from vtts_jax.search.smc import PRESETS, SMC
from vtts_jax.testing import laws, toys

KEY = jax.random.key(5)
TEXTS = core.as_prompts(['a', 'bb'])
# compiled whole: op by op they take several times as long
resample = jax.jit(select.resample_ancestors, static_argnums=(0, 3))
pick_diverse = jax.jit(select.pick_diverse, static_argnums=3)


@pytest.mark.parametrize('kind', select.RESAMPLERS)
def test_resamplers_are_unbiased_and_as_steady_as_they_should_be(kind):
  logw = jnp.log(jnp.array([[0.03, 0.3, 0.0625, 0.4075, 0.0, 0.2]]))
  trials, n = 4000, 8
  index = resample(kind, jax.random.split(KEY, trials), jnp.broadcast_to(logw, (trials, 6)), n)
  assert (np.diff(index, axis=1) >= 0).all()
  counts = (np.asarray(index)[:, :, None] == np.arange(6)).sum(1)
  expected = n * np.exp(logw[0])
  spread = counts.std(0)
  assert (np.abs(counts.mean(0) - expected) <= 4 * spread / trials**0.5 + 1e-6).all()
  if kind == 'multinomial':
    np.testing.assert_allclose(spread**2, expected * (1 - expected / n), rtol=0.1)
  else:
    assert (spread**2 <= expected * (1 - expected / n) * 1.05).all()
  if kind in ('systematic', 'ssp'):  # each count is rounded up or down
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    if kind == 'ssp':
      part = expected % 1
      np.testing.assert_allclose(spread**2, part * (1 - part), atol=0.03)


@pytest.mark.parametrize('kind', select.RESAMPLERS)
def test_resamplers_meet_the_edges(kind):
  keys = jax.random.split(KEY, 3)
  ninf = -np.inf
  logw = jnp.array([[ninf, 900.0, ninf, ninf], [0.0, 0, 0, 0], [ninf] * 4])
  index = np.asarray(resample(kind, keys, logw, 4))
  assert (index[0] == 1).all()
  if kind in ('systematic', 'ssp', 'residual', 'stratified'):
    assert (index[1:] == np.arange(4)).all(), 'equal weights keep everyone'
  np.testing.assert_allclose(select.effective_sample_size(logw), [1, 4, 4], rtol=1e-6)


def test_diverse_picks_one_of_each_cluster():
  centres = np.array([[0, 0], [10, 0], [0, 10]])
  x = np.repeat(centres, 5, axis=0) + np.random.default_rng(0).normal(size=(15, 2))
  valid = np.ones((20, 15), bool)
  rows = jnp.broadcast_to(x, (20, 15, 2))
  keys = jax.random.split(KEY, 20)
  picked = pick_diverse(keys, rows, valid, 3)
  assert (np.sort(np.asarray(picked) // 5, axis=1) == [0, 1, 2]).mean() > 0.9
  valid[:, 5:] = False
  picked = np.asarray(pick_diverse(keys, rows, valid, 3))
  assert (picked < 5).all() and all(len(set(row)) == 3 for row in picked)


def particles(algo, gen, ver, prompts):
  """The final particles and their log-weights."""
  program = SearchProgram(algo, gen, ver)
  params = {'generator': {}, 'verifier': {}}
  arrays = {'generator': gen.tokenize(prompts), 'verifier': ver.tokenize(prompts)}

  @jax.jit
  def whole():
    contexts = step.encode_prompts(program, params, jax.tree.map(jnp.asarray, arrays))
    keys = core.prompt_keys(KEY, jnp.arange(len(prompts)))
    initial = jnp.zeros((len(prompts), 0), jnp.int32)
    state = step.begin_search(program, params, contexts, keys, initial)
    state, _ = fused.run_phases(program, params, contexts, state)
    return state.frontier.state.tokens, state.frontier.own[0].logw

  return whole()


@pytest.mark.parametrize(
  ('potential', 'ess'), [('current', 0.5), ('difference', 1.0), ('max', 1.0), ('sum', 0.5)]
)
def test_particles_follow_the_tilted_distribution(potential, ess):
  """Few enough sequences to list: p(x) exp(strength r(x)), whatever the potential on the way."""
  gen, ver = toys.Tokens(length=3, vocab=3), toys.Target(rows=3)
  n, strength = 6_000, 6.0
  algo = SMC(
    particles=n,
    schedule='fixed',
    strength=strength,
    potential=potential,
    ess=ess,
    anneal='increasing' if ess == 1 else 'constant',
  )
  tokens, logw = particles(algo, gen, ver, TEXTS)
  every = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing='ij'), -1).reshape(-1, 3)
  state = gen.init({}, gen.encode({}, gen.tokenize(TEXTS)), jax.random.split(KEY, (2, 27)))
  ctx = gen.encode({}, gen.tokenize(TEXTS))
  state = gen.extend_with_tokens(
    {}, ctx, state, jnp.broadcast_to(every, (2, 27, 3)).astype(jnp.int32)
  )
  seen = gen.observe({}, ctx, state, 3, ('image',))
  score = ver.score({}, ver.encode({}, ver.tokenize(TEXTS)), seen)['target']
  target = jax.nn.softmax(state.log_prob + strength * score, axis=1)
  code = np.asarray(tokens) @ [9, 3, 1]
  weight = np.asarray(jax.nn.softmax(logw, axis=1))
  found = np.stack([np.bincount(c, w, 27) for c, w in zip(code, weight)])
  assert 0.5 * np.abs(found - target).sum(1).max() < 0.05, 'total variation'
  untilted = jax.nn.softmax(state.log_prob, axis=1)
  assert 0.5 * np.abs(untilted - target).sum(1).min() > 0.1, 'the tilt must be worth seeing'


@pytest.mark.parametrize('gen', [toys.Tokens(), toys.Flow()], ids=['tokens', 'flow'])
def test_no_strength_is_best_of_n(gen):
  laws.law_particles_are_best_of_n(gen, toys.Target(), ['a', 'bb', 'ccc'], KEY, size=2)


def test_steps_that_are_not_due_weigh_nothing():
  """The one resampling weighs by its own scores, not by the sum of all on the way."""
  algo = SMC(particles=6, size=1, potential='current', strength=20.0, resample_at=(3,))
  steps = search(algo, toys.Tokens(), toys.Target(), ['a', 'bb'], seed=KEY).steps
  np.testing.assert_array_equal(steps[2].kept, np.tile(np.arange(6), (2, 1)))
  for kept, scores in zip(np.asarray(steps[3].kept), np.asarray(steps[3].totals)):
    expected = 6 * np.asarray(jax.nn.softmax(20.0 * scores))
    counts = np.bincount(kept, minlength=6)
    assert (np.abs(counts - expected) < 1).all()  # the SSP resampler rounds up or down


def test_infinite_strength_copies_the_best_alone():
  gen, ver = toys.Tokens(), toys.Target()
  algo = SMC(particles=6, size=2, anneal='infinite', potential='current', resampler='multinomial')
  for s in search(algo, gen, ver, ['a', 'bb'], seed=KEY).steps:
    best = s.totals.max(1, keepdims=True)
    np.testing.assert_array_equal(np.take_along_axis(s.totals, s.kept, 1), np.repeat(best, 6, 1))


def test_a_bad_score_never_survives():
  gen, ver = toys.Tokens(), toys.Target(poison=0.0)
  algo = SMC(particles=8, size=1, strength=0.0)
  found = search(algo, gen, ver, ['a', 'bb', 'ccc'], seed=KEY)
  assert found.bad['target'].sum() > 0
  for s in found.steps:
    assert np.isfinite(np.take_along_axis(s.totals, s.kept, 1)).all()


@pytest.mark.parametrize(
  ('name', 'length', 'settings'),
  [
    ('tts_var', 4, {'particles': (6, 4, 4, 2), 'diverse': (0,), 'resample_at': (1,), 'steps': 4}),
    ('best', 6, {'size': 2}),
  ],
)
def test_presets_run(name, length, settings):
  """The others are held to plain loops in test_diffusion_search.py."""
  algo = components.load('search.smc', preset=name, **{'size': 1, **settings})
  found = search(algo, toys.Tokens(length=length), toys.Target(rows=length), ['a', 'bb'], seed=KEY)
  assert not found.failed


def test_presets_are_what_the_papers_say():
  assert (PRESETS['fk']['particles'], PRESETS['fk']['strength']) == (4, 10)
  assert (1 + PRESETS['das']['gamma']) ** 87 - 1 == pytest.approx(1, abs=0.01), 'full at step 87'


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'particles': 0}, 'search.particles=0'),
    ({'strength': -1}, 'search.strength=-1'),
    ({'resampler': 'best'}, "'systematic'"),
    ({'particles': 6, 'groups': 4}, 'search.groups=4'),
    ({'particles': (2, 4)}, 'must not grow'),
    ({'preset': 'fks'}, "'tts_var'"),
    ({'diverse': (9,)}, 'search.diverse'),
    ({'ess': 2}, r'in \[0, 1\]'),
  ],
)
def test_bad_settings(settings, text):
  with pytest.raises(ConfigError, match=text):
    components.load('search.smc', **settings).check(toys.Tokens())


def test_a_sampler_that_draws_nothing_is_refused():
  gen, ver = components.load('scenes.flow'), toys.Target()
  with pytest.raises(ConfigError, match='SMC needs stochastic; ScenesFlow offers'):
    validate(SMC(), gen, ver)
  validate(SMC(), components.load('scenes.flow', eta=0.5), ver)
