"""DINO, DINOv2 and DreamSim: sizes, layouts, adapters, and what loaders say; golden files are in
test_replay.py."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.dino import convert, modeling
from vtts_jax.models.dreamsim import convert as dreamsim_convert
from vtts_jax.models.dreamsim import modeling as dreamsim
from vtts_jax.models.pretrained import Pretrained

GOLDEN = pathlib.Path(__file__).parent / 'golden'
COUNTS = {  # of the torch classes, without the mask token that only training uses
  'dino_vits16': 21_665_664, 'dino_vits8': 21_670_272, 'dino_vitb16': 85_798_656,
  'dino_vitb8': 85_807_872, 'dinov2_small': 22_056_192, 'dinov2_base': 86_579_712,
  'dinov2_large': 304_367_616, 'dinov2_giant': 1_136_479_232,
  'dinov2_with_registers_small': 22_057_728, 'dinov2_with_registers_base': 86_582_784,
  'dinov2_with_registers_large': 304_371_712, 'dinov2_with_registers_giant': 1_136_485_376,
}  # fmt: skip


def count(build):
  return modules.count_parameters(modules.abstract_module(build)[1])


def test_released_sizes():
  assert modeling.SIZES.keys() > COUNTS.keys()
  for name, total in COUNTS.items():
    config = modeling.SIZES[name]
    assert config.classes == 0 and count(lambda c=config: modeling.build_model(c)) == total
    if 'dinov2' in name:
      with_head = modeling.SIZES[f'{name}_imagenet1k_1_layer']
      assert with_head == dataclasses.replace(config, classes=1000)
  head = modeling.SIZES['dinov2_small_imagenet1k_1_layer']
  assert count(lambda: modeling.build_model(head)) == COUNTS['dinov2_small'] + (2 * 384 + 1) * 1000
  assert count(lambda: dreamsim.build_model(dreamsim.SIZES['ensemble'])) == 258_185_472
  assert dreamsim.SIZES['ensemble'].width == 768 + 512 + 512


def test_flops_by_hand():
  """B/16 at 224: 17.58 G multiply-adds, as published (DeiT-B), a little of it no matmul."""
  assert modeling.count_flops(modeling.SIZES['dino_vitb16']) == pytest.approx(2 * 17.56e9, rel=2e-3)
  per_class = 2 * 2 * 384 * 1000
  head = modeling.SIZES['dinov2_small_imagenet1k_1_layer']
  plain = modeling.SIZES['dinov2_small']
  assert modeling.count_flops(head) - modeling.count_flops(plain) == per_class


def test_positions_of_the_original_code_are_shifted():
  """0.1 more than the grid: the sampling points are nearer together than transformers has them."""
  exact, shifted = modeling.resize_matrix(37, 16), modeling.resize_matrix(37, 16, 0.1)
  middle = lambda table: (np.arange(37) @ table)[8:]
  assert (middle(shifted) < middle(exact)).all()
  np.testing.assert_allclose(modeling.resize_matrix(14, 14), np.eye(14), atol=1e-7)
  np.testing.assert_allclose(modeling.resize_matrix(37, 16, antialias=True).sum(0), 1, rtol=1e-6)


def test_bfloat16_stays_near():
  model = Pretrained('dino', 'random:tiny', part='encoder')
  params = model.load()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
  a, b = (model.bind(p).image_features(images) for p in (params, half))
  assert b.dtype == jnp.float32
  assert 0 < np.abs(a - b).max() < 0.1


@pytest.fixture
def tensors():
  with np.load(GOLDEN / 'dinov2.npz') as file:
    config = json.loads(str(file['config']))['params']
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}, config


def test_config_is_read_off(tensors):
  arrays, config = tensors
  found = convert.config_of(source_of_arrays(arrays, config))
  assert found == modeling.Config(12, 2, 2, 24, 4, 4, layer_scale=True, classes=5)
  assert convert.config_of(source_of_arrays(arrays)).heads == 1  # 64 wide, if nothing says
  bare = convert.config_of(source_of_arrays(arrays, config), 'encoder')
  assert bare == dataclasses.replace(found, classes=0)
  assert 'head' not in convert.load_weights(source_of_arrays(arrays, config), bare)


def load(arrays, config):
  source = source_of_arrays(arrays, config)
  return convert.load_weights(source, convert.config_of(source))


def test_what_is_wrong_is_said(tensors):
  arrays, config = tensors
  with pytest.raises(ValueError, match=r'has no DINO or DINOv2: nothing for cls, patch\.kernel'):
    convert.config_of(source_of_arrays({'x': np.zeros(1)}))
  with pytest.raises(ConfigError, match="act='silu': must be one of quick_gelu, gelu"):
    convert.config_of(source_of_arrays(arrays, config | {'hidden_act': 'silu'}))
  gone = {k: v for k, v in arrays.items() if 'layer_scale2' not in k}
  with pytest.raises(ValueError, match=r'wanted by the model: trunk\.blocks\.scale_ffn'):
    load(gone, config)
  odd = {**arrays, 'dinov2.decoder.weight': np.zeros((2, 2), np.float32)}
  with pytest.raises(ValueError, match=r'unused by the model: dinov2\.decoder'):
    load(odd, config)


# ----------------------------------------------------------------------------------------- DreamSim


@pytest.fixture
def folder(tmp_path):
  """The golden weights in the layout of the released files."""
  with np.load(GOLDEN / 'dreamsim.npz') as file:
    golden = {k.removeprefix('params/'): file[k] for k in file.files}
  take = lambda lead: {k[len(lead) :]: v for k, v in golden.items() if k.startswith(lead)}
  for i, name in enumerate(dreamsim.ENSEMBLE):
    save_file(take(f'{i}.'), tmp_path / f'{name}_pretrain.safetensors')
  (tmp_path / 'ensemble_lora').mkdir()
  save_file(take('lora.'), tmp_path / 'ensemble_lora/adapter_model.safetensors')
  adapter = tmp_path / 'ensemble_lora/adapter_config.json'
  adapter.write_text(json.dumps({'r': 2, 'lora_alpha': 0.5, 'target_modules': ['qkv']}))
  return tmp_path, golden


def embedding(place, images):
  source = dreamsim_convert.open_weights(str(place))
  config = dreamsim_convert.config_of(source, heads=2)
  params = dreamsim_convert.load_weights(source, config)
  return modules.bind_module(dreamsim.build_model, config, params).embed_images(images)


def test_dreamsim_from_its_files(folder):
  """A folder of bases and adapters; and one file with the adapters merged, PerceptualModel's."""
  place, golden = folder
  images = golden['in/images']
  np.testing.assert_allclose(embedding(place, images), golden['out/embedding'], atol=1e-5)
  whole = {'extractor_list.0.proj.mlp.0.weight': np.zeros((3, 3), np.float32)}  # DINO's own head
  source = dreamsim_convert.open_weights(str(place))
  for full_name in source.tensor_names():
    (i, _, name), value = full_name.partition('.'), source.read_tensor(full_name)
    lead = f'extractor_list.{i}.' + ('' if name == 'proj' else 'model.')
    layers = enumerate(value) if '*' in name else [('', value)]
    for layer, part in layers:
      whole[lead + name.replace('*', str(layer))] = np.ascontiguousarray(part)
  save_file(whole, place / 'merged.safetensors')
  have = embedding(place / 'merged.safetensors', images)
  np.testing.assert_allclose(have, golden['out/embedding'], atol=1e-5)


