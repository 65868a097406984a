"""SANA and Sprint as generators: laws, one search, prompts, Sprint's steps, times, errors. Whole
pipelines against diffusers are in tests/parity."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.engine.search import bill, search
from vtts_jax.errors import ConfigError
from vtts_jax.generators import sana, sana_sprint
from vtts_jax.models.gemma2 import modeling as gemma2
from vtts_jax.models.sana import modeling
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.study import arms
from vtts_jax.testing import laws, replay, toys

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests/golden/sana_sprint_a.npz'
KEY = jax.random.key(4)


pytestmark = pytest.mark.usefixtures('host_weights')


def tiny(**settings):
  return sana.Sana(**{'steps': 2, 'dtype': 'float32', **sana.TINY, **settings})


def tiny_sprint(**settings):
  return sana_sprint.SanaSprint(**{'dtype': 'float32', **sana_sprint.TINY, **settings})


def test_the_generator_keeps_the_laws():
  """With two streams and a multistep method."""
  laws.check_generator(tiny(), ['a cat', 'Two dogs'], KEY)


def test_a_search_and_its_bill(tmp_path):
  (tmp_path / 'before.txt').write_text('say what you see: ', encoding='utf-8')
  gen = tiny(instruction=str(tmp_path / 'before.txt'))
  algo, ver, prompts = BestOfN(n=2), toys.Brightness(), ['a cat']
  found = search(algo, gen, ver, prompts, seed=0, collect=('samples',))
  step = found.steps[0]
  images = np.asarray(step.outputs['image'], np.float32)
  assert images.shape == (1, 2, 8, 8, 3) and images[0, 0].std() > 0
  assert (images[0, 0] != images[0, 1]).any()
  assert found.best.total[0] == step.totals.max()
  # the start, the end and four words; of 8 more tokens two are counted already
  one = modeling.count_flops(modeling.SIZES['tiny'], 'predict', 4, 4, 8)
  assert gen.text_width == 6 + 8 - 2
  assert gen.cost('extend', 0, 2) == core.Cost(generator=2, flops=4 * one)
  text = gemma2.count_flops(gemma2.SIZES['tiny'], 12)
  caption = modeling.count_flops(modeling.SIZES['tiny'], 'caption', words=8)
  assert gen.count_flops('encode') == 2 * (text + caption)
  assert laws.counted_cost(algo, gen, ver, prompts, KEY) == sum(bill(algo, gen, ver), core.Cost())


def test_weights_in_bfloat16():
  """Sprint's program is traced: latents and pictures stay float32, and the caption does not."""
  gen = tiny_sprint(dtype='bfloat16')
  keys = jax.random.split(KEY, (1, 2))

  def run(params, arrays):
    ctx = gen.encode(params, arrays)
    state = gen.extend(params, ctx, gen.init(params, ctx, keys), keys, 0, 2)
    return ctx['caption'], state.x, gen.observe(params, ctx, state, 2, ('image',))['image']

  found = jax.eval_shape(run, jax.eval_shape(gen.load), gen.tokenize([{'text': 'a cat'}]))
  assert [x.dtype.name for x in found] == ['bfloat16', 'float32', 'float32']


def test_what_the_network_reads_of_a_prompt(tmp_path):
  """The first token and the last of those behind the instruction; the null text has no
  instruction."""
  (tmp_path / 'before.txt').write_text('say what you see: \n', encoding='utf-8')
  gen = tiny(instruction=str(tmp_path / 'before.txt'), guidance=3.0)
  arrays = gen.tokenize([{'text': ' Two DOGS'}, {'text': 'a b c d e f g h'}])
  same = tiny(instruction=gen.instruction, guidance=1.0).tokenize([{'text': 'two dogs '}])
  np.testing.assert_array_equal(arrays['ids'][:1, :1], same['ids'])
  # start, four words, two words, end; then the text that is cut, and the null text
  assert arrays['mask'].sum(-1).tolist() == [[8, 2], [12, 2]]
  kept = [gen._kept_tokens(stream).tolist() for stream in gen.guidance_streams]
  assert kept == [[0, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7]]
  # a tokenizer that pads first
  ids, mask = sana.pad_right(np.array([[0, 0, 2, 5, 0]]), np.array([[0, 0, 1, 1, 1]]))
  assert ids.tolist() == [[2, 5, 0, 0, 0]] and mask.tolist() == [[1, 1, 1, 0, 0]]
  with pytest.raises(ConfigError, match='prompt 1 is empty'):
    gen.tokenize([{'text': 'a'}, {'text': ' '}])
  text = sana.read_instruction('published')
  # the prompt follows on the same line
  assert text.startswith('Given a user prompt') and text.endswith('\nUser Prompt: ')


