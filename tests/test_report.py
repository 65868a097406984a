"""Graded samples, merged runs and the page: toy runs from end to end, and small synthetic ones."""

import copy
import json
import pathlib
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from vtts_jax.cli import main
from vtts_jax.engine import search as run
from vtts_jax.errors import ConfigError
from vtts_jax.report import budgets as matched
from vtts_jax.report import page as report
from vtts_jax.report import runs as merge
from vtts_jax.report import stats, tables
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.study import execute as study
from vtts_jax.study import selection as rules
from vtts_jax.study import store
from vtts_jax.testing import toys

CONFIG = str(pathlib.Path(__file__).parent / 'configs' / 'toys.py')


def toy_config(seed, **changes):
  config = main.read_config([f'--config={CONFIG}'])
  config['arms'] = {
    'bon': {'search': {'name': 'search.best_of_n', 'n': 16}},
    'beam/w2': {},
    'beam/w4': {'search': {'width': 4}},
  }
  return {**config, 'seeds': [seed], 'render_chunk': 3, 'traces': 1, **changes}


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Two runs of the same arms, one seed each."""
  roots = []
  for seed in (0, 1):
    config = toy_config(seed)
    made = store.Store(tmp_path_factory.mktemp('runs'), config, main.environment())
    study.execute(config, study.arms(config), made)
    roots.append(made.root)
  return roots


def test_every_sample_is_graded_and_each_rule_recorded(two):
  """Against the same samples drawn, rendered, graded and embedded afresh."""
  gen, ver, entries = toys.Tokens(length=6), toys.Target(), toys.prompts(10)
  texts = [e['prompt'] for e in entries]
  params = {'generator': {}, 'verifier': {}}
  algo = BestOfN(n=16)
  result = run.search(algo, gen, ver, params, texts, jax.random.key(0), trace=True)
  step = result.steps[0]
  images = np.asarray(gen.render({}, None, step.shown, 6))  # [P, N, H, W, 3]
  rows = [r for r in store.read_results(two[0]) if r['arm'] == 'bon']
  assert len(rows) == 10 and any(0 < sum(r['samples']['correct']) < 16 for r in rows)
  for i, row in enumerate(rows):
    found = row['samples']
    right = toys.score(images[i], [entries[i]] * 16)
    assert found['correct'] == right.astype(int).tolist() and found['space'] == 'target'
    np.testing.assert_allclose(found['totals'], step.totals[i], atol=1e-6)
    assert found['sizes'] == [1, 2, 4, 8, 16]
    apart = rules.distances(np.asarray(ver.features({}, images[i : i + 1]))[0])
    for j, n in enumerate(found['sizes']):
      picks = {rule: found['picks'][rule][j] for rule in rules.RULES}
      totals = np.float64(step.totals[i][:n])
      assert picks['best'] == totals.argmax()
      assert picks['weighted'] == rules.weighted(totals, apart[:n, :n])
      assert picks['medoid'] == rules.medoid(np.ones(n, bool), apart[:n, :n])
      assert row['curve'][j]['correct'] == found['correct'][picks['best']]
  others = [r for r in store.read_results(two[0]) if r['arm'] != 'bon']
  assert others and not any('samples' in r for r in others)


def test_equal_arms_are_joined_by_their_seeds(two):
  runs = merge.read(two)
  assert {r['arm'] for r in runs.rows} == {'bon', 'beam/w2', 'beam/w4'} == set(runs.settings)
  assert len(runs.rows) == 2 * 3 * 10
  joined = {a.name: a for a in stats.arms(runs.rows)}
  assert all(a.seeds == 2 and a.prompts == 10 for a in joined.values())
  single = [{a.name: a for a in stats.arms(merge.read([root]).rows)} for root in two]
  for name, arm in joined.items():
    means = [s[name].points[-1].accuracy.mean for s in single]
    assert arm.points[-1].accuracy.mean == pytest.approx(np.mean(means))


def test_selection_rules_by_hand():
  def line(i, tag, correct, best, medoid):
    found = {'correct': correct, 'sizes': [1, 2], 'space': 'f', 'totals': [0.0, 0.0]}
    return {
      'arm': 'b', 'id': i, 'tag': tag,
      'samples': {**found, 'picks': {'best': best, 'medoid': medoid}},
    }  # fmt: skip

  rows = [line(0, 'x', [0, 1], [0, 1], [0, 0]), line(1, 'y', [1, 0], [0, 0], [0, 1])]
  rows += [line(2, 'y', [0, 0], [-1, -1], [-1, -1])]
  (found,) = tables.selection(rows)
  means = {rule: [p.mean for p in points] for rule, points in found.curves.items()}
  assert means == {
    'any': [0.25, 0.75],
    'best': [0.25, 0.75],
    'medoid': [0.25, 0.0],
    'single': [0.375, 0.375],
  }
  assert found.gains['medoid'].mean == -0.75 and found.gains['best'] == (0, 0, 0)


@pytest.mark.parametrize(
  ('value', 'axis', 'text'),
  [
    (2048.0, 'generator', '2,048'),
    (1.5463e9, 'flops', '1.55 G'),
    (12.0, 'flops', '12'),
    (4.2e4, 'flops', '42 k'),
    (3e21, 'flops', '3e+03 E'),
    (0.0312, 'seconds', '0.0312'),
  ],
)
def test_amounts(value, axis, text):
  assert tables.amount(value, axis) == text


# ----------------------------------------------------------------------------------------- the page


@pytest.fixture(scope='module')
def page(two, tmp_path_factory):
  out = tmp_path_factory.mktemp('merged')
  assert main.cli(['report', *map(str, two), f'--out={out}']) == 0
  return out


def test_a_merged_page_has_every_section(page, two):
  text = (page / 'report.html').read_text()
  for section in ('curve', 'arms', 'equal', 'difficulty', 'rules', 'laws', 'matrix', 'bill'):
    assert f'id="{section}"' in text, section
  assert all(root.name in text for root in two) and '60 results of 2 runs' in text
  for name in ('curve', 'rules', 'laws', 'grid'):
    assert (page / f'{name}.png').stat().st_size > 2000
  runs = merge.read(two)
  families, _, tags = matched.series(runs.rows, matched.seconds_per_prompt(runs.timing))
  assert [f.name for f in families] == ['bon', 'beam']
  base = matched.baselines(families, {'bon'}, runs.settings)
  assert base == {'beam': 'bon'}
  equal = tables.equal_budgets(families, tags, base)
  assert [t['axis'] for t in equal] == list(tables.AXES.values())
  for table in equal:
    for row in table['rows']:
      for cell in filter(None, row['cells']):
        assert f'<b>{cell["accuracy"]}</b><small>{cell["point"]}</small>' in text
        assert bool(cell['gain']) == (row['name'] == 'beam')
  assert [f.name for f in tables.laws(families, tags)] == ['bon']  # of beam there are two points


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium on PATH')
def test_a_merged_page_in_a_browser(page, tmp_path):
  """Every picture loads, the page is no wider than the window, and nothing is fetched."""
  text = (page / 'report.html').read_text()
  assert 'http://' not in text and 'https://' not in text, 'not self-contained'
  probe = """<script>addEventListener('load', () => { const all = [...document.images];
    document.body.dataset.seen = [all.length, all.filter(i => i.naturalWidth > 0).length,
      document.documentElement.scrollWidth - window.innerWidth];
    })</script>"""
  copied = tmp_path / 'report.html'
  copied.write_text(text.replace('</body>', probe + '</body>'))
  flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom '
  flags += '--disable-background-networking --disable-component-update --disable-sync '
  flags += f'--window-size=900,800 --virtual-time-budget=5000 --user-data-dir={tmp_path}/profile'
  dom = subprocess.run(
    ['chromium', *flags.split(), copied.as_uri()],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  ).stdout
  total, loaded, over = map(int, re.search(r'data-seen="(\d+),(\d+),(-?\d+)"', dom).groups())
  assert total == loaded == 3 + (5 + 3 + 3) * 2 + 3 and over <= 0  # figures, grids, genealogies


def test_one_run_is_written_where_it_is_and_several_beside(two, tmp_path, capsys):
  a, b = (tmp_path / name for name in 'ab')
  for source, target in zip(two, (a, b)):
    shutil.copytree(source, target)
  assert report.write(a) == a / 'report.html'
  assert main.cli(['report', str(a), str(b)]) == 0
  assert capsys.readouterr().out.strip() == str(tmp_path / 'report' / 'report.html')
  assert (tmp_path / 'report' / 'report.html').exists() and not (b / 'report.html').exists()
  for bad, message in (
    ([], 'give run directories'),
    ([str(a), '--output=x'], 'unknown flag --output=x; allowed: --out=DIR'),
    ([str(a), str(a)], 'is given twice'),
  ):
    assert main.cli(['report', *bad]) == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- synthetic


def write_run(folder, config, rows):
  folder.mkdir()
  about = {'config': config, 'environment': {'device': 'toy', 'revision': 'none'}}
  (folder / 'config.json').write_text(json.dumps(about))
  (folder / 'results.p00000.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return folder


def line(arm, seed=0, i=0, **more):
  point = {'generator': 4, 'render': 2, 'verify': 1, 'flops': 9, 'total': 0.25, 'correct': 1}
  return {
    'arm': arm, 'seed': seed, 'id': i, 'prompt': f'p{i}', 'tag': 'x', 'found': True, 'bad': {},
    'searched': 'target', 'ladder': False, 'stage': 6, 'scores': {'target': 0.25},
    'curve': [{**point, 'measured': {'target': 0.25}}], **more,
  }  # fmt: skip


def test_arms_of_one_name_and_different_settings_are_told_apart(tmp_path):
  one = toy_config(0)
  other = copy.deepcopy(toy_config(1, name='wide'))
  other['arms']['beam/w4']['search']['branch'] = 9
  names = ('bon', 'beam/w4')
  roots = [
    write_run(tmp_path / 'a', one, [line(n) for n in names]),
    write_run(tmp_path / 'b', other, [line(n, seed=1) for n in names]),
  ]
  runs = merge.read(roots)
  arms = list(dict.fromkeys(r['arm'] for r in runs.rows))
  assert arms == ['bon', 'beam/w4 @toys', 'beam/w4 @wide']
  assert [stats.family(a) for a in arms[1:]] == ['beam @toys', 'beam @wide']
  assert runs.settings['beam/w4 @wide']['search']['branch'] == 9
  other['name'] = 'toys'
  (tmp_path / 'b' / 'config.json').write_text(json.dumps({'config': other, 'environment': {}}))
  named = {r['arm'] for r in merge.read(roots).rows}
  assert named == {'bon', 'beam/w4 @a', 'beam/w4 @b'}  # then by their directories


def test_lines_told_twice_must_agree(tmp_path):
  config = toy_config(0)
  samples = {'correct': [1], 'totals': [0.25], 'sizes': [1], 'space': '', 'picks': {'best': [0]}}
  rounded = line('bon', scores={'target': 0.25000001}, image='elsewhere')
  roots = [
    write_run(tmp_path / 'a', config, [line('bon'), line('bon', i=1)]),
    write_run(tmp_path / 'b', config, [{**rounded, 'samples': samples}]),
  ]
  rows = merge.read(roots).rows
  assert [(r['id'], 'samples' in r) for r in rows] == [(0, True), (1, False)]
  wrong = line('bon')
  wrong['curve'][0]['correct'] = 0
  roots[1] = write_run(tmp_path / 'c', config, [wrong])
  with pytest.raises(ConfigError, match=r"arm 'bon', seed 0, prompt 0: .*a and .*c hold different"):
    merge.read(roots)


def test_runs_that_do_not_fit_are_one_error(tmp_path):
  config = toy_config(0)
  a = write_run(tmp_path / 'a', config, [line('bon')])
  other = write_run(tmp_path / 'b', config, [line('bon', seed=1, prompt='another')])
  with pytest.raises(
    ConfigError, match="prompt 0 is 'p0' in .*a and 'another' in .*one prompt set"
  ):
    merge.read([a, other])
  metric = write_run(tmp_path / 'c', {**config, 'metric': 'scenes.oracle'}, [line('bon')])
  with pytest.raises(ConfigError, match='only runs with one metric merge'):
    merge.read([a, metric])
  with pytest.raises(ConfigError, match='no run directory'):
    merge.read([a, tmp_path])
  with pytest.raises(ConfigError, match='holds no results yet'):
    merge.read([a, write_run(tmp_path / 'd', config, [])])


def test_runs_without_graded_samples_still_have_a_page(tmp_path):
  """Lines of before samples were graded, and arms over different prompts: the sections that need
  more are left out."""
  rows = [line('bon', i=0), line('beam/w4', i=1)]
  root = write_run(tmp_path / 'a', toy_config(0), rows)
  text = report.write(root).read_text()
  for section in ('equal', 'difficulty', 'rules', 'laws'):
    assert f'id="{section}"' not in text
  assert 'id="arms"' in text and 'id="curve"' in text
