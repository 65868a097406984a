"""Sweeps of the scene world: algorithm x verifier x budget, read off as curves in one report.

    vtts run --config=configs/sweeps/scenes.py:budget       searches at rising budgets
    vtts run --config=configs/sweeps/scenes.py:verifier     each verifier searched on by each search
    vtts run --config=configs/sweeps/scenes.py:alphago      tree search by value, rollout and both
    vtts run --config=configs/sweeps/scenes.py:all          the whole grid
    vtts run --config=configs/sweeps/scenes.py:budget,2d    the same on grid tokens
    vtts run --config=configs/sweeps/scenes.py:all,runlocal anything, shrunk to minutes
    vtts report runs/sweep-budget-1d-* runs/sweep-budget-2d-* --out=runs/orders

What comes out: runs/sweep-<what>-<order>-<hash>/ with report.html: curves, tables at equal budgets,
the compute-optimal choice by difficulty, selection rules, fitted laws. Best-of-N runs once, at the
largest N. On two cores a seed of `budget` takes about 15 minutes and one of `alphago` 6
(--config.seeds='(0,)'). Arms resume one by one: repeat the command. Many processes: --distributed
(see launch/).
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
ALGORITHMS = {  # a new one is a line here; the second argument is the setting that is its budget
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
AT_ONE = {  # for the sweep over verifiers: each algorithm at one budget
  'best-of-n': vary_setting('search.best_of_n', 'n', (64,)),
  'beam': vary_setting('search.beam', 'width', (4,), branch=8),
}
COLD = {  # greedy lookahead is part of most searches: what does a colder sampler buy by itself?
  f'cold best-of-n t{round(10 * t)}': {
    'generator': {'temperature': t},
    'search': {'name': 'search.best_of_n', 'n': 16},
  }
  for t in (0.3, 0.6)
}


def alphago() -> dict:
  """Leaves worth a value head, a rollout (of the generator or of the small model) or both, at about
  the same FLOPs (AlphaGo's ablation, Silver et al. 2016, figure 4)."""
  ahead = {'value_of': 'scenes_clip_a', 'rollout_model': 'small'}
  tree = {'name': 'search.mcts'}
  arms = {
    'rollout': {'simulations': 32},
    'small rollout': {'simulations': 48, 'rollout': 'small'},
    'value': {'simulations': 60, 'mix': 0.0, 'finish': 8},
    'both': {'simulations': 32, 'mix': 0.5},
    'both small': {'simulations': 48, 'mix': 0.5, 'rollout': 'small'},
  }
  return {name: {'generator': ahead, 'search': tree | own} for name, own in arms.items()}


ARMS = {
  'budget': lambda: build_grid(ALGORITHMS, {'clip_a': VERIFIERS['clip_a']}) | COLD,
  'verifier': lambda: build_grid(AT_ONE, VERIFIERS),
  'alphago': alphago,
  'all': lambda: build_grid(ALGORITHMS, VERIFIERS),
}


def get_config(arg: str = 'budget') -> ConfigDict:
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
    'render_chunk': 4,  # x 24 prompts: 96 pictures fit a core's cache
    'mode': 'fused',
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if 'runlocal' in options:
    config['prompts']['count'], config['seeds'] = 48, (0,)
  return ConfigDict(config)
