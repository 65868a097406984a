"""DINO, DINOv2 and DreamSim stage by stage against transformers."""

import jax
import numpy as np
import pytest
import reference
from dino_layouts import (
  SMALL,
  adapters,
  branches,
  embedding,
  merge,
  on_disk,
  original,
  original_positions,
  saved,
)
from full_size import check_table, header
from reference import nchw, torch, transformers

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.dino import convert, modeling
from vtts_jax.models.dreamsim import convert as dreamsim_convert
from vtts_jax.models.dreamsim import modeling as dreamsim

CLOSE = {'atol': 2e-5, 'rtol': 2e-5}
SIZES = [(16, 16), (20, 12), (28, 8)]
V2 = {k: v for k, v in SMALL.items() if k != 'intermediate_size'}
V2 |= {'mlp_ratio': 2, 'num_labels': 5, 'num_hidden_layers': 3}
MODELS = {
  'dino': lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
  'dinov2': lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**V2)),
  'dinov2_swiglu': lambda: transformers.Dinov2ForImageClassification(
    transformers.Dinov2Config(**V2, use_swiglu_ffn=True)
  ),
  'registers': lambda: transformers.Dinov2WithRegistersForImageClassification(
    transformers.Dinov2WithRegistersConfig(**V2, num_register_tokens=3)
  ),
}


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module', params=MODELS)
def pair(request):
  theirs = reference.randomise(MODELS[request.param](), 3)
  source = reference.source(theirs, theirs.config.to_dict())
  return theirs, reference.bind_port(convert, modeling, source)


def encoder(theirs):
  inner = getattr(theirs, theirs.base_model_prefix, theirs)
  options = {'interpolate_pos_encoding': True} if inner is theirs else {}
  return inner, inner.layers if hasattr(inner, 'layers') else inner.encoder.layer, options


@pytest.mark.parametrize('size', SIZES)
def test_every_stage(pair, size):
  theirs, ours = pair
  inner, layers, options = encoder(theirs)
  x = data(2, *size, 3)
  first = reference.run(inner.embeddings, nchw(x), **options)
  np.testing.assert_allclose(ours.embed_patches(x), first, **CLOSE)
  states = ours.trunk.layer_states(ours.embed_patches(x))
  for state, layer in zip(states, layers, strict=True):
    first = reference.run(layer, first)
    np.testing.assert_allclose(state, first, **CLOSE)
  with torch.no_grad():
    tokens = inner(torch.from_numpy(nchw(x)), **options).last_hidden_state.numpy()
  np.testing.assert_allclose(ours(x), tokens, **CLOSE)
  np.testing.assert_allclose(ours.image_features(x), tokens[:, 0], **CLOSE)
  if inner is not theirs:
    with torch.no_grad():
      logits = theirs(torch.from_numpy(nchw(x))).logits.numpy()
    np.testing.assert_allclose(ours.class_logits(x), logits, **CLOSE)


def test_names_of_files(pair):
  """What the hub has, and its names made without a file (used at full size below)."""
  theirs, ours = pair
  files = on_disk(theirs)
  assert {k: v.shape for k, v in files.items()} == {k: v.shape for k, v in saved(theirs).items()}
  config = theirs.config.to_dict()
  params = convert.load_weights(source_of_arrays(files, config), ours.config)
  jax.tree.map(np.testing.assert_array_equal, params, modules.split_module(ours)[1])


def test_original_layout():
  """facebookresearch/dino: other names, other epsilon, positions resized by a factor."""
  theirs = transformers.ViTModel(transformers.ViTConfig(**SMALL, layer_norm_eps=1e-6))
  theirs = original_positions(reference.randomise(theirs, 4))
  source = source_of_arrays(original(theirs), {'num_attention_heads': 2})
  ours = reference.bind_port(convert, modeling, source)
  assert ours.config.offset == 0.1
  for size in SIZES:
    x = data(2, *size, 3)
    with torch.no_grad():
      out = theirs(torch.from_numpy(nchw(x)), interpolate_pos_encoding=True).last_hidden_state
    np.testing.assert_allclose(ours(x), out.numpy(), **CLOSE)


@pytest.mark.parametrize('old', [37, 14, 5])
@pytest.mark.parametrize('new', [16, 37, 3, 40])
def test_resizing(old, new):
  """The matrix against torch: by a size, by a factor, with antialiasing."""
  row = torch.from_numpy(data(1, 1, old, old))
  resize = lambda **options: torch.nn.functional.interpolate(
    row, mode='bicubic', align_corners=False, **options
  ).numpy()
  twice = lambda by: np.einsum('xygh,gr,hc->xyrc', row.numpy(), by, by)
  by_factor = resize(scale_factor=((new + 0.1) / old,) * 2)
  assert by_factor.shape[2] == new
  for want, by in (
    (resize(size=(new, new)), modeling.resize_matrix(old, new)),
    (by_factor, modeling.resize_matrix(old, new, 0.1)),
    (resize(size=(new, new), antialias=True), modeling.resize_matrix(old, new, 0.0, True)),
  ):
    np.testing.assert_allclose(twice(by), want, **CLOSE)


