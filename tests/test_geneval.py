"""GenEval's rules one by one, on detections made by hand, and on all rows of the benchmark."""

import collections
import json

import geneval_oracle as oracle
import numpy as np
import pytest

from vtts_jax.data import geneval as grammar
from vtts_jax.data import prompts
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval
from vtts_jax.metrics import geneval_arrays as rules
from vtts_jax.metrics.geneval_arrays import Limits
from vtts_jax.scenes import world

ROWS = [
  json.loads(row)
  for row in (
    '{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, '
    '"position": ["right of", 0]}], "text": "a photo of a tie right of a dog"}',
    '{"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", '
    '"count": 4}], "text": "a photo of three cups"}',
  )
]
OFFICIAL = prompts.prompts('geneval')


def _at(name, x=0.0, y=0.0, color='red', side=10.0):
  return {'class': name, 'color': color, 'box': [x, y, x + side, y + side]}


def _ok(metadata, *found):
  return geneval.evaluate_detections(metadata, list(found))[0]


def test_count_needs_n_and_excludes_n_plus_one():
  cups = [_at('cup', 20 * i) for i in range(5)]
  assert [_ok(ROWS[1], *cups[:n]) for n in range(6)] == [False] * 3 + [True] + [False] * 2
  assert geneval.evaluate_detections(ROWS[1], cups[:2]) == (False, 'expected 3 cup, found 2')
  assert 'fewer than 4 cup' in geneval.evaluate_detections(ROWS[1], cups)[1]
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
  swapped = {
    'include': [
      {'class': 'cup', 'count': 1, 'color': 'blue'},
      {'class': 'dog', 'count': 1, 'color': 'red'},
    ]
  }
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
  pair = _at('a', dx, dy)['box'], _at('b')['box']
  assert geneval.relations_between(*pair) == oracle.relations(*pair) == want


def test_position_looks_from_the_second_to_the_first():
  assert _ok(ROWS[0], _at('tie', 20), _at('dog'))
  assert not _ok(ROWS[0], _at('tie'), _at('dog', 20))
  assert 'not right of' in geneval.evaluate_detections(ROWS[0], [_at('tie'), _at('dog', 20)])[1]
  assert not _ok(ROWS[0], _at('tie', 20))
  with pytest.raises(ValueError, match='beside'):
    _ok(
      {'include': [ROWS[0]['include'][0], {'class': 'tie', 'count': 1, 'position': ['beside', 0]}]},
      _at('tie'),
      _at('dog'),
    )


def test_overall_is_the_mean_of_the_categories():
  got = geneval.summarize_by_tag(['a', 'a', 'b'], [True, False, True])
  assert got == {'overall': 0.75, 'images': 2 / 3, 'by_tag': {'a': 0.5, 'b': 1.0}}


def test_the_world_speaks_the_official_format():
  keys = lambda row: {
    (row['tag'], part, k, type(v).__name__) for part in ('include', 'exclude')
    for entry in row.get(part, ()) for k, v in entry.items()}  # fmt: skip
  official = set().union(*map(keys, OFFICIAL))
  for row in OFFICIAL:  # nothing seen: never correct, never an error
    assert geneval.evaluate_detections(row, [])[0] is False
  for row in world.prompts('held', 60):
    assert keys(row) <= official


# ---------------------------------------------------------------------------------- the benchmark


def test_prompts_say_what_their_metadata_says():
  assert len(OFFICIAL) == 553
  for row in OFFICIAL:
    assert grammar.parse_prompt(row['text']) == row


@pytest.mark.parametrize('text', [
  'a dog', 'a photo of dog', 'a photo of an dog', 'a photo of a unicorn', 'a photo of three dog',
  'a photo of one dogs', 'a photo of a red dog and a cup', 'a photo of a red dog left of a cup',
  'a photo of a dog beside a cup', 'a photo of a dog and a cup and a cow', 'a photo of a dog.',
])  # fmt: skip
def test_other_prompts_are_refused_by_name(text):
  with pytest.raises(ConfigError, match='is no prompt of GenEval; it must read like') as error:
    grammar.parse_prompt(text)
  assert repr(text) in str(error.value)


