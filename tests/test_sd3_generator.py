"""SD3's generator: the laws, two streams, three text models, releases, what cannot be."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.cli import run
from vtts_jax.errors import ConfigError
from vtts_jax.generators import sd3
from vtts_jax.models import vit
from vtts_jax.models.autoencoder_kl import original
from vtts_jax.models.clip import convert
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.sd3 import modeling
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
GOLDEN = pathlib.Path(__file__).parent / 'golden/sd3_a.npz'
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
KEY = jax.random.key(0)


def tiny(**settings):
  return sd3.SD3(**{'steps': 3, 'dtype': 'float32', **sd3.TINY, **settings})


def test_the_generator_keeps_the_laws():
  laws.check_generator(tiny(eta=0.5), ['a red dog', 'two cats'], KEY)


def test_guidance_is_that_of_the_reference(tmp_path):
  """The golden file's guided velocity through the generator: streams, time and direction."""
  with np.load(GOLDEN) as file:
    arrays = dict(file)
  lead = 'params/'
  weights = {k.removeprefix(lead): v for k, v in arrays.items() if k.startswith(lead)}
  write_weights(tmp_path / 'sd3.safetensors', weights, {'sample_size': '8'})
  gen = tiny(
    weights=str(tmp_path / 'sd3.safetensors'), vae_weights='random:flextok_vae_c4', height=64,
    width=64, clip_weights='random:tiny', open_clip_weights='random:tiny',
  )  # fmt: skip
  assert gen.guidance_scale == 4.5 and gen.data_shape == (8, 8, 4)
  params = {'network': gen.model_parts()['network'].load()}
  ctx = {
    name: jnp.stack([arrays[f'in/{name}'], arrays[f'in/uncond_{name}']], axis=1)
    for name in ('text', 'pooled')
  }
  x = jnp.moveaxis(jnp.asarray(arrays['in/latents']), 1, -1)[:, None, None]
  times = jnp.asarray(1 - arrays['in/timestep'] / 1000)[:, None, None]
  predict = jax.jit(lambda x, t: gen.predict(params, ctx, x, t))
  both = predict(jnp.repeat(x, 2, axis=1), jnp.repeat(times, 2, axis=1))
  guided, _ = gen.guidance_rule.combine_streams(both)
  want = np.moveaxis(arrays['out/velocity_cfg'], 1, -1)
  np.testing.assert_allclose(-guided[:, 0], want, atol=2e-4)


def test_the_text_is_two_clips_beside_each_other_and_t5_behind():
  gen = tiny()
  rows = [{'text': 'a red dog'}, {'text': 'two cats'}]
  ctx = jax.jit(gen.encode)(gen.load(), jax.tree.map(jnp.asarray, gen.tokenize(rows)))
  # 16 tokens of CLIP and 8 of T5; two streams; two CLIPs of 16 channels fill the 32 of T5
  assert ctx['text'].shape == (2, 2, 24, 32) and ctx['pooled'].shape == (2, 2, 24)
  # the empty text is the same for both prompts
  jax.tree.map(lambda x: np.testing.assert_allclose(x[0, 1], x[1, 1], atol=1e-6), ctx)
  assert np.abs(ctx['text'][0, 0] - ctx['text'][1, 0]).max() > 0.1
  alone = tiny(guidance=1.0).tokenize(rows)
  assert {name: ids.shape for name, ids in alone.items()} == {
    'clip': (2, 1, 16), 'open_clip': (2, 1, 16), 't5': (2, 1, 8),
  }  # fmt: skip


