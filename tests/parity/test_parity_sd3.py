"""SD3 block by block against diffusers."""

import jax
import numpy as np
import pytest
import reference
from reference import diffusers, nchw, nhwc, torch

from vtts_jax.models import modules
from vtts_jax.models.sd3 import convert, modeling
from vtts_jax.models.sd3.replay import first_block

CLOSE = {'atol': 2e-4, 'rtol': 2e-4}
VARIANTS = {
  'sd3': {'dual_attention_layers': (), 'qk_norm': None},
  'medium': {'dual_attention_layers': (0, 1), 'qk_norm': 'rms_norm'},
  'dual_apart': {'dual_attention_layers': (1, 3), 'qk_norm': None},  # and in the last block
  'large': {'dual_attention_layers': (), 'qk_norm': 'rms_norm'},
}


def make_theirs(**options):
  return diffusers.SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
    num_attention_heads=3, attention_head_dim=8, joint_attention_dim=16, caption_projection_dim=24,
    pooled_projection_dim=20, pos_embed_max_size=6, **options,
  )  # fmt: skip


@pytest.fixture(scope='module', params=VARIANTS)
def pair(request):
  theirs = reference.randomise(make_theirs(**VARIANTS[request.param]), 3)
  source = reference.source(theirs, dict(theirs.config))
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_positions(pair):
  """The stored table is the one that random weights begin with."""
  theirs, ours = pair
  made = modeling.position_table(6, 6, 24, 4)
  np.testing.assert_allclose(ours.positions[...], made, atol=1e-5)
  np.testing.assert_allclose(theirs.pos_embed.pos_embed[0].numpy(), made.reshape(36, 24), atol=1e-5)


def test_patches_and_condition(pair):
  theirs, ours = pair
  x, pooled, t = data(2, 4, 4, 10), data(2, 20), np.array([1000.0, 21.5], np.float32)
  want = reference.run(theirs.pos_embed, x)
  np.testing.assert_allclose(ours.embed_patches(nhwc(x)), want, **CLOSE)
  want = reference.run(theirs.time_text_embed, t, pooled)
  np.testing.assert_allclose(ours.embed_condition(t, pooled), want, **CLOSE)


def test_blocks(pair):
  theirs, ours = pair
  image, text, temb = data(2, 10, 24), data(2, 5, 24, seed=1), data(2, 24, seed=2)
  for a, b in ((first_block(ours), theirs.transformer_blocks[0]),
               (ours.last, theirs.transformer_blocks[-1])):  # fmt: skip
    with torch.no_grad():
      words, hidden = b(*(torch.from_numpy(x) for x in (image, text, temb)))
    found = a(image, text, jax.nn.silu(temb))
    np.testing.assert_allclose(found[0], hidden.numpy(), **CLOSE)
    if words is not None:  # the last block gives no text
      np.testing.assert_allclose(found[1], words.numpy(), **CLOSE)


@pytest.mark.parametrize('skip', [None, (1,)])
def test_whole(pair, skip):
  theirs, ours = pair
  x, text, pooled = data(2, 4, 4, 10), data(2, 5, 16, seed=1), data(2, 20, seed=2)
  t = np.array([577.25, 3.0], np.float32)
  with torch.no_grad():
    want = theirs(*(torch.from_numpy(v) for v in (x, text, pooled, t)), skip_layers=skip).sample
  have = ours(nhwc(x), t, text, pooled, skip_layers=skip or ())
  np.testing.assert_allclose(nchw(have), want.numpy(), **CLOSE)


@pytest.mark.parametrize('name', ['sd3_medium', 'sd3_5_medium', 'sd3_5_large'])
def test_released_configs(name):
  """As many numbers as diffusers' class on the meta device; the table is a buffer there."""
  c = modeling.SIZES[name]
  with torch.device('meta'):
    theirs = diffusers.SD3Transformer2DModel(
      sample_size=c.sample_size, num_layers=c.num_layers, attention_head_dim=c.attention_head_dim,
      num_attention_heads=c.num_attention_heads, caption_projection_dim=c.width,
      pos_embed_max_size=c.pos_embed_max_size, dual_attention_layers=c.dual_attention_layers,
      qk_norm='rms_norm' if c.qk_norm else None,
    )  # fmt: skip
  count = sum(value.numel() for value in theirs.state_dict().values())
  _, template = modules.structure_of(modeling.build_model, c)
  assert modules.count_parameters(template) == count
