"""Verifiers that compare pictures, and the class logit: protocol, references, bad input."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vtts_jax.components import load
from vtts_jax.data import references
from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess as pictures
from vtts_jax.models.dino import modeling as dino
from vtts_jax.models.dreamsim import modeling as dreamsim
from vtts_jax.testing import laws
from vtts_jax.verifiers.parts import image_encoder as towers

PROMPTS = ['a red cube', 'a green dog']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Pictures 0 .. 3 in pics/, and a jsonl: 0 for the first prompt, 1 and 2 for the second."""
  folder = tmp_path_factory.mktemp('references')
  (folder / 'pics').mkdir()
  rng = np.random.default_rng(0)
  for i, size in enumerate([(40, 61), (40, 61), (40, 61), (64, 64)]):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'pics/{i}.png')
  refs = ['pics/0.png', ['pics/1.png', 'pics/2.png']]
  rows = [{'prompt': p, 'reference': r} for p, r in zip(PROMPTS, refs)]
  (folder / 'refs.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  return folder


def picture(place, i):
  return np.asarray(Image.open(place / f'pics/{i}.png'), np.float32) / 255


def images(b=2, m=2, seed=1):
  """Of 8 bits and 256 x 256, so that only a crop is between them and the model."""
  shape = (b, m, 256, 256, 3)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32) / 255


@functools.partial(jax.jit, static_argnums=0)
def score(ver, params, context, images, signals):
  return ver.score(params, context, images, **signals)[ver.names[0]]


@functools.partial(jax.jit, static_argnums=0)
def encode(ver, params, prompt):
  return ver.encode(params, prompt)


def scores(ver, prompts, images, params=None, **signals):
  params = ver.load() if params is None else params
  context = encode(ver, params, ver.tokenize(prompts))
  return np.asarray(score(ver, params, context, images, signals))


CASES = {
  'dino_i_tiny': ('image_similarity', {'random': 'tiny'}),
  'clip_i_tiny': ('image_similarity', {'random': 'tiny', 'backbone': 'clip'}),
  'dreamsim_tiny': ('dreamsim', {'random': 'tiny'}),
  'dino_logit_tiny': ('dino_logit', {'random': 'tiny'}),
}


@pytest.mark.parametrize('name', CASES)
def test_protocol(name, place):
  """The laws; one NaN makes one picture's score NaN; a reference is like itself, and of two
  references the mean counts, so that either is as like them."""
  path, settings = CASES[name]
  classes = path == 'dino_logit'
  more = {} if classes else {'references': str(place / 'refs.jsonl')}
  ver, prompts = load(f'verifiers.{path}', **settings, **more), ['3', '7'] if classes else PROMPTS
  assert ver.names == (name,)
  shown = np.random.default_rng(2).random((2, 3, 40, 61, 3), np.float32)
  shown[0, 0], shown[1, 0], shown[1, 1] = (picture(place, i) for i in range(3))
  laws.check_verifier(ver, prompts, shown)
  broken = shown.copy()
  broken[1, 2, 4, 5, 0] = np.nan
  a, b = scores(ver, prompts, shown), scores(ver, prompts, broken)
  assert np.isnan(b[1, 2]) and np.isnan(b).sum() == 1
  np.testing.assert_array_equal(a[~np.isnan(b)], b[~np.isnan(b)])
  if not classes:
    np.testing.assert_allclose(a[0, 0], 1, atol=1e-5)
    np.testing.assert_allclose(a[1, 0], a[1, 1], atol=1e-5)
    assert a[0, 1:].max() < 0.9999 and a[1, 2] < a[1, 0] < 0.9999
    assert ver.cost('encode').flops == 2 * ver.cost('score').flops


def test_references_as_the_pipelines_see_them(place):
  """What PIL makes on the host is what `images` makes in jit."""
  files = str(place / 'pics')
  for shorter, prepare in (
    (dino.RESIZED, lambda x: pictures.center_crop(pictures.resize_shortest(x, 256), 224)),
    (0, dreamsim.prepare),
  ):
    found = references.read(['any'], files, 224, shorter)
    assert found['pictures'].shape == (1, 4, 224, 224, 3) and found['mask'].all()
    for i in (2, 3):
      want = np.asarray(jax.jit(prepare)(picture(place, i)))
      np.testing.assert_array_equal(found['pictures'][0, i], np.rint(want * 255))


def test_the_class_is_the_one_that_was_asked_for(tmp_path):
  names = tmp_path / 'names.txt'
  names.write_text('tench\ngoldfish\ngreat white shark\n')
  ver = load('verifiers.dino_logit', random='tiny', class_names=str(names), score_as='log_prob')
  assert ver.names == ('dino_log_prob_tiny',)
  assert ver.tokenize(['goldfish', ' 9 ', 'great white shark'])['label'].tolist() == [1, 9, 2]
  shown = images(1, 1)
  plain, labels = load('verifiers.dino_logit', random='tiny'), [str(i) for i in range(10)]
  params, all_of_it = ver.load(), np.repeat(shown, 10, axis=0)
  probable, logits = (scores(v, labels, all_of_it, params)[:, 0] for v in (ver, plain))
  np.testing.assert_allclose(probable, jax.nn.log_softmax(logits), atol=1e-5)
  own = jax.jit(ver.tower.logits)(params, shown[0])
  np.testing.assert_allclose(logits, own[0], atol=1e-5)
  half = load('verifiers.dino_logit', random='tiny', dtype='bfloat16')
  near = scores(half, labels, all_of_it)[:, 0]
  assert near.dtype == np.float32 and 0 < np.abs(near - logits).max() < 0.05
  for bad in ('10', 'cat', '-1'):
    with pytest.raises(ConfigError, match=rf"prompts: '{bad}' is no class; must be a number in 0"):
      ver.tokenize(['1', bad])


