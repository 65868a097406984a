"""GenEval's rules one by one, on detections made by hand, and its metadata format."""

import json
import pathlib

import pytest

from vtts_jax.data import scenes as world
from vtts_jax.metrics import geneval

ROWS = [json.loads(row) for row in (
  '{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, '
  '"position": ["right of", 0]}], "prompt": "a photo of a tie right of a dog"}',
  '{"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", '
  '"count": 4}], "prompt": "a photo of three cups"}')]
OFFICIAL = pathlib.Path(__file__).parents[2] / 'shared/data/geneval/evaluation_metadata.jsonl'


def _at(name, x=0.0, y=0.0, color='red', side=10.0):
  return {'class': name, 'color': color, 'box': [x, y, x + side, y + side]}


def _ok(metadata, *found):
  return geneval.evaluate(metadata, list(found))[0]


def test_count_needs_n_and_excludes_n_plus_one():
  cups = [_at('cup', 20 * i) for i in range(5)]
  assert [_ok(ROWS[1], *cups[:n]) for n in range(6)] == [False] * 3 + [True] + [False] * 2
  assert geneval.evaluate(ROWS[1], cups[:2]) == (False, 'expected 3 cup, found 2')
  assert 'fewer than 4 cup' in geneval.evaluate(ROWS[1], cups)[1]
  assert _ok(ROWS[1], *cups[:3], _at('dog'))  # others are nobody's business


def test_without_exclude_more_is_fine():
  one = {'include': [{'class': 'cup', 'count': 1}]}
  assert _ok(one, _at('cup'), _at('cup', 20)) and not _ok(one, _at('dog')) and not _ok(one)
  both = {'include': [{'class': 'cup', 'count': 1}, {'class': 'dog', 'count': 1}]}
  assert _ok(both, _at('cup'), _at('dog')) and not _ok(both, _at('cup'))


def test_colour_is_that_of_the_best_detections():
  blue = {'include': [{'class': 'cup', 'count': 1, 'color': 'blue'}]}
  assert _ok(blue, _at('cup', color='blue'), _at('cup', color='red'))
  assert not _ok(blue, _at('cup', color='red'), _at('cup', color='blue'))
  swapped = {'include': [{'class': 'cup', 'count': 1, 'color': 'blue'},
                         {'class': 'dog', 'count': 1, 'color': 'red'}]}
  assert _ok(swapped, _at('dog', color='red'), _at('cup', color='blue'))
  assert not _ok(swapped, _at('dog', color='blue'), _at('cup', color='red'))


@pytest.mark.parametrize('dx, dy, want', [
  (-20, 0, {'left of'}), (20, 0, {'right of'}), (0, -20, {'above'}), (0, 20, {'below'}),
  (2, 0, set()), (-2, 2, set()), (0, 0, set()),  # within 0.1 * (10 + 10) on each axis
  (3, 0, set()), (5, 0, {'right of'}),  # (3 - 2) / 3 is below a half, (5 - 2) / 5 above it
  (-20, 20, {'left of', 'below'}),  # 18 / 28.3 is above a half on both axes
  (-20, 8, {'left of'}),
])  # fmt: skip
def test_relations(dx, dy, want):
  assert geneval.relations(_at('a', dx, dy)['box'], _at('b')['box']) == want


def test_position_looks_from_the_second_to_the_first():
  assert _ok(ROWS[0], _at('tie', 20), _at('dog'))
  assert not _ok(ROWS[0], _at('tie'), _at('dog', 20))
  assert 'not right of' in geneval.evaluate(ROWS[0], [_at('tie'), _at('dog', 20)])[1]
  assert not _ok(ROWS[0], _at('tie', 20))
  with pytest.raises(ValueError, match='beside'):
    _ok({'include': [ROWS[0]['include'][0],
                     {'class': 'tie', 'count': 1, 'position': ['beside', 0]}]},
        _at('tie'), _at('dog'))


def test_overall_is_the_mean_of_the_categories():
  assert geneval.overall([True, False, True], ['a', 'a', 'b']) == (0.75, {'a': 0.5, 'b': 1.0})


def test_the_world_speaks_the_official_format():
  rows = list(ROWS)
  if OFFICIAL.exists():
    rows += [json.loads(row) for row in OFFICIAL.read_text().splitlines()]
    assert len(rows) == 555
  keys = lambda row: {
    (row['tag'], part, k, type(v).__name__) for part in ('include', 'exclude')
    for entry in row.get(part, ()) for k, v in entry.items()}
  official = set().union(*map(keys, rows))
  for row in rows:  # nothing seen: never correct, never an error
    assert geneval.evaluate(row, [])[0] is False
  for row in world.prompts('held', 60):
    if OFFICIAL.exists() or row['tag'] in ('position', 'counting'):
      assert keys(row) <= official
