"""SiT: sizes, conversion, and the generator on it; its golden file is in test_replay.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.generators import sit
from vtts_jax.models import modules
from vtts_jax.models.sit import convert, modeling
from vtts_jax.testing import laws, replay

GOLDEN = pathlib.Path(__file__).parent / 'golden/sit_a.npz'
KEY = jax.random.key(4)
COUNTS = {  # millions, as published
  's2': 33, 'b2': 130, 'l2': 458, 'xl2': 675,
}  # fmt: skip


@pytest.fixture(scope='module')
def golden():
  config, source, inputs, outputs = replay.read(str(GOLDEN))
  return source, inputs, outputs, convert.config_of(source, heads=config['num_heads'])


def velocity(params, config, inputs, dtype='float32'):
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  x = jnp.moveaxis(jnp.asarray(inputs['x']), 1, -1)
  model = modules.bind_module(modeling.build_model, config, params)
  found = jax.jit(lambda *row: model(*row))(x, inputs['t'], inputs['y'].astype(np.int32))
  return np.moveaxis(np.asarray(found), -1, 1)


def test_released_sizes():
  for name, millions in COUNTS.items():
    c = modeling.SIZES[name]
    _, params = modules.structure_of(modeling.build_model, c)
    d = c.width
    # counted by hand: a block is 18 D^2 + 15 D, adaLN 6 D^2 of it
    block = 3 * d * d + 3 * d + d * d + d + 8 * d * d + 5 * d + 6 * d * d + 6 * d
    ends = 16 * d + d + 256 * d + 256 + 257 * d + d * d + d + 1001 * d - 256
    last = 2 * d * d + 2 * d + 32 * d + 32
    count = modules.count_parameters(params)
    assert count == c.layers * block + ends + last, name
    # the table of positions is no parameter of the published count
    assert round((count - 256 * d) / 1e6) == millions, name


def test_positions_are_columns_then_rows():
  table = modeling.position_table(modeling.SIZES['b2'])
  row, column, i = 3, 11, 5
  rate = 10000 ** (-i / 192)
  found = table[row * 16 + column]
  np.testing.assert_allclose(found[i], np.sin(column * rate), atol=1e-6)
  np.testing.assert_allclose(found[192 + i], np.cos(column * rate), atol=1e-6)
  np.testing.assert_allclose(found[384 + i], np.sin(row * rate), atol=1e-6)


def test_weights_that_do_not_fit_and_a_control(golden):
  source, inputs, outputs, config = golden
  params = convert.load_weights(source, config)
  want = outputs['velocity']
  close = velocity(params, config, inputs)
  assert np.abs(close - want).max() < 1e-4
  # a part of adaLN read as another one moves the result
  kernel = params['blocks']['adaln']['kernel']
  parts = jnp.split(kernel, 6, -1)
  swapped = {**params['blocks'], 'adaln': {
    **params['blocks']['adaln'], 'kernel': jnp.concatenate([parts[1], parts[0], *parts[2:]], -1),
  }}  # fmt: skip
  assert np.abs(velocity({**params, 'blocks': swapped}, config, inputs) - want).max() > 0.1
  half = velocity(params, config, inputs, 'bfloat16')
  assert np.abs(half - want).max() < 0.1 * np.abs(want).max()
  arrays = {name: source.read_tensor(name) for name in source.tensor_names()}
  for change, message in (
    (lambda a: a.pop('blocks.1.mlp.fc1.bias'), r'no blocks\.\*\.mlp\.fc1\.bias for layers \[1\]'),
    (lambda a: a.update(extra=np.zeros(3)), 'in the checkpoint, unused by the model: extra'),
    (lambda a: a.pop('t_embedder.mlp.0.bias'), r'wanted by the model: time_in\.bias'),
  ):
    changed = dict(arrays)
    change(changed)
    with pytest.raises(ValueError, match=message):
      convert.load_weights(source_of_arrays(changed), config)
  with pytest.raises(ValueError, match='has no SiT'):
    convert.config_of(source_of_arrays({'pos_embed': np.zeros((1, 16, 48))}))
  # heads are as wide as in the released sizes, if nothing says otherwise
  wide = {'x_embedder.proj.weight': np.zeros((1152, 4, 2, 2)), 'pos_embed': np.zeros((1, 256, 1)),
          'y_embedder.embedding_table.weight': np.zeros((1001, 1)),
          'final_layer.linear.weight': np.zeros((32, 1)),
          **{f'blocks.{i}.attn.qkv.weight': np.zeros(1) for i in range(28)}}  # fmt: skip
  assert convert.config_of(source_of_arrays(wide)) == modeling.SIZES['xl2']


# ------------------------------------------------------------------------------------ the generator


def tiny(**settings):
  return sit.SiT(**{'steps': 3, **sit.TINY, **settings})


def test_the_generator_keeps_the_laws():
  gen = tiny(sampler='sde', guidance=1.5)
  laws.check_generator(gen, [{'label': 3}, '7'], KEY)


def test_steps_are_those_of_the_reference(golden, tmp_path):
  """The golden trajectory through the generator: file, guidance, sampler and times."""
  source, inputs, outputs, config = golden
  arrays = {name: source.read_tensor(name) for name in source.tensor_names()}
  write_weights(tmp_path / 'sit.safetensors', arrays, {'num_heads': config.heads})
  gen = tiny(weights=str(tmp_path / 'sit.safetensors'), guidance=4.0, steps=4)
  with pytest.raises(ConfigError, match='latent_channels=3, the network wants 4'):
    gen.check()
  params = {'flow': gen.model_parts()['flow'].load()}
  rows = [{'label': int(y)} for y in inputs['y']]
  ctx = gen.encode(params, {k: jnp.asarray(v) for k, v in gen.tokenize(rows).items()})
  z = jnp.moveaxis(jnp.asarray(inputs['z']), 1, -1)[:, None]
  extend = jax.jit(lambda state: gen.extend(params, ctx, state, KEY, 0, 4))
  found = np.moveaxis(np.asarray(extend(gen.start_state(z)).x[:, 0]), -1, 1)
  np.testing.assert_allclose(found, outputs['ode_heun2_traj'][-1], atol=1e-4)


def test_the_bill_and_the_times():
  gen = tiny(steps=4, steps_per_stage=2, guidance=1.5)
  one = modeling.count_flops(modeling.SIZES['tiny'])
  assert gen.cost('extend', 0, 1) == core.Cost(generator=4, flops=8 * one)
  assert tiny(sampler='euler', guidance=1.0).cost('extend', 0, 3).generator == 3
  np.testing.assert_allclose(tiny(sampler='sde').step_times, [0, 0.48, 0.96, 1], atol=1e-6)
  assert tiny(sampler='sde').offers - gen.offers == {'stochastic'}
  # with no class the network is told the number after the last class
  labels = {'labels': jnp.array([3])}
  np.testing.assert_array_equal(gen.encode({}, labels), [[3, 10]])
  assert gen.outputs == {'image': core.Output('image', (16, 16, 3))}
  assert components.load('generators.sit', **sit.TINY) == sit.SiT(**sit.TINY)
  mesh = jax.make_mesh((1, 1), ('data', 'model'))
  places = gen.shardings(mesh)['flow']['blocks']
  assert places['qkv']['kernel'].spec == PartitionSpec(None, None, 'model')
  assert places['down']['kernel'].spec == PartitionSpec(None, 'model', None)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'sampler': 'dopri5'}, "generator.sampler='dopri5': must be one of euler"),
    ({'diffusion': 'sbdm'}, "generator.diffusion='sbdm': must be one of sigma"),
    ({'last': 'none'}, "generator.last='none': must be one of mean"),
    ({'eta': 0.5}, "generator.eta=0.5: must be 0 with sampler='heun'"),
    ({'steps': 1, 'sampler': 'sde'}, 'generator.steps=1: must be >= 2 with an SDE'),
    ({'guidance_from': 0.6, 'guidance_until': 0.2}, 'must be in order'),
    ({'weights': 'random:xxl'}, r"generator\.weights='random:xxl'"),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings)


def test_prompts_that_are_no_class():
  with pytest.raises(ConfigError, match=r'prompt 1 \(label=10\) is no class; must be in 0 \.\. 9'):
    tiny().tokenize([{'label': 3}, {'label': 10}])
