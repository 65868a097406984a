"""OWL-ViT, OWLv2 and YOLOS: sizes, preprocessing and errors of their loaders; test_replay.py
replays their golden files."""

import pathlib

import jax
import numpy as np
import pytest

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.owlvit import convert as owl_convert
from vtts_jax.models.owlvit import modeling as owl
from vtts_jax.models.yolos import convert as yolos_convert
from vtts_jax.models.yolos import modeling as yolo
from vtts_jax.testing import replay

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FILES = {'owlvit.npz': owl_convert, 'owlv2.npz': owl_convert, 'yolos.npz': yolos_convert}


def tensors(name):
  """(config, the fixture's weights by name)."""
  config, source, *_ = replay.read(str(GOLDEN / name))
  return config['params'], {key: source.read_tensor(key) for key in source.tensor_names()}


@pytest.mark.parametrize(
  ('module', 'name', 'count'),
  [
    # of a checkpoint of 153,231,879, 152,789,511, 433,888,519, 154,966,792, 437,610,760 parameters
    (owl, 'owlvit_b32', 152_838_662),
    (owl, 'owlvit_b16', 152_396_294),
    (owl, 'owlvit_l14', 433_102_086),
    (owl, 'owlv2_b16', 154_573_575),
    (owl, 'owlv2_l14', 436_824_327),
    (yolo, 'yolos_tiny', 6_488_736),
    (yolo, 'yolos_small', 30_684_768),
    (yolo, 'yolos_base', 127_798_368),
  ],
)
def test_released_sizes(module, name, count):
  _, params = modules.abstract_module(lambda: module.build_model(module.SIZES[name]))
  assert modules.count_parameters(params) == count


@pytest.mark.parametrize('name', FILES)
def test_names_of_older_files_load_too(name):
  options, have = tensors(name)
  convert = FILES[name]
  config = convert.config_of(source_of_arrays(have, options))
  want = convert.load_weights(source_of_arrays(have), config)
  if name == 'yolos.npz':
    middle = have.pop('vit.encoder.interpolation.mid_position_embeddings')
    have['vit.encoder.mid_position_embeddings'] = middle
  else:
    base = name.removesuffix('.npz')
    for part in ('text', 'vision'):
      have[f'{base}.{part}_model.embeddings.position_ids'] = np.arange(9)[None]
    have['box_bias'] = np.zeros((16, 4), np.float32)
  source = source_of_arrays(have, options)
  params = convert.load_weights(source, convert.config_of(source))
  jax.tree.map(np.testing.assert_array_equal, params, want)


def test_config_json_decides_over_the_usual_head_width():
  options, have = tensors('owlvit.npz')
  config = owl_convert.config_of(source_of_arrays(have, options))
  assert (config.vision.heads, config.text.heads, config.v2) == (2, 2, False)
  assert (config.size, config.patch, config.context, config.embed) == (16, 4, 6, 8)
  given = {'num_attention_heads': 4}
  other = owl_convert.config_of(source_of_arrays(have, options), text_config=given)
  assert (other.vision.heads, other.text.heads) == (2, 4)
  assert owl.SIZES['owlvit_l14'].text.heads == 16  # as its config.json says, see the README
  options, have = tensors('yolos.npz')
  config = yolos_convert.config_of(source_of_arrays(have, options))
  assert config.size == (12, 20) and config.middle and config.shortest == 800


@pytest.mark.parametrize('name', FILES)
def test_what_is_wrong_is_said(name):
  options, have = tensors(name)
  config = FILES[name].config_of(source_of_arrays(have, options))
  load = lambda: FILES[name].load_weights(source_of_arrays(have, options), config)
  with pytest.raises(ValueError, match='has no (OWL-ViT or OWLv2|YOLOS) detector: no'):
    FILES[name].config_of(source_of_arrays({'x': np.zeros(1)}))
  have['extra'] = np.zeros(3)
  with pytest.raises(ValueError, match=r'unused by the model: extra \(3,\)'):
    load()
  del have['extra'], have['vit.layernorm.bias' if name == 'yolos.npz' else 'box_head.dense2.bias']
  with pytest.raises(ValueError, match=r'wanted by the model: (norm|box\.last)\.bias'):
    load()
  with pytest.raises(ConfigError, match='must be'):
    if name == 'yolos.npz':
      yolo.Config(yolo.SIZES['yolos_tiny'].trunk, (8, 8))
    else:
      owl.Config(**owl._BASE, size=100, patch=32)


def test_boxes_start_a_patch_wide_at_the_tokens_corner():
  share = 1 / (1 + np.exp(-owl.box_bias(4).astype(np.float64)))
  want = [[(1 + t % 4) / 4, (1 + t // 4) / 4, 0.25, 0.25] for t in range(16)]
  np.testing.assert_allclose(share, want, atol=2e-4)


def test_owlv2_pads_with_grey_and_keeps_a_square_one():
  small = owl.Config(owl._BASE['vision'], owl._BASE['text'], 16, 8, v2=True)
  back = lambda x: np.asarray(owl.preprocess(small, x)) * owl.STD + owl.MEAN
  picture = (np.arange(16 * 16 * 3).reshape(1, 16, 16, 3) % 256) / np.float32(255)
  np.testing.assert_allclose(back(picture), picture, atol=1e-6)
  wide = back(np.ones((1, 16, 32, 3), np.float32))
  np.testing.assert_allclose(wide[0, :7], 1, atol=1e-3)
  np.testing.assert_allclose(wide[0, 9:], 0.5, atol=1e-3)
  assert owl.box_extent(small, 16, 32) == (32, 32)


def test_resizing_tables_by_hand():
  table = owl.blur_and_sample(4, 8)  # twice as large: no blur, quarters, mirrored at the ends
  np.testing.assert_allclose(table[:, 0], [0.75, 0.25, 0, 0])
  np.testing.assert_allclose(table[:, 3], [0, 0.75, 0.25, 0])
  np.testing.assert_allclose(owl.blur_and_sample(30, 7).sum(0), 1, atol=1e-6)
  np.testing.assert_array_equal(yolo.bicubic_matrix(5, 5), np.eye(5))
  cubic = [-0.03515625, 0.26171875, 0.87890625, -0.10546875]  # at a quarter, a = -0.75
  np.testing.assert_allclose(yolo.bicubic_matrix(8, 16)[1:5, 6], cubic)


def test_sides_of_yolos():
  side = lambda name, *size: yolo.resized_sides(yolo.SIZES[name], *size)
  assert side('yolos_tiny', 512, 512) == (512, 512) == side('yolos_tiny', 1024, 1024)
  assert side('yolos_small', 480, 640) == (800, 1056)  # 1066 cut to whole patches
  assert side('yolos_base', 300, 1200) == (320, 1328)  # 1333 / 4 = 333.25, rounded
