"""Verifiers that compare pictures, and the class logit: protocol, references, bad settings."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vtts_jax import core
from vtts_jax.components import load
from vtts_jax.errors import ConfigError
from vtts_jax.models.pretrained import short_name
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
TINY = {'weights': 'random:tiny'}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Pictures 0 .. 2 in a folder."""
  folder = tmp_path_factory.mktemp('references')
  rng = np.random.default_rng(0)
  for i in range(3):
    Image.fromarray(rng.integers(0, 256, (40, 61, 3), np.uint8)).save(folder / f'{i}.png')
  return folder


@pytest.fixture(scope='module')
def prompts(place):
  """Prompt rows: picture 0 is the first one's reference, 1 and 2 are the second one's."""
  file = lambda i: str(place / f'{i}.png')
  return [
    {'text': 'a red cube', 'reference': file(0)},
    {'text': 'a green dog', 'reference': [file(1), file(2)]},
  ]


def picture(place, i):
  return np.asarray(Image.open(place / f'{i}.png'), np.float32) / 255


def images(b=2, m=2, seed=1):
  """Of 8 bits and 256 x 256, so that only a crop is between them and the model."""
  shape = (b, m, 256, 256, 3)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32) / 255


@functools.cache
def compiled(ver):
  """The methods as the laws compile them."""
  return ver.load(), jax.jit(ver.encode), jax.jit(ver.score)


def scores(ver, prompts, images, **observed):
  params, encode, score = compiled(ver)
  context = encode(params, ver.tokenize(core.as_prompts(prompts)))
  return np.asarray(score(params, context, {'image': images, **observed})[ver.names[0]])


CASES = {
  'dino_i_tiny_random': ('image_similarity', {}),
  'clip_i_tiny_random': ('image_similarity', {'backbone': 'clip'}),
  # one branch: test_dino.py and the golden file have all three
  'dreamsim_tiny_random': ('dreamsim', {'branches': 'clip_vitb32'}),
  'dino_logit_tiny_random': ('dino_logit', {}),
}


@pytest.mark.parametrize('name', CASES)
def test_protocol(name, place, prompts):
  """The laws; one NaN makes one picture's score NaN; a reference is like itself, and of two
  references the mean counts, so that either is as like them."""
  path, settings = CASES[name]
  classes = path == 'dino_logit'
  more = {} if classes else {'max_references': 2}
  ver, prompts = load(f'verifiers.{path}', **TINY, **settings, **more), prompts
  prompts = ['3', '7'] if classes else prompts
  assert ver.names == (name,)
  shown = np.random.default_rng(2).random((2, 3, 40, 61, 3), np.float32)
  shown[0, 0], shown[1, 0], shown[1, 1] = (picture(place, i) for i in range(3))
  laws.check_verifier(ver, prompts, {'image': shown})
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


def test_the_class_is_the_one_that_was_asked_for(tmp_path):
  names = tmp_path / 'names.txt'
  names.write_text('tench\ngoldfish\ngreat white shark\n')
  ver = load('verifiers.dino_logit', **TINY, class_names=str(names), output='log_prob')
  assert ver.names == ('dino_log_prob_tiny_random',)
  rows = core.as_prompts(['goldfish', ' 9 ', {'text': 'a big fish', 'label': 2}])
  assert ver.tokenize(rows)['label'].tolist() == [1, 9, 2]
  plain, labels = load('verifiers.dino_logit', **TINY), [str(i) for i in range(10)]
  part, params = ver.model_part, ver.load()
  shown = np.repeat(images(1, 1), 10, axis=0)

  @jax.jit
  def score_labels(params, context):
    logits = part.bind(params).class_logits(part.modeling.preprocess(part.config, shown[0]))
    observed = {'image': shown}
    return ver.score(params, context, observed), plain.score(params, context, observed), logits

  context = ver.encode(params, ver.tokenize(core.as_prompts(labels)))
  probable, logits, own = score_labels(params, context)
  (probable,), (logits,) = probable.values(), logits.values()
  np.testing.assert_allclose(logits[:, 0], own[0], atol=1e-5)
  np.testing.assert_allclose(probable[:, 0], jax.nn.log_softmax(own[0]), atol=1e-5)
  half = load('verifiers.dino_logit', **TINY, dtype='bfloat16')
  near = scores(half, labels, shown)
  assert near.dtype == np.float32 and 0 < np.abs(near - logits).max() < 0.05


