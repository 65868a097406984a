"""The embedded scene world: searches that run on a laptop, with no download.

    vtts run --config=configs/scenes.py:demo          accuracy rising with budget, 1 min, 2 cores
    vtts run --config=configs/scenes.py:study         token orders x searches, 3 seeds, 45 min
    vtts run --config=configs/scenes.py:verifiers     each verifier searched on and measured, 10 min
    vtts run --config=configs/scenes.py:beam          one search: bon, beam, lookahead, uniform,
                                                      smc, rollover, mcts or halving
    vtts run --config=configs/scenes.py:beam,2d       the same on grid tokens
    vtts run --config=configs/scenes.py:study,runlocal   anything, shrunk to a minute

What comes out: runs/scenes-<what>-<hash>/ with report.html, curve.png, grid.png and one line per
(arm, seed, prompt). Every setting can be changed: --config.search.width=8, --config.seeds='(0,)'.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings

MEASURED = {
  'clip_a': {'name': 'scenes.clip', 'which': 'a'},
  'clip_b': {'name': 'scenes.clip', 'which': 'b'},
  'detector': {'name': 'scenes.detector'},
  'quality': {'name': 'scenes.quality'},
  'likelihood': {'name': 'verifiers.likelihood'},
}
ORDERS = ('1d', '2d')
BON = {'search': {'name': 'search.best_of_n', 'n': 64}}


def beam(**settings):
  """Geometric chunks, as published for ordered tokens; 'rows' are what was published for grids."""
  return {'search': {'name': 'search.beam', 'width': 4, 'branch': 8, **settings}}


SINGLE = {
  'bon': BON,
  'beam': beam(),
  'lookahead': beam(branch=4, lookahead=-1),
  'uniform': beam(schedule='fixed'),
  'smc': {'search': {'name': 'search.smc', 'anneal': 'increasing', 'lookahead': -1}},
  'rollover': {'search': {'name': 'search.rollover'}},
  'mcts': {'search': {'name': 'search.mcts', 'simulations': 32}},
  'halving': {
    'search': {
      'name': 'search.halving',
      'inner': {'name': 'search.beam', 'width': 1, 'branch': 4},
      'rungs': ({'keep': 0.5}, {'lookahead': -1}),
      'least': 1,
    }
  },
}


def get_config(arg: str = 'demo') -> ConfigDict:
  what, *options = (arg or 'demo').split(',')
  if what not in ('demo', 'study', 'verifiers', *SINGLE):
    raise ValueError(
      f'configs/scenes.py:{what}: must be demo, study, verifiers, {", ".join(SINGLE)}'
    )
  for option in options:
    if option not in ('runlocal', '1d', '2d'):
      raise ValueError(f'configs/scenes.py:{arg}: option {option!r}: must be runlocal, 1d or 2d')
  order = '2d' if '2d' in options else '1d'
  config = {
    'name': f'scenes-{what}' + (f'-{order}' if what in SINGLE else ''),
    'workdir': 'runs',
    'prompts': {'name': 'scenes.world', 'split': 'held', 'count': 240, 'seed': 0},
    'generator': default_settings('scenes.ar', order=order),
    'verifier': {'name': 'scenes.clip', 'which': 'a'},
    'measure': MEASURED,
    'metric': 'scenes.oracle',
    'search': default_settings(SINGLE.get(what, BON)['search']['name']),
    'arms': {},
    'seeds': (0, 1, 2),
    'batch': 24,
    'render_chunk': 4,  # x 24 prompts: 96 pictures fit a core's cache, 1,536 do not (12 x slower)
    'mode': 'fused',
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if what in SINGLE:
    config['search'].update(SINGLE[what]['search'])
    if what == 'uniform':
      config['generator']['prior'] = 'uniform'
  elif what == 'demo':
    config['prompts']['count'], config['seeds'] = 60, (0,)
    config['arms'] = {'best-of-n': BON, 'beam': beam()}
  elif what == 'study':
    config['arms'] = study_arms()
  elif what == 'verifiers':
    config['arms'] = {name: {'verifier': settings} for name, settings in MEASURED.items()}
    members = {k: MEASURED[k] for k in ('clip_a', 'clip_b', 'quality')}
    rank = {'name': 'verifiers.ensemble', 'members': members, 'mode': 'rank'}
    config['arms']['ensemble'] = {'verifier': rank}
  if 'runlocal' in options:
    config['prompts']['count'], config['seeds'], config['batch'] = 12, (0,), 12
  return ConfigDict(config)


def study_arms() -> dict:
  """Token order x search at several budgets, with the trained prior and without any."""
  arms = {}
  for order in ORDERS:
    base = {'generator': {'order': order}}
    arms[f'{order} best-of-n'] = base | BON
    for width in (2, 4, 8):
      arms[f'{order} beam/{width}'] = base | beam(width=width)
    arms[f'{order} rows/4'] = base | beam(schedule='linear', size=4)
    arms[f'{order} whole chunks/4'] = base | beam(schedule='linear', size=8, branch_at='first')
    for width in (2, 4):
      arms[f'{order} lookahead/{width}'] = base | beam(width=width, branch=4, lookahead=-1)
    free = {'generator': {'order': order, 'prior': 'uniform'}}
    arms[f'{order} uniform best-of-n'] = free | BON
    arms[f'{order} uniform beam'] = free | beam(schedule='fixed')
  return arms