def test_self_consistency():
  """1 for the same picture, less for another, each candidate with its own early picture."""
  ver = load('verifiers.self_consistency', random='tiny')
  assert ver.uses == {'images', 'early'} and ver.names == ('self_consistency_tiny',)
  shown, early = images(), images(seed=2)
  early[0, 1] = shown[0, 1]
  have = scores(ver, ['', ''], shown, early=early)
  np.testing.assert_allclose(have[0, 1], 1, atol=1e-5)
  features = functools.partial(jax.jit(ver.features), ver.load())
  np.testing.assert_allclose(have, (features(shown) * features(early)).sum(-1), atol=1e-5)
  assert (np.delete(have.ravel(), 1) < 1 - 1e-4).all()
  assert ver.cost('score').flops == 2 * ver.tower.flops()


def test_a_folder_of_the_hub(tmp_path):
  """Names of files, config.json: the head is there for the logit and left for the likeness."""
  with np.load(pathlib.Path(__file__).parent / 'golden/dinov2.npz') as file:
    tensors = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
    config = json.loads(str(file['config']))['params']
  save_file(tensors, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config))
  ver = load('verifiers.dino_logit', model_from=str(tmp_path))
  np.testing.assert_array_equal(ver.load()['head']['bias'], tensors['classifier.bias'])
  with pytest.raises(ConfigError, match="prompts: '5' is no class; must be a number in 0 .. 4"):
    ver.tokenize(['5'])
  other = load('verifiers.self_consistency', model_from=str(tmp_path), dtype='bfloat16')
  params = other.load()
  assert 'head' not in params and params['cls'].dtype == 'bfloat16'
  save_file({k: v for k, v in tensors.items() if 'classifier' not in k}, tmp_path / 'x.safetensors')
  with pytest.raises(ConfigError, match=r'model_from=.*x\.safetensors.: has no linear head'):
    load('verifiers.dino_logit', model_from=str(tmp_path / 'x.safetensors')).tokenize(['1'])


def test_names_of_scores():
  name = lambda *args, **given: load(*args, **given).names[0]
  assert name('verifiers.image_similarity') == 'dino_i_dino_vits16'
  assert name('verifiers.image_similarity', backbone='clip') == 'clip_i_clip_vit_base_patch32'
  assert name('verifiers.image_similarity', model_from='x/dinov2-large@a1') == 'dino_i_dinov2_large'
  assert towers.short_name('/models/dinov2-large.safetensors') == 'dinov2_large'
  assert name('verifiers.dino_logit') == 'dino_logit_dinov2_base_imagenet1k_1_layer'
  assert name('verifiers.dreamsim') == 'dreamsim_ensemble'


@pytest.mark.parametrize(
  ('path', 'settings', 'said'),
  [
    ('image_similarity', {'backbone': 'vgg'}, "backbone='vgg': must be one of 'dino', 'clip'"),
    ('image_similarity', {'dtype': 'float16'}, "dtype='float16': must be one of float32"),
    ('image_similarity', {'random': 'b32'}, "random='b32': must be one of tiny, dino_vits16"),
    ('self_consistency', {'random': 'x', 'backbone': 'clip'}, "random='x': must be one of tiny, b"),
    ('dino_logit', {'random': 'dinov2_base'}, "random='dinov2_base': has no linear head"),
    ('dino_logit', {'score_as': 'odds'}, "score_as='odds': must be one of 'logit', 'log_prob'"),
    ('dreamsim', {'model': 'vgg'}, "model='vgg': must be one of ensemble"),
    ('dreamsim', {'random': 'vgg'}, "random='vgg': must be one of tiny, ensemble"),
  ],
)
def test_settings_that_cannot_be(path, settings, said):
  with pytest.raises(ConfigError, match=said.replace('[', r'\[')):
    load(f'verifiers.{path}', **settings)


def test_references_that_cannot_be(place, tmp_path):
  good = str(place / 'refs.jsonl')
  with pytest.raises(ConfigError, match=r"no line for 1 of 2 prompts; the first is 'a cat'"):
    references.read(['a red cube', 'a cat'], good, 8)
  for text, said in (
    ('{"prompt": "a"}', 'line 1 must be'),
    ('nonsense', 'line 1 must be'),
    ('{"prompt": "a", "reference": "none.png"}', 'is no picture and no folder'),
    ('', 'has no line with a reference'),
  ):
    (tmp_path / 'bad.jsonl').write_text(text)
    with pytest.raises(ConfigError, match=said):
      references.index(str(tmp_path / 'bad.jsonl'))
  (tmp_path / 'bad.png').write_text('no picture')
  with pytest.raises(ConfigError, match=r"bad\.png' cannot be read"):
    references.read(['a'], str(tmp_path / 'bad.png'), 8)
  for ver in ('image_similarity', 'dreamsim'):
    with pytest.raises(ConfigError, match="references='': '' is no picture"):
      load(f'verifiers.{ver}', random='tiny').check()
  with pytest.raises(ConfigError, match="model_from='': must be a folder or file"):
    load('verifiers.dreamsim', references=good).check()
  with pytest.raises(ConfigError, match=r'class_names=.*no such file'):
    load('verifiers.dino_logit', random='tiny', class_names='/none').check()
