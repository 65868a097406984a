"""The replay command: fixtures pass, and everything that should fail does."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from vtts_jax.testing import replay

HERE = pathlib.Path(__file__).parent / 'golden'
SHARED = pathlib.Path(__file__).parents[2] / 'shared/golden'
SMALL = 'autoencoderkl_c16.npz'


@pytest.mark.parametrize('path', sorted(HERE.glob('*.npz')), ids=lambda p: p.name)
def test_committed_fixtures(path):
  lines = replay.replay(str(path))
  assert lines and all(line.ok and not line.note for line in lines), '\n'.join(map(str, lines))


def test_shared_autoencoder():
  path = SHARED / 'autoencoderkl_a.npz'
  if not path.exists():
    pytest.skip('shared/golden is not beside this clone; tests/golden holds a smaller one')
  lines = replay.replay(str(path))
  assert len(lines) == 6 and all(line.ok for line in lines), '\n'.join(map(str, lines))


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
    data['out/decoded'] = data['out/decoded'] + 1e-3
    data['out/extra'] = np.zeros(2)
    data['out/kl'] = data['out/kl'][:1]
    data['out/mode_scaled'] = data['out/mode_scaled'] * np.nan

  path = changed(tmp_path, change)
  assert replay.main([path, str(HERE / 't5_a.npz')]) == 1
  said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
  assert said['decoded'].split()[1:] == [
    '2x3x6x8', 'diff', '0.001', 'tol', f'{20 * 1.043081283569336e-05:.3g}', 'FAIL',
  ]  # fmt: skip
  assert said['extra'].endswith('FAIL missing output')
  assert said['kl'].endswith('FAIL shape (2,)')
  assert said['mode_scaled'].endswith('FAIL')
  assert said['decoded_scaled'].endswith(' ok') and said['last_hidden'].endswith(' ok')
  assert said['5'] == '5 ok, 4 failed'


def test_wrong_weights_fail(tmp_path, capsys):
  def shift(data):
    data['params/decoder.conv_out.bias'] = data['params/decoder.conv_out.bias'] + 1e-3

  assert replay.main([changed(tmp_path, shift)]) == 1
  out = capsys.readouterr().out
  assert out.count('FAIL') == 2 and out.endswith('4 ok, 2 failed\n')

  def lose(data):
    del data['params/encoder.conv_out.bias']

  assert replay.main([changed(tmp_path, lose)]) == 1
  assert 'wanted by the model: encoder.conv_out.bias' in capsys.readouterr().out


def test_without_numbers_the_floor_holds(tmp_path, capsys):
  def nothing(data):
    del data['out/kl']

  assert replay.main([changed(tmp_path, nothing, number=False)]) == 0
  out = capsys.readouterr().out
  assert 'no entry in a tolerances.json beside it: floats are held to 0.0001' in out
  assert out.count('tol 0.0001 ') == 5 and out.count('no number in tolerances.json') == 5


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
