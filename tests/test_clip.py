"""CLIP: released sizes and the verifiers on it; its golden files are in test_replay.py."""

import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.clip import convert, modeling
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.testing import laws
from vtts_jax.verifiers import aesthetic, hpsv2
from vtts_jax.verifiers.parts.dual_encoder import DualEncoder

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
  load = Pretrained.load
  made = functools.cache(lambda: load(Pretrained('clip', 'random:tiny')))
  part = lambda self: {k: made()[k] for k in ({'image'} if self.part else made())}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Pretrained, 'load', lambda self: (part if self.is_random else load)(self))
    yield


@pytest.fixture
def seen(monkeypatch):
  """Scores of embeddings: 2 x 3 pictures' against 2 prompts', all of length one."""
  rng = np.random.default_rng(1)
  shown, read = (
    modeling.unit_vectors(rng.normal(size=s).astype('f')) for s in ((2, 3, 12), (2, 12))
  )
  monkeypatch.setattr(DualEncoder, 'embed_images', lambda self, params, images: images)

  def scores(ver, context=read):
    (found,) = ver.score(ver.load(), context, {'image': shown}).values()
    return np.asarray(found)

  return scores, np.asarray(shown), np.asarray(read)


def tiny(name, **settings):
  return components.load(f'verifiers.{name}', **{'weights': 'random:tiny', **settings})


def test_released_sizes():
  for name, count in COUNTS.items():
    config = modeling.SIZES[name]
    _, params = modules.abstract_module(lambda c=config: modeling.build_model(c))
    assert modules.count_parameters(params) == count
  assert {'tiny', *COUNTS} == modeling.SIZES.keys()


def products(jaxpr, times=1):
  """FLOPs of the matrix products in a jaxpr, those of a scan as often as it runs, of the branches
  for several platforms the first's."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (left, _), _ = eqn.params['dimension_numbers']
      inner = np.prod([eqn.invars[0].aval.shape[i] for i in left])
      total += 2 * times * int(inner * np.prod(eqn.outvars[0].aval.shape))
    often = times * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    inside = eqn.params['branches'][0] if 'branches' in eqn.params else list(eqn.params.values())
    for inner in jax.tree.leaves(inside, is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      total += products(inner, often) if hasattr(inner, 'eqns') else 0
  return total


@pytest.mark.parametrize('size', ['b32', 'siglip_b16_224'])
def test_flops_are_those_of_the_products(size):
  model = DualEncoder(weights=f'random:{size}').model_part
  c, net = model.config, model.modeling
  graphdef, params = modules.abstract_module(lambda: net.build_model(c))
  shapes = {
    'image': jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), jnp.float32),
    'text': jax.ShapeDtypeStruct((1, c.length), jnp.int32),
  }
  for op, shape in shapes.items():
    run = lambda p, x, op=op: getattr(modules.bind_graph(graphdef, p), f'embed_{op}s')(x)
    traced = jax.make_jaxpr(run)(params, shape)
    assert products(traced.jaxpr) == net.count_flops(c, op)


@pytest.mark.parametrize(
  ('name', 'settings', 'scores'),
  [
    ('clip', {'output': 'cosine'}, 'clip_tiny_random_cosine'),
    ('aesthetic', {}, 'aesthetic_tiny_random'),
    ('clip_classifier', {'output': 'log_prob'}, 'clip_tiny_random_class_log_prob'),
  ],
)
def test_conformance(name, settings, scores):
  ver = tiny(name, **settings)
  assert ver.names == (scores,)
  prompts = ['3', '7'] if name == 'clip_classifier' else PROMPTS
  laws.check_verifier(ver, prompts, {'image': PICTURES})


def test_outputs_and_what_is_published_under_a_name(seen, monkeypatch):
  scores, shown, read = seen
  cosine = np.einsum('bme,be->bm', shown, read)
  assert (cosine < 0).any() and (cosine > 0).any()
  made = {s: scores(tiny('clip', output=s)) for s in ('cosine', 'clipscore', 'percent', 'logit')}
  np.testing.assert_allclose(made['cosine'], cosine, atol=1e-6)
  np.testing.assert_allclose(made['clipscore'], 2.5 * np.maximum(cosine, 0), atol=1e-6)
  np.testing.assert_allclose(made['percent'], 100 * cosine, atol=1e-4)
  np.testing.assert_allclose(made['logit'], cosine / 0.07, atol=1e-4)
  np.testing.assert_allclose(scores(tiny('pickscore')), cosine / 0.07, atol=1e-4)
  np.testing.assert_allclose(scores(tiny('hpsv2')), cosine, atol=1e-6)
  load = functools.partial(components.load, 'verifiers.clip')
  assert load().names == ('clip_b16',)
  assert load(weights='openai/clip-vit-large-patch14@abc', output='percent').names == (
    'clip_l14_percent',
  )
  assert load(weights='google/siglip2-base-patch16-224').names == ('siglip2_base_patch16_224',)
  assert load(weights='/some/Own.safetensors').names == ('clip_own',)
  assert components.load('verifiers.pickscore').names == ('pickscore_h14',)
  monkeypatch.setattr(Pretrained, 'config', modeling.part_of(modeling.SIZES['l14'], 'image'))
  for head, name in (('mlp', 'aesthetic_l14'), ('linear', 'aesthetic_linear_l14')):
    assert components.load('verifiers.aesthetic', head=head, head_weights='x').names == (name,)
  for version in hpsv2.PUBLISHED:
    ver = components.load('verifiers.hpsv2', version=version, weights='x.safetensors')
    assert ver.names == (f'hpsv2_{version[-1]}_h14',)


def test_embeddings_and_nan_pixels():
  ver = tiny('clip')
  params, broken = ver.load(), PICTURES[:, :, :34, :32].copy()
  broken[1, 2, 33, 0, 1] = np.nan  # in a row that is cut off: the pictures are not resized

  def run(params, images):
    shown = ver.embed_images(params, images)
    return shown, ver.score(params, shown[:, 0], {'image': images})[ver.names[0]]

  shown, found = jax.jit(run)(params, broken)
  np.testing.assert_allclose(np.linalg.norm(shown[0], axis=-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(np.isnan(shown).all(-1), [[0, 0, 0], [0, 0, 1]])
  np.testing.assert_array_equal(np.isnan(found), [[0, 0, 0], [0, 0, 1]])
  np.testing.assert_allclose(found[:, 0], 2.5, rtol=1e-6)


def test_hpsv2_sees_the_whole_picture_on_black():
  """48 x 24 -> 32 x 16 in the middle of 32 x 32, and not CLIP's cut."""
  ver = tiny('hpsv2')
  made = np.asarray(ver.preprocess(np.ones((1, 48, 24, 3), np.float32)))
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
  write_weights(tmp_path / 'whole.safetensors', state | layers, options)
  write_weights(tmp_path / 'clip.safetensors', state, options)
  write_weights(tmp_path / 'head.safetensors', layers)
  return list(layers.values())


