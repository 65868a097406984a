"""Stable Diffusion on the UNet: laws, prompts, schedules, files of both kinds, errors.

Whole loops against diffusers' pipelines are in tests/parity/test_parity_unet_pipeline.py."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import rename_to_original

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.engine.search import bill, search
from vtts_jax.errors import ConfigError
from vtts_jax.generators import unet
from vtts_jax.generators.diffusion import guidance
from vtts_jax.models.autoencoder_kl import original
from vtts_jax.models.unet import modeling
from vtts_jax.search.smc import SMC
from vtts_jax.study import arms
from vtts_jax.testing import laws, toys

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CONFIG = pathlib.Path(__file__).parents[1] / 'configs/sdxl_fk.py'
KEY = jax.random.key(7)
PROMPTS = ('a red dog', 'two cats')


def tiny(settings=unet.TINY, **more):
  return unet.StableDiffusion(**{'steps': 3, 'dtype': 'float32', **settings, **more})


# ---------------------------------------------------------------------------------- laws, the bill


def test_the_generator_keeps_the_laws():
  laws.check_generator(tiny(sampler='ddim', eta=1.0), PROMPTS, KEY)


def test_the_bill_of_particles():
  """A search by particles, traced and not run: its calls are those of the bill."""
  gen, target = tiny(sampler='ddim', eta=1.0), toys.Target(rows=8)
  algo = SMC(particles=2, schedule='fixed', resampler='multinomial')
  due = sum(bill(algo, gen, target), core.Cost())
  assert laws.counted_cost(algo, gen, target, PROMPTS[:1], KEY) == due
  one = modeling.count_flops(modeling.SIZES['tiny'], 4, 4, words=16)
  assert gen.cost('extend', 0, 3) == core.Cost(generator=3, flops=3 * 2 * one)
  with pytest.raises(ConfigError, match='stochastic'):
    search(algo, tiny(), target, PROMPTS, seed=KEY)


# ------------------------------------------------------------------------------ prompts and times


class Recorder(unet.StableDiffusion):
  """Its UNet keeps what it was given, and predicts zeros."""

  def bind_part(self, params, name):
    if name != 'unet':
      return super().bind_part(params, name)
    return lambda *given, **conditions: params['given'].append((given, conditions)) or given[0] * 0


def test_what_xl_reads():
  gen = Recorder(**unet.TINY_XL | {'width': 12, 'dtype': 'float32'})
  gen.check()
  assert gen.outputs == {'image': core.Output('image', (8, 12, 3))}
  assert gen.guidance_scale == 5.0 and tiny().guidance_scale == 7.5
  params = {name: gen.model_parts()[name].load() for name in ('clip', 'open_clip')}
  arrays = gen.tokenize(core.as_prompts(PROMPTS))
  tower = gen.bind_part(params, 'open_clip').text
  encode = lambda params, arrays: (
    gen.encode(params, arrays), tower.penultimate_states(arrays['open_clip'][:, 0])
  )  # fmt: skip
  ctx, (states, pooled) = jax.jit(encode)(params, arrays)
  # CLIP L's channels first, the pooled text of the second tower, zeros for no text
  np.testing.assert_allclose(ctx['text'][:, 0, :, 16:], states, atol=1e-5)
  np.testing.assert_allclose(ctx['pooled'][:, 0], pooled, atol=1e-5)
  assert np.any(ctx['text'][:, 0, :, :16])
  assert not np.any(ctx['text'][:, 1]) and not np.any(ctx['pooled'][:, 1])
  params['given'] = []
  x = np.random.default_rng(0).normal(size=(2, 2, 1, 4, 6, 3)).astype(np.float32)
  t = np.full((2, 2, 1), unet.TRAINED.times[400], np.float32)
  assert gen.predict(params, ctx, jnp.asarray(x), jnp.asarray(t)).shape == x.shape
  (rows, level, text), conditions = params['given'][0]
  # rows are prompts, then streams; sizes have the height before the width
  np.testing.assert_array_equal(rows, x.reshape(4, 4, 6, 3))
  np.testing.assert_array_equal(level, np.full(4, 400.0))
  np.testing.assert_array_equal(text, ctx['text'].reshape(4, 16, 32))
  np.testing.assert_array_equal(conditions['pooled'], ctx['pooled'].reshape(4, 12))
  np.testing.assert_array_equal(conditions['time_ids'], [[8, 12, 0, 0, 8, 12]] * 4)


def test_times_of_the_samplers(tmp_path):
  trained = unet.TRAINED
  levels = lambda gen: np.asarray(trained.timestep_at(gen.step_times[:-1]))
  ddim, euler = tiny(sampler='ddim', steps=50), tiny(steps=50)
  np.testing.assert_array_equal(levels(ddim), np.arange(981, 0, -20))
  np.testing.assert_array_equal(levels(euler), levels(ddim))
  # DDIM's last step stays at the first level, Euler's reaches the data
  np.testing.assert_allclose([ddim.landing_times[-1], euler.landing_times[-1]],
                             [trained.times[0], 1])  # fmt: skip
  # of 21 points, 47 levels apart, the last is left out
  np.testing.assert_array_equal(
    levels(tiny(sampler='dpm++2m', steps=20)), np.arange(941, 1, -47)
  )
  turbo = tiny(spacing='trailing', steps=1)
  np.testing.assert_allclose(turbo.noise_scale, np.sqrt(1 - trained.alphas_squared[-1]), rtol=1e-5)
  assert tiny(sampler='dpm++2m').stepper.order == 2 and euler.stepper.order == 1
  assert tiny(eta=1.0).offers - euler.offers == {'stochastic'}
  # the pipeline's own file
  (tmp_path / 'scheduler').mkdir()
  file = tmp_path / 'scheduler/scheduler_config.json'
  file.write_text(json.dumps({'prediction_type': 'v_prediction', 'timestep_spacing': 'trailing'}))
  gen = unet.StableDiffusion(weights=str(tmp_path))
  assert gen.predictor == guidance.AnglePredictor()
  assert gen.schedule == unet.Schedule('v_prediction', 'trailing')
  assert unet.StableDiffusion(weights=str(tmp_path), prediction='epsilon').predictor == (
    guidance.NoisePredictor()
  )
  unet.read_schedule.cache_clear()
  file.write_text(json.dumps({'rescale_betas_zero_snr': True}))
  with pytest.raises(ConfigError, match='rescale_betas_zero_snr=True; allowed is False'):
    _ = gen.schedule


# ------------------------------------------------------------------------------------------ files


def read_arrays(name):
  with np.load(GOLDEN / name) as file:
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}


def test_an_original_single_file(tmp_path):
  """All models are found in it, and a text tower of another release is refused."""
  network, towers = read_arrays('unet_sd15_a.npz'), read_arrays('clip_hf.npz')
  text = {k: v for k, v in towers.items() if k.startswith('text_model.')}
  names = [
    'conv_in', 'mid.block_1.conv1', 'up.0.block.0.conv1', 'up.0.block.1.conv1', 'conv_out',
  ]  # fmt: skip
  decoder = {f'decoder.{name}.weight': np.zeros((32, 32, 3, 3), np.float32) for name in names}
  decoder['decoder.conv_in.weight'] = np.zeros((32, 4, 3, 3), np.float32)
  whole = {rename_to_original(k): v for k, v in network.items()}
  whole |= {unet.CLIP_OF_SD1 + k: v for k, v in text.items()}
  whole |= {original.LEAD + k: v for k, v in decoder.items()}
  write_weights(tmp_path / 'sd.safetensors', whole, {'norm_num_groups': 8, 'attention_head_dim': 4})
  gen = tiny({'weights': str(tmp_path / 'sd.safetensors'), 'tokenizer': 'owner/sd@1'})
  assert gen.unet.config.cross_attention_dim == 20 and not gen.is_xl
  tower = gen.part_config('clip')
  assert (tower.text.width, tower.projection, tower.length) == (12, 0, 8)
  assert gen.text_models()['clip'].tokenizer == 'owner/sd/tokenizer@1'
  assert gen.part_config('vae').scaling_factor == 0.18215
  loaded = gen.model_parts()['clip'].load()['text']['position']
  np.testing.assert_array_equal(loaded, text['text_model.embeddings.position_embedding.weight'])
  with pytest.raises(ConfigError, match='clip_weights: has width=12, the UNet wants 20'):
    gen.check()
  # XL's label_emb tells whose autoencoder it is
  named = whole | {'model.diffusion_model.label_emb.0.0.weight': np.zeros(1)}
  found = original.select_autoencoder(source_of_arrays(named))
  assert found.config == {'scaling_factor': 0.13025} and len(found.header) == len(decoder)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'sampler': 'plms'}, "generator.sampler='plms': must be one of 'euler', 'ddim', 'dpm"),
    ({'spacing': 'linspace'}, "generator.spacing='linspace': must be one of '', 'leading'"),
    ({'prediction': 'x0'}, "generator.prediction='x0': must be one of '', 'epsilon'"),
    ({'steps': 1000}, r'generator.steps=1000: must be in 1 \.\. 999'),
    ({'dtype': 'float16'}, "generator.dtype='float16': must be one of float32, bfloat16"),
    ({'weights': 'random:xxl'}, r"generator\.weights='random:xxl'"),
    ({'weights': 'sd.safetensors'}, "generator.tokenizer='': must be a pipeline with tokenizers"),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'height': 9}, 'generator.height=9: must be a positive multiple of 2'),
    (unet.TINY | {'clip_weights': 'random:b32'}, 'clip_weights: has width=512, the UNet wants 16'),
    (unet.TINY_XL | {'open_clip_weights': 'random:b32'}, "has width with CLIP L's=528, the UNet"),
    ({'vae_weights': 'random:sd1'}, 'vae_weights: has latent_channels=4, the network wants 3'),
  ],
)
def test_models_that_do_not_fit(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings).check()


def test_releases_and_the_config():
  """FK steering as its authors launch it, and what a laptop runs; nothing is read."""
  for settings in unet.RELEASES.values():
    assert components.load('generators.unet', **settings).num_stages == 50
  get_config = runpy.run_path(str(CONFIG))['get_config']
  full = get_config('fk').to_dict()
  given = {'sampler': 'ddim', 'eta': 1.0, 'steps': 100, 'guidance': 5.0}
  assert full['generator'] | unet.RELEASES['sdxl'] | given == full['generator']
  published = {'particles': 4, 'strength': 10.0, 'potential': 'max'}
  published['schedule'] = (21, 41, 61, 81, 100)
  assert full['search'] | published == full['search']
  # stages x particles; the two children of a parent share its call, and the last stage is one call
  for arg, evals in (('fk', 9), ('das,sd15', 9), ('svdd,clip', 7), ('bfs,sd21', 12)):
    study = arms.build_study(get_config(f'{arg},runlocal').to_dict()).arms
    assert {arm.name: arm.cost.generator for arm in study} == {
      arg.split(',')[0]: evals, 'best-of-n': 9,
    }  # fmt: skip
    study[0].gen.check()
  for arg in ('beam', 'fk,sd3', 'fk,clip,image_reward'):
    with pytest.raises(ValueError, match='must be one of fk, das, svdd, bfs, then at most one of'):
      get_config(arg)
