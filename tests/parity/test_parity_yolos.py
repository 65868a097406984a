"""YOLOS stage by stage against transformers, and its preprocessing."""

import full_size
import jax
import numpy as np
import pytest
import reference
from PIL import Image
from reference import torch, transformers

from vtts_jax.models import modules, vit
from vtts_jax.models.stacked import fuse_projections, stack_layers
from vtts_jax.models.yolos import convert, modeling

CLOSE = {'atol': 1e-5, 'rtol': 1e-5}
SIZES = {
  'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'intermediate_size': 48,
  'patch_size': 8, 'num_detection_tokens': 5,
}  # fmt: skip


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'middle'])
def pair(request):
  # the tiny model's height and width are no whole number of patches; it has none in the middle
  sizes = {**SIZES, 'image_size': [24, 40 if request.param else 44]}
  sizes['use_mid_position_embeddings'] = request.param
  theirs = transformers.YolosForObjectDetection(transformers.YolosConfig(**sizes, num_labels=6))
  theirs = reference.randomise(theirs, 1)
  return theirs, reference.bind_port(convert, modeling, reference.source(theirs, sizes))


@pytest.mark.parametrize('size', [(24, 40), (40, 40)])  # the grid's own, and one to resize to
def test_every_stage(pair, size):
  theirs, ours = pair
  images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  seen = []
  hooks = [
    layer.register_forward_hook(lambda *call: seen.append(call[2].numpy()))
    for layer in theirs.vit.encoder.layer
  ]
  with torch.no_grad():
    pixels = torch.from_numpy(reference.nchw(images))
    start = theirs.vit.embeddings(pixels).numpy()
    want = theirs(pixels)
  for hook in hooks:
    hook.remove()
  np.testing.assert_allclose(ours.embed_patches(images), start, **CLOSE)
  last, blocks = ours.hidden_states(images, every=True)
  assert len(seen) == len(blocks) == 3
  for have, block in zip(blocks, seen):
    np.testing.assert_allclose(have, block, atol=5e-5, rtol=1e-5)
  np.testing.assert_allclose(ours.norm(last), want.last_hidden_state.numpy(), atol=5e-5, rtol=1e-5)
  graphdef, params = modules.split_module(ours)
  logits, boxes = jax.jit(lambda p, x: modules.bind_graph(graphdef, p)(x))(params, images)
  np.testing.assert_allclose(logits, want.logits.numpy(), atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(boxes, want.pred_boxes.numpy(), atol=1e-4)


@pytest.mark.parametrize('new', [3, 7, 12, 31])
def test_positions_are_resized_as_torch_does(new):
  x = np.random.default_rng(1).normal(size=(1, 1, 12, 12)).astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.from_numpy(x), size=(new, 12), mode='bicubic', align_corners=False
  )
  have = np.einsum('bcij,ix->bcxj', x, modeling.bicubic_matrix(12, new))
  np.testing.assert_allclose(have, want.numpy(), **CLOSE)


@pytest.mark.parametrize(
  'old', [(64, 64), (50, 71), (200, 130), (64, 70), (70, 64), (64, 300), (300, 70), (32, 64)]
)
def test_preprocessing(old, monkeypatch):
  from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

  config = modeling.Config(vit.Config(8, 1, 1, 32, eps=1e-12), (64, 64), shortest=64)
  monkeypatch.setattr(modeling, 'LONGEST', 107)
  picture = np.random.default_rng(2).integers(0, 256, (*old, 3), np.uint8)
  processor = YolosImageProcessorPil(
    size={'shortest_edge': 64, 'longest_edge': 107}, do_normalize=False, do_pad=False
  )
  want = processor(Image.fromarray(picture), return_tensors='np').pixel_values[0]
  have = modeling.preprocess(config, picture[None] / np.float32(255))[0]
  assert have.shape == want.transpose(1, 2, 0).shape
  have = np.asarray(have) * modeling.STD + modeling.MEAN
  assert np.abs(have - want.transpose(1, 2, 0)).max() <= 1.001 / 255


def test_side_is_the_processors_for_every_size():
  from transformers.models.yolos.image_processing_pil_yolos import get_size_with_aspect_ratio_yolos

  for name, shortest in (('yolos_tiny', 512), ('yolos_small', 800), ('yolos_base', 800)):
    config = modeling.SIZES[name]
    for height in (64, 333, 512, 768, 800, 1024, 1333):
      for width in (64, 256, 511, 512, 800, 1000, 1344):
        want = get_size_with_aspect_ratio_yolos((height, width), shortest, 1333)
        assert modeling.resized_sides(config, height, width) == want, (name, height, width)


@pytest.mark.parametrize('name', [n for n in modeling.SIZES if n != 'tiny'])
def test_released_sizes_and_keys(name):
  c = modeling.SIZES[name]
  sizes = {
    'hidden_size': c.trunk.width, 'intermediate_size': c.trunk.hidden,
    'num_hidden_layers': c.trunk.layers, 'num_attention_heads': c.trunk.heads,
    'image_size': list(c.size), 'use_mid_position_embeddings': c.middle,
  }  # fmt: skip
  with torch.device('meta'):
    theirs = transformers.YolosForObjectDetection(transformers.YolosConfig(**sizes, num_labels=91))
  source = full_size.header(theirs, sizes)
  assert convert.config_of(source) == c
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  whole = fuse_projections(stack_layers(source, 'layer'), ('query', 'key', 'value'))
  full_size.check_table(whole, convert.RULES, template)
  assert modules.count_parameters(template) == sum(p.numel() for p in theirs.parameters())
  print(name, modules.count_parameters(template))


def test_flops_are_what_torch_counts():
  from torch.utils.flop_counter import FlopCounterMode

  sizes = {**SIZES, 'image_size': [24, 40]}
  theirs = transformers.YolosForObjectDetection(transformers.YolosConfig(**sizes, num_labels=6))
  theirs.set_attn_implementation('eager')  # the other is not counted on a CPU
  config = convert.config_of(reference.source(theirs, sizes), shortest=40)
  with torch.no_grad(), FlopCounterMode(display=False) as counter:
    theirs.eval()(torch.zeros((1, 3, 40, 80)))
  assert modeling.count_flops(config, 20, 40) == counter.get_total_flops()
