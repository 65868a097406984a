"""The scene world and its oracle: determinism, splits, prompt rows, grades."""

import numpy as np
import pytest

from vtts_jax.errors import ConfigError
from vtts_jax.scenes import labels, oracle, world


def test_rows_depend_on_seed_and_index_only():
  whole = world.sample_scenes(3, np.arange(200))
  part = world.sample_scenes(3, np.arange(50, 60))
  for a, b in zip(whole[1:], part[1:]):
    np.testing.assert_array_equal(a[50:60], b)
  assert world.caption_texts(whole.captions)[50:60] == world.caption_texts(part.captions)
  other = world.sample_scenes(4, np.arange(200))
  assert world.caption_texts(other.captions) != world.caption_texts(whole.captions)


def test_splits_share_no_combination():
  for tag in world.TAGS:
    train, held = world.list_captions(tag, 'train'), world.list_captions(tag, 'held')
    assert len(train.tag) > 2 * len(held.tag) > 0
    assert not set(world.caption_texts(train)) & set(world.caption_texts(held))
    assert (world.caption_splits(train) == 0).all() and (world.caption_splits(held) == 1).all()
  # the mirrored saying of a held-out relation or attribution is held out too
  text = set(world.caption_texts(world.list_captions('position', 'held')))
  assert ('a photo of a square left of a circle' in text) == (
    'a photo of a circle right of a square' in text)


def test_prompts_are_rows_with_geneval_metadata():
  prompts = world.prompts('held', 24, seed=1)
  assert [p['tag'] for p in prompts[:6]] == list(world.TAGS)
  by_tag = {p['tag']: p for p in prompts}
  assert set(by_tag['counting']['exclude'][0]) == {'class', 'count'}
  assert by_tag['position']['include'][1]['position'][1] == 0
  assert world.tokenize_texts([p['text'] for p in prompts]).shape == (24, world.TEXT_LENGTH)
  with pytest.raises(ConfigError, match='count=7'):
    world.prompts('held', 7)
  with pytest.raises(ConfigError, match="'dog' is not in the scene world"):
    world.tokenize_texts(['a photo of a dog'])


def test_oracle_reads_clean_and_noisy_scenes():
  scenes = world.sample_scenes(9, np.arange(600), 'held')
  images, prompts = world.render_scenes(scenes), world.caption_prompts(scenes.captions)
  seen = oracle.detect_objects(images)
  names = lambda found: sorted((d['class'], d['color']) for d in found)
  exact = [names(a) == names(b) for a, b in zip(seen, world.object_detections(scenes))]
  assert np.mean(exact) >= 0.99
  assert oracle.report_grades(images, prompts)['overall'] >= 0.99
  bytes_ = np.round(images * 255).astype(np.uint8)  # as a search collects them
  np.testing.assert_array_equal(oracle.grade(bytes_, prompts), oracle.grade(images, prompts))
  noise = np.random.default_rng(0).normal(0, 0.06, images.shape)
  assert oracle.report_grades(images + noise, prompts)['overall'] >= 0.99
  wrong, aspect = labels.wrong_captions(scenes, 1, np.arange(600), 'held')
  assert not oracle.grade(images, world.caption_prompts(wrong)).any()
  assert set(aspect) == set(range(5))
  empty = np.full((2, 32, 32, 3), 0.5)
  empty[1, 3, 3] = 1  # a speck is no object
  assert oracle.detect_objects(empty) == [[], []]
  assert not oracle.grade(np.full((1, 32, 32, 3), np.nan), prompts[:1]).any()


def test_training_negatives_stay_in_the_training_split():
  scenes = world.sample_scenes(9, np.arange(400))
  wrong, _ = labels.wrong_captions(scenes, 1, np.arange(400))
  assert (world.caption_splits(wrong) == 0).all()
