"""FlexTok AR, the published lookahead: a beam whose candidates run 8 tokens ahead, greedily.

    vtts run --config=configs/flextok_lookahead.py:geneval
    vtts run --config=configs/flextok_lookahead.py:runlocal   tiny random weights, no files

Arguments and what comes out: configs/flextok_beam.py.
"""

import pathlib
import runpy

COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name('flextok_beam.py')))


def get_config(arg: str = ''):
  search = COMMON['beam'](lookahead=8)
  return COMMON['base']('lookahead', arg, search, {'width': 2, 'branch': 3, 'lookahead': 2})