def test_sprint_takes_the_steps_of_the_reference(tmp_path, monkeypatch):
  """The golden loop through the generator: file, embedded guidance, times, fresh noise."""
  config, source, inputs, outputs = replay.read(str(GOLDEN))
  tensors = {name: source.read_tensor(name) for name in source.tensor_names()}
  write_weights(tmp_path / 'sprint.safetensors', tensors, config['params'])
  gen = tiny_sprint(weights=str(tmp_path / 'sprint.safetensors'), height=8, width=12)
  with pytest.raises(ConfigError, match='text_weights: has hidden_size=12, the network wants 24'):
    gen.check()
  last = lambda x: jnp.moveaxis(jnp.asarray(x), -3, -1)
  monkeypatch.setattr(type(gen), '_draw_noise', lambda self, i: last(inputs['noise'])[i][:, None])
  # a key that is the number of its step
  monkeypatch.setattr('vtts_jax.core.fold', lambda keys, i: i)

  @jax.jit
  def run(params, start, text, mask):
    caption = gen.bind_part(params, 'network').caption(text)[:, None]
    ctx = {'caption': caption, 'mask': mask[:, None]}
    return gen.extend(params, ctx, gen.start_state(start[:, None]), jnp.zeros((2, 1)), 0, 2).end

  params = {'network': gen.model_parts()['network'].load()}
  text, mask = inputs['text'], inputs['text_mask']
  found = run(params, last(inputs['latents']), text, mask)
  # theirs are times the standard deviation of the data
  np.testing.assert_allclose(found[:, 0] * 0.5, last(outputs['sprint_denoised'][1]), atol=1e-5)


def test_times_and_facts():
  # sigma .9997 first, as DPM-Solver++ has it, and 1 for Euler
  np.testing.assert_allclose(1 - tiny(steps=20).step_times[0], 0.99967, atol=1e-5)
  assert tiny(sampler='euler', steps=20).step_times[0] == 0
  angles = lambda gen: (1 - gen.step_times) * np.pi / 2
  np.testing.assert_allclose(angles(tiny_sprint()), [1.5708, 1.3, 0], atol=1e-5)
  np.testing.assert_allclose(angles(tiny_sprint(steps=3)), [1.5708, 1.0472, 0.5236, 0], atol=1e-5)
  assert 'stochastic' in tiny_sprint().offers and 'stochastic' not in tiny().offers
  assert (tiny().guidance_scale, tiny_sprint().guidance_scale) == (4.5, 4.5)
  assert tiny_sprint(guidance=3.0).guidance_streams == ('prompt',)
  assert tiny().outputs == {'image': core.Output('image', (8, 8, 3))}
  for name, kind in (('sana', sana), ('sana_sprint', sana_sprint)):
    assert components.load(f'generators.{name}', **kind.TINY).words == 8
    for settings in kind.RELEASES.values():
      # parts of a pipeline are named without reading anything
      parts = components.load(f'generators.{name}', **settings).model_parts()
      assert parts['text'].weights == f'{settings["weights"]}/text_encoder'
      assert parts['vae'].weights == f'{settings["weights"]}/vae'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'sampler': 'heun'}, "generator.sampler='heun': must be one of dpm, euler"),
    ({'shift': 0}, 'generator.shift=0: must be > 0'),
    ({'words': 1}, 'generator.words=1: must be an integer >= 2'),
    ({'instruction': 'nowhere.txt'}, "instruction='nowhere.txt': must be a text file, 'published'"),
    ({'text_weights': 'random:gemma'}, "generator.text_weights='random:gemma': must be"),
    ({'height': 7}, 'generator.height=7: must be a positive multiple of 2'),
    ({'weights': 'random:sprint_tiny', 'vae_weights': 'random:tiny', 'text_weights': 'random:tiny'},
     'the network is distilled: .* must be run by generators.sana_sprint'),
  ],
)  # fmt: skip
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings).check()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'weights': 'random:tiny'}, 'the network reads no guidance scale, .* by generators.sana$'),
    ({'max_timestep': 2.0}, r'generator.max_timestep=2.0: must be in \(0, pi / 2\]'),
    ({'intermediate_timestep': 1.6}, 'intermediate_timestep=1.6: must be above 0 and below'),
  ],
)
def test_settings_that_sprint_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny_sprint(**settings).check()


def test_the_config():
  """The published search at full size, and what a laptop runs; nothing is read."""
  get_config = runpy.run_path(str(ROOT / 'configs/sana_geneval.py'))['get_config']
  full = get_config('random').to_dict()
  assert full['search'] | {'n': 2048, 'round': 32} == full['search']
  assert full['generator'] | sana.RELEASES['1.5_4800m'] | {'steps': 20} == full['generator']
  for arg, steps in (('random,1600m', 3), ('random,sprint_600m,clip', 2)):
    study = arms.build_study(get_config(f'{arg},runlocal').to_dict())
    assert study.arms[0].cost.generator == 4 * steps
  for arg in ('beam', 'random,vqa,clip', 'random,2b'):
    with pytest.raises(ValueError, match=r'must be one of random, then at most one of vqa'):
      get_config(arg)
