"""Studies from the command line: what they write and decode, resume after SIGKILL, several
processes, the report of one and of two runs in a browser, bad input."""

import contextlib
import io
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

import jax
import numpy as np
import pytest

from vtts_jax.cli import main
from vtts_jax.core import Cost
from vtts_jax.engine import search as engine
from vtts_jax.errors import ConfigError
from vtts_jax.media import files
from vtts_jax.report import budgets, page, runs, stats, tables
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.study import arms, remake, selection, snapshots, store
from vtts_jax.testing import toys

CONFIGS = pathlib.Path(__file__).parent / 'configs'
CONFIG = str(CONFIGS / 'toys.py')
SMALL = [f'--config={CONFIG}', '--config.seeds=(0,)']


def run_vtts(*argv, cwd):
  """A command in this process: (exit code, stdout, stderr)."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main.run_cli(list(argv))
  return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def without_page():
  """A run in this process writes no page, which takes longer than the toy study itself."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(page, 'write_report', lambda root: None)
    yield


def results_of(folder):
  """The only run in a folder, and its results by (arm, seed, id)."""
  (root,) = (folder / 'runs').iterdir()
  rows = store.read_results(root)
  keyed = {(r['arm'], r['seed'], r['id']): r for r in rows}
  assert len(keyed) == len(rows), 'a prompt was done twice'
  return root, keyed


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Two runs of the same arms, one seed each, with a generator that counts: their folders, what the
  first one said, and how many candidates each decoded."""
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.syspath_prepend(CONFIGS)
  import counting_toy

  folders, decoded = [], []
  for seed in (0, 1):
    folders.append(tmp_path_factory.mktemp('run'))
    counting_toy.decoded.clear()
    with without_page() if seed else contextlib.nullcontext():
      code, out, err = run_vtts(
        'run', f'--config={CONFIG}:counting', f'--config.seeds=({seed},)', cwd=folders[-1]
      )
    assert code == 0, err
    jax.effects_barrier()
    decoded.append(sum(counting_toy.decoded))
    if seed == 0:
      said = out, err
  yield folders, said, decoded
  monkeypatch.undo()


@pytest.fixture(scope='module')
def whole(two):
  """The first of the two runs: its folder and what it said."""
  return two[0][0], two[1]


# --------------------------------------------------------------------------------------- one run


def test_a_run_leaves_everything_it_should(whole):
  folder, (out, err) = whole
  root, rows = results_of(folder)
  assert len(rows) == 3 * 10 and re.fullmatch(r'toys-[0-9a-f]{10}', root.name)
  about = json.loads((root / 'config.json').read_text())
  assert {'revision', 'jax', 'device', 'vtts_jax'} <= set(about['environment'])
  assert about['config']['search']['width'] == 2
  for row in rows.values():
    assert (root / row['image']).exists() and (root / row['state']).exists()
    assert len(row['curve']) == (5 if row['arm'] == 'bon' else 3)
    assert {'generator', 'observe', 'verify', 'flops', 'total', 'correct'} <= set(row['curve'][0])
    assert row['curve'][-1]['measured']['target'] == pytest.approx(
      row['scores']['target'], abs=1e-6
    )
    for point in row['curve']:  # on the host, of the pictures in 8 bits
      measured = point['measured']
      assert measured['darkness'] == pytest.approx(1 - measured['brightness'], abs=1 / 255)
  assert sum('trace' in r for r in rows.values()) == 3 * 2
  for name in ('report.html', 'curve.png', 'grid.png', 'timing.p00000.jsonl'):
    assert (root / name).stat().st_size > 200
  assert 'beam/w4' in out and 'accuracy' in out and 'generator evals' in err
  assert not list(root.rglob('.*')), 'a temporary file was left'


def test_a_study_decodes_what_its_bill_says(two):
  """Graded, measured, drawn and saved: every picture was decoded once, and the best once more at
  the end, as the bill says."""
  folders, _, decoded = two
  for folder, count in zip(folders, decoded):
    rows = results_of(folder)[1].values()
    assert count == sum(row['curve'][-1]['observe'] for row in rows) > 0
    (bon,) = {row['curve'][-1]['observe'] for row in rows if row['arm'] == 'bon'}
    assert bon == 16 + 1


def test_winners_are_made_again_from_their_states(whole):
  root, rows = results_of(whole[0])
  for key, row in list(rows.items())[::7]:
    again = remake.remake_output(root, *key)
    np.testing.assert_array_equal(
      files.image_bytes(again), files.read_output(root / row['image'], 'image')
    )
  assert again.shape == (6, 2, 3)
  with pytest.raises(ConfigError, match="no state of arm 'bon', seed 7, prompt 0"):
    remake.remake_output(root, 'bon', 7, 0)


def test_every_sample_is_graded_and_each_rule_recorded(whole):
  """Against the same samples drawn, decoded, graded and embedded afresh."""
  gen, ver, prompts = toys.Tokens(length=6), toys.Target(), toys.prompts(10)
  found = engine.search(BestOfN(n=16), gen, ver, prompts, collect=('states',))
  step = found.steps[0]
  images = np.asarray(gen.observe({}, None, step.states, 6, ('image',))['image'])  # [P, N, ...]
  rows = [row for row in results_of(whole[0])[1].values() if row['arm'] == 'bon']
  assert len(rows) == 10 and any(0 < sum(r['samples']['correct']) < 16 for r in rows)
  for i, row in enumerate(rows):
    said = row['samples']
    right = toys.grade(images[i], [prompts[i]] * 16)
    assert said['correct'] == right.astype(int).tolist() and said['space'] == 'target'
    np.testing.assert_allclose(said['totals'], step.totals[i], atol=1e-6)
    assert said['sizes'] == [1, 2, 4, 8, 16]
    apart = selection.squared_distances(np.asarray(ver.embed_images({}, images[i : i + 1]))[0])
    for j, n in enumerate(said['sizes']):
      picks = {rule: said['picks'][rule][j] for rule in selection.SELECTION_RULES}
      totals = np.float64(step.totals[i][:n])
      assert picks['best'] == totals.argmax()
      assert picks['weighted'] == selection.pick_weighted(totals, apart[:n, :n])
      assert picks['medoid'] == selection.pick_medoid(np.ones(n, bool), apart[:n, :n])
      assert row['curve'][j]['correct'] == said['correct'][picks['best']]
  others = [r for r in results_of(whole[0])[1].values() if r['arm'] != 'bon']
  assert others and not any('samples' in r for r in others)


def test_the_same_command_resumes_and_does_nothing_twice(whole):
  folder, _ = whole
  root, before = results_of(folder)
  content = (root / 'results.p00000.jsonl').read_bytes()
  with without_page():
    code, _, err = run_vtts(
      'run', f'--config={CONFIG}:counting', '--config.seeds=(0,)', cwd=folder
    )
  assert code == 0, err
  assert (root / 'results.p00000.jsonl').read_bytes() == content
  assert results_of(folder)[1] == before


def test_texts_are_a_study_too(tmp_path):
  """Another kind of output, on a mesh: saved as it is, not graded, shown on the page as text."""
  code, out, err = run_vtts('run', f'--config={CONFIG}:words', cwd=tmp_path)
  assert code == 0, err
  assert 'not graded' in out
  root, rows = results_of(tmp_path)
  html = (root / 'report.html').read_text()
  for key, row in rows.items():
    text = (root / row['text']).read_text()
    assert re.fullmatch('texts/.*txt', row['text']) and re.fullmatch('[a-e]{0,5}', text)
    wanted = sum(letter in 'ab' for letter in text)
    shorter = wanted - row['scores']['letters']  # a tenth for each letter, the end among them
    assert 10 * shorter == pytest.approx(min(len(text) + 1, 5), abs=1e-4)
    assert files.text_of(remake.remake_output(root, *key)) == text
  traced = rows['bon', 0, 0]
  assert all((root / path).read_text() in html for path in traced['grid'])
  assert html.count('class="genealogy"') == 2


# --------------------------------------------------------------------------- sessions and processes


def start_run(folder, *argv, **environment):
  """`vtts run` in a process of its own."""
  command = [sys.executable, '-m', 'vtts_jax.cli.main', 'run', *argv]
  environment = {**os.environ, **environment}
  return subprocess.Popen(
    command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def assert_same_results(folder, whole):
  """The run in a folder has the lines and pictures that `whole` has of the same arms."""
  root, got = results_of(folder)
  want_root, want = results_of(whole[0])
  arms_run = {arm for arm, _, _ in got}
  want = {key: row for key, row in want.items() if key[0] in arms_run}
  assert got == want
  for row in want.values():
    assert (root / row['image']).read_bytes() == (want_root / row['image']).read_bytes()
  return root


def test_killed_at_random_and_resumed_equals_uninterrupted(whole, tmp_path):
  """SIGKILL at a random moment, then a session that ends in the middle of a line; what the third
  session leaves must equal `whole`."""
  rng = random.Random(1)
  wanted, process = rng.randint(1, 10), start_run(tmp_path, *SMALL, PYTHONUNBUFFERED='1')
  deadline = time.time() + 60
  while process.poll() is None and time.time() < deadline:
    found = list(tmp_path.glob('runs/*/results.p00000.jsonl'))
    if found and found[0].read_bytes().count(b'\n') >= wanted:
      break
    time.sleep(rng.uniform(0.0, 0.05))
  process.send_signal(signal.SIGKILL)
  process.communicate()
  (file,) = tmp_path.glob('runs/*/results.p00000.jsonl')
  assert file.read_bytes().count(b'\n') < 30, 'it was through before it was killed'

  class Killed(BaseException):
    pass

  limit = rng.randint(11, 24)

  def append_half(self, rows):
    text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    is_last = self.path.name == file.name and file.read_bytes().count(b'\n') >= limit
    with self.path.open('ab') as out:
      out.write(text[: rng.randrange(1, len(text) - 1)] if is_last else text)
    if is_last:
      raise Killed

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    patch.setattr(store.LineFile, 'append_lines', append_half)
    run_vtts('run', *SMALL, cwd=tmp_path)
  torn = file.read_bytes()
  assert not torn.endswith(b'\n') and torn.count(b'\n') < 30
  with without_page():
    code, _, err = run_vtts('run', *SMALL, cwd=tmp_path)
  assert code == 0, err
  assert file.read_bytes().endswith(b'}\n')
  root = assert_same_results(tmp_path, whole)
  assert len(store.read_results(root)) == 30


def test_two_processes_share_the_prompts(whole, tmp_path):
  """Each process takes every second batch and writes its own file; process 0 reports once all are
  done."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = [
    start_run(
      tmp_path,
      f'--config={CONFIG}:one',
      '--config.seeds=(0,)',
      '--distributed',
      JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}',
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i),
      JAX_CPU_COLLECTIVES_IMPLEMENTATION='gloo',
    )
    for i in range(2)
  ]
  try:
    outs = [p.communicate(timeout=120) for p in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], outs
  root = assert_same_results(tmp_path, whole)
  assert (root / 'report.html').exists()
  for i in range(2):
    lines = store.read_lines(root / f'results.p0000{i}.jsonl')
    assert [line['id'] for line in lines] == list(range(5 * i, 5 * i + 5))
  assert 'beam/w2' in outs[0][0] and 'beam/w2' not in outs[1][0]


