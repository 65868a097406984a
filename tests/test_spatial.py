"""The spatial verifier: rules against metrics/geneval.py, crops against PIL, and its protocol."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vtts_jax.components import load
from vtts_jax.data import geneval as grammar
from vtts_jax.data import prompts as prompt_files
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval
from vtts_jax.metrics import geneval_arrays as geneval_rules
from vtts_jax.models.owlvit import modeling as owl
from vtts_jax.study import grading
from vtts_jax.testing import laws, replay
from vtts_jax.verifiers import ensemble
from vtts_jax.verifiers.parts import colours, detectors
from vtts_jax.verifiers.parts import image_encoder as towers

HERE = pathlib.Path(__file__).parent
ROWS = prompt_files.prompts('geneval')
PROMPTS = [
  'a photo of a dog', 'a photo of three buses', 'a photo of a red car and a blue orange',
  'a photo of a cup left of a cow',
]  # fmt: skip
T = 20  # detections of a class that the made-up detector reports


def made(rows, pictures, seed):
  """Detections near what the rows ask for, so that many are right and many just wrong: lists as
  metrics/geneval.py takes them, and boxes `[B, M, 2 T, 4]`, scores `[B, M, 2, 2 T]`, log-
  probabilities of colours `[B, M, 2, 2 T, 10]`."""
  rng = np.random.default_rng(seed)
  table, names = geneval_rules.targets(rows, 2)
  shape = (len(rows), pictures)
  boxes = np.zeros((*shape, 2 * T, 4), np.float32)
  scores, hues = np.zeros((*shape, 2, 2 * T), np.float32), np.zeros((*shape, 2, 2 * T, 10))
  lists = []
  for b, m in np.ndindex(shape):
    found = []
    for e in range(len({*names[b]})):
      count = max(0, table['least'][b, e] + rng.choice([-1, 0, 0, 0, 1]))
      for t in range(e * T, e * T + count):
        corner = rng.choice([20, 24, 40, 60], 2) + rng.random(2) * 4
        boxes[b, m, t] = [*corner, *(corner + rng.uniform(5, 30, 2))]
        scores[b, m, e, t] = rng.choice([0.25, 0.6, 0.92, 0.95]) + rng.random() / 100
        hue = table['colour'][b, e] if rng.random() < 0.7 else rng.integers(10)
        hues[b, m, e, t, hue] = 5
        found.append({
          'class': names[b][e], 'box': boxes[b, m, t].tolist(), 'color': grammar.COLOURS[hue],
          'score': float(scores[b, m, e, t]),
        })  # fmt: skip
    lists.append(found)
  return lists, boxes, scores, np.asarray(jax.nn.log_softmax(hues, -1), np.float32)


@functools.partial(jax.jit, static_argnames=('mode', 'overlap'))
def judged(targets, boxes, scores, hues, threshold, mode, overlap):
  index, best = geneval_rules.best(boxes, scores, overlap)
  pick = lambda x: jnp.take_along_axis(x, index[..., None], 3)
  return getattr(geneval_rules, mode)(targets, pick(boxes[:, :, None]), best, pick(hues), threshold)


def judge(rows, boxes, scores, hues, mode, overlap):
  targets, _ = geneval_rules.targets(rows, 2)
  threshold = np.where(targets['counting'], 0.9, 0.3).astype(np.float32)
  return np.asarray(judged(targets, boxes, scores, hues, threshold, mode, overlap))


@pytest.mark.parametrize('overlap', [1.0, 0.3])
def test_strict_is_genevals_rule_on_every_row(overlap):
  lists, *arrays = made(ROWS, 8, seed=int(10 * overlap))
  have = judge(ROWS, *arrays, 'strict', overlap)
  limits = (geneval.CONFIDENCE, geneval.COUNTING, overlap)
  rows = [row for row in ROWS for _ in range(8)]
  want = geneval.report(rows, lists, geneval.OFFICIAL, limits=limits)
  np.testing.assert_array_equal(have.ravel(), np.array(want['correct'], np.float32))
  assert all(0.05 < share < 0.9 for share in want['by_tag'].values()), want['by_tag']


def test_best_takes_sixteen_in_order():
  scores = np.random.default_rng(0).random((1, 1, 2, 30), np.float32)
  boxes = np.zeros((1, 1, 30, 4), np.float32) + np.arange(30)[:, None] * 50
  index, score = geneval_rules.best(jnp.array(boxes), jnp.array(scores), 0.5)
  np.testing.assert_array_equal(index, np.argsort(-scores, -1)[..., :16])
  np.testing.assert_array_equal(score, -np.sort(-scores, -1)[..., :16])


def test_partial_credit_climbs_to_what_strict_asks_for():
  """Within [0, 1], the higher the surer, and on average higher where the rule holds."""
  _, boxes, scores, hues = made(ROWS, 8, seed=3)
  earned = judge(ROWS, boxes, scores, hues, 'partial', 1.0)
  right = judge(ROWS, boxes, scores, hues, 'strict', 1.0) > 0
  assert earned.min() >= 0 and earned.max() <= 1
  tags = np.repeat([row['tag'] for row in ROWS], 8).reshape(-1, 8)
  for tag in grammar.TAGS:
    assert earned[(tags == tag) & right].mean() > earned[(tags == tag) & ~right].mean() + 0.1
  sure = judge(ROWS, boxes, np.where(scores > 0.5, 0.999999, 0.0), hues, 'strict', 1.0) > 0
  hues = np.asarray(jax.nn.log_softmax(50 * hues, -1))
  sharp = judge(ROWS, boxes, np.where(scores > 0.5, 0.999999, 0.0), hues, 'partial', 1.0)
  np.testing.assert_allclose(sharp[sure], 1, atol=1e-3)


def credit(prompt, *objects, hue=None):
  """Partial credit of (entry, x, y, score) objects of 10 x 10 pixels."""
  boxes, scores = np.zeros((1, 1, 8, 4), np.float32), np.zeros((1, 1, 2, 8), np.float32)
  for i, (entry, x, y, score) in enumerate(objects):
    boxes[0, 0, i], scores[0, 0, entry, i] = [x, y, x + 10, y + 10], score
  hues = np.full((1, 1, 2, 8, 10), -np.inf if hue else np.log(0.1), np.float32)
  if hue:
    hues[..., grammar.COLOURS.index(hue)] = 0
  return float(judge([grammar.parse(prompt)], boxes, scores, hues, 'partial', 1.0)[0, 0])


def test_partial_credit_by_hand():
  near = lambda x: pytest.approx(x, abs=1e-4)
  assert credit('a photo of a dog', (0, 0, 0, 0.3)) == near(0.5)  # at the threshold
  assert credit('a photo of a dog', (0, 0, 0, 0.9)) == near(9 / (9 + 3 / 7))
  two = [(0, 0, 0, 0.999999), (0, 40, 0, 0.999999)]
  assert credit('a photo of three dogs', *two) == near(2 / 3)
  assert credit('a photo of two dogs', *two) == near(1)
  assert credit('a photo of two dogs', *two, (0, 80, 0, 0.999999)) == near(1 / 2)
  assert credit('a photo of two dogs', *two, (0, 80, 0, 0.9)) == near(1 - 0.5 / 2)
  dog = (0, 0, 0, 0.999999)
  assert credit('a photo of a red dog', dog, hue='red') == near(1)
  assert credit('a photo of a red dog', dog, hue='blue') == near(1 / 2)
  assert credit('a photo of a red dog', dog) == near(1.1 / 2)
  left = 'a photo of a cup left of a dog'  # entry 0 is the dog, entry 1 the cup
  assert credit(left, (0, 40, 0, 0.999999), (1, 0, 0, 0.999999)) == near(1)
  assert credit(left, (0, 0, 0, 0.999999), (1, 40, 0, 0.999999)) == near(2 / 3)
  assert credit(left, (0, 0, 40, 0.999999), (1, 0, 0, 0.999999)) == near((2 + 0.5) / 3)  # above
  assert credit(left, dog) == near(1 / 3)


def test_what_is_excluded_stands_alone_or_with_its_class():
  row = {'include': [{'class': 'dog', 'count': 1}], 'exclude': [{'class': 'cat', 'count': 1}],
         'prompt': 'a dog, no cat', 'tag': 'single_object'}  # fmt: skip
  targets, names = geneval_rules.targets([row], 2)
  assert names == [['dog', 'cat']]
  assert targets['least'].tolist() == [[1, 0]] and targets['most'].tolist() == [[10_000, 0]]
  with pytest.raises(ConfigError, match='entries=1: the metadata of .* has 2'):
    geneval_rules.targets([row], 1)
  for change, match in (
    ({'color': 'mauve'}, "color='mauve'; must be one of red"), ({'count': 17}, 'in 1 .. 16'),
    ({'position': ['beside', 0]}, "position='beside'"), ({'position': ['above', 0]}, 'no entry'),
  ):  # fmt: skip
    wrong = {'include': [{'class': 'dog', 'count': 1, **change}]}
    with pytest.raises(ConfigError, match=match):
      geneval_rules.targets([wrong], 2)


# ------------------------------------------------------------------------------------------ crops


def test_crops_are_what_pil_cuts():
  """PIL's crop, then torchvision's Resize and CenterCrop; also painted around a mask."""
  rng, side = np.random.default_rng(0), 24
  images = rng.integers(0, 256, (2, 50, 70, 3), np.uint8)
  boxes = np.array([
    [[3.4, 5.5, 40.5, 30.49], [10, 2, 17, 49], [-9, -4, 90, 60]],
    [[60.2, 40, 69.9, 49.7], [5, 5, 5.2, 5.3], [20, 20, 44, 44]],
  ])  # fmt: skip
  masks = rng.random((2, 3, 50, 70)) < 0.7
  cut = jax.jit(colours.crops, static_argnums=2)
  scaled = images / np.float32(255)
  for given in (None, masks):
    have = np.rint(np.asarray(cut(scaled, boxes, side, given)) * 255)
    assert have.shape == (2, 3, side, side, 3)
    for i, j in np.ndindex(2, 3):
      picture = Image.fromarray(images[i])
      if given is not None:
        blank = Image.new('RGB', picture.size, '#999')
        picture = Image.composite(picture, blank, Image.fromarray(masks[i, j]))
      left, top, right, bottom = np.clip(np.round(boxes[i, j]), 0, [70, 50, 70, 50]).astype(int)
      picture = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
      w, h = picture.size
      new = (side * w // min(w, h), side * h // min(w, h))
      picture = picture.resize(new, Image.Resampling.BICUBIC)
      x, y = round((new[0] - side) / 2), round((new[1] - side) / 2)
      want = np.asarray(picture.crop((x, y, x + side, y + side)), np.float32)
      gap = np.abs(have[i, j] - want)
      assert gap.max() <= 1 and (gap > 0).mean() < 0.03, (i, j, gap.max(), (gap > 0).mean())


def test_colours_are_clips_averaged_templates():
  clip = load('verifiers.geneval', random='tiny_yolos').clip
  params = clip.load()
  ids = clip.tokenize([['cup', 'wine glass']])
  assert ids.shape == (1, 2, 10, 3, 12) and colours.TEMPLATES[1] == 'a photo of a {}-colored {}'
  assert (ids[0, 0, 1, 2] == ids[0, 1, 1, 2]).all()  # 'a photo of a orange object'
  assert (ids[0, :, :, 0] != ids[0, :, :, 1]).any(-1).all()
  rows = jax.jit(clip.encode)(params, ids)
  images = np.random.default_rng(1).random((1, 2, 30, 30, 3), np.float32)
  boxes = np.broadcast_to(np.float32([0, 0, 30, 30]), (1, 2, 2, 4))
  have = jax.jit(clip.classify)(params, rows, images, boxes)

  @jax.jit
  def by_hand(params):
    model, pixels = clip.merge(params), colours.modeling.preprocess(clip.config, images[0])
    texts = model.embed_text(ids.reshape(-1, 12)).reshape(2, 10, 3, -1).mean(2)
    texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    return 100 * jnp.einsum('md,ecd->mec', model.embed_image(pixels), texts)

  want = jax.nn.log_softmax(by_hand(params), -1)
  np.testing.assert_allclose(have[0], want, atol=2e-3)


# ------------------------------------------------------------------------------------ the verifier


@pytest.fixture(autouse=True, scope='module')
def load_once():
  """Random weights are made by a program of their own: here once for each size."""
  load_, towers.Tower.load = towers.Tower.load, functools.cache(towers.Tower.load)
  yield
  towers.Tower.load = load_


@pytest.mark.parametrize('settings', [
  {'random': 'tiny'}, {'random': 'tiny_yolos', 'mode': 'strict'},
], ids=str)  # fmt: skip
def test_protocol(settings):
  verifier = load('verifiers.geneval', limits=(0.05, 0.1, 0.5), **settings)
  images = np.random.default_rng(0).random((4, 3, 40, 48, 3), np.float32)
  laws.check_verifier(verifier, PROMPTS, images)


def test_broken_pictures_and_half_precision():
  verifier = load('verifiers.geneval', limits=(0.05, 0.1, 0.5), random='tiny')
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), verifier.load())
  prompt = verifier.tokenize(PROMPTS)
  run = lambda x: verifier.score(params, verifier.encode(params, prompt), x)[verifier.names[0]]
  score, images = jax.jit(run), np.random.default_rng(0).random((4, 3, 40, 48, 3), np.float32)
  clean, spoiled = np.asarray(score(images)), images.copy()
  spoiled[1, 2, 3, 3, 0] = np.nan
  have = np.asarray(score(spoiled))
  assert np.isnan(have[1, 2]) and np.isnan(have).sum() == 1
  np.testing.assert_array_equal(np.delete(have, 5), np.delete(clean, 5))
  assert have.dtype == np.float32 and clean.min() >= 0 and clean.max() <= 1


@pytest.mark.parametrize('size', ['tiny', 'tiny_yolos'])
def test_strict_is_the_benchmark_on_its_own_detections(size):
  """Of random detectors that see objects everywhere, under limits that some of them pass."""
  prompts = ['a photo of two dogs', 'a photo of a red car', 'a photo of a cup left of a cow'] * 4
  verifier = load('verifiers.geneval', random=size, mode='strict')
  params = jax.tree.map(lambda x: x * 3, verifier.load())  # louder: scores and places differ
  images = np.random.default_rng(5).random((12, 4, 40, 40, 3), np.float32)
  found = verifier.detections(params, prompts, images)
  ranked = np.sort([d['score'] for row in found for seen in row for d in seen])
  limits = (float(ranked[len(ranked) // 2]), float(ranked[-len(ranked) // 4]), 0.9)
  verifier = load('verifiers.geneval', random=size, mode='strict', limits=limits)
  found = verifier.detections(params, prompts, images)
  vctx = verifier.encode(params, verifier.tokenize(prompts))
  have = np.asarray(jax.jit(verifier.score)(params, vctx, images)[verifier.names[0]])
  rows = [grammar.parse(p) for p in prompts for _ in range(4)]
  flat = [seen for row in found for seen in row]
  want = geneval.report(rows, flat, verifier.judges, limits=limits)
  np.testing.assert_array_equal(have.ravel(), np.array(want['correct'], np.float32))
  assert 0 < have.mean() < 1


def test_owl_asks_for_every_class_in_every_colour():
  """Scores and colours of a class are those of its own queries, whatever the batch."""
  model = load('verifiers.geneval', random='tiny').model
  params, names = model.load(), [['dog', 'tv remote'], ['cup', 'cow']]
  prompt = model.tokenize(names, True)
  assert prompt['ids'].shape == (2, 22, 16)
  images = np.random.default_rng(2).random((2, 1, 40, 24, 3), np.float32)

  @jax.jit
  def found(params, ids):
    return model.detect(params, model.encode(params, {'ids': ids}), images, 2)

  @jax.jit
  def alone(params, images, ids):
    net = model.merge(params)
    x = net.features(owl.prepare(model.config, images))
    return net.logits(x, net.text(ids)[None])[0], net.boxes(x)[0]

  boxes, scores, hues = found(params, prompt['ids'])
  for b, e in np.ndindex(2, 2):
    words = [names[b][e]] + [f'{hue} {names[b][e]}' for hue in grammar.COLOURS]
    said = [f'a photo of {grammar.article(w)}' for w in words]
    ids, _ = detectors.texts.tokens(said, '', 16, 64)
    logits, share = alone(params, images[b], ids)
    np.testing.assert_allclose(scores[b, 0, e], jax.nn.sigmoid(logits[:, 0]), atol=1e-5)
    want = jax.nn.log_softmax(logits[:, 1:], -1).T
    np.testing.assert_allclose(hues[b, 0, e], want, atol=1e-4)
    sides = boxes[b, 0, :, 2:] - boxes[b, 0, :, :2]
    np.testing.assert_allclose(sides, share[:, 2:] * np.array([24, 40]), rtol=1e-4)


def test_yolos_looks_up_cocos_numbers():
  model = load('verifiers.geneval', random='tiny_yolos').model
  params = model.load()
  prompt = model.tokenize([['computer mouse', 'person']], False)
  assert prompt['index'].tolist() == [[74, 1]]
  images = np.random.default_rng(2).random((1, 2, 40, 40, 3), np.float32)
  boxes, scores, hues = jax.jit(lambda p, x: model.detect(p, prompt['index'], x, 2))(params, images)
  prepared = detectors.yolos.prepare(model.config, images[0])
  logits, _ = jax.jit(lambda p, x: model.merge(p)(x))(params, prepared)
  assert hues is None and boxes.shape == (1, 2, 20, 4)
  want = jax.nn.softmax(logits)[..., [74, 1]].swapaxes(1, 2)
  np.testing.assert_allclose(scores[0], want, atol=1e-6)
  with pytest.raises(ConfigError, match="'unicorn': no class of COCO's"):
    model.tokenize([['unicorn', 'person']], False)


def test_metadata_from_a_file(tmp_path):
  path = tmp_path / 'mine.jsonl'
  row = {
    'prompt': 'Two unicorns.',
    'tag': 'counting',
    'include': [{'class': 'unicorn', 'count': 2}],
  }
  path.write_text(json.dumps(row) + '\n' + json.dumps({'prompt': 'bare'}) + '\n')
  verifier = load('verifiers.geneval', random='tiny', metadata=str(path))
  targets = verifier.tokenize(['Two unicorns.'])['targets']
  assert targets['least'].tolist() == [[2, 0]] and targets['counting'].tolist() == [True]
  for text in ('bare', 'a photo of a dog'):
    with pytest.raises(
      ConfigError, match=f'has no row with an include for the prompt {text!r}'
    ):
      verifier.tokenize([text])
  with pytest.raises(ConfigError, match='no such file'):
    load('verifiers.geneval', random='tiny', metadata='nowhere.jsonl').tokenize(['x'])


def checkpoint(folder, name):
  """A folder as on the hub, from a fixture."""
  config, source, *_ = replay.read(str(HERE / 'golden' / name))
  folder.mkdir()
  save_file({k: source.get(k) for k in source.names()}, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config['params']))
  return str(folder)


def test_a_checkpoint_says_which_detector_it_is(tmp_path):
  verifier = load('verifiers.geneval', model_from=checkpoint(tmp_path / 'my-owl', 'owlv2.npz'))
  assert verifier.names == ('spatial_my_owl',) and verifier.model.config.v2
  params = verifier.load()['detector']
  x = np.zeros((1, 1, 20, 20, 3), np.float32)
  queries = np.ones((1, 22, 8), np.float32)
  boxes, *_ = jax.jit(lambda p: verifier.model.detect(p, queries, x, 2))(params)
  assert boxes.shape == (1, 1, 16, 4)
  few = load('verifiers.geneval', model_from=checkpoint(tmp_path / 'few', 'yolos.npz'))
  with pytest.raises(ConfigError, match="has 7 classes; must be COCO's 92"):
    few.check()
  with pytest.raises(FileNotFoundError, match='nothing-here'):
    load('verifiers.geneval', model_from='nothing-here.safetensors').check()


def test_names_tell_the_models_and_oracles():
  name = lambda **given: load('verifiers.geneval', **given).names[0]
  assert name() == 'spatial_owlvit_b32' and name(mode='strict') == 'spatial_strict_owlvit_b32'
  assert name(colour='clip') == 'spatial_owlvit_b32_clip_l14'
  assert name(model_from='hustvl/yolos-small@abc') == 'spatial_yolos_small_clip_l14'
  assert name(random='owlv2_l14') == 'spatial_owlv2_l14'
  owl_, yolo = load('verifiers.geneval'), load('verifiers.geneval', model_from='hustvl/yolos-tiny')
  both = ensemble.build(members={'a': owl_, 'b': yolo}, weights={'a': 1, 'b': 0})
  assert geneval.judges_of(yolo) == {'yolos_tiny', 'clip_l14'}
  assert geneval.judges_of(both) == {'owlvit_b32'}  # the other is only measured
  label = functools.partial(geneval.column, searched=geneval.judges_of(both))
  assert label(owl_.judges) == 'geneval_owlvit_b32 (not official, oracle)'
  assert label(yolo.judges) == 'geneval_yolos_tiny_clip_l14 (not official)'


def test_what_cannot_be_run_is_said():
  for settings, match in (
    ({'mode': 'soft'}, "verifier.mode='soft': must be one of 'partial', 'strict'"),
    ({'colour': 'rgb'}, "verifier.colour='rgb'"), ({'entries': 0}, 'entries=0: must be at least 1'),
    ({'limits': (0.3, 0.9)}, r'limits=\(0.3, 0.9\)'), ({'limits': (0.3, 0.9, 2.0)}, 'an overlap'),
    ({'random': 'huge'}, "verifier.random='huge': must be one of tiny"),
    ({'dtype': 'float16'}, "verifier.dtype='float16'"),
    ({'random': 'tiny_yolos', 'colour': 'query'}, "colour='query': tiny_yolos cannot"),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=match):
      load('verifiers.geneval', **settings)
  with pytest.raises(ConfigError, match='is no prompt of GenEval'):
    load('verifiers.geneval', random='tiny').tokenize(['hello'])


def test_cost_is_the_detectors_and_the_clips():
  owl_ = load('verifiers.geneval', random='owlvit_b32')
  # 577 tokens of 85 M parameters and their attention; OWL-ViT's paper gives no number
  assert 1.0e11 < owl_.cost('score').flops < 1.25e11 and owl_.cost('score').verify == 1
  clipped = load('verifiers.geneval', random='owlvit_b32', colour='clip')
  crop = 2 * colours.modeling.flops(colours.SIZES['tiny'], 'image')
  fewer = 2 * 24**2 * 20 * 512  # the queries of ten colours for two classes
  assert clipped.cost('score').flops == owl_.cost('score').flops - fewer + crop


def test_a_verifier_as_metric():
  """Pictures are right where the strict score is 1; the label says whose accuracy it is."""
  settings = {
    'name': 'verifiers.geneval',
    'mode': 'strict',
    'random': 'tiny',
    'limits': (0.001, 0.001, 0.5),
  }
  texts = ['a photo of a dog', 'a photo of a cup left of a cow']
  images = np.random.default_rng(3).random((6, 40, 40, 3), np.float32)
  entries = [{'prompt': texts[i % 2]} for i in range(6)]
  right = grading.metric(settings, texts).score(images, entries)
  verifier = load('verifiers.geneval', mode='strict', random='tiny', limits=(0.001, 0.001, 0.5))
  params = verifier.load()
  vctx = verifier.encode(params, verifier.tokenize(texts))
  paired = images.reshape(3, 2, *images.shape[1:]).swapaxes(0, 1)
  want = verifier.score(params, vctx, paired)[verifier.names[0]]
  np.testing.assert_array_equal(right.reshape(3, 2).T, np.asarray(want) == 1)
  assert right.any() and not right.all()
  assert grading.label(settings) == 'geneval_tiny (not official)'
  assert grading.label(settings, [verifier]) == 'geneval_tiny (not official, oracle)'
  assert 'not graded' in grading.label('data.prompts')
  with pytest.raises(ConfigError, match='metric: .*is no prompt of GenEval'):
    grading.metric(settings, ['hello'])
