"""The GenEval verifier: its rules against a plain oracle, crops against PIL, and its protocol."""

import functools
import json
import pathlib

import geneval_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vtts_jax import core
from vtts_jax.components import load
from vtts_jax.data import geneval as grammar
from vtts_jax.data import prompts as prompt_files
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval
from vtts_jax.metrics import geneval_arrays as rules
from vtts_jax.metrics.geneval_arrays import OFFICIAL_LIMITS, Limits
from vtts_jax.models.owlvit import modeling as owl
from vtts_jax.study import grading
from vtts_jax.testing import laws, replay
from vtts_jax.verifiers import ensemble
from vtts_jax.verifiers.parts import colours, detectors

HERE = pathlib.Path(__file__).parent
ROWS = prompt_files.prompts('geneval')
PROMPTS = core.as_prompts([
  'a photo of a dog', 'a photo of three buses', 'a photo of a red car and a blue orange',
  'a photo of a cup left of a cow',
])  # fmt: skip
TINY = {'weights': 'random:tiny', 'limits': (0.05, 0.1, 0.5)}
TINY_YOLOS = {**TINY, 'backbone': 'yolos', 'clip_weights': 'random:tiny'}
T = 20  # detections of a class that the made-up detector reports


def made(rows, pictures, seed):
  """Detections near what the rows ask for, so that many are right and many just wrong: lists as
  metrics/geneval.py takes them, and boxes `[B, M, 1, 2 T, 4]`, scores `[B, M, 2, 2 T]`, log-
  probabilities of colours `[B, M, 2, 2 T, 10]`."""
  rng = np.random.default_rng(seed)
  table, names = rules.read_targets(rows, 2)
  shape = (len(rows), pictures)
  boxes = np.zeros((*shape, 1, 2 * T, 4), np.float32)
  scores, hues = np.zeros((*shape, 2, 2 * T), np.float32), np.zeros((*shape, 2, 2 * T, 10))
  lists = []
  for b, m in np.ndindex(shape):
    found = []
    for e in range(len({*names[b]})):
      count = max(0, table['least'][b, e] + rng.choice([-1, 0, 0, 0, 1]))
      for t in range(e * T, e * T + count):
        corner = rng.choice([20, 24, 40, 60], 2) + rng.random(2) * 4
        boxes[b, m, 0, t] = [*corner, *(corner + rng.uniform(5, 30, 2))]
        scores[b, m, e, t] = rng.choice([0.25, 0.6, 0.92, 0.95]) + rng.random() / 100
        hue = table['colour'][b, e] if rng.random() < 0.7 else rng.integers(10)
        hues[b, m, e, t, hue] = 5
        found.append({
          'class': names[b][e], 'box': boxes[b, m, 0, t].tolist(), 'color': grammar.COLOURS[hue],
          'score': float(scores[b, m, e, t]),
        })  # fmt: skip
    lists.append(found)
  return lists, (boxes, scores, np.asarray(jax.nn.log_softmax(hues, -1), np.float32))


def score_found(targets, boxes, scores, hues, overlap=1.0):
  """(strict, partial) scores `[B, M]` of what a detector found."""
  xp = scores.__array_namespace__()
  index, best = rules.select_best(boxes, scores, overlap)
  pick = lambda x: xp.take_along_axis(x, index[..., None], 3)
  found = targets, pick(boxes), best, pick(hues), OFFICIAL_LIMITS
  return rules.score_strict(*found), rules.score_partial(*found)


score_compiled = jax.jit(score_found, static_argnames='overlap')


@pytest.mark.parametrize('overlap', [1.0, 0.3])
def test_strict_is_genevals_rule_on_every_row(overlap):
  """In jit, on numpy arrays, and through lists of detections: all as the oracle says."""
  lists, arrays = made(ROWS, 4, seed=int(10 * overlap))
  rows = [row for row in ROWS for _ in range(4)]
  want = np.array([oracle.correct(r, f, near=overlap) for r, f in zip(rows, lists)])
  targets, _ = rules.read_targets(ROWS, 2)
  strict, partial = score_compiled(targets, *arrays, overlap=overlap)
  np.testing.assert_array_equal(np.ravel(strict), want.astype(np.float32))
  on_host = score_found(targets, *arrays, overlap)
  np.testing.assert_array_equal(on_host[0], strict)
  np.testing.assert_allclose(on_host[1], partial, atol=1e-5)
  limits = Limits(overlap=overlap)
  listed = geneval.report_benchmark(rows, lists, geneval.OFFICIAL, limits=limits)
  np.testing.assert_array_equal(listed['correct'], want)
  assert all(0.05 < share < 0.9 for share in listed['by_tag'].values()), listed['by_tag']