def test_dreamsim_adapters_that_do_not_fit(folder):
  place, golden = folder
  lora = {k.removeprefix('lora.'): v for k, v in golden.items() if k.startswith('lora.')}
  file = place / 'ensemble_lora/adapter_model.safetensors'
  first = next(iter(lora))
  for change, said in (
    ({k: v for k, v in lora.items() if k != first}, 'has 1 matrices for the 1 blocks'),
    ({**lora, 'base_model.model.mlp.lora_A.weight': np.zeros((1, 1))}, 'is no adapter of queries'),
    ({k: v[:1] if 'lora_A' in k else v for k, v in lora.items()}, 'does not fit'),
  ):
    save_file({k: np.ascontiguousarray(v) for k, v in change.items()}, file)
    with pytest.raises(ValueError, match=said):
      dreamsim_convert.open_weights(str(place))
  adapter = place / 'ensemble_lora/adapter_config.json'
  adapter.write_text('{"r": 2, "lora_alpha": 1, "use_dora": 1}')
  with pytest.raises(ConfigError, match='use_dora=1: only plain LoRA is known'):
    dreamsim_convert.open_weights(str(place))
  (place / 'clip_vitb16_pretrain.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='clip_vitb16_pretrain'):
    dreamsim_convert.open_weights(str(place))