def test_self_consistency():
  """1 for the same picture, less for another, each candidate with its own early picture."""
  ver = load('verifiers.self_consistency', **TINY)
  assert ver.needs == {'image', 'early_image'}
  assert ver.names == ('self_consistency_tiny_random',)
  shown, early = images(), images(seed=2)
  early[0, 1] = shown[0, 1]
  have = scores(ver, ['', ''], shown, early_image=early)
  np.testing.assert_allclose(have[0, 1], 1, atol=1e-5)
  embed = functools.partial(jax.jit(ver.embed_images), ver.load())
  np.testing.assert_allclose(have, (embed(shown) * embed(early)).sum(-1), atol=1e-5)
  assert (np.delete(have.ravel(), 1) < 1 - 1e-4).all()
  assert ver.cost('score').flops == 2 * ver.model_part.embedding_flops


def test_a_folder_of_the_hub(tmp_path):
  """Names of files, config.json: the head is there for the logit and left for the likeness."""
  with np.load(pathlib.Path(__file__).parent / 'golden/dinov2.npz') as file:
    tensors = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
    config = json.loads(str(file['config']))['params']
  save_file(tensors, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config))
  ver = load('verifiers.dino_logit', weights=str(tmp_path))
  np.testing.assert_array_equal(ver.load()['head']['bias'], tensors['classifier.bias'])
  with pytest.raises(ConfigError, match=r"prompt 0 \('5'\) is no class; must be in 0 .. 4"):
    ver.tokenize([{'text': '5'}])
  other = load('verifiers.self_consistency', weights=str(tmp_path), dtype='bfloat16')
  params = other.load()
  assert 'head' not in params and params['cls'].dtype == 'bfloat16'
  save_file({k: v for k, v in tensors.items() if 'classifier' not in k}, tmp_path / 'x.safetensors')
  with pytest.raises(ConfigError, match=r'weights=.*x\.safetensors.: has no linear head'):
    load('verifiers.dino_logit', weights=str(tmp_path / 'x.safetensors')).check()


def test_names_of_scores():
  name = lambda *args, **given: load(*args, **given).names[0]
  assert name('verifiers.image_similarity') == 'dino_i_dino_vits16'
  assert name('verifiers.image_similarity', backbone='clip') == 'clip_i_clip_vit_base_patch32'
  assert name('verifiers.image_similarity', weights='x/dinov2-large@a1') == 'dino_i_dinov2_large'
  assert short_name('/models/dinov2-large.safetensors') == 'dinov2_large'
  assert name('verifiers.dino_logit') == 'dino_logit_dinov2_base_imagenet1k_1_layer'
  assert name('verifiers.dreamsim', weights='/models/dreamsim') == 'dreamsim_ensemble'


@pytest.mark.parametrize(
  ('path', 'settings', 'message'),
  [
    ('image_similarity', {'backbone': 'vgg'}, "backbone='vgg': must be one of 'dino', 'clip'"),
    ('image_similarity', {'dtype': 'float16'}, "verifier.dtype='float16': must be one of float32"),
    ('image_similarity', {'weights': 'random:b32'},
     "weights='random:b32': must be a checkpoint or one of random:tiny, random:dino_vits16"),
    ('image_similarity', {'max_references': 0}, 'max_references=0: must be an integer >= 1'),
    ('self_consistency', {'weights': 'random:x', 'backbone': 'clip'}, 'of random:tiny, random:b'),
    ('dino_logit', {'weights': 'random:dinov2_base'}, "'random:dinov2_base': has no linear head"),
    ('dino_logit', {'output': 'odds'}, "output='odds': must be one of 'logit', 'log_prob'"),
    ('dino_logit', {**TINY, 'class_names': '/none'}, "class_names: path='/none': no such file"),
    ('dreamsim', {**TINY, 'branches': 'vgg'}, "branches='vgg': must be one of ensemble"),
    ('dreamsim', {'weights': 'random:vgg'}, 'one of random:tiny, random:ensemble, random:dino'),
    ('dreamsim', {}, "weights='': must be a folder or file"),
    ('image_similarity', {**TINY, 'references': '/none'}, "'/none' is no picture and no folder"),
  ],
)  # fmt: skip
def test_settings_that_cannot_be(path, settings, message):
  with pytest.raises(ConfigError, match=message):
    load(f'verifiers.{path}', **settings).check()