OFFSETS = {'left of': (-60, 0), 'right of': (60, 0), 'above': (0, -60), 'below': (0, 60)}


def perfect(row):
  """What a detector would find in a picture that is right in every point, in pixels."""
  found = []
  for i, want in enumerate(row['include']):
    x, y = (100, 100 + 60 * i)
    if 'position' in want:
      x, y = (100 + d for d in OFFSETS[want['position'][0]])
    for j in range(want['count']):
      found.append({**_at(want['class'], x + 30 * j, y, want.get('color', 'red')), 'score': 0.95})
  return found


def broken(row):
  """The same picture, wrong in one point, for every point that the row asks for."""
  for i, d in enumerate(perfect(row)):
    rest = perfect(row)
    low = 0.9 if row['tag'] == 'counting' else 0.3
    yield 'missing', rest[:i] + rest[i + 1 :]
    yield 'unsure', [*rest[:i], {**d, 'score': low}, *rest[i + 1 :]]
  for i, want in enumerate(row['include']):
    found = perfect(row)
    if 'color' in want:
      found[i]['color'] = 'red' if want['color'] != 'red' else 'blue'
      yield 'colour', found
    if 'position' in want:
      found[0]['box'], found[1]['box'] = found[1]['box'], found[0]['box']
      yield 'position', found
      yield 'on top', [{**d, 'box': found[0]['box']} for d in found]
  for ban in row.get('exclude', ()):
    yield 'surplus', [*perfect(row), {**_at(ban['class'], 300, 300), 'score': 0.91}]


def test_perfect_detections_score_one_on_every_row():
  got = geneval.report_benchmark(OFFICIAL, [perfect(row) for row in OFFICIAL], geneval.OFFICIAL)
  assert got['name'] == 'geneval' and all(got['correct']) and not any(got['reasons'])
  assert got['overall'] == got['images'] == got['prompts'] == 1
  assert got['by_tag'] == dict.fromkeys(grammar.TAGS, 1.0)


def test_every_broken_detection_scores_zero_on_every_row():
  rows, kinds, found = zip(*((row, *wrong) for row in OFFICIAL for wrong in broken(row)))
  got = geneval.report_benchmark(rows, found, geneval.OFFICIAL)
  assert not any(got['correct']) and all(got['reasons'])
  assert not any(map(oracle.correct, rows, found))
  kinds = collections.Counter(kinds)
  assert set(kinds) == {'missing', 'unsure', 'colour', 'position', 'on top', 'surplus'}
  assert kinds['position'] == 100 and kinds['surplus'] == 80 and kinds['colour'] == 94 + 2 * 100


def test_confidence_is_higher_when_counting_and_must_be_exceeded():
  # float32(0.3) and float32(0.9) are above 0.3 and 0.9 as doubles, and exceed neither
  scores = [0.95, float(np.float32(0.9)), 0.5, 0.30001, float(np.float32(0.3)), 0.1]
  found = [{**_at('cup', 20 * i), 'score': s} for i, s in enumerate(scores)][::-1]
  left = lambda tag, **limits: [d['score'] for d in geneval.select_detections(found, tag, **limits)]
  assert left('colors') == scores[:4] and left('counting') == scores[:1]
  assert left('counting', limits=Limits(0.1, 0.4)) == scores[:3]


