"""Grids of arms, their names and families, and the shipped sweep."""

import pathlib

import pytest

from vtts_jax.cli.run import read_config
from vtts_jax.errors import ConfigError
from vtts_jax.report import stats
from vtts_jax.study import sweep
from vtts_jax.study.arms import build_study

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'sweeps' / 'scenes.py'
A, B = {'name': 'scenes.clip', 'which': 'a'}, {'name': 'verifiers.likelihood'}


def test_best_of_n_runs_once_at_its_largest():
  beams = sweep.vary_setting('search.beam', 'width', (2, 4), branch=8)
  samples = sweep.vary_setting('search.best_of_n', 'n', (4, 64, 16))
  arms = sweep.build_grid({'bon': samples, 'beam': beams})
  assert arms == {
    'bon': {'search': {'name': 'search.best_of_n', 'n': 64}},
    'beam/w2': {'search': {'name': 'search.beam', 'branch': 8, 'width': 2}},
    'beam/w4': {'search': {'name': 'search.beam', 'branch': 8, 'width': 4}},
  }
  rounds = sweep.vary_setting('search.best_of_n', 'n', (4, 8), round=4)  # not prefixes of one
  assert list(sweep.build_grid({'bon': rounds})) == ['bon/n4', 'bon/n8']


def test_verifiers_multiply_and_families_stay_apart():
  beams = {'beam': sweep.vary_setting('search.beam', 'width', (2, 4))}
  one = sweep.build_grid(beams, {'a': A})
  assert list(one) == ['beam/w2', 'beam/w4'] and one['beam/w2']['verifier'] == A
  two = sweep.build_grid(beams, {'a': A, 'b': B})
  assert list(two) == ['beam/w2 a', 'beam/w4 a', 'beam/w2 b', 'beam/w4 b']
  assert two['beam/w4 b'] == {
    'search': {'name': 'search.beam', 'width': 4},
    'verifier': B,
  }
  assert {stats.family_name(arm) for arm in two} == {'beam a', 'beam b'}


@pytest.mark.parametrize(
  ('arm', 'want'),
  [
    ('beam/w4', 'beam'),
    ('1d beam/2', '1d beam'),
    ('a/b/w2', 'a/b'),
    ('beam/w4 clip @run', 'beam clip @run'),
    ('bon', 'bon'),
  ],
)
def test_families(arm, want):
  assert stats.family_name(arm) == want


def test_errors_say_what_is_allowed():
  with pytest.raises(ConfigError, match=r'search.beam.width=\(\): must be one or more'):
    sweep.vary_setting('search.beam', 'width', ())
  with pytest.raises(ConfigError, match='cannot be fixed as well'):
    sweep.vary_setting('search.beam', 'width', (1, 2), width=3)
  with pytest.raises(ConfigError, match="must not hold '/'"):
    sweep.build_grid({'a/b': sweep.vary_setting('search.beam', 'width', (1,))})
  with pytest.raises(ConfigError, match='unknown setting widht=2'):
    sweep.build_grid({'a': sweep.vary_setting('search.beam', 'widht', (2,))})


@pytest.mark.parametrize('arg', ['budget', 'verifier', 'all', 'alphago', 'budget,2d,runlocal'])
def test_the_shipped_sweep_builds(arg):
  """Every arm is built and checked as before a run; nothing is compiled."""
  config = read_config([f'--config={CONFIG}:{arg}'])
  made = build_study(config).arms
  assert [a.name for a in made] == list(config['arms'])
  ladders = [a for a in made if a.holds_all_budgets and not a.name.startswith('cold')]
  verifiers = {a.ver for a in made if arg != 'alphago'}
  assert len(ladders) == len(verifiers) and all(a.algo.n == 64 for a in ladders)
  assert config['prompts']['count'] == (48 if 'runlocal' in arg else 240)
  assert config['generator']['order'] == ('2d' if '2d' in arg else '1d')
