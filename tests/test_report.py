"""Runs merged and the page, on small synthetic runs; runs from end to end are in test_study.py."""

import copy
import json
import pathlib

import pytest

from vtts_jax.cli.run import read_config
from vtts_jax.errors import ConfigError
from vtts_jax.report import page, runs, stats, tables

CONFIG = str(pathlib.Path(__file__).parent / 'configs' / 'toys.py')


def toy_config(seed, **changes):
  return {**read_config([f'--config={CONFIG}']), 'seeds': [seed], **changes}


def test_selection_rules_by_hand():
  def line(i, tag, correct, best, medoid):
    found = {'correct': correct, 'sizes': [1, 2], 'space': 'f', 'totals': [0.0, 0.0]}
    return {
      'arm': 'b', 'id': i, 'tag': tag,
      'samples': {**found, 'picks': {'best': best, 'medoid': medoid}},
    }  # fmt: skip

  rows = [line(0, 'x', [0, 1], [0, 1], [0, 0]), line(1, 'y', [1, 0], [0, 0], [0, 1])]
  rows += [line(2, 'y', [0, 0], [-1, -1], [-1, -1])]
  (found,) = tables.rule_curves(rows)
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
  assert tables.format_amount(value, axis) == text


def write_run(folder, config, rows):
  folder.mkdir()
  about = {'config': config, 'environment': {'device': 'toy', 'revision': 'none'}}
  (folder / 'config.json').write_text(json.dumps(about))
  (folder / 'results.p00000.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return folder


def line(arm, seed=0, i=0, **more):
  point = {'generator': 4, 'observe': 2, 'verify': 1, 'flops': 9, 'total': 0.25, 'correct': 1}
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
  found = runs.read_runs(roots)
  arms = list(dict.fromkeys(r['arm'] for r in found.rows))
  assert arms == ['bon', 'beam/w4 @toys', 'beam/w4 @wide']
  assert [stats.family_name(a) for a in arms[1:]] == ['beam @toys', 'beam @wide']
  assert found.settings['beam/w4 @wide']['search']['branch'] == 9
  other['name'] = 'toys'
  (tmp_path / 'b' / 'config.json').write_text(json.dumps({'config': other, 'environment': {}}))
  named = {r['arm'] for r in runs.read_runs(roots).rows}
  assert named == {'bon', 'beam/w4 @a', 'beam/w4 @b'}  # then by their directories


def test_runs_must_agree_on_a_line(tmp_path):
  config = toy_config(0)
  samples = {'correct': [1], 'totals': [0.25], 'sizes': [1], 'space': '', 'picks': {'best': [0]}}
  rounded = line('bon', scores={'target': 0.25000001}, image='elsewhere')
  roots = [
    write_run(tmp_path / 'a', config, [line('bon'), line('bon', i=1)]),
    write_run(tmp_path / 'b', config, [{**rounded, 'samples': samples}]),
  ]
  rows = runs.read_runs(roots).rows
  assert [(r['id'], 'samples' in r) for r in rows] == [(0, True), (1, False)]
  wrong = line('bon')
  wrong['curve'][0]['correct'] = 0
  roots[1] = write_run(tmp_path / 'c', config, [wrong])
  with pytest.raises(ConfigError, match=r"arm 'bon', seed 0, prompt 0: .*a and .*c hold different"):
    runs.read_runs(roots)


def test_runs_that_do_not_fit_are_one_error(tmp_path):
  config = toy_config(0)
  a = write_run(tmp_path / 'a', config, [line('bon')])
  other = write_run(tmp_path / 'b', config, [line('bon', seed=1, prompt='another')])
  with pytest.raises(
    ConfigError, match="prompt 0 is 'p0' in .*a and 'another' in .*one prompt set"
  ):
    runs.read_runs([a, other])
  metric = write_run(tmp_path / 'c', {**config, 'metric': 'scenes.oracle'}, [line('bon')])
  with pytest.raises(ConfigError, match='only runs with one metric merge'):
    runs.read_runs([a, metric])
  with pytest.raises(ConfigError, match='no run directory'):
    runs.read_runs([a, tmp_path])
  with pytest.raises(ConfigError, match='holds no results yet'):
    runs.read_runs([a, write_run(tmp_path / 'd', config, [])])


def test_runs_without_graded_samples_still_have_a_page(tmp_path):
  """Lines of before samples were graded, and arms over different prompts: the sections that need
  more are left out."""
  rows = [line('bon', i=0), line('beam/w4', i=1)]
  root = write_run(tmp_path / 'a', toy_config(0), rows)
  written = page.write_report(root, out=tmp_path / 'elsewhere')
  assert written.parent == tmp_path / 'elsewhere' and not (root / 'report.html').exists()
  text = written.read_text()
  for section in ('equal', 'difficulty', 'rules', 'laws'):
    assert f'id="{section}"' not in text
  assert 'id="arms"' in text and 'id="curve"' in text
