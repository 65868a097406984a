"""FlexTok AR without its prompt: only the verifier knows what is asked for.

    vtts run --config=configs/flextok_uncond.py:geneval
    vtts run --config=configs/flextok_uncond.py:runlocal   tiny random weights, no files

Arguments and what comes out: configs/flextok_beam.py.
"""

import pathlib
import runpy

COMMON = runpy.run_path(str(pathlib.Path(__file__).with_name('flextok_beam.py')))


def get_config(arg: str = ''):
  local = {'width': 2, 'branch': 3}
  return COMMON['base']('uncond', arg, COMMON['beam'](), local, condition='none')
