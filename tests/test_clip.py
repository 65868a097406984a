"""CLIP: released sizes and the verifiers on it; its golden files are in test_replay.py."""

import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components
from vtts_jax.checkpoints import files as weight_files
from vtts_jax.checkpoints import source as source_files
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.clip import convert, modeling
from vtts_jax.testing import laws
from vtts_jax.verifiers import aesthetic, hpsv2
from vtts_jax.verifiers.parts import dual_encoder as dual

GOLDEN = pathlib.Path(__file__).parent / 'golden'
COUNTS = {
  'b32': 151_277_313, 'b16': 149_620_737, 'l14': 427_616_513, 'l14_336': 427_944_193,
  'h14': 986_109_441, 'bigg14': 2_539_567_105,
}  # fmt: skip
PICTURES = np.random.default_rng(0).random((2, 3, 36, 40, 3), np.float32)
PROMPTS = ['a red cat', 'two dogs on a mat']


@pytest.fixture(scope='module', autouse=True)
def one_model():
  """All tiny verifiers have the same model: made once."""
  load = dual.Dual.load
  made = functools.cache(lambda: load(dual.Dual(random='tiny')))
  part = lambda self: {k: made()[k] for k in ({'image'} if self.towers == 'image' else made())}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dual.Dual, 'load', lambda self: part(self) if self.random else load(self))
    yield


@pytest.fixture
def seen(monkeypatch):
  """Scores of embeddings: 2 x 3 pictures' against 2 prompts', all of length one."""
  rng = np.random.default_rng(1)
  shown, read = (modeling.unit(rng.normal(size=s).astype('f')) for s in ((2, 3, 12), (2, 12)))
  monkeypatch.setattr(dual.Dual, 'features', lambda self, params, images: images)

  def scores(ver, context=read):
    (found,) = ver.score(ver.load(), context, shown).values()
    return np.asarray(found)

  return scores, np.asarray(shown), np.asarray(read)


def tiny(name, **settings):
  return components.load(f'verifiers.{name}', random='tiny', **settings)


def test_released_sizes():
  for name, count in COUNTS.items():
    config = modeling.RELEASED[name]
    assert modules.size(modules.abstract(lambda c=config: modeling.build(c))[1]) == count
  assert COUNTS.keys() == modeling.RELEASED.keys()


