"""FlexTok AR, best of 50: the published baseline of the beam.

    vtts run --config=configs/flextok_bon.py:geneval
    vtts run --config=configs/flextok_bon.py:runlocal   tiny random weights, no files

Arguments and what comes out: configs/flextok_beam.py.
"""

import pathlib
import runpy

from vtts_jax.components import defaults

COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name('flextok_beam.py')))


def get_config(arg: str = ''):
  search = defaults('search.best_of_n', n=50)
  return COMMON['base']('bon', arg, search, {'n': 4})
