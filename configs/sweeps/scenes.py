"""Sweeps of the scene world: search x verifier x budget, read off as curves in one report.

    vtts run --config=configs/sweeps/scenes.py:budget       searches at rising budgets
    vtts run --config=configs/sweeps/scenes.py:verifier     each verifier searched on by each search
    vtts run --config=configs/sweeps/scenes.py:alphago      tree search by value, rollout and both
    vtts run --config=configs/sweeps/scenes.py:all          the whole grid
    vtts run --config=configs/sweeps/scenes.py:budget,2d    the same on grid tokens
    vtts run --config=configs/sweeps/scenes.py:all,runlocal any of them, shrunk to minutes
    vtts report runs/sweep-budget-1d-* runs/sweep-budget-2d-* --out=runs/orders

Time: on two CPU cores a seed of `budget` takes about 15 minutes and a seed of `alphago` 6; there
are three seeds unless --config.seeds='(0,)' is given. Arms resume one by one: repeat the command.
launch/ starts many processes.

What comes out: runs/sweep-<what>-<order>-<hash>/ with report.html: curves, tables at equal budgets,
the compute-optimal choice by difficulty, selection rules, fitted laws. Best-of-N runs once, at the
largest N.
"""

from ml_collections import ConfigDict

from vtts_jax.components import default_settings
from vtts_jax.study.sweep import build_grid, vary_setting

VERIFIERS = {
  'clip_a': {'name': 'scenes.clip', 'which': 'a'},
  'clip_b': {'name': 'scenes.clip', 'which': 'b'},
  'detector': {'name': 'scenes.detector'},
  'quality': {'name': 'scenes.quality'},
  'likelihood': {'name': 'verifiers.likelihood'},
}
# a new one is a line here; the second argument is the setting that is its budget
ALGORITHMS = {
  'best-of-n': vary_setting('search.best_of_n', 'n', (64,)),
  'beam': vary_setting('search.beam', 'width', (2, 4, 8), branch=8),
  'lookahead': vary_setting('search.beam', 'width', (1, 2), branch=4, lookahead=-1),
  'halving': vary_setting(
    'search.halving',
    'inner.width',
    (1, 2),
    inner={'name': 'search.beam', 'branch': 4},
    rungs=({'keep': 0.5}, {'lookahead': -1}),
    least=1,
  ),
  'smc': vary_setting(
    'search.smc', 'particles', (4, 8), preset='best', size=4, lookahead=-1, strength=2.0
  ),
  'rollover': vary_setting('search.rollover', 'quota', (2, 4), size=4),
  'mcts': vary_setting('search.mcts', 'simulations', (16, 32)),
}
# the sweep over verifiers has each search at one budget, so that its rows can be compared
AT_ONE_BUDGET = {
  'best-of-n': vary_setting('search.best_of_n', 'n', (64,)),
  'beam': vary_setting('search.beam', 'width', (4,), branch=8),
}
# greedy lookahead is part of most searches: what does a colder sampler buy by itself?
COLD_SAMPLERS = {
  f'cold best-of-n t{round(10 * t)}': {
    'generator': {'temperature': t},
    'search': {'name': 'search.best_of_n', 'n': 16},
  }
  for t in (0.3, 0.6)
}


def alphago_arms() -> dict:
  """AlphaGo's ablation (Silver et al. 2016, figure 4): what a leaf of the tree is worth.

  It is the value head, a rollout of the generator or of the small model, or both, at about the same
  FLOPs.
  """
  guides = {'value_of': 'scenes_clip_a', 'rollout_model': 'small'}
  tree = {'name': 'search.mcts'}
  arms = {
    'rollout': {'simulations': 32},
    'small rollout': {'simulations': 48, 'rollout': 'small'},
    'value': {'simulations': 60, 'mix': 0.0, 'finish': 8},
    'both': {'simulations': 32, 'mix': 0.5},
    'both small': {'simulations': 48, 'mix': 0.5, 'rollout': 'small'},
  }
  return {name: {'generator': guides, 'search': tree | own} for name, own in arms.items()}


# functions, because building a grid checks all of its arms
ARMS = {
  'budget': lambda: build_grid(ALGORITHMS, {'clip_a': VERIFIERS['clip_a']}) | COLD_SAMPLERS,
  'verifier': lambda: build_grid(AT_ONE_BUDGET, VERIFIERS),
  'alphago': alphago_arms,
  'all': lambda: build_grid(ALGORITHMS, VERIFIERS),
}


def get_config(arg: str = 'budget') -> ConfigDict:
  """The config of a sweep with its options, as in 'budget,2d,runlocal'.

  Raises:
    ValueError: an unknown sweep or option.
  """
  what, *options = (arg or 'budget').split(',')
  if what not in ARMS:
    raise ValueError(f'configs/sweeps/scenes.py:{what}: must be {", ".join(ARMS)}')
  for option in options:
    if option not in ('runlocal', '1d', '2d'):
      raise ValueError(
        f'configs/sweeps/scenes.py:{arg}: option {option!r}: must be runlocal, 1d or 2d'
      )
  order = '2d' if '2d' in options else '1d'
  config = {
    'name': f'sweep-{what}-{order}',
    'workdir': 'runs',
    'prompts': {'name': 'scenes.world', 'split': 'held', 'count': 240, 'seed': 0},
    'generator': default_settings('scenes.ar', order=order),
    'verifier': VERIFIERS['clip_a'],
    'measure': VERIFIERS,
    'metric': 'scenes.oracle',
    'search': default_settings('search.best_of_n', n=64),
    'arms': ARMS[what](),
    'seeds': (0, 1, 2),
    'batch': 24,
    # x 24 prompts: 96 pictures fit a core's cache
    'render_chunk': 4,
    'mode': 'fused',
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if 'runlocal' in options:
    config['prompts']['count'], config['seeds'] = 48, (0,)
  return ConfigDict(config)