def products(jaxpr, times=1):
  """FLOPs of the matrix products in a jaxpr, those of a scan as often as it runs."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (left, _), _ = eqn.params['dimension_numbers']
      inner = np.prod([eqn.invars[0].aval.shape[i] for i in left])
      total += 2 * times * int(inner * np.prod(eqn.outvars[0].aval.shape))
    often = times * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      total += products(inner, often) if hasattr(inner, 'eqns') else 0
  return total


@pytest.mark.parametrize('size', ['b32', 'siglip_b16_224'])
def test_flops_are_those_of_the_products(size):
  ver = dual.Dual(random=size)
  c, net = ver.config, ver.modeling
  graphdef, params = modules.abstract(lambda: net.build(c))
  shapes = {
    'image': jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), jnp.float32),
    'text': jax.ShapeDtypeStruct((1, c.length), jnp.int32),
  }
  for op, shape in shapes.items():
    run = lambda p, x, op=op: getattr(modules.merge(graphdef, p), f'embed_{op}')(x)
    traced = jax.make_jaxpr(run)(params, shape)
    assert products(traced.jaxpr) == net.flops(c, op)


@pytest.mark.parametrize(
  ('name', 'settings', 'scores'),
  [
    ('clip', {'scale': 'cosine'}, 'clip_tiny_random_cosine'),
    ('aesthetic', {}, 'aesthetic_tiny_random'),
    ('clip_classifier', {'value': 'log_prob'}, 'clip_tiny_random_class_log_prob'),
  ],
)
def test_conformance(name, settings, scores):
  ver = tiny(name, **settings)
  assert ver.names == (scores,)
  laws.check_verifier(ver, ['3', '7'] if name == 'clip_classifier' else PROMPTS, PICTURES)


def test_scales_and_what_is_published_under_a_name(seen, monkeypatch):
  scores, shown, read = seen
  cosine = np.einsum('bme,be->bm', shown, read)
  assert (cosine < 0).any() and (cosine > 0).any()
  made = {s: scores(tiny('clip', scale=s)) for s in ('cosine', 'clipscore', 'percent', 'logit')}
  np.testing.assert_allclose(made['cosine'], cosine, atol=1e-6)
  np.testing.assert_allclose(made['clipscore'], 2.5 * np.maximum(cosine, 0), atol=1e-6)
  np.testing.assert_allclose(made['percent'], 100 * cosine, atol=1e-4)
  np.testing.assert_allclose(made['logit'], cosine / 0.07, atol=1e-4)
  np.testing.assert_allclose(scores(tiny('pickscore')), cosine / 0.07, atol=1e-4)
  np.testing.assert_allclose(scores(tiny('hpsv2')), cosine, atol=1e-6)
  load = functools.partial(components.load, 'verifiers.clip')
  assert load().names == ('clip_b16',)
  assert load(model_from='openai/clip-vit-large-patch14@abc', scale='percent').names == (
    'clip_l14_percent',
  )
  assert load(model_from='google/siglip2-base-patch16-224').names == ('siglip2_base_patch16_224',)
  assert load(model_from='/some/Own.safetensors').names == ('clip_own',)
  assert components.load('verifiers.pickscore').names == ('pickscore_h14',)
  for head, name in (('mlp', 'aesthetic_l14'), ('linear', 'aesthetic_linear_l14')):
    config = dataclasses.replace(modeling.RELEASED['l14'], text=None)
    monkeypatch.setattr(dual, '_config', lambda *place, c=config: c)
    assert components.load('verifiers.aesthetic', head=head, head_from='x').names == (name,)
  for version in hpsv2.PUBLISHED:
    ver = components.load('verifiers.hpsv2', version=version, model_from='x.safetensors')
    assert ver.names == (f'hpsv2_{version[-1]}_h14',)


def test_features_and_nan_pixels():
  ver = tiny('clip')
  params, broken = ver.load(), PICTURES[:, :, :34, :32].copy()
  broken[1, 2, 33, 0, 1] = np.nan  # in a row that is cut off: the pictures are not resized

  def run(params, images):
    shown = ver.features(params, images)
    return shown, ver.score(params, shown[:, 0], images)[ver.names[0]]

  shown, found = jax.jit(run)(params, broken)
  np.testing.assert_allclose(np.linalg.norm(shown[0], axis=-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(np.isnan(shown).all(-1), [[0, 0, 0], [0, 0, 1]])
  np.testing.assert_array_equal(np.isnan(found), [[0, 0, 0], [0, 0, 1]])
  np.testing.assert_allclose(found[:, 0], 2.5, rtol=1e-6)


def test_hpsv2_sees_the_whole_picture_on_black():
  """48 x 24 -> 32 x 16 in the middle of 32 x 32, and not CLIP's cut."""
  ver = tiny('hpsv2')
  made = np.asarray(ver.prepare(np.ones((1, 48, 24, 3), np.float32)))
  white, black = ((v - np.array(modeling.MEAN)) / np.array(modeling.STD) for v in (1, 0))
  want = np.broadcast_to(black, (1, 32, 32, 3)).copy()
  want[:, :, 8:24] = white
  np.testing.assert_allclose(made, want, atol=1e-5)


