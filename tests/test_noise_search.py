"""Searches over noise: conformance, bills, bad settings. The loops of the papers are in
test_noise_loops.py, known optima in test_noise_optima.py."""

import pathlib
import runpy

import jax
import pytest

from vtts_jax import core
from vtts_jax.engine.search import search
from vtts_jax.errors import ConfigError
from vtts_jax.search.cma_es import CMAES
from vtts_jax.search.evolution import Evolution
from vtts_jax.search.first_order import FirstOrder
from vtts_jax.search.halving import Halving
from vtts_jax.search.noise_bandit import NoiseBandit
from vtts_jax.search.paths import Paths
from vtts_jax.search.zero_order import ZeroOrder
from vtts_jax.study import arms
from vtts_jax.testing import laws, toys
from vtts_jax.verifiers.ensemble import Ensemble

KEY = jax.random.key(11)
PROMPTS = ['a', 'bb', 'ccc']
GEN, VER = toys.Flow(), toys.Target(rows=2)
ALGORITHMS = {
  'zero_order': ZeroOrder(neighbours=2, rounds=6, adapt=1.5),
  'paths': Paths(paths=2, expansions=3, start=0.5, forward=0.25, backward=0.5),
  'noise_bandit': NoiseBandit(arms=3, rounds=(1, 2, 3)),
  'evolution': Evolution(schedule=(0.5,), sizes=(4, 3), elites=1),
  'cma_es': CMAES(population=4, generations=2, block=2),
  'first_order': FirstOrder(starts=2, rounds=4),
}


@pytest.mark.parametrize('name', ALGORITHMS)
def test_noise_searches_conform(name):
  laws.check_algorithm(ALGORITHMS[name], GEN, VER, PROMPTS, KEY)


@pytest.mark.parametrize('name', [name for name in ALGORITHMS if name != 'first_order'])
def test_ranks_choose_as_their_score_does(name):
  """The rank of one verifier is relative to the candidates at hand; what is chosen is the same."""
  ranks = Ensemble((('only', VER),), mode='rank')
  plain, ranked = (search(ALGORITHMS[name], GEN, ver, PROMPTS, seed=KEY) for ver in (VER, ranks))
  laws.assert_same(ranked.best.state, plain.best.state, 'the best candidate')
  for a, b in zip(plain.steps, ranked.steps):
    laws.assert_same(list(b.scores.values()), list(a.scores.values()), 'every candidate')


# ------------------------------------------------------------------------------- bills and settings


def test_paths_settings_are_the_published_ones_in_whole_stages():
  algo = Paths()
  for stages, want in ((25, (3, 20, 1)), (50, (6, 39, 2)), (100, (11, 78, 3))):
    gen = toys.Flow(steps=stages)
    algo.check(gen)
    assert algo.in_stages(gen) == want
    ends = [row[0] + shape for shape, row in core.steps_of(algo, gen)]
    assert ends[-1] == stages and len(ends) == -(-want[0] // want[2])


def test_bills_are_the_published_counts():
  flow = toys.Flow(steps=50)

  def evaluations(algo):
    return sum(algo.step_cost(flow, *step)[0].generator for step in core.steps_of(algo, flow)) + (
      algo.init_cost(flow).generator
    )

  assert evaluations(ZeroOrder(neighbours=4, rounds=9)) == 9 * 4 * 50
  # EvoSearch on Stable Diffusion 2.1: as many evaluations as best-of-100
  assert evaluations(Evolution()) == 100 * 50
  assert evaluations(FirstOrder(starts=2, rounds=3)) == 2 * 3 * 4 * 50
  assert evaluations(CMAES(population=8, generations=3)) == 3 * 8 * 50
  assert evaluations(NoiseBandit()) == 49 * 20 * 4 * 2
  # sampled to 6 before the end; then 3 rounds of 39 back and 2 more forward
  assert evaluations(Paths(paths=2, expansions=5)) == 2 * 44 + 3 * 10 * 41


@pytest.mark.parametrize('file', ['sit_imagenet', 'scenes'])
def test_configs_name_searches_that_fit(file):
  """Every search of the paper, and the studies of several, shrunk to a minute."""
  config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / f'configs/{file}.py'))
  names = ['noise'] if file == 'scenes' else [*config['SEARCHES'], 'figures']
  for name in names:
    study = arms.build_study(config['get_config'](f'{name},runlocal').to_dict())
    assert all(isinstance(arm.algo, core.Algorithm) for arm in study.arms)
  found = {type(arm.algo).__name__ for arm in study.arms}
  assert found >= {'BestOfN', 'ZeroOrder', 'Paths'}
  # at full size, a budget is the same number of evaluations for all searches
  if file == 'scenes':
    study = arms.build_study(config['get_config']('noise').to_dict())
    samples = {arm.name: arm.cost.generator / 24 for arm in study.arms}
    for name, spent in samples.items():
      assert min(b - spent for b in (16, 32, 64) if b >= spent) < 5, (name, spent)


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (lambda: ZeroOrder(angle=2.0), 'search.angle=2.0: must be a number in'),
    (lambda: Paths(backward=0.78), 'search.backward=0.78: must be above search.forward=0.78'),
    (lambda: Paths().check(GEN), '0 stages left, 3 back and 0 gained a round of the 4'),
    (lambda: Paths(start=0.5, backward=1.0).check(GEN), '3 stages back from 2 before the end'),
    (lambda: NoiseBandit(back=4).check(GEN), 'search.back=4: must be an integer in 1 .. 3'),
    (lambda: NoiseBandit(rounds=(1, 2)).check(GEN), r'search.rounds=\[1, 2\]: .* list of 3'),
    (lambda: Evolution(sizes=(4, 4)), r'search.sizes=\[4, 4\]: must be 5, one more than'),
    (lambda: Evolution(sizes=(42, 26, 26, 26, 3)), 'search.sizes=3: must be an integer >= 4'),
    (lambda: Evolution().check(toys.Flow(steps=2)), r'falls on stages \[0, 1, 1, 2\] of the 2'),
    (lambda: search(CMAES(block=3), GEN, VER, ['a']), 'search.block=3: must be at most 2'),
    (lambda: Halving(FirstOrder()), 'FirstOrder needs gradient of all of its candidates'),
    (lambda: search(FirstOrder(), toys.Tokens(), VER, ['a']), 'FirstOrder needs noise'),
  ],
)
def test_bad_settings(make, text):
  with pytest.raises(ConfigError, match=text):
    make()
