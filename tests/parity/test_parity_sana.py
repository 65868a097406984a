"""SANA block by block against diffusers."""

import numpy as np
import pytest
import reference
from reference import diffusers, nchw, nhwc, torch

from vtts_jax.models import modules
from vtts_jax.models.sana import convert, modeling

CLOSE = {'atol': 2e-4, 'rtol': 2e-4}
SPRINT = {'qk_norm': 'rms_norm_across_heads', 'guidance_embeds': True}
VARIANTS = {
  'plain': {},
  'placed': {'interpolation_scale': 2.0},
  'normed': {'qk_norm': 'rms_norm_across_heads', 'attention_bias': True},
  'sprint': SPRINT,
  'patches': {'patch_size': 2, 'out_channels': 3},
}


def make_theirs(**options):
  return diffusers.SanaTransformer2DModel(
    **{
      'in_channels': 6, 'out_channels': 6, 'num_attention_heads': 4, 'attention_head_dim': 8,
      'num_layers': 2, 'num_cross_attention_heads': 2, 'cross_attention_head_dim': 16,
      'cross_attention_dim': 32, 'caption_channels': 24, 'sample_size': 6, **options,
    }
  )  # fmt: skip


@pytest.fixture(scope='module', params=VARIANTS)
def pair(request):
  theirs = reference.randomise(make_theirs(**VARIANTS[request.param]), 3)
  source = reference.source(theirs, dict(theirs.config))
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_patches_and_caption(pair):
  """On the network's own sides and on others."""
  theirs, ours = pair
  for x in (data(2, 6, 6, 6), data(2, 6, 4, 10)):
    want = reference.run(theirs.patch_embed, x)
    np.testing.assert_allclose(ours.embed_patches(nhwc(x)), want, **CLOSE)
  text = data(2, 5, 24)
  with torch.no_grad():
    want = theirs.caption_norm(theirs.caption_projection(torch.from_numpy(text)))
  np.testing.assert_allclose(ours.caption(text), want.numpy(), **CLOSE)


def test_whole(pair):
  theirs, ours = pair
  x, text = data(2, 6, 4, 6), data(2, 5, 24, seed=1)
  mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
  sprint = ours.config.guidance_embeds
  t = np.array([0.7, 0.2] if sprint else [577.25, 3.0], np.float32)
  scale = np.array([4.5, 2.0], np.float32) if sprint else None
  with torch.no_grad():
    want = theirs(
      torch.from_numpy(x), torch.from_numpy(text), torch.from_numpy(t),
      guidance=None if scale is None else torch.from_numpy(0.1 * scale),
      encoder_attention_mask=torch.from_numpy(mask),
    ).sample  # fmt: skip
  have = ours(nhwc(x), t, ours.caption(text), mask, scale)
  np.testing.assert_allclose(nchw(have), want.numpy(), **CLOSE)


@pytest.mark.parametrize(
  'name', ['sana_600m_1024', 'sana_1600m_1024', 'sana1_5_4800m_1024', 'sana_sprint_1600m_1024']
)
def test_released_configs(name):
  """As many parameters as diffusers' class on the meta device."""
  c = modeling.SIZES[name]
  with torch.device('meta'):
    theirs = diffusers.SanaTransformer2DModel(
      num_attention_heads=c.num_attention_heads, num_layers=c.num_layers,
      num_cross_attention_heads=c.num_cross_attention_heads,
      cross_attention_head_dim=c.cross_attention_head_dim, cross_attention_dim=c.width,
      guidance_embeds=c.guidance_embeds, qk_norm='rms_norm_across_heads' if c.qk_norm else None,
    )  # fmt: skip
  count = sum(p.numel() for p in theirs.parameters())
  _, template = modules.structure_of(modeling.build_model, c)
  assert modules.count_parameters(template) == count