def test_preprocessing():
  """BitImageProcessor with the settings on the hub. Where 224 is cut from an odd rest it may round
  the other way than torchvision, which the original evaluations (and `preprocess`) use."""
  processor = transformers.models.bit.image_processing_pil_bit.BitImageProcessorPil(
    size={'shortest_edge': 256}, crop_size={'height': 224, 'width': 224},
    image_mean=modeling.MEAN, image_std=modeling.STD,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  for size in ((300, 300), (64, 64), (180, 270), (512, 384)):
    picture = rng.integers(0, 256, (*size, 3), np.uint8)
    want = processor(picture, return_tensors='np', input_data_format='channels_last')
    want = want['pixel_values'][0].transpose(1, 2, 0)
    have = modeling.preprocess(None, picture[None].astype(np.float32) / 255)[0]
    assert (np.abs(have - want) * modeling.STD).max() < 1.001 / 255


@pytest.mark.parametrize('name', [name for name in modeling.SIZES if name != 'tiny'])
def test_released(name):
  """As many parameters as the class on the meta device, and every tensor of its file known."""
  c = modeling.SIZES[name]
  sizes = {
    'hidden_size': c.width, 'num_hidden_layers': c.layers, 'num_attention_heads': c.heads,
    'patch_size': c.patch, 'image_size': c.patch * c.grid,
  }  # fmt: skip
  with torch.device('meta'):
    if name.startswith('dino_'):
      config = transformers.ViTConfig(**sizes, intermediate_size=c.hidden)
      theirs = transformers.ViTModel(config, add_pooling_layer=False)
    else:
      kind = 'Dinov2WithRegisters' if c.registers else 'Dinov2'
      config = getattr(transformers, f'{kind}Config')(
        **sizes, mlp_ratio=4, use_swiglu_ffn=c.act == 'swiglu', num_labels=1000
      )
      theirs = getattr(transformers, kind + ('ForImageClassification' if c.classes else 'Model'))
      theirs = theirs(config)
  count = sum(p.numel() for n, p in theirs.named_parameters() if not n.endswith('mask_token'))
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  assert modules.count_parameters(template) == count
  for tensors in (saved(theirs), None):
    source = source_of_arrays(tensors, config.to_dict()) if tensors else header(theirs)
    if tensors:
      assert convert.config_of(source) == c
    check_table(convert.arrange_layers(source), convert.RULES, template)


# ----------------------------------------------------------------------------------------- DreamSim


def test_dreamsim():
  """Branches, adapters, embedding; the torch classes have the adapters merged by hand."""
  theirs = [reference.randomise(model, i) for i, model in enumerate(branches())]
  low_rank = adapters(np.random.default_rng(0))
  bases = [source_of_arrays(original(model)) for model in theirs]
  images = np.random.default_rng(1).random((3, 16, 16, 3)).astype(np.float32)
  with torch.no_grad():
    for i, model in enumerate(theirs):
      merge(model, low_rank, i, 0.5 / 16)
    parts, whole = embedding(theirs, images)
  found = dreamsim_convert.merge_adapters(bases, source_of_arrays(low_rank), 0.5 / 16)
  source = dreamsim_convert.join_branches(found)
  ours = reference.bind_port(dreamsim_convert, dreamsim, source, heads=2)
  for branch, part in zip(ours.branches, parts, strict=True):
    np.testing.assert_allclose(dreamsim.branch_features(branch, images), part.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.embed_images(images), whole.numpy(), **CLOSE)
  source = dreamsim_convert.join_branches(bases)
  plain = reference.bind_port(dreamsim_convert, dreamsim, source, heads=2)
  assert np.abs(plain.embed_images(images) - whole.numpy()).max() > 1e-3


@pytest.mark.parametrize('name', dreamsim.BRANCHES)
def test_dreamsim_branches(name):
  """Released sizes: parameters and names, from transformers' classes on the meta device."""
  c = dreamsim.BRANCHES[name]
  sizes = {'patch_size': c.patch, 'image_size': c.patch * c.grid}
  with torch.device('meta'):
    if 'clip' in name:
      theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                      num_attention_heads=12, projection_dim=512, **sizes)
      )  # fmt: skip
    elif 'v2' in name:
      theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    else:
      config = transformers.ViTConfig(**sizes)
      theirs = transformers.ViTModel(config, add_pooling_layer=False)
  tensors = saved(theirs) if 'v2' in name else original(theirs)
  source = source_of_arrays(tensors)
  found = convert.config_of(source, act=c.act, eps=c.eps, offset=c.offset)
  assert found == c
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  check_table(convert.arrange_layers(source), convert.RULES, template)
  left = sum(v.size for k, v in tensors.items() if 'mask_token' in k)
  assert modules.count_parameters(template) == sum(v.size for v in tensors.values()) - left
