"""FLUX's generator: a search, the reference's steps, what each release reads, what cannot be."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.cli import run
from vtts_jax.errors import ConfigError
from vtts_jax.generators import flux
from vtts_jax.models.flux import modeling
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws, toys

pytestmark = pytest.mark.usefixtures('host_weights')
GOLDEN = pathlib.Path(__file__).parent / 'golden/flux_c_schnell.npz'
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
KEY = jax.random.key(0)


def tiny(**settings):
  return flux.Flux(**{'steps': 3, 'dtype': 'float32', **flux.TINY, **settings})


def test_a_search_keeps_the_laws():
  prompts = ['a red dog', 'two cats', 'a cup']
  laws.check_algorithm(BestOfN(n=3), tiny(), toys.Brightness(), prompts, KEY)


@pytest.fixture(scope='module')
def golden(tmp_path_factory):
  """The original's single file, and the arrays of the golden file."""
  file = tmp_path_factory.mktemp('flux') / 'flux1.safetensors'
  with np.load(GOLDEN) as arrays:
    arrays = dict(arrays)
  lead = 'params/'
  weights = {k.removeprefix(lead): v for k, v in arrays.items() if k.startswith(lead)}
  axes = json.loads(str(arrays['config']))['params']['axes_dim']
  write_weights(file, weights, {'axes_dim': str(axes)})
  return str(file), arrays


def test_steps_are_those_of_the_reference(golden):
  """The golden trajectory of [schnell] through the generator."""
  weights, arrays = golden
  given = {
    'weights': weights, 'steps': 4, 'height': 32, 'width': 64,
    'vae_weights': 'random:flextok_vae_c4', 'clip_weights': 'random:tiny',
    't5_weights': 'random:tiny',
  }  # fmt: skip
  gen = tiny(**given)
  with pytest.raises(ConfigError, match=r'clip_weights: has width=16, the network wants 12'):
    gen.check()
  with pytest.raises(ConfigError, match=r"guidance=3.5: must be -1, because weights='.*1.safeten"):
    tiny(**given, guidance=3.5).check()
  params = {'network': gen.model_parts()['network'].load()}
  ctx = {'text': arrays['in/txt'][:, None], 'pooled': arrays['in/vec'][:, None]}
  noise = jnp.moveaxis(jnp.asarray(arrays['in/latent']), 1, -1)
  extend = jax.jit(lambda state: gen.extend(params, ctx, state, KEY, 0, 4))
  found = extend(gen.start_state(noise[:, None])).x[:, 0]
  want = arrays['out/denoised_noshift_packed']
  np.testing.assert_allclose(modeling.pack_latents(found), want, atol=1e-4)


def test_the_scale_is_an_input_of_dev():
  """One network call with the scale that is set; [schnell] has none."""
  scales = []

  def bind(params, name):
    def network(rows, times, text, pooled, scale):
      scales.append(scale)
      np.testing.assert_allclose(times, [0.75] * 6)
      return rows

    return network

  x = jnp.ones((2, 1, 3, 8, 8, 3))
  ctx = {'text': jnp.zeros((2, 1, 4, 8)), 'pooled': jnp.zeros((2, 1, 16))}
  for settings in ({}, {'guidance': 2.0}):
    gen = tiny(**settings)
    object.__setattr__(gen, 'bind_part', bind)
    # its velocity runs from the data to the noise
    np.testing.assert_array_equal(gen.predict({}, ctx, x, jnp.full((2, 1, 3), 0.25)), -x)
  np.testing.assert_allclose(scales, [[3.5] * 6, [2.0] * 6])
  assert gen.guidance_streams == ('prompt',)