def test_best_takes_sixteen_in_order():
  scores = np.random.default_rng(0).random((1, 1, 2, 30))
  boxes = np.zeros((1, 1, 1, 30, 4)) + np.arange(30)[:, None] * 50
  index, score = rules.select_best(boxes, scores, 0.5)
  np.testing.assert_array_equal(index, np.argsort(-scores, -1)[..., :16])
  np.testing.assert_array_equal(score, -np.sort(-scores, -1)[..., :16])


def test_partial_credit_climbs_to_what_strict_asks_for():
  """Within [0, 1], the higher the surer, and on average higher where the rule holds."""
  _, (boxes, scores, hues) = made(ROWS, 4, seed=3)
  targets, _ = rules.read_targets(ROWS, 2)
  strict, earned = score_found(targets, boxes, scores, hues)
  right = strict > 0
  assert earned.min() >= 0 and earned.max() <= 1
  tags = np.repeat([row['tag'] for row in ROWS], 4).reshape(-1, 4)
  for tag in grammar.TAGS:
    assert earned[(tags == tag) & right].mean() > earned[(tags == tag) & ~right].mean() + 0.1
  certain = np.where(scores > 0.5, 0.999999, 0.0)
  sharp = np.asarray(jax.nn.log_softmax(50 * hues, -1))
  strict, earned = score_found(targets, boxes, certain, sharp)
  np.testing.assert_allclose(earned[strict > 0], 1, atol=1e-3)


def credit(prompt, *objects, hue=None):
  """Partial credit of (entry, x, y, score) objects of 10 x 10 pixels."""
  boxes, scores = np.zeros((1, 1, 1, 8, 4)), np.zeros((1, 1, 2, 8))
  for i, (entry, x, y, score) in enumerate(objects):
    boxes[0, 0, 0, i], scores[0, 0, entry, i] = [x, y, x + 10, y + 10], score
  hues = np.full((1, 1, 2, 8, 10), -np.inf if hue else np.log(0.1))
  if hue:
    hues[..., grammar.COLOURS.index(hue)] = 0
  targets, _ = rules.read_targets([grammar.parse_prompt(prompt)], 2)
  return float(score_found(targets, boxes, scores, hues)[1][0, 0])


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
         'text': 'a dog, no cat', 'tag': 'single_object'}  # fmt: skip
  targets, names = rules.read_targets([row], 2)
  assert names == [['dog', 'cat']]
  assert targets['least'].tolist() == [[1, 0]] and targets['most'].tolist() == [[10_000, 0]]
  with pytest.raises(ConfigError, match='entries=1: the metadata of .* has 2'):
    rules.read_targets([row], 1)
  for change, match in (
    ({'color': 'mauve'}, "color='mauve'; must be one of red"), ({'count': 17}, 'in 1 .. 16'),
    ({'position': ['beside', 0]}, "position='beside'"), ({'position': ['above', 0]}, 'no entry'),
  ):  # fmt: skip
    wrong = {'include': [{'class': 'dog', 'count': 1, **change}]}
    with pytest.raises(ConfigError, match=match):
      rules.read_targets([wrong], 2)


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
  cut = jax.jit(colours.crop_boxes, static_argnums=2)
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
  clip = load('verifiers.geneval', **TINY_YOLOS).colour_clip
  params = clip.load()
  ids = clip.tokenize([['cup', 'wine glass']])
  assert ids.shape == (1, 2, 10, 3, 16) and colours.TEMPLATES[1] == 'a photo of a {}-colored {}'
  assert (ids[0, 0, 1, 2] == ids[0, 1, 1, 2]).all()  # 'a photo of a orange object'
  assert (ids[0, :, :, 0] != ids[0, :, :, 1]).any(-1).all()
  rows = jax.jit(clip.encode)(params, ids)
  images = np.random.default_rng(1).random((1, 2, 40, 40, 3), np.float32)
  boxes = np.broadcast_to(np.float32([0, 0, 40, 40]), (1, 2, 2, 4))
  have = jax.jit(clip.classify_colours)(params, rows, images, boxes)

  @jax.jit
  def by_hand(params):
    model, pixels = clip.bind(params), colours.modeling.preprocess(clip.config, images[0])
    texts = model.embed_texts(ids.reshape(-1, 16)).reshape(2, 10, 3, -1).mean(2)
    texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    return 100 * jnp.einsum('md,ecd->mec', model.embed_images(pixels), texts)

  want = jax.nn.log_softmax(by_hand(params), -1)
  np.testing.assert_allclose(have[0], want, atol=2e-3)


