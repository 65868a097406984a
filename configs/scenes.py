"""The embedded scene world: searches that run on a laptop, with no download.

    vtts run --config=configs/scenes.py:demo          accuracy rising with budget, 1 min, 2 cores
    vtts run --config=configs/scenes.py:study         token orders x searches, 3 seeds, 45 min
    vtts run --config=configs/scenes.py:verifiers     each verifier searched on and measured, 10 min
    vtts run --config=configs/scenes.py:noise         searches over the flow model's noise at equal
                                                      evaluations, 3 seeds, 2 hours
    vtts run --config=configs/scenes.py:particles     searches over the steps of the flow model, of
                                                      the papers' presets, at equal evaluations
    vtts run --config=configs/scenes.py:beam          one search, a few minutes: bon, beam,
                                                      lookahead, uniform, smc, rollover, mcts or
                                                      halving
    vtts run --config=configs/scenes.py:beam,2d       the same on grid tokens
    vtts run --config=configs/scenes.py:study,runlocal   any of them, shrunk to a minute

Times are on two CPU cores.

What comes out: runs/scenes-<what>-<hash>/ with report.html, curve.png, grid.png and one line for
each (arm, seed, prompt). Every setting can be changed, as in --config.search.width=8 or
--config.seeds='(0,)'.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.study.sweep import build_grid, vary_setting

MEASURED = {
  'clip_a': {'name': 'scenes.clip', 'which': 'a'},
  'clip_b': {'name': 'scenes.clip', 'which': 'b'},
  'detector': {'name': 'scenes.detector'},
  'quality': {'name': 'scenes.quality'},
  'likelihood': {'name': 'verifiers.likelihood'},
}
ORDERS = ('1d', '2d')
STUDIES = ('demo', 'study', 'verifiers', 'noise', 'particles')
BEST_OF_N = {'search': {'name': 'search.best_of_n', 'n': 64}}


def beam_arm(**settings) -> dict:
  """An arm with a beam, by default with the geometric chunks published for ordered tokens."""
  return {'search': {'name': 'search.beam', 'width': 4, 'branch': 8, **settings}}


SINGLE = {
  'bon': BEST_OF_N,
  'beam': beam_arm(),
  'lookahead': beam_arm(branch=4, lookahead=-1),
  'uniform': beam_arm(schedule='fixed'),
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
  """The config of a study or of one search with its options, as in 'beam,2d,runlocal'.

  Raises:
    ValueError: an unknown study, search or option.
  """
  what, *options = (arg or 'demo').split(',')
  if what not in (*STUDIES, *SINGLE):
    raise ValueError(f'configs/scenes.py:{what}: must be {", ".join([*STUDIES, *SINGLE])}')
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
    # all settings stand in the config, so that each can be a flag
    'search': default_settings(SINGLE.get(what, BEST_OF_N)['search']['name']),
    'arms': {},
    'seeds': (0, 1, 2),
    'batch': 24,
    # x 24 prompts: 96 pictures fit a core's cache, 1,536 do not and are 12 times as slow
    'render_chunk': 4,
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
    config['arms'] = {'best-of-n': BEST_OF_N, 'beam': beam_arm()}
  elif what == 'study':
    config['arms'] = study_arms()
  # best-of-16 on each: the rows of the matrix differ in the verifier alone
  elif what == 'verifiers':
    config['arms'] = {name: {'verifier': settings} for name, settings in MEASURED.items()}
    members = {k: MEASURED[k] for k in ('clip_a', 'clip_b', 'quality')}
    rank = {'name': 'verifiers.ensemble', 'members': members, 'mode': 'rank'}
    config['arms']['ensemble'] = {'verifier': rank}
  elif what in ('noise', 'particles'):
    config['generator'] = default_settings('scenes.flow')
    # the flow model's activations fill a core's cache much earlier than pictures do
    config['batch'] = 4
    # a flow has no likelihood at hand
    config['measure'] = {k: v for k, v in MEASURED.items() if k != 'likelihood'}
    config['arms'] = noise_arms() if what == 'noise' else particle_arms()
  if 'runlocal' in options:
    config['prompts']['count'], config['seeds'] = 12, (0,)
    config['batch'] = min(config['batch'], 12)
    # the smallest budget of each search, named in the order of the budgets
    if what in ('noise', 'particles'):
      smallest = {name.split('/')[0]: name for name in reversed(config['arms'])}
      config['arms'] = {name: config['arms'][name] for name in reversed(smallest.values())}
      config['arms']['random']['search']['n'] = 16
  return ConfigDict(config)


def study_arms() -> dict:
  """Token order x search at several budgets, with the trained prior and without any."""
  arms = {}
  for order in ORDERS:
    base = {'generator': {'order': order}}
    arms[f'{order} best-of-n'] = base | BEST_OF_N
    for width in (2, 4, 8):
      arms[f'{order} beam/{width}'] = base | beam_arm(width=width)
    # a row of the grid at a time is what was published for grids
    arms[f'{order} rows/4'] = base | beam_arm(schedule='linear', size=4)
    arms[f'{order} whole chunks/4'] = base | beam_arm(schedule='linear', size=8, branch_at='first')
    for width in (2, 4):
      arms[f'{order} lookahead/{width}'] = base | beam_arm(width=width, branch=4, lookahead=-1)
    # without a prior the verifier alone decides
    free = {'generator': {'order': order, 'prior': 'uniform'}}
    arms[f'{order} uniform best-of-n'] = free | BEST_OF_N
    arms[f'{order} uniform beam'] = free | beam_arm(schedule='fixed')
  return arms


def noise_arms() -> dict:
  """Searches over noise at the evaluations of 16, 32 and 64 samples of 24 steps."""
  grid = build_grid({
    'random': vary_setting('search.best_of_n', 'n', (64,)),
    'zero order': vary_setting('search.zero_order', 'rounds', (4, 8, 16), neighbours=4),
    'paths': vary_setting('search.paths', 'expansions', (2, 6, 12), paths=2),
    'bandit': vary_setting('search.noise_bandit', 'rounds', (2, 4, 8)),
    'cma-es': vary_setting('search.cma_es', 'generations', (2, 4, 8), population=8),
    'first order': vary_setting('search.first_order', 'rounds', (4, 8, 16)),
  })
  # EvoSearch's schedule and about its proportions, written out for each budget
  for sizes in ((6, 4, 4, 4, 8), (12, 8, 8, 9, 16), (24, 16, 16, 18, 32)):
    search = {'name': 'search.evolution', 'sizes': sizes, 'elites': 1}
    grid[f'evolution/n{sum(sizes)}'] = {'search': search}
  return grid


def particle_arms() -> dict:
  """Searches over the steps at the evaluations of 16 and 32 samples of 24 steps. Copies diverge by
  DDPM's steps, which keep the marginals of the flow, or by GLASS's."""
  ddpm, glass = {'inner_steps': 1, 'correlation': -1.0}, {'steps': 6, 'inner_steps': 4}
  arms = {'random': {'search': {'name': 'search.best_of_n', 'n': 32}}}  # 16 are its first
  for n in (16, 32):
    smc, rollover, mcts = ({'name': f'search.{a}'} for a in ('smc', 'rollover', 'mcts'))
    # the strength of the sweep: scores of samples differ by about 1
    fk = smc | {'preset': 'fk', 'particles': n, 'strength': 2.0}
    # n evaluations choose the noise; a try is two, of its step and of what it shows
    rbf = {'preset': 'rbf', 'roots': n, 'steps': 23, 'quota': n // 2, 'tries': 23 * n // 2}
    tree = {'size': 6, 'simulations': n - 1, 'rule_settings': {'sharpness': 2.0, 'widen': 2.0}}
    searches = {
      'fk': (ddpm, fk | {'size': 6}),
      'fk, glass': (glass, fk | {'size': 2}),
      # the published gamma, for 24 stages instead of 100
      'das': (ddpm, smc | {'preset': 'das', 'particles': n, 'strength': 2.0, 'gamma': 0.0336}),
      'svdd': (ddpm, smc | {'preset': 'svdd', 'branch': n}),
      'rbf': (ddpm, rollover | rbf),
      'dts': (ddpm, mcts | {'preset': 'dts', **tree}),
      'dts star': (
        ddpm,
        mcts | {'preset': 'dts_star', **tree, 'rule_settings': {'greedy': True, 'widen': 2.0}},
      ),
    }
    for name, (sampler, search) in searches.items():
      arms[f'{name}/n{n}'] = {'generator': sampler, 'search': search}
  return arms
