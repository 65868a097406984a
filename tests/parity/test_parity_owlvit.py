"""OWL-ViT and OWLv2 stage by stage against transformers, and their preprocessing."""

import full_size
import jax
import numpy as np
import pytest
import reference
from PIL import Image
from reference import torch, transformers

from vtts_jax.models import modules, vit
from vtts_jax.models.owlvit import convert, modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers

CLOSE = {'atol': 1e-5, 'rtol': 1e-5}
R, Q, W = 3, 4, 7
TEXT = {
  'vocab_size': 60, 'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
  'num_attention_heads': 3, 'max_position_embeddings': 9,
}  # fmt: skip
VISION = {
  'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
  'image_size': 40, 'patch_size': 8,
}  # fmt: skip
SIZES = {'text_config': TEXT, 'vision_config': VISION, 'projection_dim': 24}


def classes(v2):
  if v2:
    return transformers.Owlv2Config, transformers.Owlv2ForObjectDetection
  return transformers.OwlViTConfig, transformers.OwlViTForObjectDetection


@pytest.fixture(scope='module', params=[False, True], ids=['owlvit', 'owlv2'])
def pair(request):
  config, model = classes(request.param)
  theirs = reference.randomise(model(config(**SIZES)), 1)
  ours = reference.bind_port(convert, modeling, reference.source(theirs, SIZES))
  return theirs, ours


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 50, (R * Q, W))
  ids[np.arange(R * Q), rng.integers(2, W, R * Q)] = 59  # the end token, the largest id
  return rng.normal(size=(R, 40, 40, 3)).astype(np.float32), ids


@pytest.fixture(scope='module')
def outputs(pair, inputs):
  images, ids = inputs
  with torch.no_grad():
    return pair[0](
      input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(reference.nchw(images)),
      output_hidden_states=True,
    )  # fmt: skip


def test_every_block_of_the_image_tower(pair, inputs, outputs):
  theirs, ours = pair
  base = theirs.owlv2 if ours.config.v2 else theirs.owlvit
  images = inputs[0]
  pixels = torch.from_numpy(reference.nchw(images))
  with torch.no_grad():
    embedded = base.vision_model.embeddings(pixels)
    want = base.vision_model.pre_layernorm(embedded).numpy()
    states = base.vision_model(pixels, output_hidden_states=True).hidden_states
  have = ours.vision.embed_patches(images)
  np.testing.assert_allclose(have, want, **CLOSE)
  blocks = ours.vision.trunk.layer_states(have)
  assert len(blocks) == 3
  for i in range(3):
    np.testing.assert_allclose(blocks[i], states[i + 1].numpy(), atol=5e-5, rtol=1e-5)


def test_text_tower(pair, inputs, outputs):
  _, ours = pair
  ids = inputs[1]
  want = outputs.text_model_output.last_hidden_state.numpy()
  np.testing.assert_allclose(ours.text.hidden_states(ids), want, **CLOSE)
  have = ours.text(ids).reshape(R, Q, -1)
  np.testing.assert_allclose(have, outputs.text_embeds.numpy(), **CLOSE)


def test_heads(pair, inputs, outputs):
  theirs, ours = pair
  features = ours.patch_features(inputs[0])
  want = outputs.image_embeds.numpy().reshape(R, 25, -1)
  np.testing.assert_allclose(features, want, atol=5e-5, rtol=1e-5)
  np.testing.assert_allclose(
    modeling.unit_vectors(ours.classes(want)), outputs.class_embeds.numpy(), **CLOSE
  )
  queries = outputs.text_embeds.numpy()
  np.testing.assert_allclose(ours.query_logits(want, queries), outputs.logits.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.predict_boxes(want), outputs.pred_boxes.numpy(), **CLOSE)
  np.testing.assert_allclose(modeling.box_bias(5), theirs.box_bias.numpy(), **CLOSE)
  if ours.config.v2:
    objects = outputs.objectness_logits.numpy()
    np.testing.assert_allclose(ours.objectness_logits(want), objects, **CLOSE)


