"""FlexTok: quantiser, prefixes, guidance, sampling, grid variant, loading, sizes."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, stacked
from vtts_jax.models.flextok import convert, flow, fsq, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/flextok_a.npz'
SMALL = modeling.Config(
  channels=3, size=6, patch=2, grid=4, registers=5, levels=(4, 3), encoder_width=16,
  encoder_layers=2, decoder_width=24, decoder_layers=2, head=8, max_timestep=1.0,
)  # fmt: skip
GRID = dataclasses.replace(SMALL, registers=0, streams=1)


@functools.cache
def tok(config=SMALL):
  build = lambda: modeling.FlexTok(config, rngs=nnx.Rngs(2))
  graphdef, template = modules.abstract_module(build)
  rng = np.random.default_rng(0)  # and no initialisation: every part matters
  draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)
  return modules.bind_graph(graphdef, jax.tree.map(draw, template))


@functools.cache
def velocity(config=SMALL):
  decoder = tok(config).decoder
  return jax.jit(lambda x, t, ids, keep: decoder(x, t, decoder.embed_registers(ids, keep)))


def pictures(seed, rows=2):
  return jax.random.normal(jax.random.key(seed), (rows, SMALL.size, SMALL.size, SMALL.channels))


IDS = jnp.array([[3, 11, 0, 7, 5], [1, 2, 3, 4, 9]])
T = jnp.array([0.3, 0.9])


def close(a, b):
  np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------- quantiser


@pytest.mark.parametrize('levels', [(2,), (6, 3), (8, 8, 8, 5, 5, 5)])
def test_every_id_is_a_code_and_comes_back(levels):
  ids = np.arange(fsq.count_codes(levels))
  codes = fsq.codes_of(ids, levels)
  np.testing.assert_array_equal(fsq.ids_of(codes, levels), ids)
  assert len(np.unique(codes, axis=0)) == len(ids) and np.abs(codes).max() <= 1
  z = np.linspace(-9, 9, 2001, dtype=np.float32)[:, None].repeat(len(levels), 1)
  seen = np.asarray(fsq.quantize_codes(z, levels))
  for i, n in enumerate(levels):  # each level is reached, in order, and no other
    np.testing.assert_array_equal(np.unique(seen[:, i]), np.unique(codes[:, i]))
    assert len(np.unique(seen[:, i])) == n and (np.diff(seen[:, i]) >= 0).all()


def test_first_level_is_the_least_significant_digit():
  step = fsq.codes_of(jnp.array([1]), (8, 5)) - fsq.codes_of(jnp.array([0]), (8, 5))
  np.testing.assert_array_equal(step, [[0.25, 0]])


# --------------------------------------------------------------------------------------- encoder


def test_a_register_does_not_see_those_after_it():
  graphdef, params = modules.split_module(tok().encoder)
  run = jax.jit(lambda p: modules.bind_graph(graphdef, p).unquantized_codes(pictures(0)))
  changed = params | {'registers': params['registers'].at[3:].mul(-1.0)}
  before, after = run(params), run(changed)
  close(before[:, :3], after[:, :3])
  assert (np.abs(before - after)[:, 3:].max(-1) > 1e-3).all()


def test_a_latent_smaller_than_the_tables_is_cropped_to_their_corner():
  encoder = tok().encoder
  large = jnp.pad(pictures(0), ((0, 0), (0, 2), (0, 2), (0, 0)))
  close(encoder.embed_patches(pictures(0)), encoder.embed_patches(large)[:, :3, :3])


# --------------------------------------------------------------------------------------- decoder


def test_ids_past_keep_do_not_matter_and_those_before_do():
  keep = jnp.array([2, 4])
  out = velocity()(pictures(1), T, IDS, keep)
  rubbish = jnp.where(jnp.arange(5) < keep[:, None], IDS, 8)
  close(out, velocity()(pictures(1), T, rubbish, keep))
  for row, k in enumerate(keep):  # a row does not depend on its neighbours' keep
    close(out[row], velocity()(pictures(1), T, IDS, jnp.full(2, k))[row])
  other = velocity()(pictures(1), T, IDS.at[:, 1].set(6), keep)
  assert (np.abs(out - other).max((1, 2, 3)) > 1e-3).all()
  decoder = tok().decoder
  np.testing.assert_array_equal(decoder.embed_registers(IDS), decoder.embed_registers(IDS, 5))


def test_one_time_for_all_rows_is_that_time_in_each():
  decoder = tok().decoder
  run = jax.jit(lambda t: decoder(pictures(1), t, decoder.embed_registers(IDS)))
  close(run(jnp.array([0.4])), run(jnp.array([0.4, 0.4])))


# -------------------------------------------------------------------------------------- sampling


def test_projected_guidance_by_hand():
  cond, null = pictures(3), pictures(4)
  out, momentum = flow.projected_guidance(cond, null, 4.0, jnp.zeros_like(cond))
  close(momentum, cond - null)
  added = np.asarray(out - cond)
  for row in range(2):
    c, d = np.asarray(cond[row]).ravel(), np.asarray(cond - null)[row].ravel()
    d = d * min(1, 2.5 / np.linalg.norm(d))
    close(added[row].ravel(), 3 * (d - c * (d @ c) / (c @ c)))
    assert abs(added[row].ravel() @ c) < 1e-3
  _, second = flow.projected_guidance(cond, null, 4.0, momentum)
  close(second, 0.5 * (cond - null))
  short, _ = flow.projected_guidance(cond, cond - 1e-3, 1.0, jnp.zeros_like(cond))
  close(short, cond)  # scale 1 adds nothing


def test_euler_steps_by_hand():
  decoder, noise = tok().decoder, pictures(5)
  registers = decoder.embed_registers(IDS, jnp.array([2, 5]))
  null = jnp.broadcast_to(decoder.null_registers(), registers.shape)
  velocity = jax.jit(decoder.__call__)

  @jax.jit
  def run(r, x):
    cases = (x, 2, 1.0, False), (x, 1, 3.0, False), (x, 1, 3.0, True), (x[:1], 1, 3.0, True)
    return [flow.sample_latents(decoder, r, *case) for case in cases]

  unguided, plain, projected, shared = run(registers, noise)
  x = noise - velocity(noise, jnp.array([1.0]), registers) / 2
  close(unguided, x - velocity(x, jnp.array([0.5]), registers) / 2)
  pair = [velocity(noise, jnp.array([1.0]), r) for r in (registers, null)]
  close(plain, noise - flow.plain_guidance(*pair, 3.0))
  close(projected, noise - flow.projected_guidance(*pair, 3.0, 0.0)[0])
  close(shared[0], projected[0])  # one noise for all rows
  assert np.abs(shared[1] - projected[1]).max() > 1e-2


def test_bfloat16_weights_are_run_in_bfloat16_and_latents_stay_float32():
  graphdef, params = modules.split_module(tok())
  low = modules.bind_graph(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))

  def run(noise):
    registers = low.decoder.embed_registers(low.encoder(noise))
    return registers, flow.sample_latents(low.decoder, registers, noise, 2)

  registers, latents = jax.eval_shape(run, pictures(0))
  assert registers.dtype == jnp.bfloat16 and latents.dtype == jnp.float32


# ----------------------------------------------------------------------------------- grid variant


def test_grid_variant_has_a_token_for_each_patch():
  model, ids = tok(GRID), jnp.arange(18).reshape(2, 9) % 12
  assert GRID.tokens == 9 and jax.jit(model.encoder.__call__)(pictures(0)).shape == (2, 9)
  run = velocity(GRID)
  out = run(pictures(1), T, ids, jnp.array([4, 9]))
  assert out.shape == pictures(1).shape
  close(out[0], run(pictures(1), T, ids.at[:, 4:].set(0), jnp.array([9, 9]))[0])
  assert np.abs(out - run(pictures(1), T, ids.at[:, 3].set(1), jnp.array([4, 9]))).max() > 1e-3


# ---------------------------------------------------------------------------------- loading, sizes


def source(change=lambda arrays: None):
  with np.load(GOLDEN) as file:
    arrays = {k[7:]: file[k] for k in file.files if k.startswith('params/')}
  change(arrays)
  return source_of_arrays(arrays, {'model': {'head_dim': 16, 'max_timestep': 7}}, 'here')


def test_loading_infers_the_config_and_takes_parts():
  config = convert.config_of(source())
  assert config == modeling.Config(
    channels=4, size=8, grid=4, registers=8, encoder_width=48, encoder_layers=2, decoder_width=64,
    decoder_layers=2, head=16, max_timestep=7.0,
  )  # fmt: skip
  both = convert.load_weights(source(), config)
  for part in modeling.PARTS:
    own = convert.load_weights(source(), convert.config_of(source(), part))
    jax.tree.map(np.testing.assert_array_equal, own, both[part])
  extra = lambda arrays: arrays.update({'vae.decoder.x': np.zeros(3), 'decoder.repa.y': np.ones(2)})
  jax.tree.map(np.testing.assert_array_equal, convert.load_weights(source(extra), config), both)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda a: a.pop('decoder.module_dict.dec_latent_dropout.nullcond'),
     'missing from the checkpoint.*decoder.unconditional'),
    (lambda a: a.update({'decoder.module_dict.dec_odd.weight': np.zeros(2)}),
     'unused by the model: decoder.module_dict.dec_odd.weight'),
    (lambda a: a.pop('decoder.module_dict.dec_transformer.blocks.0.mlp.fc2.weight'),
     r'here has no .*dec_transformer.blocks.\*.mlp.fc2.weight for layers \[0\]'),
    (lambda a: a.update({'encoder.module_dict.enc_transformer.blocks.1.mlp.fc1.weight':
                         np.zeros((3, 3), np.float32)}), 'here: .*blocks.1.mlp.fc1.weight is'),
  ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(change, message):
  with pytest.raises(ValueError, match=message):
    convert.load_weights(source(change), convert.config_of(source()))


def test_stacked_layers_keep_their_order():
  layers = {f'a.blocks.{i}.w': np.full(2, i) for i in (1, 0, 10, *range(2, 10))}
  joined = stacked.stack_layers(source_of_arrays({**layers, 'b': np.ones(1)}))
  assert sorted(joined.tensor_names()) == ['a.blocks.*.w', 'b']
  assert joined.shape_of('a.blocks.*.w') == (11, 2)
  np.testing.assert_array_equal(joined.read_tensor('a.blocks.*.w')[:, 0], np.arange(11))


# Published in billions, with the VAE (84 million parameters at 16 channels).
@pytest.mark.parametrize(
  ('name', 'billions', 'millions'),
  [
    ('flextok_d12_d12_in1k', 0.34, 258),
    ('flextok_d18_d18_in1k', 0.95, 866),
    ('flextok_d18_d28_in1k', 2.5, 2457),
    ('flextok_d18_d28_dfn', 2.5, 2457),
  ],
)
def test_released_sizes(name, billions, millions):
  config = modeling.SIZES[name]
  _, params = modules.abstract_module(lambda: modeling.build_model(config))
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
  assert round(modules.count_parameters(params) / 1e6) == millions
  assert abs(millions + 84 - 1e3 * billions) < 0.02 * 1e3 * billions
  assert config.codes == 64000 and config.tokens == 256


def test_flops_are_those_of_the_compiled_program():
  lowered = velocity().lower(pictures(1), T, IDS, jnp.array([5, 5]))
  counted = lowered.compile().cost_analysis()['flops'] / 2
  ends = modeling.count_velocity_flops(dataclasses.replace(SMALL, decoder_layers=0))
  # XLA counts one loop body
  exact = ends + (modeling.count_velocity_flops(SMALL) - ends) / SMALL.decoder_layers
  assert (
    exact < counted < 2 * exact
  )  # modulations and pointwise work are not small at a width of 24


def test_errors_name_setting_value_and_what_is_allowed():
  for options, message in (
    ({'head': 7}, 'encoder_width=16: must be a multiple of head=7'),
    ({'size': 10}, 'size=10: must be a multiple of patch=2, at most 8'),
    ({'registers': 0}, r'streams=2: must be 1'),
  ):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(SMALL, **options)
  with pytest.raises(ValueError, match='here is no FlexTok checkpoint: no encoder.module_dict'):
    convert.config_of(source_of_arrays({'x': np.zeros(1)}, where='here'))
