"""ImageReward: sizes, what a prompt pays once, the verifier, and what its loader says."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.blip import convert, modeling
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
GOLDEN = pathlib.Path(__file__).parent / 'golden/blip_a.npz'
PROMPTS = core.as_prompts(['a red square', 'two blue dogs sit'])


@pytest.fixture(scope='module')
def pictures():
  return np.random.default_rng(0).random((2, 3, 40, 33, 3), np.float32)


@pytest.fixture(scope='module')
def ver():
  return components.load('verifiers.image_reward', weights='random:tiny')


@pytest.fixture(scope='module')
def params(ver):
  return ver.load()


def test_released_size():
  _, params = modules.abstract_module(lambda: modeling.build_model(modeling.SIZES['image_reward']))
  assert modules.count_parameters(params) == 446_206_689
  # ViT-L/16 at 224 without its classifier
  assert modules.count_parameters(params['vision']) == 303_301_632


def test_flops_are_what_xla_counts():
  """With one layer in every loop, which XLA counts once; it adds what is not a matmul."""
  c = modeling.Config(
    vision=vit.Config(256, 1, 4, 1024), size=32, patch=8, vocab=64, positions=12, width=192,
    layers=2, heads=3, hidden=768, length=12,
  )  # fmt: skip
  graphdef, params = modules.abstract_module(lambda: modeling.build_model(c))
  shape = jax.ShapeDtypeStruct

  def counted(f, *args):
    run = jax.jit(lambda params, *args: f(modules.bind_graph(graphdef, params), *args))
    return run.lower(params, *args).compile().cost_analysis()['flops']

  ids, text = shape((1, 12), jnp.int32), shape((1, 12, 192), jnp.float32)
  assert 1 <= counted(lambda m, i: m.encode_text(i, i), ids) / modeling.count_flops(c, 'text') < 1.1
  score = lambda m, text, mask, images: m.predict_reward(
    m.fuse_image(text, mask, m.vision(images))[0]
  )
  whole = counted(score, text, ids, shape((1, 32, 32, 3), jnp.float32))
  assert 1 <= whole / modeling.count_flops(c, 'image') < 1.1


def test_conformance(ver, pictures):
  laws.check_verifier(ver, PROMPTS, pictures)
  assert ver.names == ('image_reward_blip_l_tiny_random',)
  assert components.load('verifiers.image_reward').names == ('image_reward_blip_l',)


def test_a_bad_pixel_breaks_one_score_and_bfloat16_is_near(ver, params, pictures):
  prompt = ver.tokenize(PROMPTS)

  @jax.jit
  def score(p, images):
    return ver.score(p, ver.encode(p, prompt), {'image': images})[ver.names[0]]

  broken = pictures.copy()
  broken[0, 1, 5, 5] = np.nan
  good, bad = (np.asarray(score(params, p)) for p in (pictures, broken))
  assert np.isnan(bad[0, 1]) and np.isnan(bad).sum() == 1
  np.testing.assert_array_equal(bad[1], good[1])
  near = score(jax.tree.map(lambda x: x.astype('bfloat16'), params), pictures)
  assert near.dtype == np.float32 and 0 < np.abs(near - good).max() < 0.1


def test_the_words_count_and_padding_does_not(params):
  @jax.jit
  def reward(ids, mask):
    model = modules.bind_module(modeling.build_model, modeling.SIZES['tiny'], params)
    image = model.vision(jnp.zeros((1, 32, 32, 3)))
    return model.predict_reward(model.fuse_image(model.encode_text(ids, mask), mask, image)[0])

  ids, mask = np.array([[62, 5, 9, 63, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0]])
  base = reward(ids, mask)
  np.testing.assert_allclose(reward(ids[:, :4], mask[:, :4]), base, atol=1e-5)
  np.testing.assert_array_equal(reward(np.where(mask, ids, 7), mask), base)
  assert abs(reward(np.array([[62, 5, 8, 63, 0, 0]]), mask) - base) > 1e-4


@pytest.fixture
def tensors():
  with np.load(GOLDEN) as file:
    options = json.loads(str(file['config']))['options']
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}, options


def test_sizes_from_shapes_then_config(tensors):
  values, options = tensors
  config = convert.config_of(source_of_arrays(values))
  assert (config.size, config.patch, config.layers, config.heads) == (16, 4, 2, 1)
  assert config.vision == vit.Config(8, 1, 1, 12, eps=1e-6) and config.head == (8, 6, 6, 4, 1)
  said = {'text_config': {'num_attention_heads': 2}, 'vision_config': {'layer_norm_eps': 1e-3}}
  config = convert.config_of(source_of_arrays(values, said))
  assert config.heads == 2 and config.vision.eps == 1e-3
  assert convert.config_of(source_of_arrays(values), **options).heads == options['heads']


def test_what_is_wrong_is_said(tensors):
  values, _ = tensors
  config = convert.config_of(source_of_arrays(values))
  with pytest.raises(ValueError, match='has no BLIP with a reward head'):
    convert.config_of(source_of_arrays({'x': np.zeros(1)}))
  headless = {k: v for k, v in values.items() if not k.startswith('mlp.')}
  with pytest.raises(ValueError, match=r'wanted by the model: head\.4\.kernel'):
    convert.load_weights(source_of_arrays(headless), config)
  with pytest.raises(ValueError, match=r'unused by the model: text_encoder\.pooler'):
    more = values | {'blip.text_encoder.pooler': np.zeros(3)}
    convert.load_weights(source_of_arrays(more), config)
  with pytest.raises(ConfigError, match='layers=1: at least 2'):
    modeling.Config(layers=1)
  for given in ({'weights': 'random:huge'}, {'dtype': 'int8'}, {'weights': ''}):
    (setting,) = given
    with pytest.raises(ConfigError, match=f'verifier.{setting}='):
      components.load('verifiers.image_reward', **given)


def test_an_empty_prompt(ver):
  with pytest.raises(ConfigError, match='prompt 1 is empty'):
    ver.tokenize([{'text': 'a'}, {'text': ' '}])
