"""The search algorithms: the laws on toys, and a beam against an independent loop in numpy."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_noise_search
from hypothesis import given, settings

from vtts_jax import components, core
from vtts_jax.engine.search import search
from vtts_jax.errors import ConfigError
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.halving import Halving, Rung
from vtts_jax.search.mcts.search import MCTS
from vtts_jax.search.rollover import Rollover
from vtts_jax.search.smc import SMC
from vtts_jax.testing import laws, toys

KEY = jax.random.key(3)
PROMPTS = ['a', 'bb', 'ccc']
TOKENS, FLOW, TARGET = toys.Tokens(), toys.Flow(), toys.Target()
SCALES, WORDS, LETTERS = toys.Scales(), toys.Words(), toys.Letters()
AHEAD = toys.Tokens(value_of='target', rollout_model='small')
HALVES = (Rung(keep=0.5, draft=(('coarse', True),)), Rung(keep=0.5), Rung(lookahead=-1))


TOYS = {'tokens': AHEAD, 'flow': FLOW, 'scales': SCALES, 'words': WORDS}


@pytest.mark.parametrize('gen', TOYS.values(), ids=TOYS)
def test_toy_generators_conform(gen):
  laws.check_generator(gen, PROMPTS, KEY)


@pytest.mark.parametrize('ver', [TARGET, toys.Brightness()], ids=['target', 'brightness'])
def test_toy_verifiers_conform(ver):
  images = jax.random.uniform(KEY, (3, 4, 6, 2, 3))
  laws.check_verifier(ver, PROMPTS, images)


ALGORITHMS = {
  'rounds': (TOKENS, BestOfN(n=6, round=3)),
  'beam': (TOKENS, Beam(width=3, branch=4, schedule='linear', size=2)),
  'schedules': (
    TOKENS,
    Beam(width=(4, 2), branch=(2, 3), schedule=(2, 4), lookahead=1, replace=False),
  ),
  'first': (
    FLOW,
    Beam(width=2, branch=3, roots=1, branch_at='first', lookahead=-1, lookahead_steps=1),
  ),
  'smc': (TOKENS, SMC(particles=6, size=2, lookahead=-1, anneal='increasing', ess=0.7)),
  'shrinking': (
    TOKENS,
    SMC(particles=(6, 4, 2), size=2, diverse=(0,), resample_at=(1,), potential='sum'),
  ),
  'groups': (
    TOKENS,
    SMC(particles=4, branch=3, groups=2, size=2, anneal='infinite', resampler='residual'),
  ),
  'smc-flow': (
    FLOW,
    SMC(particles=2, branch=3, groups='particles', size=1, lookahead=1, anneal='infinite'),
  ),
  'rollover': (TOKENS, Rollover(quota=4, round=2, size=2)),
  'threshold': (FLOW, Rollover(quota=2, schedule='fixed', threshold=-0.05, lookahead=1)),
  'halving': (TOKENS, Halving(Beam(width=2, branch=6, schedule=(3, 6)), least=2)),
  'halving-smc': (TOKENS, Halving(SMC(particles=8, size=3), HALVES, least=3)),
  'puct': (TOKENS, MCTS(simulations=4, leaves=2, size=3, rule='puct', commit=2, temperature=1.0)),
  'gumbel': (AHEAD, MCTS(simulations=6, leaves=2, mix=0.5, rollout='small')),
  'dts': (
    FLOW,
    MCTS(simulations=4, leaves=2, slots=3, size=2, rule='dts', greedy=False, keep_rollouts=True),
  ),
  'scales': (SCALES, Beam(width=2, branch=3, schedule='fixed')),
  'scales-smc': (SCALES, SMC(particles=4, size=1)),
  'words': (WORDS, Beam(width=2, branch=3, schedule='linear', size=2)),
  'words-mcts': (WORDS, MCTS(simulations=4, leaves=2, slots=3, size=2, rule='uct', finish=2)),
}  # fmt: skip


@pytest.mark.parametrize('name', ALGORITHMS)
def test_algorithms_conform(name):
  gen, algo = ALGORITHMS[name]
  ver = LETTERS if gen is WORDS else TARGET
  laws.check_algorithm(algo, gen, ver, PROMPTS, KEY)


def test_every_algorithm_is_among_them():
  shipped = {name for name in components.list_components() if name.startswith('search.')}
  checked = [algo for _, algo in ALGORITHMS.values()] + [*test_noise_search.ALGORITHMS.values()]
  assert shipped == {f'search.{type(algo).__module__.split(".")[2]}' for algo in checked}


@pytest.mark.parametrize('gen', [TOKENS, FLOW], ids=['tokens', 'flow'])
def test_best_of_n_laws(gen):
  laws.law_prefix(gen, TARGET, PROMPTS, KEY)
  laws.law_beam_is_best_of_n(gen, TARGET, PROMPTS, KEY, schedule='linear', size=3)


@given(
  st.integers(1, 4),
  st.integers(1, 4),
  st.sampled_from(['geometric', 'linear', 'fixed']),
  st.integers(0, 3),
  st.integers(-1, 4),
  st.integers(0, 3),
  st.sampled_from(['last', 'first']),
  st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_beam_plans_add_up(width, branch, schedule, steps, lookahead, roots, where, initial):
  algo = Beam(
    width=width,
    branch=branch,
    schedule=schedule,
    steps=steps,
    lookahead=lookahead,
    roots=roots,
    branch_at=where,
    initial=initial,
  )
  steps = [(chunk, row[0]) for chunk, row in core.steps_of(algo, TOKENS)]
  assert steps == algo.chunks(TOKENS)
  assert steps[0][1] == initial and steps[0][0].beams == (roots or width)
  for (chunk, begin), (after, mark) in zip(steps, steps[1:]):
    assert (begin + chunk.size, chunk.kept) == (mark, after.beams)
    assert begin + chunk.size + chunk.lookahead <= TOKENS.num_stages
  assert steps[-1][1] + steps[-1][0].size == TOKENS.num_stages


def reference_beam(gen, ver, text, key, width, branch, marks, replace, lookahead):
  """The published loop, one prompt, plain Python: extend, branch at the last token, look, keep."""
  ctx = gen.encode({}, {k: jnp.asarray(v) for k, v in gen.tokenize([{'text': text}]).items()})
  vctx = ver.encode({}, {k: jnp.asarray(v) for k, v in ver.tokenize([{'text': text}]).items()})
  root = jax.random.fold_in(key, 0)
  vocab = gen.vocab

  def logits(tokens):
    state = toys.TokenState(None, None, jnp.full((1, 1), float(sum(tokens))))
    return gen.logits(ctx, state, len(tokens))[0, 0]

  def noise(key, t):
    return jax.random.gumbel(jax.random.fold_in(key, t), (vocab,))

  def picture(tokens):
    bars = [t / (vocab - 1) for t in tokens] + [0.5] * (gen.length - len(tokens))
    return jnp.broadcast_to(jnp.array(bars)[:, None, None], (gen.length, 2, 3))

  beams = [((), jax.random.fold_in(root, i)) for i in range(width)]
  steps = []
  for mark in marks:
    candidates = []
    for tokens, own in beams:
      while len(tokens) < mark - 1:
        tokens = (*tokens, int(jnp.argmax(logits(tokens) + noise(own, len(tokens)))))
      base = jax.random.fold_in(own, core.CHILD + len(tokens))
      keys = [own] + [jax.random.fold_in(base, j) for j in range(1, branch)]
      guess = logits(tokens)
      if replace:
        drawn = [int(jnp.argmax(guess + noise(k, len(tokens)))) for k in keys]
      else:
        drawn = np.argsort(-np.asarray(guess + noise(own, len(tokens))), kind='stable')[:branch]
      candidates += [((*tokens, int(d)), k) for d, k in zip(drawn, keys)]
    scores = []
    for tokens, _ in candidates:
      for _ in range(min(lookahead, gen.length - mark)):
        tokens = (*tokens, int(jnp.argmax(logits(tokens))))
      seen = {'image': picture(tokens)[None, None]}
      scores.append(float(ver.score({}, vctx, seen)[ver.name][0, 0]))
    order = np.argsort(-np.array(scores), kind='stable')[:width]
    beams = [candidates[i] for i in order]
    steps.append(([c[0] for c in candidates], scores))
  return steps


@pytest.mark.parametrize(('replace', 'lookahead'), [(True, 0), (False, 2)])
def test_beam_equals_an_independent_loop(replace, lookahead):
  marks = (1, 3, 4, 6)
  algo = Beam(width=3, branch=4, schedule=marks, replace=replace, lookahead=lookahead)
  found = search(algo, TOKENS, TARGET, ['bb'], seed=KEY, collect=('states',))
  want = reference_beam(TOKENS, TARGET, 'bb', KEY, 3, 4, marks, replace, lookahead)
  for mark, step, (tokens, scores) in zip(marks, found.steps, want):
    assert step.states.tokens[0, :, :mark].tolist() == [list(t) for t in tokens]
    np.testing.assert_allclose(step.totals[0], scores, atol=1e-6)


def test_candidates_of_a_beam_differ_in_the_last_token_only():
  algo = Beam(width=2, branch=5, schedule=(3, 6))
  steps = search(algo, TOKENS, TARGET, PROMPTS, seed=KEY, collect=('states',)).steps
  for mark, step in zip((3, 6), steps):
    tokens = step.states.tokens.reshape(3, 2, 5, -1)
    assert (tokens[:, :, :, : mark - 1] == tokens[:, :, :1, : mark - 1]).all()
    assert (tokens[..., mark - 1] != tokens[:, :, :1, mark - 1]).any()


def test_a_search_starts_from_initial_tokens():
  given = np.array([[1, 2], [3, 4], [5, 6]])
  for algo in (BestOfN(n=4, initial=2), Beam(width=2, branch=2, initial=2)):
    found = search(algo, TOKENS, TARGET, PROMPTS, seed=KEY, initial=given, collect=('states',))
    for step in found.steps:
      assert (step.states.tokens[:, :, :2] == given[:, None]).all()
    cost = laws.counted_cost(algo, TOKENS, TARGET, PROMPTS[:1], KEY)
    assert cost == sum(found.costs, core.Cost())
  with pytest.raises(ConfigError, match='search.initial=2: 0 initial tokens were passed'):
    search(algo, TOKENS, TARGET, PROMPTS, seed=KEY)


def test_bad_scores_are_never_selected_and_named():
  poison = 3 / 7  # pictures whose first bar is token 3 score NaN
  ver = dataclasses.replace(TARGET, poison=poison)
  gen = dataclasses.replace(TOKENS, length=2)
  algo = Beam(width=6, branch=8, schedule='fixed', replace=False)
  found = search(algo, gen, ver, PROMPTS, seed=KEY, collect=('states',))
  first = found.steps[0]
  bad = first.states.tokens[:, :, 0] == 3
  assert bad.any() and (first.totals[bad] == -np.inf).all()
  assert found.bad['target'].sum() > 0 and not found.failed
  for step in found.steps:
    kept = np.take_along_axis(step.totals, step.kept, axis=1)
    assert np.isfinite(kept).all() and np.isfinite(found.best.total).all()


def test_a_prompt_without_any_finite_score_is_reported():
  class Nan(toys.Target):
    def score(self, params, vctx, observed):
      return {self.name: super().score(params, vctx, observed)[self.name] * jnp.nan}

  found = search(BestOfN(n=3), FLOW, Nan(), PROMPTS, seed=KEY, ids=[4, 7, 9])
  assert found.failed == [4, 7, 9] and found.bad['target'].tolist() == [3, 3, 3]


def test_elitism_hands_out_only_finished_pictures_where_prefixes_are_none():
  grid = dataclasses.replace(TOKENS, prefixes_are_samples=False)
  algo = Beam(width=2, branch=4, schedule='fixed')
  for gen in (TOKENS, grid):
    found = search(algo, gen, TARGET, PROMPTS, seed=KEY, collect=('states',))
    seen = np.stack([s.totals.max(1) for s in found.steps], 1)
    want = seen.max(1) if gen.prefixes_are_samples else seen[:, -1]
    np.testing.assert_allclose(found.best.total, want, atol=1e-6)
  assert (found.best.stage == grid.num_stages).all()
  with pytest.raises(ConfigError, match='search.complete=False'):
    search(Beam(steps=1, complete=False), grid, TARGET, PROMPTS, seed=KEY)
