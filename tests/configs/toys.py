"""Toy arms for the tests of the command line: seconds to run, nothing to load.

    vtts run --config=tests/configs/toys.py              pictures
    vtts run --config=tests/configs/toys.py:counting     the same, and every decode is counted
    vtts run --config=tests/configs/toys.py:words        texts, graded by nothing
    vtts run --config=tests/configs/toys.py:one          pictures, one arm of the three
"""

import os
import sys

from ml_collections import ConfigDict

sys.path.append(os.path.dirname(__file__))  # where counting_toy and host_toy are found

TOYS = 'vtts_jax.testing.toys'
BON = {'name': 'search.best_of_n', 'n': 16}


def get_config(arg: str = '') -> ConfigDict:
  config = {
    'name': 'toys',
    'workdir': 'runs',
    'prompts': {'name': TOYS, 'count': 10},
    'generator': {'name': TOYS, 'part': 'tokens', 'length': 6},
    'verifier': {'name': TOYS, 'part': 'target'},
    'measure': {
      'target': {'name': TOYS, 'part': 'target'},
      'brightness': {'name': TOYS, 'part': 'brightness'},
      'darkness': {'name': 'host_toy'},
    },
    'metric': TOYS,
    'search': {'name': 'search.beam', 'width': 2, 'branch': 3, 'schedule': 'linear', 'size': 2},
    'arms': {'bon': {'search': BON}, 'beam/w2': {}, 'beam/w4': {'search': {'width': 4}}},
    'seeds': (0, 1),
    'batch': 5,
    'render_chunk': 2,
    'mode': 'fused',
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 2,
  }
  if arg == 'counting':
    config['generator'] = {'name': 'counting_toy', 'length': 6}
  if arg == 'one':
    config['arms'] = {'beam/w2': {}}
  if arg == 'words':
    config['prompts']['count'], config['seeds'], config['batch'] = 3, (0,), 0
    config['generator'] = {'name': TOYS, 'part': 'words'}
    config['verifier'] = {'name': TOYS, 'part': 'letters'}
    config['measure'] = {'letters': config['verifier']}
    config['metric'], config['mesh'] = 'data.prompts', {'model': 1}
    # the second one is no prefix of anything: its snapshots are those of its steps
    rounds = {**BON, 'n': 4, 'round': 2}
    config['arms'] = {'bon': {'search': {**BON, 'n': 4}}, 'rounds': {'search': rounds}}
  return ConfigDict(config)