def test_a_text_tower_of_a_pipeline():
  """Saved without names in front and without a projection; the state before the last block."""
  with np.load(GOLDEN.with_name('clip_hf.npz')) as file:
    arrays = {k: file[k] for k in file.files if k.startswith('params/text_model.')}
  found = []
  for lead in ('params/', 'params/text_model.'):
    source = source_of_arrays({k.removeprefix(lead): v for k, v in arrays.items()})
    config = convert.config_of(source, 'text')
    found.append(convert.load_weights(source, config))
  assert config.projection == 0 and 'projection' not in found[0]['text']
  jax.tree.map(np.testing.assert_array_equal, *found)
  model = Pretrained('clip', 'random:tiny', part='text')
  ids = jnp.array([[5, 9, 255, 0], [7, 255, 0, 0]])

  @jax.jit
  def run(params):
    text = model.bind(params).text
    before, pooled = text.penultimate_states(ids)
    first = text.trunk.layer_states(text.embed_tokens(ids), vit.causal_bias(4))[0]
    return before - first, pooled - text(ids)

  # of two blocks the last one reads what the first one gives
  for difference in run(model.load()):
    np.testing.assert_allclose(difference, 0, atol=1e-6)


def test_releases_times_and_the_bill():
  gen = tiny(steps=4, steps_per_stage=2)
  one = modeling.count_flops(modeling.SIZES['tiny'], 8, 8, 24)
  assert gen.cost('extend', 0, 1) == core.Cost(generator=2, flops=4 * one)
  assert gen.published_guidance == 7.0
  # the end points are shifted, and then everything is shifted again
  sigmas = 1 - gen.step_times
  np.testing.assert_allclose(sigmas[[0, 3, 4]], [1, 0.00893, 0], atol=1e-5)
  large = tiny(
    **{**sd3.RELEASES['3.5_large'], 'weights': 'random:sd3_5_large'}, vae_weights='random:sd3',
    clip_weights='random:l14', open_clip_weights='random:bigg14', t5_weights='random:t5_v1_1_xxl',
    words=256, height=1024, width=768,
  )  # fmt: skip
  large.check()
  assert large.data_shape == (128, 96, 16) and large.published_guidance == 4.5
  names = {name: part.weights for name, part in sd3.SD3(weights='a/b').model_parts().items()}
  assert names['open_clip'] == 'a/b/text_encoder_2' and names['t5'] == 'a/b/text_encoder_3'
  assert components.load('generators.sd3', **sd3.TINY) == sd3.SD3(**sd3.TINY)


def test_the_autoencoder_inside_a_single_file():
  network, vae = 'model.diffusion_model.', 'first_stage_model.'
  for name, factor in (
    ('joint_blocks.0.x_block.attn.qkv.weight', 1.5305), ('label_emb.0.0.weight', 0.13025),
    ('input_blocks.0.0.weight', 0.18215),
  ):  # fmt: skip
    whole = source_of_arrays({network + name: np.zeros(1), vae + original.MARK: np.ones(1)})
    found = original.select_autoencoder(whole)
    assert found.tensor_names() == [original.MARK] and found.config['scaling_factor'] == factor
  assert original.select_autoencoder(found) is found


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'height': 18}, 'generator.height=18: must be a positive multiple of 4'),
    ({'width': 28}, 'generator.width=28: must be at most 24'),
    ({'shift': 0.0}, 'generator.shift=0.0: must be > 0'),
    ({'words': 1}, 'generator.words=1: must be an integer >= 2'),
    ({'t5_weights': 'random:tiny'}, 't5_weights: has d_model=8, the network wants 32'),
    ({'open_clip_weights': 'random:b32'}, "projection with CLIP L's=524, the network wants 24"),
    ({'vae_weights': 'random:flextok_vae_c4', 'height': 64, 'width': 64},
     'vae_weights: has latent_channels=4, the network wants 3'),
  ],
)  # fmt: skip
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings).check()


@pytest.mark.parametrize(('name', 'evals'), [('random', 12), ('random,ensemble,medium', 12)])
def test_configs(name, evals):
  where = f'--config={CONFIGS}/sd35_geneval.py:'
  (arm,) = build_study(run.read_config([f'{where}{name},runlocal'])).arms
  assert arm.cost.generator == evals and arm.gen.check() is None
  with pytest.raises(ConfigError, match='must be one of random'):
    run.read_config([f'{where}random,pro'])