def test_a_directory_belongs_to_one_config(tmp_path):
  config = {'name': 'x', 'workdir': 'a', 'k': 1}
  made = store.Store(tmp_path, config, {})
  assert not list(tmp_path.iterdir()), 'written before it began'
  made.open_files()
  assert store.config_hash(config) == store.config_hash({**config, 'workdir': 'b'})
  assert store.config_hash(config) != store.config_hash({**config, 'k': 2})
  (made.root / 'config.json').write_text(json.dumps({'config': {'k': 2}, 'environment': {}}))
  with pytest.raises(ConfigError, match='holds the results of another config'):
    store.Store(tmp_path, config, {})


# ------------------------------------------------------------------------------------------ reports


def roots_of(two):
  return [results_of(folder)[0] for folder in two[0]]


@pytest.fixture(scope='module')
def merged(two, tmp_path_factory):
  """One report of both runs, where `vtts report` puts it without `--out`."""
  folder = tmp_path_factory.mktemp('merged')
  copies = [shutil.copytree(root, folder / root.name) for root in roots_of(two)]
  code, out, err = run_vtts('report', *map(str, copies), cwd=folder)
  assert code == 0, err
  assert out.strip() == str(folder / 'report' / 'report.html')
  return folder / 'report'


def test_equal_arms_are_joined_by_their_seeds(two):
  found = runs.read_runs(roots_of(two))
  assert {r['arm'] for r in found.rows} == {'bon', 'beam/w2', 'beam/w4'} == set(found.settings)
  assert len(found.rows) == 2 * 3 * 10
  joined = {a.name: a for a in stats.arm_statistics(found.rows)}
  assert all(a.seeds == 2 and a.prompts == 10 for a in joined.values())
  single = [
    {a.name: a for a in stats.arm_statistics(runs.read_runs([root]).rows)}
    for root in roots_of(two)
  ]
  for name, arm in joined.items():
    means = [s[name].points[-1].accuracy.mean for s in single]
    assert arm.points[-1].accuracy.mean == pytest.approx(np.mean(means))