def test_sixteen_of_a_class_and_overlaps_are_kept_by_default():
  found = [{**_at('cup'), 'score': 0.95 - 0.001 * i} for i in range(20)]
  found += [{**_at('dog'), 'score': 0.5}]
  kept = geneval.select_detections(found, 'counting')
  assert [d['score'] for d in kept] == [d['score'] for d in found[:16]]
  count = lambda found, **limits: len(geneval.select_detections(found, 'colors', Limits(**limits)))
  assert count(found) == 17
  assert count(found, overlap=0.99) == 2  # one cup, one dog
  near = [{**_at('cup', x), 'score': 0.9 - x / 100} for x in (0, 5, 20)]
  a, b = (np.array(d['box']) for d in near[:2])
  assert rules.box_overlap(a, b) == oracle.overlap(a, b) == pytest.approx(6 / 16)  # 11 pixels wide
  assert count(near, overlap=6 / 16) == 2 and count(near, overlap=0.4) == 3
  # corners the wrong way round: a box of no area overlaps nothing, not even itself
  inverted = np.array([9.0, 9, 2, 2])
  assert rules.box_overlap(inverted, inverted) == oracle.overlap(inverted, inverted) == 0


def test_colours_are_asked_for_the_best_objects_alone():
  row = grammar.parse_prompt('a photo of a red cup and a blue dog')
  asked = []

  def colours(image, name, group):
    asked.append((image, name, [d['score'] for d in group]))
    return ['red' if name == 'cup' else 'blue'] * len(group)

  found = [{'class': c, 'box': _at(c, x)['box'], 'score': s} for c, x, s in (
    ('cup', 0, 0.4), ('cup', 20, 0.8), ('dog', 40, 0.9), ('cow', 60, 0.9))]  # fmt: skip
  plain = grammar.parse_prompt('a photo of a cup and a dog')
  got = geneval.report_benchmark([plain, row], [found, found], ('owlvit_b32', 'clip_l14'), colours)
  assert got['correct'] == [True, True]
  assert asked == [(1, 'cup', [0.8]), (1, 'dog', [0.9])]
  got = geneval.report_benchmark([row], [found], ('owlvit_b32',), lambda *_: ['green'])
  assert got['reasons'] == ['expected red cup, found green; expected blue dog, found green']


def test_a_position_needs_a_target_that_is_right():
  row = {'include': [{'class': 'dog', 'count': 1, 'color': 'red'},
                     {'class': 'cup', 'count': 1, 'position': ['left of', 0]}]}  # fmt: skip
  assert _ok(row, _at('cup'), _at('dog', 40))
  ok, why = geneval.evaluate_detections(row, [_at('cup'), _at('dog', 40, color='blue')])
  assert not ok and why == 'expected red dog, found blue; nothing for cup to be left of'
  both = {'include': [{'class': 'dog', 'count': 2},
                      {'class': 'cup', 'count': 1, 'position': ['left of', 0]}]}  # fmt: skip
  assert _ok(both, _at('cup'), _at('dog', 40), _at('dog', 40, 20))
  assert not _ok(both, _at('cup', 60), _at('dog', 40), _at('dog', 120))  # of every dog


def test_prompts_count_once_and_scores_of_others_are_labelled():
  row, other = grammar.parse_prompt('a photo of a dog'), grammar.parse_prompt('a photo of two cups')
  dog = [{**_at('dog'), 'score': 0.5}]
  rows, found = [row, row, other, other], [dog, [], [], dog]
  got = geneval.report_benchmark(rows, found, ('yolos_base', 'clip_l14'))
  assert (got['overall'], got['images'], got['prompts']) == (0.25, 0.25, 0.5)
  assert got['name'] == 'geneval_yolos_base_clip_l14 (not official)'
  assert geneval.benchmark_label(geneval.OFFICIAL, ['clip_l14']) == 'geneval (oracle)'
  name = geneval.benchmark_label(['owlvit_b32'], ['owlvit_b32', 'clip_l14'])
  assert name == 'geneval_owlvit_b32 (not official, oracle)'
  with pytest.raises(ValueError, match='2 metadata entries but 1 images'):
    geneval.report_benchmark([row, row], [dog], geneval.OFFICIAL)
