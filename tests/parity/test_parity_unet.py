"""UNet block by block against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import diffusers, nchw, nhwc, torch

from vtts_jax.models import modules
from vtts_jax.models.unet import convert, modeling

CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
VARIANTS = {
  'sd15': {'layers_per_block': 1, 'attention_head_dim': 4},
  'sd21': {'attention_head_dim': [2, 3, 4], 'use_linear_projection': True, 'layers_per_block': 2},
  'inpaint': {'in_channels': 9, 'attention_head_dim': 8, 'layers_per_block': 1},
  'sdxl': {
    'attention_head_dim': [2, 3, 4], 'use_linear_projection': True, 'layers_per_block': 1,
    'transformer_layers_per_block': [1, 2, 3], 'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 8, 'projection_class_embeddings_input_dim': 12 + 6 * 8,
    'down_block_types': (PLAIN, CROSS, CROSS),
    'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
  },
}  # fmt: skip


@pytest.fixture(scope='module', params=VARIANTS)
def pair(request):
  options = {
    'block_out_channels': (16, 24, 32), 'norm_num_groups': 8, 'cross_attention_dim': 20,
    'sample_size': 8, 'down_block_types': (CROSS, CROSS, PLAIN),
    'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
  }  # fmt: skip
  theirs = diffusers.UNet2DConditionModel(**options | VARIANTS[request.param])
  theirs = reference.randomise(theirs, 3)
  config = {'_class_name': 'UNet2DConditionModel', **theirs.config}
  return theirs, reference.bind_port(convert, modeling, reference.source(theirs, config))


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_conditions(theirs, rows=2):
  """(theirs, ours): keyword arguments of the added condition, none without one."""
  if theirs.config.addition_embed_type is None:
    return {}, {}
  pooled, sizes = draw(rows, 12, seed=5), 1000 * np.abs(draw(rows, 6, seed=6))
  both = {'text_embeds': torch.from_numpy(pooled), 'time_ids': torch.from_numpy(sizes)}
  return {'added_cond_kwargs': both}, {'pooled': pooled, 'time_ids': sizes}


def test_resnet_and_transformer(pair):
  theirs, ours = pair
  level = 1  # it has both in every variant
  a, b = ours.down_blocks[level], theirs.down_blocks[level]
  time, text = draw(2, ours.config.time_width, seed=1), draw(2, 7, 20, seed=2)
  x = draw(2, b.resnets[0].in_channels, 6, 4)
  have = nchw(a.resnets[0](nhwc(x), time))
  np.testing.assert_allclose(have, reference.run(b.resnets[0], x, time), **CLOSE)
  x = draw(2, b.resnets[0].out_channels, 6, 4)
  want = reference.run(
    b.attentions[0], x, encoder_hidden_states=torch.from_numpy(text), return_dict=False
  )
  np.testing.assert_allclose(nchw(a.attentions[0](nhwc(x), text)), want, **CLOSE)
  have = nchw(a.downsample(nhwc(x)))
  np.testing.assert_allclose(have, reference.run(b.downsamplers[0], x), **CLOSE)


@pytest.mark.parametrize('side', [(8, 8), (4, 12), (7, 5)])
def test_whole(pair, side):
  theirs, ours = pair
  x, text = draw(2, ours.config.in_channels, *side), draw(2, 7, 20, seed=2)
  added, conditions = make_conditions(theirs)
  t = np.array([981.0, 3.25], np.float32)
  want = reference.run(theirs, x, t, text, return_dict=False, **added)
  graphdef, params = modules.split_module(ours)
  run = jax.jit(lambda p, x: modules.bind_graph(graphdef, p)(x, t, text, **conditions))
  np.testing.assert_allclose(nchw(run(params, nhwc(x))), want, **CLOSE)


def test_bfloat16_stays_near(pair):
  theirs, ours = pair
  x, text, t = draw(2, ours.config.in_channels, 8, 8), draw(2, 7, 20), np.ones(2, np.float32)
  added, conditions = make_conditions(theirs)
  graphdef, params = modules.split_module(ours)
  half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
  have = nchw(modules.bind_graph(graphdef, half)(nhwc(x), t, text, **conditions))
  want = reference.run(theirs, x, t, text, return_dict=False, **added)
  assert np.abs(have - want).mean() < 0.05 * np.abs(want).mean()


@pytest.mark.parametrize('name', ['sd15', 'sd15_inpaint', 'sd21', 'sdxl'])
def test_released_configs(name):
  """As many parameters as diffusers' class on the meta device."""
  c = modeling.SIZES[name]
  kinds = [CROSS if here else PLAIN for here in c.has_attention]
  options = {}
  if c.addition_time_embed_dim:
    options = {
      'addition_embed_type': 'text_time', 'addition_time_embed_dim': c.addition_time_embed_dim,
      'projection_class_embeddings_input_dim': c.projection_class_embeddings_input_dim,
    }  # fmt: skip
  with torch.device('meta'):
    theirs = diffusers.UNet2DConditionModel(
      in_channels=c.in_channels, block_out_channels=c.block_out_channels, down_block_types=kinds,
      up_block_types=[kind.replace('Down', 'Up') for kind in reversed(kinds)],
      layers_per_block=c.layers_per_block, cross_attention_dim=c.cross_attention_dim,
      attention_head_dim=c.attention_head_dim,
      transformer_layers_per_block=c.transformer_layers_per_block, **options,
    )  # fmt: skip
  count = sum(p.numel() for p in theirs.parameters())
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  assert modules.count_parameters(template) == count