def test_aesthetic_head_by_hand(tmp_path, monkeypatch):
  """In one file with its CLIP or in its own: five layers on the unit embedding."""
  layers = write_aesthetic(tmp_path)
  place = lambda name: str(tmp_path / f'{name}.safetensors')
  ver = components.load('verifiers.aesthetic', weights=place('whole'))
  apart = components.load('verifiers.aesthetic', weights=place('clip'), head_weights=place('head'))
  assert (*ver.names, *apart.names) == ('aesthetic_whole', 'aesthetic_clip')
  params = ver.load()
  jax.tree.map(np.testing.assert_array_equal, params, apart.load())
  run = lambda p, x: (ver.embed_images(p, x), ver.score(p, {}, {'image': x}))
  x, have = jax.jit(run)(params, PICTURES)
  np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6)
  for kernel, bias in zip(layers[::2], layers[1::2]):
    x = np.asarray(x, np.float64) @ kernel.T + bias
  np.testing.assert_allclose(have['aesthetic_whole'], x[..., 0], rtol=1e-4, atol=1e-4)
  with pytest.raises(ConfigError, match=r"verifier\.head_weights='': .* does not fit"):
    components.load('verifiers.aesthetic', weights=place('clip')).load()
  wide = dataclasses.replace(apart.model_part.config, projection=768)
  monkeypatch.setattr(Pretrained, 'config', wide)
  with pytest.raises(ConfigError, match=r'has shape \(1024, 12\)'):
    apart._read_head(apart._head_shapes())


def test_class_is_its_prompts_mean(tmp_path, seen):
  file = tmp_path / 'classes.txt'
  file.write_text('tench\nred crane\ncrane\ncrane\n')
  settings = {'class_names': str(file), 'templates': ('a {}.', 'no {} here.')}
  ver, plain = tiny('clip_classifier', **settings), tiny('clip')
  log = tiny('clip_classifier', output='log_prob', **settings)
  params = ver.load()
  texts = [t.format(name) for name in ver.known_classes for t in settings['templates']]
  each = jax.jit(plain.encode)(params['model'], plain.tokenize(core.as_prompts(texts)))
  mean = np.asarray(each).reshape(4, 2, 12).mean(1)
  mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
  np.testing.assert_allclose(params['classes'], mean, atol=1e-5)
  _, shown, _ = seen
  logits = shown @ mean.T / 0.07
  for made, want in ((ver, logits), (log, logits - np.log(np.exp(logits).sum(-1))[..., None])):
    rows = core.as_prompts(['red crane', '0'])
    context = made.encode(params, made.tokenize(rows))
    (found,) = made.score(params, context, {'image': shown}).values()
    np.testing.assert_allclose(found, [want[0, :, 1], want[1, :, 0]], atol=1e-4)
  assert ver.tokenize([{'text': 'crane', 'label': 3}])['label'].tolist() == [3]
  for text in ('crane', '4', '-1', 'a dog'):
    with pytest.raises(ConfigError, match=rf'prompt 0 \({text!r}\) is no class; must be in 0 .. 3'):
      ver.tokenize([{'text': text}])


