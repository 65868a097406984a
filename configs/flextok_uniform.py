"""FlexTok without a prior: 5 beams of 640 uniform tokens each (1 % of the codes), 32 tokens.

    vtts run --config=configs/flextok_uniform.py:geneval
    vtts run --config=configs/flextok_uniform.py:runlocal   tiny random weights, no files

Arguments and what comes out: configs/flextok_beam.py.
"""

import pathlib
import runpy

COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name('flextok_beam.py')))


def get_config(arg: str = ''):
  search = COMMON['beam'](schedule='fixed', steps=32, complete=False) | {'branch': 640}
  local = {'width': 2, 'branch': 6, 'steps': 3}
  return COMMON['base']('uniform', arg, search, local, prior='uniform')