# ------------------------------------------------------------------------------------ the verifier


@pytest.fixture(scope='module')
def pictures():
  return np.random.default_rng(0).random((4, 3, 40, 48, 3), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def score_prompts(verifier, params, prompt, images):
  """The score `[B, M]` of prompt arrays and images, encoder and all."""
  vctx = verifier.encode(params, prompt)
  return verifier.score(params, vctx, {'image': images})[verifier.names[0]]


@pytest.mark.parametrize('settings', [TINY, {**TINY_YOLOS, 'output': 'strict'}], ids=str)
def test_conformance(settings, pictures):
  verifier = load('verifiers.geneval', **settings)
  laws.check_verifier(verifier, PROMPTS, pictures)
  assert not verifier.gives  # rules have no useful gradient


def test_broken_pictures_and_half_precision(pictures):
  verifier = load('verifiers.geneval', **TINY)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), verifier.load())
  prompt, broken = verifier.tokenize(PROMPTS), pictures.copy()
  broken[1, 2, 3, 3, 0] = np.nan
  run = functools.partial(score_prompts, verifier, params, prompt)
  clean, have = np.asarray(run(pictures)), np.asarray(run(broken))
  assert np.isnan(have[1, 2]) and np.isnan(have).sum() == 1
  np.testing.assert_array_equal(np.delete(have, 5), np.delete(clean, 5))
  assert have.dtype == np.float32 and clean.min() >= 0 and clean.max() <= 1


@pytest.mark.parametrize(
  ('settings', 'limits'),
  [(TINY, Limits(0.4995, 0.501, 0.9)), (TINY_YOLOS, Limits(1e-23, 1e-17, 0.9))],
  ids=['owlvit', 'yolos'],
)
def test_strict_is_the_benchmark_on_its_own_detections(settings, limits):
  """Of random detectors that see objects everywhere, under limits that about half of them pass."""
  texts = ['a photo of two dogs', 'a photo of a red car', 'a photo of a cup left of a cow'] * 4
  prompts = core.as_prompts(texts)
  verifier = load('verifiers.geneval', **settings | {'output': 'strict', 'limits': limits})
  params = jax.tree.map(lambda x: x * 3, verifier.load())  # louder: scores and places differ
  images = np.random.default_rng(5).random((12, 4, 40, 40, 3), np.float32)
  found = [seen for row in verifier.list_detections(params, prompts, images) for seen in row]
  have = score_prompts(verifier, params, verifier.tokenize(prompts), images)
  rows = [grammar.parse_prompt(text) for text in texts for _ in range(4)]
  want = geneval.report_benchmark(rows, found, verifier.scoring_models, limits=limits)
  np.testing.assert_array_equal(np.ravel(have), np.array(want['correct'], np.float32))
  near = {'confidence': limits[0], 'counting': limits[1], 'near': limits[2]}
  assert want['correct'] == [oracle.correct(r, f, **near) for r, f in zip(rows, found)]
  assert 0 < have.mean() < 1


def test_owl_asks_for_every_class_in_every_colour():
  """Scores and colours of a class are those of its own queries, whatever the batch."""
  model = load('verifiers.geneval', **TINY).object_detector
  params, names = model.load(), [['dog', 'tv remote'], ['cup', 'cow']]
  prompt = model.tokenize(names, True)
  assert prompt['ids'].shape == (2, 22, 16)
  images = np.random.default_rng(2).random((2, 1, 40, 24, 3), np.float32)

  @jax.jit
  def found(params, ids):
    return model.detect_objects(params, model.encode(params, {'ids': ids}), images, 2)

  @jax.jit
  def alone(params, images, ids):
    net = model.bind(params)
    x = net.patch_features(owl.preprocess(model.config, images))
    return net.query_logits(x, net.text(ids)[None])[0], net.predict_boxes(x)[0]

  boxes, scores, hues = found(params, prompt['ids'])
  for b, e in np.ndindex(2, 2):
    words = [names[b][e]] + [f'{hue} {names[b][e]}' for hue in grammar.COLOURS]
    said = [f'a photo of {grammar.with_article(w)}' for w in words]
    ids, _ = tokenizers.tokenize_texts(said, '', 16, 64)
    logits, share = alone(params, images[b], ids)
    np.testing.assert_allclose(scores[b, 0, e], jax.nn.sigmoid(logits[:, 0]), atol=1e-5)
    want = jax.nn.log_softmax(logits[:, 1:], -1)
    np.testing.assert_allclose(hues[b, 0, e], want, atol=1e-4)
    sides = boxes[b, 0, :, 2:] - boxes[b, 0, :, :2]
    np.testing.assert_allclose(sides, share[:, 2:] * np.array([24, 40]), rtol=1e-4)


