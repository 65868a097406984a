"""FLUX part by part against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import diffusers, torch

from vtts_jax.checkpoints.source import Source
from vtts_jax.models import modules
from vtts_jax.models.flux import convert, flow, modeling
from vtts_jax.models.stacked import scan_blocks

CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
ROWS, COLUMNS, TEXT = 2, 3, 5
TIMES = np.array([0.3, 0.95], np.float32)
# an angle of the embedding is 1000 x the scale: at 3.5 the last bit of torch's float32 exponential
# is 2e-4 of an angle, which `test_condition` bounds and the depth of the whole would magnify
GUIDANCE = np.array([0.5, 1.0], np.float32)


def make_theirs(**options):
  return diffusers.FluxTransformer2DModel(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
    num_attention_heads=3, joint_attention_dim=20, pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 6), **options,
  )  # fmt: skip


@pytest.fixture(scope='module', params=[True, False], ids=['dev', 'schnell'])
def pair(request):
  theirs = reference.randomise(make_theirs(guidance_embeds=request.param), 1)
  source = reference.source(theirs, dict(theirs.config))
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def guidance_of(ours, scales=GUIDANCE):
  return scales if ours.config.has_guidance else None


def test_positions_and_rotation(pair):
  theirs, ours = pair
  positions = modeling.token_positions(TEXT, ROWS, COLUMNS)
  pipeline = diffusers.FluxPipeline
  ids = pipeline._prepare_latent_image_ids(2, ROWS, COLUMNS, 'cpu', torch.float32)
  np.testing.assert_array_equal(positions[TEXT:], ids.numpy())
  want = theirs.pos_embed(torch.from_numpy(positions))  # each angle twice, for the two of a pair
  for table, both in zip(modeling.rotary_tables(ours.config, positions), want):
    np.testing.assert_allclose(table, both.numpy()[:, ::2], atol=1e-6)


def test_patches(pair):
  x = data(2, 4, 2 * ROWS, 2 * COLUMNS)
  want = diffusers.FluxPipeline._pack_latents(torch.from_numpy(x), 2, 4, 2 * ROWS, 2 * COLUMNS)
  have = modeling.pack_latents(reference.nhwc(x))
  np.testing.assert_array_equal(have, want.numpy())


def test_condition(pair):
  theirs, ours = pair
  pooled, guidance = data(2, 12), guidance_of(ours, np.array([3.5, 1.0], np.float32))
  given = [torch.from_numpy(1000 * TIMES)]
  given += [] if guidance is None else [torch.from_numpy(1000 * guidance)]
  with torch.no_grad():
    want = theirs.time_text_embed(*given, torch.from_numpy(pooled)).numpy()
  np.testing.assert_allclose(ours.embed_condition(TIMES, pooled, guidance), want, **CLOSE)


def test_blocks(pair):
  """After each block of either kind, from the same states."""
  theirs, ours = pair
  image, text = data(2, ROWS * COLUMNS, 48), data(2, TEXT, 48, seed=1)
  condition = data(2, 48, seed=2)
  positions = modeling.token_positions(TEXT, ROWS, COLUMNS)
  turn = theirs.pos_embed(torch.from_numpy(positions))
  tables = modeling.rotary_tables(ours.config, positions)
  on_image = tuple(table[TEXT:] for table in tables)

  def run_double(block, streams, _):
    streams = block(*streams, condition, on_image)
    return streams, streams

  _, found = scan_blocks(ours.double_blocks, run_double, (jnp.asarray(image), jnp.asarray(text)))
  hidden, words, temb = (torch.from_numpy(x) for x in (image, text, condition))
  with torch.no_grad():
    for i, block in enumerate(theirs.transformer_blocks):
      words, hidden = block(
        hidden_states=hidden, encoder_hidden_states=words, temb=temb, image_rotary_emb=turn
      )
      np.testing.assert_allclose(found[0][i], hidden.numpy(), **CLOSE)
      np.testing.assert_allclose(found[1][i], words.numpy(), **CLOSE)

  def run_single(block, x, _):
    x = block(x, condition, tables)
    return x, x

  x = data(2, TEXT + ROWS * COLUMNS, 48, seed=3)
  _, found = scan_blocks(ours.single_blocks, run_single, jnp.asarray(x))
  # newer classes take and give the two streams apart
  words, hidden = torch.from_numpy(x[:, :TEXT]), torch.from_numpy(x[:, TEXT:])
  with torch.no_grad():
    for i, block in enumerate(theirs.single_transformer_blocks):
      words, hidden = block(
        hidden_states=hidden, encoder_hidden_states=words, temb=temb, image_rotary_emb=turn
      )
      both = torch.cat([words, hidden], 1)
      np.testing.assert_allclose(found[i], both.numpy(), **CLOSE)


def test_whole(pair):
  theirs, ours = pair
  x = data(2, 2 * ROWS, 2 * COLUMNS, 4)
  text, pooled = data(2, TEXT, 20, seed=1), data(2, 12, seed=2)
  guidance, positions = guidance_of(ours), modeling.token_positions(TEXT, ROWS, COLUMNS)
  with torch.no_grad():
    want = theirs(
      hidden_states=torch.from_numpy(np.array(modeling.pack_latents(x))),
      encoder_hidden_states=torch.from_numpy(text), pooled_projections=torch.from_numpy(pooled),
      timestep=torch.from_numpy(TIMES),
      guidance=None if guidance is None else torch.from_numpy(guidance),
      txt_ids=torch.from_numpy(positions[:TEXT]), img_ids=torch.from_numpy(positions[TEXT:]),
    ).sample.numpy()  # fmt: skip
  have = modeling.pack_latents(ours(x, TIMES, text, pooled, guidance))
  np.testing.assert_allclose(have, want, **CLOSE)


@pytest.mark.parametrize('patches', [256, 1024, 4096])
def test_times(patches):
  """The pipeline's: even sigmas, shifted by the scheduler with dev's settings."""
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
    max_image_seq_len=4096,
  )  # fmt: skip
  scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=flow.time_shift(patches))
  np.testing.assert_allclose(flow.sampling_times(7, patches), scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize('name', ['dev', 'schnell'])
def test_released_sizes_are_theirs(name):
  """On the meta device: the count, and the config from the file's header alone."""
  c = modeling.SIZES[name]
  with torch.device('meta'):
    theirs = diffusers.FluxTransformer2DModel(guidance_embeds=c.has_guidance)
  _, template = modules.structure_of(modeling.build_model, c)
  assert modules.count_parameters(template) == sum(p.numel() for p in theirs.parameters())
  header = {k: (tuple(v.shape), 'float32') for k, v in theirs.state_dict().items()}

  def read_nothing(name):
    raise AssertionError(f'{name} was read, and a header should do')

  assert convert.config_of(Source('meta', header, read_nothing)) == c


def test_bfloat16_stays_near(pair):
  theirs, ours = pair
  source = reference.source(theirs, dict(theirs.config))
  params = convert.load_weights(source, ours.config, dtype='bfloat16')
  half = modules.bind_module(modeling.build_model, ours.config, params)
  given = data(2, 4, 6, 4), TIMES, data(2, TEXT, 20, seed=1), data(2, 12, seed=2), guidance_of(ours)
  exact, near = ours(*given), jax.jit(lambda *x: half(*x))(*given)
  assert np.abs(near - exact).mean() < 0.05 * np.abs(exact).mean()