def test_a_merged_page_has_every_section(merged, two):
  text = (merged / 'report.html').read_text()
  for section in ('curve', 'arms', 'equal', 'difficulty', 'rules', 'laws', 'matrix', 'bill'):
    assert f'id="{section}"' in text, section
  assert all(root.name in text for root in roots_of(two)) and '60 results of 2 runs' in text
  for name in ('curve', 'rules', 'laws', 'grid'):
    assert (merged / f'{name}.png').stat().st_size > 2000
  found = runs.read_runs(roots_of(two))
  families, _, tags = budgets.family_series(found.rows, budgets.seconds_per_prompt(found.timing))
  assert [f.name for f in families] == ['beam', 'bon']
  base = budgets.find_baselines(families, {'bon'}, found.settings)
  assert base == {'beam': 'bon'}
  equal = tables.equal_budget_tables(families, tags, base)
  assert [t['axis'] for t in equal] == list(budgets.COST_AXES.values())
  for table in equal:
    for row in table['rows']:
      for cell in filter(None, row['cells']):
        assert f'<b>{cell["accuracy"]}</b><small>{cell["point"]}</small>' in text
        assert bool(cell['gain']) == (row['name'] == 'beam')
  laws = tables.fit_laws(families, tags)
  assert [f.name for f in laws] == ['bon']  # of beam there are two points


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium on PATH')
def test_pages_in_a_browser(merged, whole, tmp_path):
  """Every picture loads, the page is no wider than the window, and nothing is fetched."""
  root, rows = results_of(whole[0])
  probe = """<script>addEventListener('load', () => { const all = [...document.images];
    document.body.dataset.seen = [all.length, all.filter(i => i.naturalWidth > 0).length,
      document.documentElement.scrollWidth - window.innerWidth];
    })</script>"""
  flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom '
  flags += '--disable-background-networking --disable-component-update --disable-sync '
  flags += '--window-size=900,800 --virtual-time-budget=5000'
  grids = sum(len(r['grid']) for r in rows.values() if 'grid' in r)
  assert grids == (5 + 3 + 3) * 2
  browsers = []
  for name, folder in (('one', root), ('merged', merged)):
    text = (folder / 'report.html').read_text()
    assert 'http://' not in text and 'https://' not in text, 'not self-contained'
    copied = tmp_path / f'{name}.html'
    copied.write_text(text.replace('</body>', probe + '</body>'))
    command = ['chromium', *flags.split(), f'--user-data-dir={tmp_path}/{name}', copied.as_uri()]
    browsers.append(subprocess.Popen(
      command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ))  # fmt: skip
  # curve, rules and laws, the grids (of one seed), a genealogy for each arm
  for browser, pictures in zip(browsers, (3 + grids + 3, 3 + 2 * grids + 3)):
    dom, _ = browser.communicate(timeout=120)
    total, loaded, over = map(int, re.search(r'data-seen="(\d+),(\d+),(-?\d+)"', dom).groups())
    assert total == loaded == pictures and over <= 0
    for name in ('curve', 'arms', 'matrix', 'bill'):
      assert f'id="{name}"' in dom
    assert dom.count('<td>beam/w4</td>') >= 3