def test_a_checkpoint_of_open_clip(tmp_path, caplog):
  """A file in the other layout through the verifier, in both dtypes."""
  with np.load(GOLDEN / 'clip_open.npz') as file:
    state = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
  path = str(tmp_path / 'open.safetensors')
  write_weights(path, state, {'vision_config': {'num_attention_heads': 2}})
  ver = components.load('verifiers.clip', weights=path, output='cosine')
  params, ids = ver.load(), np.arange(16).reshape(2, 8)
  half = dataclasses.replace(ver, dtype='bfloat16').load()
  assert half['image']['cls'].dtype == jnp.bfloat16 and half['scale'].dtype == jnp.float32

  def run(params, images):
    context = ver.encode(params, {'ids': ids})
    found = ver.score(params, context, {'image': images})
    return ver.embed_images(params, images), found['clip_open_cosine']

  shown, found = jax.jit(run)(params, PICTURES)
  near = jax.jit(ver.embed_images)(half, PICTURES)
  assert shown.dtype == near.dtype == found.dtype == jnp.float32
  assert 0 < np.abs(shown - near).max() < 0.03 and np.ptp(found) > 1e-3
  with pytest.raises(ConfigError, match=r"verifier\.tokenizer='': must be a folder"):
    ver.tokenize([{'text': 'a cat'}])
  with pytest.raises(ConfigError, match=r'verifier\.weights=.*must be CLIP h14; it is Config'):
    components.load('verifiers.pickscore', weights=path).check()
  with pytest.raises(ConfigError, match='has no CLIP'):
    write_weights(tmp_path / 'x.safetensors', {'w': np.zeros(1)})
    components.load('verifiers.clip', weights=str(tmp_path / 'x.safetensors')).check()
  with caplog.at_level(logging.WARNING):
    tiny('clip').tokenize(core.as_prompts(['a cat', 'a ' * 20]))
  assert '1 of 2 are longer than the 16 tokens' in caplog.text


@pytest.mark.parametrize(
  ('name', 'settings', 'message'),
  [
    ('clip', {'weights': 'random:b17'},
     r"verifier\.weights='random:b17': must be a checkpoint or one of random:tiny, random:b32"),
    ('clip', {'dtype': 'int8'}, r"verifier\.dtype='int8': must be one of float32"),
    ('clip', {'output': 'cos'}, r"verifier\.output='cos': must be one of 'clipscore'"),
    ('clip', {'temperature': 1}, r'unknown setting temperature=1'),
    ('pickscore', {'weights': 'random:siglip_tiny'}, r"'random:siglip_tiny': must be a checkpoint"),
    ('hpsv2', {'version': 2.1}, r"verifier\.version=2\.1: must be one of '2\.0', '2\.1'"),
    ('hpsv2', {}, r"verifier\.weights='': must be HPS_v2\.1_compressed\.pt .* as safetensors"),
    ('aesthetic', {'head': 'cnn'}, r"verifier\.head='cnn': must be one of 'mlp', 'linear'"),
    ('aesthetic', {'head': 'linear'}, r"verifier\.head_weights='': must be sa_0_4_vit_l_14_linear"),
    ('clip_classifier', {}, r"verifier\.class_names='': must be a text file"),
    ('clip_classifier', {'weights': 'random:tiny', 'class_names': '/none'},
     r"verifier\.class_names: path='/none': no such file"),
    ('clip_classifier', {'weights': 'random:tiny', 'templates': ['a']}, r'verifier\.templates=.*'),
  ],
)  # fmt: skip
def test_bad_settings(name, settings, message):
  with pytest.raises(ConfigError, match=message):
    components.load(f'verifiers.{name}', **settings).check()


def test_bad_checkpoints():
  with np.load(GOLDEN / 'clip_hf.npz') as file:
    state = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
  load = lambda **options: convert.config_of(source_of_arrays(state, options))
  with pytest.raises(ConfigError, match="act='relu': must be one of"):
    load(vision_config={'hidden_act': 'relu'})
  with pytest.raises(ConfigError, match='width=12: must be a multiple of heads=5'):
    load(text_config={'num_attention_heads': 5})
  with pytest.raises(ValueError, match='10 positions do not fit pictures of 224 in patches of 4'):
    load(vision_config={'image_size': 224})
  with pytest.raises(ConfigError, match="part='audio' of clip: must be in .'image', 'text'"):
    Pretrained('clip', 'random:tiny', part='audio')
  with pytest.raises(ConfigError, match=r'prompt 1 is empty'):
    tiny('clip').tokenize(core.as_prompts(['a', ' ']))
