"""The replay command: fixtures pass, and everything that should fail does."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from vtts_jax.testing import replay

HERE = pathlib.Path(__file__).parent / 'golden'
SMALL = 't5_a.npz'


@pytest.mark.parametrize('path', sorted(HERE.glob('*.npz')), ids=lambda p: p.name)
def test_committed_fixtures(path):
  lines = replay.replay(str(path))
  assert lines and all(line.ok and not line.note for line in lines), '\n'.join(map(str, lines))


def changed(tmp_path, change, number=True):
  """A copy of the small fixture with `change` done to its dict of arrays."""
  with np.load(HERE / SMALL) as file:
    data = {k: file[k] for k in file.files}
  change(data)
  path = tmp_path / SMALL
  np.savez(path, **data)
  if number:
    shutil.copy(HERE / 'tolerances.json', tmp_path)
  return str(path)


def test_output_lines_and_exit_code(tmp_path, capsys):
  def change(data):
    data['out/last_hidden'] = data['out/last_hidden'] + 1e-3
    data['out/extra'] = np.zeros(2)
    data['out/last_hidden_unmasked'] = data['out/last_hidden_unmasked'][:1]

  assert replay.main([changed(tmp_path, change), str(HERE / SMALL)]) == 1
  *lines, last = capsys.readouterr().out.splitlines()
  said = {line.split()[0]: line for line in lines[1:4]}
  assert said['last_hidden'].split()[1:] == [
    '2x9x24', 'diff', '0.001', 'tol', f'{20 * 2.1755695343017578e-05:.3g}', 'FAIL',
  ]  # fmt: skip
  assert said['extra'].endswith('FAIL missing output')
  assert said['last_hidden_unmasked'].endswith('FAIL shape (2, 9, 24)')
  assert all(line.endswith(' ok') for line in lines[5:7]) and len(lines) == 7
  assert last == '2 ok, 3 failed'


def test_wrong_weights_fail(tmp_path, capsys):
  def shift(data):
    data['params/encoder.final_layer_norm.weight'] += 1e-2

  assert replay.main([changed(tmp_path, shift)]) == 1
  assert capsys.readouterr().out.endswith('0 ok, 2 failed\n')

  def lose(data):
    del data['params/encoder.final_layer_norm.weight']

  assert replay.main([changed(tmp_path, lose)]) == 1
  assert 'wanted by the model: norm.scale' in capsys.readouterr().out


def test_without_numbers_the_floor_holds(tmp_path, capsys):
  assert replay.main([changed(tmp_path, lambda data: None, number=False)]) == 0
  out = capsys.readouterr().out
  assert 'no entry in a tolerances.json beside it: floats are held to 0.0001' in out
  assert out.count('tol 0.0001 ') == 2 and out.count('no number in tolerances.json') == 2


def test_unknown_model_and_no_fixture(tmp_path, capsys):
  def other(data):
    data['config'] = json.dumps({'model': 'sora'})

  assert replay.main([changed(tmp_path, other)]) == 1
  assert "model='sora' is unknown; known are autoencoderkl" in capsys.readouterr().out
  broken = tmp_path / 'broken.npz'
  broken.write_bytes((HERE / SMALL).read_bytes()[:-100])
  objects = tmp_path / 'objects.npz'  # a pickle inside is refused by numpy, not run
  np.savez(objects, config=np.array([{}], dtype=object))
  assert replay.main([str(broken), str(objects), str(tmp_path / 'none.npz')]) == 1
  out = capsys.readouterr().out
  assert out.count('is no golden file') == 3 and 'allow_pickle=False' in out
  assert replay.main([]) == 2


def test_integers_are_exact_and_infinities_compare():
  ids = np.array([3, 4])
  assert replay.compare('x', ids, ids, None).ok
  line = replay.compare('x', ids, ids + np.array([0, 1]), 1.0)
  assert not line.ok and line.tolerance == 0
  wide = np.array([2**62], np.int64)  # no float tells these two apart
  assert not replay.compare('x', wide, wide + 1, None).ok
  nan = np.array([np.nan], 'f')
  assert not replay.compare('x', nan, nan, None).ok
  mask = np.array([0, -np.inf], 'f')
  assert replay.compare('x', mask, mask, 0.0).ok
  assert not replay.compare('x', mask, np.array([-np.inf, 0]), 0.0).ok
  assert replay.compare('x', mask[:1], mask[:1] + 1e-3, 1e-4).tolerance == 2e-3


def test_command(monkeypatch):
  import runpy

  monkeypatch.setattr(sys, 'argv', ['replay', str(HERE / 't5_a.npz')])
  monkeypatch.delitem(sys.modules, 'vtts_jax.testing.replay')
  with pytest.raises(SystemExit) as stop:
    runpy.run_module('vtts_jax.testing.replay', run_name='__main__')
  assert stop.value.code == 0
