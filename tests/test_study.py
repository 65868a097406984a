"""Studies from the command line: results, resume after SIGKILL, the report in a browser, bad
input."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import astuple

import numpy as np
import pytest

from vtts_jax.cli import main
from vtts_jax.errors import ConfigError
from vtts_jax.report import stats
from vtts_jax.study import store

CONFIG = str(pathlib.Path(__file__).parent / 'configs' / 'toys.py')
SMALL = [f'--config={CONFIG}', '--config.seeds=(0,)']


def vtts(*args, cwd):
  command = [sys.executable, '-m', 'vtts_jax.main', *args]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def lines(folder):
  """Results of the only run in a folder, by (arm, seed, id)."""
  (root,) = (folder / 'runs').iterdir()
  rows = store.read_results(root)
  keyed = {(r['arm'], r['seed'], r['id']): r for r in rows}
  assert len(keyed) == len(rows), 'a prompt was done twice'
  return root, keyed


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  out = vtts('run', *SMALL, cwd=folder)
  assert out.returncode == 0, out.stderr
  return folder, out


def test_a_run_leaves_everything_it_should(whole):
  folder, out = whole
  root, rows = lines(folder)
  assert len(rows) == 3 * 10 and re.fullmatch(r'toys-[0-9a-f]{10}', root.name)
  about = json.loads((root / 'config.json').read_text())
  assert {'revision', 'jax', 'device', 'vtts_jax'} <= set(about['environment'])
  assert about['config']['search']['width'] == 2
  for row in rows.values():
    assert (root / row['image']).exists()
    assert len(row['curve']) == (4 if row['arm'] == 'bon' else 3)
    assert {'generator', 'render', 'verify', 'flops', 'total', 'correct'} <= set(row['curve'][0])
    assert row['curve'][-1]['measured']['target'] == pytest.approx(
      row['scores']['target'], abs=1e-6
    )
  assert sum('trace' in r for r in rows.values()) == 3 * 2
  for name in ('report.html', 'curve.png', 'grid.png', 'timing.p00000.jsonl'):
    assert (root / name).stat().st_size > 200
  assert 'beam/w4' in out.stdout and 'accuracy' in out.stdout and 'generator evals' in out.stderr
  assert not list(root.rglob('.*')), 'a temporary file was left'


def test_the_same_command_resumes_and_does_nothing_twice(whole):
  folder, _ = whole
  root, before = lines(folder)
  content = (root / 'results.p00000.jsonl').read_bytes()
  out = vtts('run', *SMALL, cwd=folder)
  assert out.returncode == 0 and (root / 'results.p00000.jsonl').read_bytes() == content
  assert lines(folder)[1] == before


def test_killed_at_random_and_resumed_equals_uninterrupted(whole, tmp_path):
  """SIGKILL at random moments, then half a line by hand; the lines must equal those of `whole`."""
  rng = random.Random(1)
  command = [sys.executable, '-m', 'vtts_jax.main', 'run', *SMALL]
  environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
  for _ in range(3):
    process = subprocess.Popen(
      command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline, wanted = time.time() + 60, rng.randint(1, 24)
    while process.poll() is None and time.time() < deadline:
      found = list(tmp_path.glob('runs/*/results.p00000.jsonl'))
      if found and found[0].read_bytes().count(b'\n') >= wanted:
        break
      time.sleep(rng.uniform(0.0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
  (file,) = tmp_path.glob('runs/*/results.p00000.jsonl')
  with file.open('ab') as out:
    out.write(b'{"arm": "bon", "seed": 0, "id"')
  done = vtts('run', *SMALL, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  root, got = lines(tmp_path)
  assert file.read_bytes().endswith(b'}\n')
  want_root, want = lines(whole[0])
  assert got == want
  for row in want.values():
    assert (root / row['image']).read_bytes() == (want_root / row['image']).read_bytes()


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium on PATH')
def test_the_report_shows_its_pictures_in_a_browser(whole, tmp_path):
  root, rows = lines(whole[0])
  page = (root / 'report.html').read_text()
  assert 'http://' not in page and 'https://' not in page, 'not self-contained'
  count = """<script>addEventListener('load', () => { const all = [...document.images];
    document.body.dataset.seen = [all.length, all.filter(i => i.naturalWidth > 0).length];
    })</script>"""
  copy = tmp_path / 'report.html'
  copy.write_text(page.replace('</body>', count + '</body>'))
  flags = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    f'--user-data-dir={tmp_path / "profile"}',
    '--virtual-time-budget=5000',
    '--dump-dom',
  ]
  dom = subprocess.run(
    ['chromium', *flags, copy.as_uri()], capture_output=True, text=True, timeout=120, check=False
  ).stdout
  total, loaded = map(int, re.search(r'data-seen="(\d+),(\d+)"', dom).groups())
  grids = sum(len(r['grid']) for r in rows.values() if 'grid' in r)
  assert total == loaded == 3 + grids + 3  # curve, rules and laws, grids, a genealogy for each arm
  for name in ('curve', 'arms', 'matrix', 'bill'):
    assert f'id="{name}"' in dom
  assert dom.count('<td>beam/w4</td>') >= 3


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ((), r'--config=FILE\[:ARGS\] is missing'),
    (('--config=nothing.py',), r'nothing.py'),
    (
      (f'--config={CONFIG}', '--config.search.widht=8'),
      r'unknown flag --config.search.widht; allowed in config.search: .*width',
    ),
    ((f'--config={CONFIG}', '--config.search.width=wide'), r'--config.search.width=wide'),
    (
      (f'--config={CONFIG}', '--config.search.width=0'),
      r'arm beam/w2: search: search.width=0: must be an integer >= 1',
    ),
    (
      (f'--config={CONFIG}', '--config.search.name=search.beams'),
      r"unknown component 'search.beams'",
    ),
    (
      (f'--config={CONFIG}', '--config.budget.generator=20.0'),
      r'arm beam/w4: budget.generator=20 per prompt is below what the search spends',
    ),
    ((f'--config={CONFIG}', '--config.mode=quick'), r"mode='quick'"),
    (
      (f'--config={CONFIG}', '--config.metric=metrics.nothing'),
      r"unknown component 'metrics.nothing'",
    ),
    ((f'--config={CONFIG}', 'extra'), r"unknown argument 'extra'"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(args, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main.cli(['run', *args]) == 2
  err = capsys.readouterr().err
  assert err.startswith('vtts: run: ') and re.search(message, err), err
  assert err.count('\n') == 1 and not list(tmp_path.iterdir())


def test_commands_explain_themselves(capsys, tmp_path):
  assert main.cli(['--help']) == 0 and 'vtts run --config' in capsys.readouterr().out
  assert main.cli(['list']) == 0
  listed = capsys.readouterr().out
  for name in ('search.beam', 'search.best_of_n', 'scenes.ar', 'verifiers.host'):
    assert name in listed
  assert main.cli(['list', 'search.beam']) == 0 and 'branch_at' in capsys.readouterr().out
  assert main.cli(['run', f'--config={CONFIG}', '--help']) == 0
  assert '"width": 2' in capsys.readouterr().out
  assert main.cli(['report', str(tmp_path)]) == 2 and 'no run directory' in capsys.readouterr().err
  assert main.cli(['search']) == 2 and 'allowed: run, report, score' in capsys.readouterr().err


def test_a_directory_belongs_to_one_config(tmp_path):
  config = {'name': 'x', 'workdir': 'a', 'k': 1}
  made = store.Store(tmp_path, config, {})
  assert store.config_hash(config) == store.config_hash({**config, 'workdir': 'b'})
  assert store.config_hash(config) != store.config_hash({**config, 'k': 2})
  (made.root / 'config.json').write_text(json.dumps({'config': {'k': 2}, 'environment': {}}))
  with pytest.raises(ConfigError, match='holds the results of another config'):
    store.Store(tmp_path, config, {})


def test_intervals_are_those_of_the_mean_of_category_means():
  rng = np.random.default_rng(3)
  tags = np.repeat(['a', 'b'], [40, 160])
  values = rng.random(200) < np.where(tags == 'a', 0.9, 0.3)
  got = stats.interval(values.astype(float), tags)
  means = [values[tags == t].mean() for t in 'ab']
  assert got.mean == pytest.approx(np.mean(means))
  error = 0.5 * np.sqrt(sum(m * (1 - m) / n for m, n in zip(means, (40, 160))))
  assert got.low == pytest.approx(got.mean - 1.96 * error, abs=0.012)
  assert got.high == pytest.approx(got.mean + 1.96 * error, abs=0.012)


def test_two_processes_share_the_prompts(whole, tmp_path):
  """Each process takes every second batch and writes its own file; process 0 reports once all are
  done."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = []
  for i in range(2):
    cluster = {
      'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(i),
      'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    }
    command = [sys.executable, '-m', 'vtts_jax.main', 'run', *SMALL, '--distributed']
    processes.append(
      subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, **cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  try:
    outs = [p.communicate(timeout=120) for p in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], outs
  root, got = lines(tmp_path)
  assert got == lines(whole[0])[1] and (root / 'report.html').exists()
  assert all((root / f'results.p0000{i}.jsonl').stat().st_size for i in range(2))
  assert 'beam/w4' in outs[0][0] and 'beam/w4' not in outs[1][0]


def test_what_is_searched_on_goes_by_its_measured_name():
  from vtts_jax.study import execute as study
  from vtts_jax.testing import toys
  from vtts_jax.verifiers import ensemble

  measure = ensemble.build(members={'t': toys.Target(), 'b': toys.Brightness()})
  assert study.searched(toys.Target(), measure) == 't'
  both = {'x': toys.Target(), 'y': toys.Brightness()}
  assert study.searched(ensemble.build(members=both), measure) == 't+b'
  assert study.searched(ensemble.build(members=both, weights={'x': 1, 'y': 0}), measure) == 't'
  assert study.searched(toys.Target(name='other'), measure) == 'other'


def test_what_a_prompt_did_not_need_is_not_on_its_bill():
  """With a threshold each prompt's curve costs what the whole search costs up to where it stopped,
  and nothing from there on."""
  import jax

  from vtts_jax import core
  from vtts_jax.engine import search as run
  from vtts_jax.search.beam import Beam
  from vtts_jax.study import execute as study
  from vtts_jax.testing import toys

  gen, ver = toys.Tokens(), toys.Target()
  algo = Beam(width=2, branch=3, schedule='linear', size=2)
  arm = study.Arm('x', gen, ver, algo, ver, 'fused', 0, 0, np.inf, core.Cost())
  texts = [e['prompt'] for e in toys.prompts(10)]
  args = (algo, gen, ver, {'generator': {}, 'verifier': {}}, texts, jax.random.key(0))
  full, _, _, totals = study.snapshots(arm, run.search(*args, trace=True))
  bill = np.sum([astuple(cost) for cost in run.bill(algo, gen, ver)], axis=0)
  np.testing.assert_allclose(full[:, -1], np.tile(bill, (10, 1)))
  stop = float(np.median(totals[:, 0]))
  costs, *_ = study.snapshots(arm, run.search(*args, trace=True, stop=stop))
  reached = (totals >= stop).argmax(axis=1)
  reached[(totals < stop).all(axis=1)] = totals.shape[1] - 1
  assert {0, totals.shape[1] - 1} <= set(reached.tolist())
  for own, whole, j in zip(costs, full, reached):
    np.testing.assert_allclose(own[: j + 1], whole[: j + 1])
    np.testing.assert_allclose(own[j:], np.tile(whole[j], (len(own) - j, 1)))