def write_aesthetic(tmp_path):
  """A tiny CLIP and a head in one file, as on the hub; the layers."""
  with np.load(GOLDEN / 'clip_hf.npz') as file:
    state = {k[7:]: file[k] for k in file.files if k.startswith('params/vis')}
  state['vision_model.embeddings.position_ids'] = np.arange(10)
  rng, layers, width = np.random.default_rng(3), {}, 12
  for name, out in aesthetic.HEADS['mlp']:
    layers[f'{name}.weight'] = rng.normal(size=(out, width)).astype(np.float32) / 8
    layers[f'{name}.bias'] = rng.normal(size=out).astype(np.float32)
    width = out
  options = {'num_attention_heads': 2, 'hidden_act': 'quick_gelu'}
  weight_files.save(tmp_path / 'whole.safetensors', state | layers, options)
  weight_files.save(tmp_path / 'clip.safetensors', state, options)
  weight_files.save(tmp_path / 'head.safetensors', layers)
  return list(layers.values())


def test_aesthetic_head_by_hand(tmp_path):
  """In one file with its CLIP or in its own: five layers on the unit embedding."""
  layers = write_aesthetic(tmp_path)
  place = lambda name: str(tmp_path / f'{name}.safetensors')
  ver = components.load('verifiers.aesthetic', model_from=place('whole'))
  apart = components.load('verifiers.aesthetic', model_from=place('clip'), head_from=place('head'))
  assert (*ver.names, *apart.names) == ('aesthetic_whole', 'aesthetic_clip')
  params = ver.load()
  jax.tree.map(np.testing.assert_array_equal, params, apart.load())
  x, have = jax.jit(lambda p, x: (ver.features(p, x), ver.score(p, {}, x)))(params, PICTURES)
  np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6)
  for kernel, bias in zip(layers[::2], layers[1::2]):
    x = np.asarray(x, np.float64) @ kernel.T + bias
  np.testing.assert_allclose(have['aesthetic_whole'], x[..., 0], rtol=1e-4, atol=1e-4)
  with pytest.raises(ConfigError, match=r"verifier\.head_from='': .* does not fit"):
    components.load('verifiers.aesthetic', model_from=place('clip')).load()
  with pytest.raises(ConfigError, match=r'has shape \(1024, 12\)'):
    shapes = aesthetic._shapes('mlp', 768)
    aesthetic.read_head(place('head'), 'mlp', shapes)


def test_class_is_its_prompts_mean(tmp_path, seen):
  file = tmp_path / 'classes.txt'
  file.write_text('tench\nred crane\ncrane\ncrane\n')
  settings = {'classes': str(file), 'templates': ('a {}.', 'no {} here.')}
  ver, plain = tiny('clip_classifier', **settings), tiny('clip')
  log = tiny('clip_classifier', value='log_prob', **settings)
  params = ver.load()
  texts = [t.format(name) for name in ver.known for t in settings['templates']]
  each = jax.jit(plain.encode)(params['model'], plain.tokenize(texts))
  mean = np.asarray(each).reshape(4, 2, 12).mean(1)
  mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
  np.testing.assert_allclose(params['classes'], mean, atol=1e-5)
  _, shown, _ = seen
  logits = shown @ mean.T / 0.07
  for made, want in ((ver, logits), (log, logits - np.log(np.exp(logits).sum(-1))[..., None])):
    context = made.encode(params, made.tokenize(['red crane', '0']))
    (found,) = made.score(params, context, shown).values()
    np.testing.assert_allclose(found, [want[0, :, 1], want[1, :, 0]], atol=1e-4)
  for text in ('crane', '4', '-1', 'a dog'):
    with pytest.raises(ConfigError, match=rf'prompts: {text!r} is no class; must be a number in 0'):
      ver.tokenize([text])


