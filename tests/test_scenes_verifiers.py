"""The shipped scene verifiers: protocol, cost, and what they know, on held-out scenes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.components import load
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval
from vtts_jax.scenes import labels, world
from vtts_jax.scenes.models import soft_detector
from vtts_jax.testing import laws

PAIRS = 600
VERIFIERS = {
  'clip_a': ('scenes.clip', {'which': 'a'}),
  'clip_b': ('scenes.clip', {'which': 'b'}),
  'detector': ('scenes.detector', {}),
  'quality': ('scenes.quality', {}),
}


def _verifier(name):
  path, settings = VERIFIERS[name]
  return load(path, **settings)


@functools.cache
def _pairs():
  """Held-out pictures, right and wrong captions, what is wrong: relations as often as two more."""
  scenes = world.sample_scenes(301, np.arange(6 * PAIRS), 'held')
  wrong, aspect = labels.wrong_captions(scenes, 302, np.arange(6 * PAIRS), 'held')
  counts = {'relation': PAIRS // 3}
  order = np.concatenate([np.flatnonzero(aspect == k)[:counts.get(what, PAIRS // 6)]
                          for k, what in enumerate(labels.ASPECTS)])
  assert len(order) == PAIRS
  take = lambda tree: type(tree)(*(f.take_rows(order) if isinstance(f, world.Captions) else f[order]
                                   for f in tree))
  scenes = take(scenes)
  texts = (world.caption_texts(captions) for captions in (scenes.captions, wrong.take_rows(order)))
  return world.render_scenes(scenes), *texts, aspect[order]


def _scores(verifier, images, texts):
  """`[R]`: each picture under its own caption, in one call of fixed shape."""
  params = verifier.load()

  @jax.jit
  def score(prompt, images):
    vctx, observed = verifier.encode(params, prompt), {'image': images[:, None]}
    found = verifier.score(params, vctx, observed)
    return found[verifier.names[0]][:, 0]

  prompt = jax.tree.map(jnp.asarray, verifier.tokenize(core.as_prompts(texts)))
  return np.asarray(score(prompt, images))


@pytest.mark.parametrize('name', VERIFIERS)
def test_protocol(name):
  images, texts, *_ = _pairs()
  laws.check_verifier(_verifier(name), texts[:2], images[:6].reshape(2, 3, 32, 32, 3))


@pytest.mark.parametrize('name', VERIFIERS)
def test_cost_is_what_is_compiled(name):
  verifier = _verifier(name)
  params = verifier.load()
  prompt = jax.tree.map(jnp.asarray, verifier.tokenize([{'text': 'a photo of a red ring'}] * 2))
  vctx = verifier.encode(params, prompt)
  observed = {'image': jnp.full((2, 8, 32, 32, 3), 0.5)}

  def flops(f, *args):
    return jax.jit(f).lower(params, *args).compile().cost_analysis()['flops']

  score = flops(verifier.score, vctx, observed) / 16
  assert verifier.cost('score').verify == 1
  assert score == pytest.approx(verifier.cost('score').flops, rel=0.08)
  if name.startswith('clip'):
    encode = flops(verifier.encode, prompt) / 2
    assert encode == pytest.approx(verifier.cost('encode').flops, rel=0.08)


@pytest.mark.parametrize('name', ['clip_a', 'clip_b', 'detector'])
def test_tells_a_caption_from_one_wrong_in_a_detail(name):
  images, right, wrong, aspect = _pairs()
  verifier = _verifier(name)
  better = _scores(verifier, images, right) > _scores(verifier, images, wrong)
  assert better.mean() >= 0.90
  for k, what in enumerate(labels.ASPECTS):
    assert better[aspect == k].mean() >= (0.90 if what == 'relation' else 0.85), what


def test_quality_prefers_the_clean_picture():
  images, texts, *_ = _pairs()
  verifier = _verifier('quality')
  clean = _scores(verifier, images[:200], texts[:200])
  noise = np.random.default_rng(0).normal(0, 0.15, images[:200].shape).astype(np.float32)
  mixed = (images[:200] + np.roll(images[:200], 1, 0)) / 2
  assert (clean >= 0).all() and (clean <= 1).all()
  for corrupted in (images[:200] + noise, mixed):
    assert (clean > _scores(verifier, corrupted, texts[:200])).mean() >= 0.95


def test_parse_reads_the_whole_grammar():
  for tag in world.TAGS:
    for split in world.SPLITS:
      captions = world.list_captions(tag, split)
      got = soft_detector.parse_captions(world.caption_texts(captions))
      want = np.stack([getattr(captions, f) for f in soft_detector.FIELDS], 1)
      np.testing.assert_array_equal(got, want)
  for text in ('a photo of', 'a photo of a red', 'a photo of a circle and a red ring',
               'circle', 'a photo of two ring', 'a photo of a ring above', 'a of photo a ring'):
    with pytest.raises(ConfigError, match='not a sentence of the scene world'):
      soft_detector.parse_captions([text])


def test_satisfaction_is_genevals_rule_on_certain_detections():
  scenes = world.sample_scenes(7, np.arange(200))
  wrong, _ = labels.wrong_captions(scenes, 8, np.arange(200))
  kind, colour = soft_detector.place_targets(scenes)
  sure = lambda x, n: np.log(np.eye(n, dtype=np.float32)[x] * 0.998 + 1e-3)[:, None]
  for captions in (scenes.captions, wrong):
    targets = soft_detector.parse_captions(world.caption_texts(captions))
    log = soft_detector.satisfaction_log_prob(sure(kind, 6), sure(colour, 8), targets)[:, 0]
    want = [geneval.evaluate_detections(m, o)[0]
            for m, o in zip(world.caption_prompts(captions), world.object_detections(scenes))]
    np.testing.assert_array_equal(np.asarray(log) > np.log(0.5), want)


def test_labels_are_genevals_rule_on_the_objects():
  scenes = world.sample_scenes(9, np.arange(60))
  wrong, _ = labels.wrong_captions(scenes, 8, np.arange(60))
  said = world.Captions(*map(np.concatenate, zip(scenes.captions, wrong)))
  want = [[geneval.evaluate_detections(m, o)[0] for m in world.caption_prompts(said)]
          for o in world.object_detections(scenes)]
  np.testing.assert_array_equal(labels.true_captions(said, scenes), want)


def test_settings_that_do_not_exist_are_refused():
  with pytest.raises(ConfigError, match="which='c'"):
    load('scenes.clip', which='c')
  with pytest.raises(ConfigError, match='unknown setting'):
    load('scenes.quality', size=3)
