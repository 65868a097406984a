"""Toy arms for the tests of the command line: seconds to run, nothing to load.

vtts run --config=tests/configs/toys.py
"""

from ml_collections import ConfigDict

TOYS = 'vtts_jax.testing.toys'


def get_config(arg: str = '') -> ConfigDict:
  return ConfigDict(
    {
      'name': 'toys',
      'workdir': 'runs',
      'prompts': {'name': TOYS, 'count': 10},
      'generator': {'name': TOYS, 'part': 'tokens', 'length': 6},
      'verifier': {'name': TOYS, 'part': 'target'},
      'measure': {
        'target': {'name': TOYS, 'part': 'target'},
        'brightness': {'name': TOYS, 'part': 'brightness'},
      },
      'metric': TOYS,
      'search': {'name': 'search.beam', 'width': 2, 'branch': 3, 'schedule': 'linear', 'size': 2},
      'arms': {
        'bon': {'search': {'name': 'search.best_of_n', 'n': 8}},
        'beam/w2': {},
        'beam/w4': {'search': {'width': 4}},
      },
      'seeds': (0, 1),
      'batch': 4,
      'render_chunk': 0,
      'mode': 'fused',
      'budget': {'generator': 0.0, 'render': 0.0, 'verify': 0.0, 'flops': 0.0},
      'traces': 2,
    }
  )