def test_whole(pair, inputs, outputs):
  graphdef, params = modules.split_module(pair[1])

  @jax.jit
  def run(params, images, ids):
    model = modules.bind_graph(graphdef, params)
    x, queries = model.patch_features(images), model.text(ids).reshape(R, Q, -1)
    return model.query_logits(x, queries), model.predict_boxes(x)

  logits, boxes = run(params, *inputs)
  np.testing.assert_allclose(logits, outputs.logits.numpy(), atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(boxes, outputs.pred_boxes.numpy(), atol=1e-4)


def test_boxes_in_pixels_are_the_processors(pair, outputs):
  """`extent` of a wide picture: shares of the picture, or of the square it was padded to."""
  ours = pair[1].config
  kind = 'Owlv2ImageProcessor' if ours.v2 else 'OwlViTImageProcessor'
  processor = getattr(transformers, kind)()
  found = processor.post_process_object_detection(outputs, 0.0, [(30, 70)] * R)
  x, y, w, h = np.moveaxis(outputs.pred_boxes.numpy(), -1, 0)
  wide, high = modeling.box_extent(ours, 30, 70)
  have = np.stack(
    [(x - w / 2) * wide, (y - h / 2) * high, (x + w / 2) * wide, (y + h / 2) * high], -1
  )
  want = np.stack([f['boxes'].numpy() for f in found])
  np.testing.assert_allclose(have, want, atol=1e-4)


def picture(height, width, seed=0):
  rng = np.random.default_rng(seed)
  smooth = np.kron(rng.random((height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))
  mixed = 0.5 * smooth[:height, :width] + 0.5 * rng.random((height, width, 3))
  return (255 * mixed).astype(np.uint8)


@pytest.mark.parametrize('old', [(96, 96), (50, 71), (200, 133)])
def test_owlvit_preprocessing(old):
  from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

  config = modeling.Config(vit.Config(8, 1, 1, 8), vit.Config(8, 1, 1, 8), 96, 8)
  found = picture(*old)
  processor = OwlViTImageProcessorPil(size={'height': 96, 'width': 96}, do_normalize=False)
  want = processor(Image.fromarray(found), return_tensors='np').pixel_values[0]
  have = modeling.preprocess(config, found[None] / np.float32(255))[0]
  have = np.asarray(have) * modeling.STD + modeling.MEAN
  assert np.abs(have - want.transpose(1, 2, 0)).max() <= 1.001 / 255


@pytest.mark.parametrize('old', [(96, 96), (50, 50), (201, 201), (230, 150), (64, 90)])
def test_owlv2_preprocessing(old):
  from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

  config = modeling.Config(vit.Config(8, 1, 1, 8), vit.Config(8, 1, 1, 8), 96, 8, v2=True)
  found = picture(*old)
  processor = Owlv2ImageProcessorPil(size={'height': 96, 'width': 96})
  # transformers 5 pads with 0; the paper's code, and transformers before, with grey
  processor.pad = lambda image: np.pad(
    image, ((0, 0), (0, max(old) - old[0]), (0, max(old) - old[1])), constant_values=0.5
  )
  want = processor(Image.fromarray(found), return_tensors='np').pixel_values[0]
  have = modeling.preprocess(config, found[None] / np.float32(255))[0]
  np.testing.assert_allclose(have, want.transpose(1, 2, 0), atol=2e-5)


@pytest.mark.parametrize('name', [n for n in modeling.SIZES if not n.startswith('tiny')])
def test_released_sizes_and_keys(name):
  """Every key of the full-size state dict is read or knowingly left, every parameter filled."""
  c = modeling.SIZES[name]
  tower = lambda t: {
    'hidden_size': t.width, 'intermediate_size': t.hidden, 'num_hidden_layers': t.layers,
    'num_attention_heads': t.heads,
  }  # fmt: skip
  sizes = {
    'text_config': tower(c.text), 'projection_dim': c.embed,
    'vision_config': {**tower(c.vision), 'image_size': c.size, 'patch_size': c.patch},
  }  # fmt: skip
  config, model = classes(c.v2)
  with torch.device('meta'):
    theirs = model(config(**sizes))
  lead = 'owlv2' if c.v2 else 'owlvit'
  old = [f'{lead}.{part}_model.embeddings.position_ids' for part in ('text', 'vision')]
  source = full_size.header(theirs, sizes, [*old, 'box_bias'])
  assert convert.config_of(source) == c
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  full_size.check_table(fuse_projections(stack_layers(source, 'layers')), convert.RULES, template)
  left = c.vision.width * c.embed + 1  # visual_projection, logit_scale
  count = sum(p.numel() for p in theirs.parameters())
  assert modules.count_parameters(template) + left == count
  print(name, modules.count_parameters(template), count)


@pytest.mark.parametrize('v2', [False, True])
def test_flops_are_what_torch_counts(v2):
  from torch.utils.flop_counter import FlopCounterMode

  config, model = classes(v2)
  theirs = model(config(**SIZES)).eval()
  theirs.set_attn_implementation('eager')  # the other is not counted on a CPU
  ours = convert.config_of(reference.source(theirs, SIZES))
  ids = torch.ones((Q, ours.context), dtype=torch.int64)
  with torch.no_grad(), FlopCounterMode(display=False) as counter:
    theirs(input_ids=ids, pixel_values=torch.zeros((1, 3, 40, 40)))
  width, tokens = ours.vision.width, ours.grid**2
  unused = 2 * width * ours.embed + 2 * Q * ours.embed  # the whole picture against the texts
  unused += 2 * tokens * (2 * width**2 + width) if v2 else 0  # objectness
  have = modeling.count_flops(ours, 'image', Q) + modeling.count_flops(ours, 'text', Q)
  assert have == counter.get_total_flops() - unused
