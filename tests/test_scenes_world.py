"""The scene world, its oracle, and GenEval's rules: determinism, splits, and judgement by hand."""

import numpy as np
import pytest

from vtts_jax.metrics import geneval
from vtts_jax.scenes import oracle as oracle
from vtts_jax.scenes import world as world


def test_rows_depend_on_seed_and_index_only():
  whole = world.sample(3, np.arange(200))
  part = world.sample(3, np.arange(50, 60))
  for a, b in zip(whole[1:], part[1:]):
    np.testing.assert_array_equal(a[50:60], b)
  assert world.texts(whole.captions)[50:60] == world.texts(part.captions)
  assert world.texts(world.sample(4, np.arange(200)).captions) != world.texts(whole.captions)


def test_splits_share_no_combination():
  for tag in world.TAGS:
    train, held = world.grammar(tag, 'train'), world.grammar(tag, 'held')
    assert len(train.tag) > 2 * len(held.tag) > 0
    assert not set(world.texts(train)) & set(world.texts(held))
    assert (world.splits(train) == 0).all() and (world.splits(held) == 1).all()
  # the mirrored saying of a held-out relation or attribution is held out too
  text = set(world.texts(world.grammar('position', 'held')))
  assert ('a photo of a square left of a circle' in text) == (
    'a photo of a circle right of a square' in text)


def test_prompts_are_geneval_metadata():
  prompts = world.prompts('held', 24, seed=1)
  assert [p['tag'] for p in prompts[:6]] == list(world.TAGS)
  by_tag = {p['tag']: p for p in prompts}
  assert set(by_tag['counting']['exclude'][0]) == {'class', 'count'}
  assert by_tag['position']['include'][1]['position'][1] == 0
  assert world.tokenize([p['prompt'] for p in prompts]).shape == (24, world.TEXT_LENGTH)
  with pytest.raises(ValueError, match='count=7'):
    world.prompts('held', 7)
  with pytest.raises(ValueError, match="'dog' is not in the scene world"):
    world.tokenize(['a photo of a dog'])


def test_oracle_reads_clean_and_noisy_scenes():
  scenes = world.sample(9, np.arange(600), 'held')
  images, metadata = world.render(scenes), world.metadata(scenes.captions)
  seen = oracle.detect(images)
  names = lambda found: sorted((d['class'], d['color']) for d in found)
  exact = [names(a) == names(b) for a, b in zip(seen, world.objects(scenes))]
  assert np.mean(exact) >= 0.99
  assert oracle.report(images, metadata)['overall'] >= 0.99
  noise = np.random.default_rng(0).normal(0, 0.06, images.shape)
  assert oracle.report(images + noise, metadata)['overall'] >= 0.99
  wrong, aspect = world.negatives(scenes, 1, np.arange(600), 'held')
  assert not oracle.score(images, world.metadata(wrong)).any()
  assert set(aspect) == set(range(5))
  empty = np.full((2, 32, 32, 3), 0.5)
  empty[1, 3, 3] = 1  # a speck is no object
  assert oracle.detect(empty) == [[], []]
  assert not oracle.score(np.full((1, 32, 32, 3), np.nan), metadata[:1]).any()


def test_training_negatives_stay_in_the_training_split():
  scenes = world.sample(9, np.arange(400))
  wrong, _ = world.negatives(scenes, 1, np.arange(400))
  assert (world.splits(wrong) == 0).all()


def _box(x, y, side=10):
  return [x, y, x + side, y + side]


def test_geneval_by_hand():
  at = lambda name, color, *box: {'class': name, 'color': color, 'box': _box(*box)}
  two = {'tag': 'counting', 'include': [{'class': 'cup', 'count': 2}],
         'exclude': [{'class': 'cup', 'count': 3}]}
  cups = [at('cup', 'red', 20 * i, 0) for i in range(3)]
  assert [geneval.evaluate(two, cups[:n])[0] for n in (1, 2, 3)] == [False, True, False]
  left = {'tag': 'position', 'include': [
    {'class': 'dog', 'count': 1}, {'class': 'cup', 'count': 1, 'position': ['left of', 0]}]}
  assert geneval.evaluate(left, [at('dog', 'red', 20, 0), at('cup', 'red', 0, 0)])[0]
  assert not geneval.evaluate(left, [at('dog', 'red', 0, 0), at('cup', 'red', 20, 0)])[0]
  # margin: offsets within 0.1 of the summed sides (2 px here) are no relation
  assert geneval.relations(_box(0, 0), _box(2, 0)) == set()
  assert geneval.relations(_box(0, 0), _box(8, 0)) == {'left of'}
  assert geneval.relations(_box(0, 0), _box(20, -20)) == {'left of', 'below'}
  paint = {'tag': 'colors', 'include': [{'class': 'cup', 'count': 1, 'color': 'blue'}]}
  ok, reason = geneval.evaluate(paint, cups[:1])
  assert not ok and reason == 'expected blue cup, found red'
  assert geneval.summarize(['a', 'a', 'b'], [1, 0, 1]) == {
    'overall': 0.75, 'images': 2 / 3, 'by_tag': {'a': 0.5, 'b': 1.0}}