def test_a_checkpoint_of_open_clip(tmp_path, caplog):
  """A file in the other layout through the verifier, in both dtypes."""
  with np.load(GOLDEN / 'clip_open.npz') as file:
    state = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
  path = str(tmp_path / 'open.safetensors')
  weight_files.save(path, state, {'vision_config': {'num_attention_heads': 2}})
  ver = components.load('verifiers.clip', model_from=path, scale='cosine')
  params, ids = ver.load(), np.arange(16).reshape(2, 8)
  half = dataclasses.replace(ver, dtype='bfloat16').load()
  assert half['image']['cls'].dtype == jnp.bfloat16 and half['scale'].dtype == jnp.float32

  def run(params, images):
    shown = ver.features(params, images)
    return shown, ver.score(params, ver.encode(params, {'ids': ids}), images)['clip_open_cosine']

  shown, found = jax.jit(run)(params, PICTURES)
  near = jax.jit(ver.features)(half, PICTURES)
  assert shown.dtype == near.dtype == found.dtype == jnp.float32
  assert 0 < np.abs(shown - near).max() < 0.03 and np.ptp(found) > 1e-3
  with pytest.raises(ConfigError, match=r"verifier\.tokenizer_from='': must be a folder"):
    ver.tokenize(['a cat'])
  with pytest.raises(ConfigError, match=r'verifier\.model_from=.*must be CLIP h14; it is Config'):
    components.load('verifiers.pickscore', model_from=path).check()
  with pytest.raises(ConfigError, match='has no CLIP'):
    weight_files.save(tmp_path / 'x.safetensors', {'w': np.zeros(1)})
    components.load('verifiers.clip', model_from=str(tmp_path / 'x.safetensors')).check()
  with caplog.at_level(logging.WARNING):
    tiny('clip').tokenize(['a cat', 'a ' * 20])
  assert '1 of 2 are longer than the 16 tokens' in caplog.text


@pytest.mark.parametrize(
  ('name', 'settings', 'message'),
  [
    ('clip', {'random': 'b17'}, r"verifier\.random='b17': must be '' or one of tiny, b32"),
    ('clip', {'dtype': 'int8'}, r"verifier\.dtype='int8': must be one of float32"),
    ('clip', {'scale': 'cos'}, r"verifier\.scale='cos': must be one of 'clipscore'"),
    ('clip', {'temperature': 1}, r'unknown setting temperature=1'),
    ('pickscore', {'random': 'siglip_tiny'}, r"verifier\.random='siglip_tiny': must be '' or one"),
    ('hpsv2', {'version': 2.1}, r"verifier\.version=2\.1: must be one of '2\.0', '2\.1'"),
    ('hpsv2', {}, r"verifier\.model_from='': must be HPS_v2\.1_compressed\.pt .* as safetensors"),
    ('aesthetic', {'head': 'cnn'}, r"verifier\.head='cnn': must be one of 'mlp', 'linear'"),
    ('aesthetic', {'head': 'linear'}, r"verifier\.head_from='': must be sa_0_4_vit_l_14_linear"),
    ('clip_classifier', {}, r"verifier\.classes='': must be a text file"),
    ('clip_classifier', {'classes': '/none'}, r"verifier\.classes='/none': cannot be read"),
    ('clip_classifier', {'random': 'tiny', 'templates': ['a']}, r'verifier\.templates=.*must be'),
  ],
)
def test_bad_settings(name, settings, message):
  with pytest.raises(ConfigError, match=message):
    components.load(f'verifiers.{name}', **settings)


def test_bad_checkpoints():
  with np.load(GOLDEN / 'clip_hf.npz') as file:
    state = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
  load = lambda **options: convert.load(source_files.arrays(state, options))
  with pytest.raises(ConfigError, match="act='relu': must be one of"):
    load(vision_config={'hidden_act': 'relu'})
  with pytest.raises(ConfigError, match='width=12: must be a multiple of heads=5'):
    load(text_config={'num_attention_heads': 5})
  with pytest.raises(ValueError, match='10 positions do not fit pictures of 224 in patches of 4'):
    load(vision_config={'image_size': 224})
  with pytest.raises(ConfigError, match="towers='audio': must be one of both, image, text"):
    convert.config_of(source_files.arrays(state), 'audio')
  with pytest.raises(ConfigError, match=r'prompt 1 is empty'):
    tiny('clip').tokenize(['a', ' '])