def test_yolos_looks_up_cocos_numbers():
  model = load('verifiers.geneval', **TINY_YOLOS).object_detector
  params = model.load()
  prompt = model.tokenize([['computer mouse', 'person']], False)
  assert prompt['index'].tolist() == [[74, 1]]
  images = np.random.default_rng(2).random((1, 2, 40, 40, 3), np.float32)

  @jax.jit
  def detect_both(params):
    logits, _ = model.bind(params)(detectors.yolos.preprocess(model.config, images[0]))
    return model.detect_objects(params, prompt['index'], images, 2), logits

  (boxes, scores, hues), logits = detect_both(params)
  assert hues is None and boxes.shape == (1, 2, 20, 4)
  want = jax.nn.softmax(logits)[..., [74, 1]].swapaxes(1, 2)
  np.testing.assert_allclose(scores[0], want, atol=1e-6)
  with pytest.raises(ConfigError, match="'unicorn': no class of COCO's"):
    model.tokenize([['unicorn', 'person']], False)


def test_a_prompt_row_brings_its_own_metadata():
  """The row's include, exclude and tag decide, whatever its text; without them the text does."""
  row = {
    'text': 'Two unicorns.', 'tag': 'counting', 'include': [{'class': 'unicorn', 'count': 2}],
    'exclude': [{'class': 'unicorn', 'count': 3}], 'id': 7,
  }  # fmt: skip
  verifier = load('verifiers.geneval', **TINY)
  arrays = verifier.tokenize([row, {'text': 'a photo of a dog'}])
  targets = arrays['targets']
  assert targets['least'].tolist() == [[2, 0], [1, 0]] and targets['most'][0, 0] == 2
  assert targets['counting'].tolist() == [True, False]
  said = tokenizers.tokenize_texts(['a photo of an unicorn', 'a photo of a dog'], '', 16, 64)[0]
  np.testing.assert_array_equal(arrays['detector']['ids'][:, 0], said)
  with pytest.raises(ConfigError, match="'Two unicorns.' is no prompt of GenEval"):
    verifier.tokenize([{'text': 'Two unicorns.'}])


def checkpoint(folder, name):
  """A folder as on the hub, from a fixture."""
  config, source, *_ = replay.read(str(HERE / 'golden' / name))
  folder.mkdir()
  save_file({k: source.read_tensor(k) for k in source.tensor_names()}, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config['params']))
  return str(folder)


def test_a_checkpoint_says_which_detector_it_is(tmp_path):
  verifier = load('verifiers.geneval', weights=checkpoint(tmp_path / 'my-owl', 'owlv2.npz'))
  assert verifier.names == ('geneval_partial_my_owl',) and verifier.object_detector.config.v2
  params = verifier.load()['detector']
  x = np.zeros((1, 1, 20, 20, 3), np.float32)
  queries = np.ones((1, 22, 8), np.float32)
  boxes, *_ = jax.jit(lambda p: verifier.object_detector.detect_objects(p, queries, x, 2))(params)
  assert boxes.shape == (1, 1, 16, 4)
  few = load('verifiers.geneval', weights=checkpoint(tmp_path / 'few', 'yolos.npz'))
  with pytest.raises(ConfigError, match="has 7 classes; must be COCO's 92"):
    few.check()
  with pytest.raises(ConfigError, match='verifier.weights=.*nothing-here'):
    load('verifiers.geneval', weights='nothing-here.safetensors').check()


