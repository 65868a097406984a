"""Infinity: sizes, schedules, files, the generator; its golden file is in test_replay.py."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_flops import count_traced_flops

from vtts_jax import components, core
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.cli import run
from vtts_jax.engine.search import bill
from vtts_jax.errors import ConfigError
from vtts_jax.generators.infinity import TINY, Infinity
from vtts_jax.models import modules
from vtts_jax.models.infinity import convert, modeling
from vtts_jax.models.infinity.replay import _pad_words
from vtts_jax.models.infinity.schedules import Schedule, schedule_of
from vtts_jax.models.infinity_vae import convert as vae_convert
from vtts_jax.models.infinity_vae import modeling as infinity_vae
from vtts_jax.search.smc import SMC
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws, toys

pytestmark = pytest.mark.usefixtures('host_weights')
KEY = jax.random.key(5)
HERE = pathlib.Path(__file__).parent
SMALL = {**TINY, 'words': 8, 'area': '0.06M'}


@dataclasses.dataclass(frozen=True)
class Drawn(Infinity):
  """With weights drawn on the host: initialisers take seconds to compile."""

  def load(self):
    draw = np.random.default_rng(0).normal
    random = lambda leaf: jnp.asarray(0.3 * draw(size=leaf.shape), jnp.float32)
    parts = self.model_parts().items()
    shapes = {k: modules.structure_of(p.modeling.build_model, p.config)[1] for k, p in parts}
    return jax.tree.map(random, shapes)


@pytest.fixture(scope='module')
def golden():
  with np.load(HERE / 'golden/infinity_e_patchify.npz') as file:
    return {k: file[k] for k in file.files}


def take(golden, lead):
  return {k.removeprefix(lead): v for k, v in golden.items() if k.startswith(lead)}


def load(tensors):
  source = source_of_arrays(tensors, {}, 'here')
  config = convert.config_of(source)
  return config, convert.load_weights(source, config)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(('name', 'billions'), [('2b', 2.20), ('8b', 8.38)])
def test_released_sizes(name, billions):
  _, params = modules.structure_of(modeling.build_model, modeling.SIZES[name])
  assert round(modules.count_parameters(params) / 1e9, 2) == billions


def test_schedules():
  full = schedule_of('1M')
  assert sum(h * w for h, w in full.grids) == 10521 and full.frame == (64, 64)
  small = schedule_of('0.25M')
  # positions stay those of the largest picture
  assert small == Schedule(full.grids[:10], (64, 64)) and small.grids[-1] == (32, 32)
  tall, wide = schedule_of('1M', 1.5), schedule_of('1M', 1 / 1.52)
  assert tall.frame == (78, 52) and wide.grids == tuple(grid[::-1] for grid in tall.grids)
  with pytest.raises(ConfigError, match="area='2M': must be one of 0.06M"):
    schedule_of('2M')
  # a grid of 4 on a frame of 6 has the rows 0, 1.5, 3, 4.5, of which halves go to even numbers
  config = modeling.SIZES['tiny']
  table = modeling.rotation_table(config, Schedule(((4, 1),), (6, 1)))
  np.testing.assert_allclose(table[0, :, 0], np.cos([0, 2, 3, 4]), atol=1e-6)
  np.testing.assert_allclose(table[1, :, 2:], 0)  # one column


def test_flops_are_those_of_the_traced_program():
  gen = Infinity(**SMALL, scales=3)
  params, rows = jax.eval_shape(gen.load), gen.tokenize([{'text': 'a red dog'}])
  trace = lambda f, *args: count_traced_flops(jax.make_jaxpr(f)(*args).jaxpr)
  prior = lambda p, s, m: gen.bind_part(p, 'prior').text_context(s, m)
  states = jnp.zeros((1, 8, 8))
  want = modeling.count_flops(gen.part_config('prior'), 'context', 2, 8)
  assert trace(prior, params, states, rows['mask']) == want
  ctx = jax.eval_shape(gen.encode, params, rows)
  state = jax.eval_shape(lambda p, c: gen.init(p, c, jnp.zeros((1, 1), jnp.uint32)), params, ctx)
  for stage in (0, 2):
    step = functools.partial(gen.next_logits, stage=stage)
    assert trace(step, params, ctx, state) == gen.cost('extend', stage, 1).flops
  see = lambda p, c, s: gen.decode(p, c, s, 3)
  assert trace(see, params, ctx, state) == gen.cost('observe:image').flops


def test_tokens_of_four_cells():
  config = infinity_vae.SIZES['d14_f8']
  assert infinity_vae.cells_of_token(config, 56) == 2
  assert infinity_vae.cells_of_token(config, 14) == 1
  with pytest.raises(ConfigError, match='bits=32: the tokenizer allows 14 or 56'):
    infinity_vae.cells_of_token(config, 32)
  tokens = np.arange(8).reshape(1, 1, 8)
  cells = infinity_vae.split_tokens(tokens, 2)  # 2 channels
  np.testing.assert_array_equal(cells[..., 0], [[0, 1], [2, 3]])
  np.testing.assert_array_equal(cells[..., 1], [[4, 5], [6, 7]])
  np.testing.assert_array_equal(infinity_vae.join_cells(cells, 2), tokens)


# ------------------------------------------------------------------------------------------- files


def test_wrong_rotations_are_seen(golden):
  config, params = load(take(golden, 'params/'))
  states, mask = _pad_words(golden['in/text_compact'], golden['in/text_lens'])
  schedule = Schedule(((1, 1), (2, 2), (4, 3)), (4, 3))

  @jax.jit
  def run_all(params):
    model = modules.bind_module(modeling.build_model, config, params)
    ctx = model.text_context(states, mask)
    cache = model.init_cache(ctx, 1, schedule)
    hidden, _ = model.feed_scales(ctx, cache, golden['in/x_in'][:, None], schedule, 0, 3)
    return model.bit_logits(ctx, hidden)[:, 0, :, 0]

  want = golden['out/logits'].reshape(*golden['out/logits'].shape[:2], -1, 2)
  difference = lambda params: np.abs(run_all(params) - want).max()
  assert difference(params) < 1e-4
  # channels of queries and keys in another order than that of the file's pairs
  attn = params['blocks']['attn']
  kernel = np.asarray(attn['qkv']['kernel']).copy()
  kernel[:, :, :2] = convert._gather_pairs(config.heads)(kernel[:, :, :2])
  broken = attn | {'qkv': {'kernel': jnp.asarray(kernel)}}
  assert difference(params | {'blocks': params['blocks'] | {'attn': broken}}) > 0.01
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  found = run_all(low)
  assert found.dtype == jnp.float32 and 0 < np.abs(found - want).mean() < 0.05 * np.abs(want).mean()


def test_what_is_wrong_is_said(golden):
  tensors = take(golden, 'params/')
  with pytest.raises(ValueError, match='unused by the model: odd'):
    load(tensors | {'odd': np.zeros(2)})
  # two chunks of two blocks: the last block has number 3
  lost = 'block_chunks.1.module.1.ca.mat_q.bias'
  kept = {k: v for k, v in tensors.items() if k != lost}
  with pytest.raises(ValueError, match=r'has no blocks\.\*\.ca\.mat_q\.bias for layers \[3\]'):
    load(kept)
  with pytest.raises(ValueError, match='here is no Infinity: no word_embed.weight'):
    load({'x': np.zeros(1)})
  with pytest.raises(ValueError, match='no tokenizer of Infinity: no decoder'):
    vae_convert.config_of(source_of_arrays({'x': np.zeros(1)}))
  # the decoder alone leaves the encoder's tensors
  source = source_of_arrays(take(golden, 'params_vae/'))
  config = vae_convert.config_of(source, 'decoder')
  assert (config.downscale, config.ch_mult) == (2, (1, 1))
  assert vae_convert.load_weights(source, config).keys() == {'decoder'}


# ------------------------------------------------------------------------------------ the generator


def test_the_generator_keeps_the_laws():
  gen = Drawn(**SMALL, scales=2, guided_layer=-1)
  laws.check_generator(gen, ['a red dog', 'two cats'], KEY)


def test_bits_are_shown_as_words():
  gen = Infinity(**SMALL, scales=2)
  bits = jnp.zeros((1, 1, 1, 32), jnp.int32).at[..., jnp.array([0, 3])].set(1)
  np.testing.assert_array_equal(gen._pack_tokens(bits), [[[9]]])  # bit j is 2 ** j
  np.testing.assert_array_equal(gen._pack_tokens(bits.at[..., 31].set(1)), [[[9 - 2**31]]])
  assert gen.outputs['tokens'] == core.Output('tokens', (5,)) and gen.token_shape == (4,)


def test_a_shrinking_population_and_its_bill():
  gen, ver = Drawn(**SMALL, scales=3), toys.Brightness()
  algo = SMC(particles=(3, 2, 1), schedule='linear', size=1, resample_at=(1,))
  costs = bill(algo, gen, ver)
  assert [cost.generator for cost in costs] == [3, 2, 1]
  assert laws.counted_cost(algo, gen, ver, ['a dog'], KEY) == sum(costs, core.Cost())
  assert gen.outputs['image'] == core.Output('image', (8, 8, 3))
  wide = Infinity(**SMALL, aspect=0.5, scales=3)
  assert wide.outputs['image'].shape == (4, 8, 3) and wide.scale_tokens == (1, 4, 8)
  assert components.load('generators.infinity', **SMALL) == Infinity(**SMALL)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'area': '3M'}, "area='3M': must be one of 0.06M"),
    ({'scales': 8}, r'generator.scales=8: must be an integer in 0 \.\. 7'),
    ({'words': 9}, 'generator.words=9: must be at most 8'),
    ({'guided_layer': -2}, r'generator.guided_layer=-2: must be in -1 \.\. 0'),
    ({'tokenizer_weights': 'random:d32'}, 'generator.tokenizer_weights: bits=4: the tokenizer'),
    ({'text_weights': 'random:thin_xl'}, 'has d_model=2048, the transformer wants 8'),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    Infinity(**{**SMALL, **settings}).check()


@pytest.mark.parametrize(('name', 'evals'), [('bon', 12), ('beam', 18), ('tts_var', 6)])
def test_configs_build_and_know_their_bill(name, evals):
  config = f'--config={HERE.parent}/configs/infinity_geneval.py'
  (arm,) = build_study(run.read_config([f'{config}:{name},runlocal'])).arms
  assert arm.cost.generator == evals
  published = run.read_config([f'{config}:{name},verifiers.clip'])
  assert published['generator']['area'] == '1M'
  assert published['verifier']['name'] == 'verifiers.clip'
  with pytest.raises(ConfigError, match='must be one of bon, beam, tts_var'):
    run.read_config([f'{config}:smc'])