def test_releases_times_and_the_bill():
  gen = tiny(steps=4, steps_per_stage=2)
  one = modeling.count_flops(modeling.SIZES['tiny'], 8, 8, 8)
  assert gen.cost('extend', 0, 1) == core.Cost(generator=2, flops=2 * one)
  assert gen.outputs == {'image': core.Output('image', (16, 16, 3))}
  assert tiny(height=8, width=24).data_shape == (4, 12, 3)
  released = components.load('generators.flux', **flux.RELEASES['schnell'])
  assert (released.steps, released.words) == (4, 256)
  # at 1024 pixels [dev] shifts by e^1.15, and [schnell] not at all
  sizes = {
    'height': 1024, 'width': 1024, 'vae_weights': 'random:flux', 'clip_weights': 'random:l14',
    't5_weights': 'random:t5_v1_1_xxl', 'steps': 4,
  }  # fmt: skip
  dev = tiny(weights='random:dev', **sizes)
  dev.check()
  sigmas = np.array([1, 0.75, 0.5, 0.25, 0])
  shifted = np.exp(1.15) * sigmas / (1 + (np.exp(1.15) - 1) * sigmas)
  np.testing.assert_allclose(dev.step_times, 1 - shifted, atol=1e-6)
  schnell = tiny(weights='random:schnell', **sizes)
  schnell.check()
  np.testing.assert_allclose(schnell.step_times, 1 - sigmas, atol=1e-6)


def test_models_and_tokenizers_of_a_pipeline():
  gen = flux.Flux(weights='owner/FLUX@v1')
  places = {name: part.weights for name, part in gen.model_parts().items()}
  assert places == {
    'network': 'owner/FLUX@v1', 'vae': 'owner/FLUX/vae@v1', 'clip': 'owner/FLUX/text_encoder@v1',
    't5': 'owner/FLUX/text_encoder_2@v1',
  }  # fmt: skip
  for weights, place in (
    ('owner/FLUX/text_encoder_2@v1', 'owner/FLUX/tokenizer_2@v1'),
    ('google/t5', 'google/t5'),
    ('/models/t5/x.safetensors', '/models/t5'),
    ('random:tiny', ''),
  ):
    part = flux.Flux(weights='a/b', t5_weights=weights).model_parts()['t5']
    assert flux.TextModel(part, 8, 100).tokenizer == place
  rows = tiny().tokenize([{'text': 'a red dog'}, {'text': 'a dog'}])
  assert rows['clip'].shape == (2, 1, 16) and rows['t5'].shape == (2, 1, 8)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'height': 18}, 'generator.height=18: must be a positive multiple of 4'),
    ({'width': 0}, 'generator.width=0: must be a positive multiple of 4'),
    ({'words': 1}, 'generator.words=1: must be an integer >= 2'),
    ({'guidance': -2.0}, r'generator.guidance=-2.0: must be >= 0, or -1'),
    ({'weights': 'random:pro'}, r"generator.weights='random:pro'"),
    ({'weights': 'x/y/flux1-dev.safetensors', 'vae_weights': 'random:tiny'},
     r"generator.clip_weights='': must be owner/name"),
    ({'t5_weights': 'random:tiny_wide'}, 't5_weights: has d_model=32, the network wants 8'),
    ({'vae_weights': 'random:flextok_vae_c4', 'height': 64, 'width': 64},
     'vae_weights: has latent_channels=4, the network wants 3'),
  ],
)  # fmt: skip
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings).check()


def test_prompts_without_words():
  with pytest.raises(ConfigError, match='prompt 1 is empty'):
    tiny().tokenize([{'text': 'a dog'}, {'text': ' '}])


@pytest.mark.parametrize(
  ('name', 'evals'), [('random', 12), ('zero_order', 12), ('paths,clip', 12)]
)
def test_configs(name, evals):
  where = f'--config={CONFIGS}/flux_drawbench.py:'
  (arm,) = build_study(run.read_config([f'{where}{name},runlocal'])).arms
  assert arm.cost.generator == evals and arm.gen.check() is None
  with pytest.raises(ConfigError, match='must be one of random'):
    run.read_config([f'{where}random,dev'])