def test_names_tell_the_models_and_oracles():
  """A strict score is named as the benchmark's label, partial credit says so."""
  name = lambda **given: load('verifiers.geneval', **given).names[0]
  assert name() == 'geneval_partial_owlvit_b32' and name(output='strict') == 'geneval_owlvit_b32'
  assert name(colour='clip') == 'geneval_partial_owlvit_b32_clip_l14'
  yolos = {'weights': 'hustvl/yolos-small@abc', 'output': 'strict'}
  assert name(**yolos) == 'geneval_yolos_small_clip_l14'
  assert name(weights='random:owlv2_l14') == 'geneval_partial_owlv2_l14_random'
  owl_, yolo = load('verifiers.geneval'), load('verifiers.geneval', weights='hustvl/yolos-tiny')
  both = ensemble.Ensemble(members=(('a', owl_), ('b', yolo)), weights=(('a', 1), ('b', 0)))
  assert geneval.scoring_models_of(yolo) == {'yolos_tiny', 'clip_l14'}
  assert geneval.scoring_models_of(both) == {'owlvit_b32'}  # the other is only measured
  label = functools.partial(geneval.benchmark_label, searched=geneval.scoring_models_of(both))
  assert label(owl_.scoring_models) == 'geneval_owlvit_b32 (not official, oracle)'
  assert label(yolo.scoring_models) == 'geneval_yolos_tiny_clip_l14 (not official)'


def test_what_cannot_be_run_is_said():
  for settings, match in (
    ({'output': 'soft'}, "verifier.output='soft': must be one of 'partial', 'strict'"),
    ({'colour': 'rgb'}, "verifier.colour='rgb'"), ({'entries': 0}, 'entries=0: must be at least 1'),
    ({'limits': (0.3, 0.9)}, r'limits=\(0.3, 0.9\)'), ({'limits': (0.3, 0.9, 2.0)}, 'an overlap'),
    ({'weights': 'random:huge'}, "verifier.weights='random:huge': must be .* random:tiny"),
    ({'weights': ''}, "verifier.weights='': must be"),
    ({'backbone': 'detr'}, "verifier.backbone='detr': must be one of '', 'owlvit', 'yolos'"),
    ({'dtype': 'float16'}, "verifier.dtype='float16'"),
    ({**TINY_YOLOS, 'colour': 'query'}, "colour='query': tiny_random cannot be asked"),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=match):
      load('verifiers.geneval', **settings)


def test_cost_is_the_detectors_and_the_clips():
  owl_ = load('verifiers.geneval', weights='random:owlvit_b32')
  # 577 tokens of 85 M parameters and their attention; OWL-ViT's paper gives no number
  assert 1.0e11 < owl_.cost('score').flops < 1.25e11 and owl_.cost('score').verify == 1
  settings = {'colour': 'clip', 'clip_weights': 'random:tiny'}
  clipped = load('verifiers.geneval', weights='random:owlvit_b32', **settings)
  crop = 2 * colours.modeling.count_flops(colours.modeling.SIZES['tiny'], 'image')
  fewer = 2 * 24**2 * 20 * 512  # the queries of ten colours for two classes
  assert clipped.cost('score').flops == owl_.cost('score').flops - fewer + crop


def test_a_verifier_as_metric(pictures):
  """Pictures are right where the strict score is 1; the label says whose accuracy it is."""
  own = {'output': 'strict', 'weights': 'random:tiny', 'limits': (0.001, 0.001, 0.5)}
  settings, verifier = {'name': 'verifiers.geneval', **own}, load('verifiers.geneval', **own)
  prompts = core.as_prompts(['a photo of a dog', 'a photo of a cup left of a cow'])
  images = pictures[:2]
  right = grading.build_metric(settings).grade(
    images.reshape(6, *images.shape[2:]), [row for row in prompts for _ in range(3)]
  )
  want = score_prompts(verifier, verifier.load(), verifier.tokenize(prompts), images)
  np.testing.assert_array_equal(right, np.ravel(want) == 1)
  assert right.any() and not right.all()
  assert grading.metric_label(settings) == 'geneval_tiny_random (not official)'
  label = grading.metric_label(settings, [verifier])
  assert label == 'geneval_tiny_random (not official, oracle)'
  assert 'not graded' in grading.metric_label('data.prompts')
  with pytest.raises(ConfigError, match='metric: .*is no prompt of GenEval'):
    grading.build_metric(settings).read_prompts([{'text': 'hello'}])
