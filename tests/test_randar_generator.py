"""RandAR as a generator: protocol, orders, cells drawn together, configs."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.cli import run
from vtts_jax.errors import ConfigError
from vtts_jax.generators.randar import TINY, RandAR
from vtts_jax.generators.randar_parallel import ParallelRandAR
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
KEY = jax.random.key(3)
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
tiny = functools.partial(RandAR, **TINY)
KEYS = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(3))


@pytest.mark.parametrize('gen', [tiny(), ParallelRandAR(**TINY, steps=3)], ids=['one', 'several'])
def test_conformance(gen):
  laws.check_generator(gen, ['1', '3'], KEY)


def test_orders():
  orders = {name: np.asarray(tiny(order=name).init_extra({}, (), KEYS)) for name in
            ('candidate', 'prompt', 'raster')}  # fmt: skip
  for order in orders.values():
    np.testing.assert_array_equal(np.sort(order, -1), np.broadcast_to(np.arange(9), order.shape))
  assert (orders['raster'] == np.arange(9)).all()
  assert (orders['prompt'] == orders['prompt'][:, :1]).all()
  assert len(np.unique(orders['candidate'].reshape(6, 9), axis=0)) == 6
  np.testing.assert_array_equal(orders['prompt'][:, 0], orders['candidate'][:, 0])


def test_children_go_on_in_orders_of_their_own():
  stage = np.array([[2, 3, 4], [3, 0, 7]])
  gen = tiny(guidance=1.0)
  params = gen.load()
  ctx = gen.encode(params, gen.tokenize([{'text': '1'}, {'text': '2'}]))
  state = gen.init(params, ctx, KEYS)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def fork(gen, k, params, state, stage):
    return gen.fork(params, ctx, state, core.child_keys(KEYS, stage, k), stage, k)

  children, owners = fork(gen, 4, params, state, stage)
  orders = np.asarray(children.extra).reshape(2, 3, 4, 9)
  np.testing.assert_array_equal(np.sort(orders, -1), np.broadcast_to(np.arange(9), orders.shape))
  parents = np.asarray(owners.extra)
  np.testing.assert_array_equal(orders[:, :, 0], parents)  # child 0 is its parent
  for place in np.ndindex(2, 3):
    drawn = stage[place] + 1
    assert (orders[place][:, :drawn] == parents[place][:drawn]).all()
  assert len(np.unique(orders[0, 0], axis=0)) > 1
  # so does a copy with another key, unless it is greedy
  extend = jax.jit(lambda keys, greedy: gen.extend(
    params, ctx, owners, keys, stage, 1, greedy=greedy
  ), static_argnums=1)  # fmt: skip
  others = core.fold(KEYS, 1)
  np.testing.assert_array_equal(extend(KEYS, False).extra, parents)
  np.testing.assert_array_equal(extend(others, True).extra, parents)
  assert (np.asarray(extend(others, False).extra) != parents).any()
  # a fixed order is one for all
  same, _ = fork(tiny(order='prompt', guidance=1.0), 2, params, state, stage)
  np.testing.assert_array_equal(same.extra, np.repeat(parents, 2, 1))


def test_pictures_are_row_by_row():
  gen = tiny()
  params = gen.load()
  order = gen.init_extra(params, (), KEYS[:1, :1])
  tokens = jnp.arange(9)[None, None]
  state = gen.init(params, gen.encode(params, gen.tokenize([{'text': '1'}])), KEYS[:1, :1])
  state = state._replace(tokens=tokens, extra=order)
  cells = np.zeros((1, 9), int)
  cells[0, np.asarray(order)[0, 0, :5]] = np.arange(5)  # the first five are drawn
  want = jax.jit(gen.decode_cells)(params, cells)
  found = jax.jit(gen.decode)(params, (), state, 5)
  np.testing.assert_allclose(found[0], jnp.clip(want, 0, 1), atol=1e-6)


def test_settings():
  for settings, say in (
    ({'order': 'spiral'}, 'order=.spiral.: must be one of candidate, prompt, raster'),
    ({'tokenizer': 'titok'}, 'tokenizer=.titok.: must be one of llamagen, maskgit'),
  ):
    with pytest.raises(ConfigError, match=f'generator.{say}'):
      tiny(**settings)
  with pytest.raises(ConfigError, match='generator.tokenizer_weights: has num_embeddings=1024'):
    tiny(tokenizer='maskgit', tokenizer_weights='random:imagenet_f16_256').check()
  with pytest.raises(ConfigError, match=r'generator.steps=88: must be in 2 \.\. 9'):
    ParallelRandAR(**TINY).check()
  gen = tiny(tokenizer='maskgit')
  gen.check()
  assert gen.outputs['image'].shape == (6, 6, 3)
  # guidance grows from 1
  logits = jnp.array([[1.0, 2.0], [3.0, -1.0]])
  np.testing.assert_allclose(tiny()._guide_place(logits, jnp.asarray(0)), [1, 2])
  np.testing.assert_allclose(tiny()._guide_place(logits, jnp.asarray(9)), [-5, 11])


@pytest.mark.parametrize(('name', 'evals'), [('bon', 36), ('beam', 72), ('parallel', 16)])
def test_configs(name, evals):
  where = f'--config={CONFIGS}/randar_imagenet.py:{name}'
  (arm,) = build_study(run.read_config([f'{where},runlocal'])).arms
  assert arm.cost.generator == evals and arm.gen.check() is None
  assert run.read_config([f'{where},0.3b'])['generator']['guidance'] == 3.4
  with pytest.raises(ConfigError, match='must be one of bon, beam, parallel, then'):
    run.read_config([f'{where},coco'])
