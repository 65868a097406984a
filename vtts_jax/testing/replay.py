"""Golden fixtures through the production loader: `python -m vtts_jax.testing.replay FILE...`

A fixture is one `.npz` with a JSON `config` (its `"model"` names the family), the weights of the
public reference under `params/`, inputs under `in/` and its outputs under `out/`. The weights go
through the same rules as a released checkpoint. One line per output: name, shape, largest absolute
difference, tolerance, ok or FAIL. The exit code is 1 if any output of any file failed, was missing,
or belongs to a model that is not here.

Tolerances: integers exactly; floats to max(1e-4, 20 x the number in `tolerances.json` beside the
file), where the number is what a change of all weights by 1e-6 does. A file or output without
a number is held to 1e-4, and the line says so.
"""

import importlib
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from vtts_jax.checkpoints.source import source_of_arrays

FLOOR, FACTOR = 1e-4, 20
FAMILIES = {  # "model" of a fixture -> folder of models/, or a dotted one
  'autoencoderkl': 'autoencoder_kl',
  'blip': 'blip',
  'clip': 'clip',
  'clip_flant5': 'clip_flant5',
  'cyclereward': 'blip',
  'dcae': 'dcae',
  'dino': 'dino',
  'dreamsim': 'dreamsim',
  'flexar': 'flexar',
  'flextok': 'flextok',
  'flux': 'flux',
  'fluxae': 'autoencoder_kl',
  'inception': 'inception',
  'infinity': 'infinity',
  'janus': 'janus',
  'llamagen': 'llamagen',
  'owlvit': 'owlvit',
  'randar': 'randar',
  'rar': 'rar',
  'schedulers': 'generators.diffusion',
  'sana': 'sana',
  'sd3': 'sd3',
  'siglip': 'siglip',
  'sit': 'sit',
  't5': 't5',
  'titok': 'titok',
  'unet': 'unet',
  'var': 'var',
  'yolos': 'yolos',
}


class Line(NamedTuple):
  """What became of one output."""

  name: str
  shape: tuple
  difference: float  # largest absolute; nan if it could not be taken
  tolerance: float
  ok: bool
  note: str = ''

  def __str__(self):
    shape = 'x'.join(map(str, self.shape)) or 'scalar'
    numbers = f'diff {self.difference:.3g}  tol {self.tolerance:.3g}'
    verdict = 'ok' if self.ok else 'FAIL'
    return f'  {self.name:<32} {shape:<16} {numbers:<28} {verdict} {self.note}'.rstrip()


def read(path: str):
  """(config, Source of the weights, inputs, outputs) of a fixture.

  Raises:
    ValueError: no fixture, or one without `config` or outputs.
  """
  try:
    # never a pickle: the default of numpy; the handle is ours, as numpy forgets it on an error
    with open(path, 'rb') as handle, np.load(handle) as file:
      data = {name: file[name] for name in file.files}
    config = json.loads(str(data.pop('config')))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{path} is no golden file: {error!r}') from error
  take = lambda lead: {k[len(lead) :]: v for k, v in data.items() if k.startswith(lead)}
  params, outputs = take('params/'), take('out/')
  params |= {k: v for k, v in data.items() if k.startswith('params_')}  # a second part keeps a name
  if not outputs:
    raise ValueError(f'{path} is no golden file: it has no out/ array')
  return config, source_of_arrays(params, config, path), take('in/'), outputs


def tolerances(path: str) -> dict[str, float] | None:
  """The numbers for this file in the `tolerances.json` beside it, None if there are none."""
  beside = os.path.join(os.path.dirname(os.path.abspath(path)), 'tolerances.json')
  if not os.path.isfile(beside):
    return None
  with open(beside, encoding='utf-8') as handle:
    return json.load(handle).get(os.path.basename(path))


def compare(name: str, want: np.ndarray, have, number: float | None) -> Line:
  """One output against the fixture's; `have` None is a missing one."""
  exact = want.dtype.kind in 'iub'
  tolerance = 0.0 if exact else max(FLOOR, FACTOR * (number or 0.0))
  if have is None:
    return Line(name, want.shape, np.nan, tolerance, False, 'missing output')
  have = np.asarray(have)
  if have.shape != want.shape:
    return Line(name, want.shape, np.nan, tolerance, False, f'shape {have.shape}')
  with np.errstate(invalid='ignore'):  # of two equal infinities, as in masks
    gap = np.abs(have.astype(np.float64) - want.astype(np.float64))
  difference = float(np.where(have == want, 0.0, gap).max(initial=0.0))
  ok = np.array_equal(have, want) if exact else difference <= tolerance  # nan is not
  note = '' if exact or number is not None else 'no number in tolerances.json'
  return Line(name, want.shape, difference, tolerance, bool(ok), note)


def replay(path: str) -> list[Line]:
  """Every output of one fixture.

  Raises:
    ValueError: no fixture, an unknown model, weights that do not fit it.
  """
  config, source, inputs, outputs = read(path)
  folder = FAMILIES.get(config.get('model'))
  if folder is None:
    known = ', '.join(FAMILIES)
    raise ValueError(f'{path}: model={config.get("model")!r} is unknown; known are {known}')
  package = folder if '.' in folder else f'models.{folder}'
  model = importlib.import_module(f'vtts_jax.{package}.replay')
  with jax.default_matmul_precision('highest'):
    have = model.replay_outputs(config, source, inputs)
  numbers = tolerances(path) or {}
  return [compare(k, v, have.get(k), numbers.get(k)) for k, v in outputs.items()]


def main(paths: Sequence[str]) -> int:
  """Prints the lines of every file and returns the exit code."""
  if not paths:
    print('usage: python -m vtts_jax.testing.replay FILE...')
    return 2
  failed = total = 0
  for path in paths:
    print(path, flush=True)
    if tolerances(path) is None:
      print(f'  (no entry in a tolerances.json beside it: floats are held to {FLOOR:g})')
    try:
      lines = replay(path)
    except Exception as error:  # one bad file must not hide the others
      print(f'  FAIL {type(error).__name__}: {error}')
      failed, total = failed + 1, total + 1
      continue
    for line in lines:
      print(line)
    failed, total = failed + sum(not line.ok for line in lines), total + len(lines)
  print(f'{total - failed} ok, {failed} failed')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