def test_a_report_goes_where_it_is_asked_to(two, merged, capsys, monkeypatch):
  a, b = map(str, roots_of(two))
  assert not (merged.parent / pathlib.Path(b).name / 'report.html').exists()
  written = []
  monkeypatch.setattr(page, 'write_report', lambda *roots, out: written.append((roots, out)))
  assert main.run_cli(['report', a, '--out=x']) == main.run_cli(['report', a, b, '--out=x']) == 0
  assert written == [((a,), 'x'), ((a, b), 'x')]
  assert 'accuracy' not in capsys.readouterr().out
  assert main.run_cli(['report', a]) == 0 and 'accuracy' in capsys.readouterr().out
  monkeypatch.undo()
  for bad, message in (
    ([], 'give run directories'),
    ([a, '--output=x'], 'unknown flag --output; allowed for vtts report: --out=DIR'),
    ([a, a], 'is given twice'),
  ):
    assert main.run_cli(['report', *bad]) == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- bad input


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
      (f'--config={CONFIG}', '--config.generator.name=generators.scenes_ar'),
      r"'generators.scenes_ar' is now called 'scenes.ar'",
    ),
    (
      (f'--config={CONFIG}', '--config.budget.generator=20.0'),
      r'arm beam/w4: budget.generator=20 per prompt is below what the search spends',
    ),
    ((f'--config={CONFIG}', '--config.mode=quick'), r"mode='quick'"),
    (
      (f'--config={CONFIG}', '--config.seeds=(0, 4294967296)'),
      r'seeds=\[0, 4294967296\]: must be different integers in 0 \.\. 2\*\*32 - 1',
    ),
    (
      (f'--config={CONFIG}', '--config.metric=metrics.nothing'),
      r"unknown component 'metrics.nothing'",
    ),
    ((f'--config={CONFIG}', 'extra'), r"unknown argument 'extra'"),
    ((f'--config={CONFIG}', '--distributd'), r'unknown flag --distributd; allowed: --config'),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(args, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main.run_cli(['run', *args]) == 2
  err = capsys.readouterr().err
  assert err.startswith('vtts: run: ') and re.search(message, err), err
  assert err.count('\n') == 1 and not list(tmp_path.iterdir())


def test_commands_explain_themselves(capsys, tmp_path):
  assert main.run_cli(['--help']) == 0 and 'vtts run --config' in capsys.readouterr().out
  for command in main.COMMANDS:
    assert main.run_cli([command, '--help']) == 0
    said = capsys.readouterr().out
    assert said.startswith(f'usage: vtts {command}')
    assert main.COMMANDS[command].__doc__.split('\n')[0] in said
  assert main.run_cli(['list']) == 0
  listed = capsys.readouterr().out
  for name in ('search.beam', 'search.best_of_n', 'scenes.ar', 'verifiers.host'):
    assert name in listed
  assert main.run_cli(['list', 'search.beam']) == 0 and 'branch_at' in capsys.readouterr().out
  assert main.run_cli(['run', f'--config={CONFIG}', '--help']) == 0
  assert '"width": 2' in capsys.readouterr().out
  assert main.run_cli(['report', str(tmp_path)]) == 2
  assert 'no run directory' in capsys.readouterr().err
  assert main.run_cli(['search']) == 2 and 'allowed: run, report, score' in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- parts


def test_intervals_are_those_of_the_mean_of_category_means():
  rng = np.random.default_rng(3)
  tags = np.repeat(['a', 'b'], [40, 160])
  values = rng.random(200) < np.where(tags == 'a', 0.9, 0.3)
  got = stats.bootstrap_interval(values.astype(float), tags)
  means = [values[tags == t].mean() for t in 'ab']
  assert got.mean == pytest.approx(np.mean(means))
  error = 0.5 * np.sqrt(sum(m * (1 - m) / n for m, n in zip(means, (40, 160))))
  assert got.low == pytest.approx(got.mean - 1.96 * error, abs=0.012)
  assert got.high == pytest.approx(got.mean + 1.96 * error, abs=0.012)


def test_what_is_searched_on_goes_by_its_measured_name():
  from vtts_jax.verifiers.ensemble import Ensemble

  measured = (('t', toys.Target()), ('b', toys.Brightness()))
  assert arms.searched_name(toys.Target(), measured) == 't'
  both = (('x', toys.Target()), ('y', toys.Brightness()))
  assert arms.searched_name(Ensemble(both), measured) == 't+b'
  weighted = Ensemble(both, weights=(('x', 1.0), ('y', 0.0)))
  assert arms.searched_name(weighted, measured) == 't'
  assert arms.searched_name(toys.Target(name='other'), measured) == 'other'


def test_what_a_prompt_did_not_need_is_not_on_its_bill():
  """With a threshold each prompt's curve costs what the whole search costs up to where it stopped,
  and nothing from there on."""
  gen, ver = toys.Tokens(), toys.Target()
  algo = Beam(width=2, branch=3, schedule='linear', size=2)
  arm = arms.Arm('x', gen, ver, algo, (('target', ver),), Cost())
  parts = (algo, gen, ver, toys.prompts(10))
  full = snapshots.take_snapshots(arm, engine.search(*parts, collect=('best',)))
  bill = np.sum([astuple(cost) for cost in engine.bill(algo, gen, ver)], axis=0)
  np.testing.assert_allclose(full.costs[:, -1], np.tile(bill, (10, 1)))
  totals = full.totals
  stop = float(np.median(totals[:, 0]))
  found = engine.search(*parts, collect=('best',), stop=stop)
  costs = snapshots.take_snapshots(arm, found).costs
  reached = (totals >= stop).argmax(axis=1)
  reached[(totals < stop).all(axis=1)] = totals.shape[1] - 1
  assert {0, totals.shape[1] - 1} <= set(reached.tolist())
  for own, whole, j in zip(costs, full.costs, reached):
    np.testing.assert_allclose(own[: j + 1], whole[: j + 1])
    np.testing.assert_allclose(own[j:], np.tile(whole[j], (len(own) - j, 1)))
