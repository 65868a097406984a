"""UNet: sizes, both layouts of files, options, conditions; its golden file is in test_replay.py."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_flops import count_traced_flops

from vtts_jax.checkpoints.files import flatten_tree, write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.unet import convert, modeling

GOLDEN = pathlib.Path(__file__).parent / 'golden/unet_sd15_a.npz'
OPTIONS = {
  '_class_name': 'UNet2DConditionModel', 'norm_num_groups': 8, 'attention_head_dim': 4,
  'sample_size': 8,
}  # fmt: skip
XL = modeling.SIZES['tiny_xl']


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    return {k: file[k] for k in file.files}


@pytest.fixture
def tensors(golden):
  return {k[7:]: v for k, v in golden.items() if k.startswith('params/')}


def load(tensors, options=OPTIONS):
  source = source_of_arrays(tensors, options, 'here')
  config = convert.config_of(source)
  return config, convert.load_weights(source, config)


@functools.cache
def draw_parameters():
  """Parameters of `tiny_xl` without zeros, so that every part matters."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, modules.structure_of(modeling.build_model, XL)[1])


def make_inputs(side=(5, 3), rows=2):
  """Latents of odd sides, text, pooled text and size numbers for `tiny_xl`."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(rows, *shape)), jnp.float32)
  return draw(*side, 3), draw(3, 32), draw(12), 100 * jnp.abs(draw(6))


@jax.jit
def predict(params, t, latents, text, pooled, time_ids):
  model = modules.bind_module(modeling.build_model, XL, params)
  return model(latents, t, text, pooled, time_ids)


# ---------------------------------------------------------------------------------- sizes, FLOPs


@pytest.mark.parametrize(('name', 'count'), [('sd15', 859_520_964), ('sdxl', 2_567_463_684)])
def test_released_sizes(name, count):
  _, params = modules.structure_of(modeling.build_model, modeling.SIZES[name])
  assert modules.count_parameters(params) == count
  paths = [path.replace('.', '/') for path in flatten_tree(params)]
  assert all(any(re.search(rule, path) for path in paths) for rule, _ in convert.SHARDING)


def test_sizes_that_differ_from_sd15_in_a_width():
  """They are not traced: 3 x 3 x 320 numbers for an input channel; for a channel of the text two
  columns in each of the 16 transformers."""
  sd15, inpaint, sd21 = (modeling.SIZES[name] for name in ('sd15', 'sd15_inpaint', 'sd21'))
  assert dataclasses.replace(inpaint, in_channels=4) == sd15
  assert 859_520_964 + 9 * 320 * (inpaint.in_channels - 4) == 859_535_364
  text, heads = sd21.cross_attention_dim - 768, {'attention_head_dim': (8,) * 4}
  assert dataclasses.replace(sd21, cross_attention_dim=768, sample_size=64, **heads) == sd15
  assert 859_520_964 + text * 2 * (5 * (320 + 640 + 1280) + 1280) == 865_910_724


def test_flops_are_those_of_the_traced_program():
  inputs = make_inputs(rows=1)
  traced = jax.make_jaxpr(predict)(draw_parameters(), jnp.ones(1), *inputs)
  assert count_traced_flops(traced.jaxpr) == modeling.count_flops(XL, 5, 3, words=3)


# ------------------------------------------------------------------------------------- conditions


def test_rows_times_and_bfloat16():
  params, inputs = draw_parameters(), make_inputs()
  whole = predict(params, jnp.array([3.5, 3.5]), *inputs)
  assert whole.shape == (2, 5, 3, 3) and whole.dtype == jnp.float32
  turned = predict(params, jnp.array([700.0, 3.5]), *(x[::-1] for x in inputs))
  np.testing.assert_allclose(turned[1], whole[0], atol=1e-5)
  assert np.abs(turned[0] - whole[1]).max() > 1e-2
  # one time for all rows, and half the bits
  half = predict(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), jnp.array([3.5]), *inputs)
  assert half.dtype == jnp.float32
  assert 0 < np.abs(half - whole).mean() < 0.05 * np.abs(whole).mean()


def test_added_condition_by_hand():
  _, _, pooled, time_ids = make_inputs()
  model = modules.bind_module(modeling.build_model, XL, draw_parameters())
  parts = [pooled]  # the text first, then number by number cosines and sines
  for number in time_ids.T:
    angles = np.asarray(number)[:, None] * np.array([1.0, 0.01])
    parts += [np.cos(angles), np.sin(angles)]
  want = model.add_embedding(jnp.asarray(np.concatenate(parts, -1), jnp.float32))
  np.testing.assert_allclose(model.embed_added(pooled, time_ids), want, atol=1e-4)
  with pytest.raises(ConfigError, match=r'time_ids \(2, 5\): must give 36 features, 32 given'):
    model.embed_added(pooled, time_ids[:, :5])
  for given in ({}, {'pooled': pooled}):
    with pytest.raises(ConfigError, match='this model reads pooled and time_ids'):
      model.embed_time(jnp.ones(2), **given)
  _, template = modules.structure_of(modeling.build_model, modeling.SIZES['tiny'])
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
  plain = modules.bind_module(modeling.build_model, modeling.SIZES['tiny'], zeros)
  with pytest.raises(ConfigError, match='this model reads neither'):
    plain.embed_time(jnp.ones(2), pooled, time_ids)


def test_a_doubled_odd_side_is_cut():
  for n in range(1, 70):  # what nearest neighbours of the reference take
    nearest = np.floor(np.arange(2 * n - 1) * n / (2 * n - 1))
    np.testing.assert_array_equal(np.repeat(np.arange(n), 2)[: 2 * n - 1], nearest)


# ------------------------------------------------------------------------------------------- files


def swap_halves(params):
  """Value and gate of every GEGLU exchanged."""

  def swap(path, x):
    return jnp.flip(x, -2) if [p.key for p in path[-3:-1]] == ['ff', 'up'] else x

  return jax.tree_util.tree_map_with_path(swap, params)


def test_wrong_halves_are_seen(tensors):
  """The golden file tells value and gate apart: exchanged in the file, they are in the model."""
  params, inputs = draw_parameters(), (jnp.array([3.5, 3.5]), *make_inputs())
  right, wrong = predict(params, *inputs), predict(swap_halves(params), *inputs)
  assert np.abs(wrong - right).mean() > 0.1 * np.abs(right).mean()
  name = r'.*ff\.net\.0\.proj\.(weight|bias)'
  halves = lambda v: np.concatenate(np.split(v, 2)[::-1])
  swapped = {k: halves(v) if re.fullmatch(name, k) else v for k, v in tensors.items()}
  want = swap_halves(load(tensors)[1])
  jax.tree.map(np.testing.assert_array_equal, load(swapped)[1], want)


def rename_to_original(name, layers=1):
  """The name that the original single file has for a tensor of the golden file's layout."""
  stem, _, kind = name.rpartition('.')
  resnet = {
    'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
    'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection',
  }  # fmt: skip
  ends = {
    'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2',
    'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
  }  # fmt: skip
  if stem in ends:
    stem = ends[stem]
  elif stem.startswith('mid_block'):
    _, what, i, rest = stem.split('.', 3)
    at = 1 if what == 'attentions' else 2 * int(i)
    stem = f'middle_block.{at}.{resnet.get(rest, rest)}'
  else:
    side, level, what, i, rest = stem.split('.', 4)
    first = int(level) * (layers + 1)
    if what == 'downsamplers':
      stem = f'input_blocks.{first + layers + 1}.0.op'
    elif what == 'upsamplers':  # after a transformer where there is one
      stem = f'output_blocks.{first + layers}.{1 if level == "0" else 2}.conv'
    else:
      block = first + int(i) + (side == 'down_blocks')
      kind_of = 'input' if side == 'down_blocks' else 'output'
      slot = int(what == 'attentions')
      stem = f'{kind_of}_blocks.{block}.{slot}.{resnet.get(rest, rest)}'
  return f'model.diffusion_model.{stem}.{kind}'


def test_an_original_file(tensors):
  config, params = load(tensors)
  old = {rename_to_original(name): value for name, value in tensors.items()}
  assert len(old) == len(tensors)
  old['first_stage_model.encoder.conv_in.weight'] = np.zeros(3)  # other models of the same file
  found, same = load(old, OPTIONS)
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, same, params)
  old['model.diffusion_model.label_emb.1.weight'] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match='unused by the model: label_emb.1.weight'):
    load(old, OPTIONS)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('input_blocks.3.0.op.bias', 'down_blocks.0.downsamplers.0.conv.bias'),
    ('input_blocks.4.0.skip_connection.weight', 'down_blocks.1.resnets.0.conv_shortcut.weight'),
    ('input_blocks.11.0.out_layers.3.bias', 'down_blocks.3.resnets.1.conv2.bias'),
    ('middle_block.2.emb_layers.1.bias', 'mid_block.resnets.1.time_emb_proj.bias'),
    ('output_blocks.2.1.conv.weight', 'up_blocks.0.upsamplers.0.conv.weight'),
    ('output_blocks.5.2.conv.weight', 'up_blocks.1.upsamplers.0.conv.weight'),
    ('output_blocks.11.1.proj_in.bias', 'up_blocks.3.attentions.2.proj_in.bias'),
    ('label_emb.0.2.weight', 'add_embedding.linear_2.weight'),
  ],
)
def test_names_of_the_released_originals(old, new):
  assert convert._translate_name(old, layers=2) == new


def test_a_pipeline_folder(tmp_path, tensors):
  (tmp_path / 'unet').mkdir()
  write_weights(tmp_path / 'unet/diffusion_pytorch_model.safetensors', tensors, OPTIONS)
  unet = Pretrained('unet', str(tmp_path))
  assert unet.config == modeling.Config(
    block_out_channels=(16, 24, 32), has_attention=(True, True, False),
    attention_head_dim=(4, 4, 4), transformer_layers_per_block=(1, 1, 1), layers_per_block=1,
    cross_attention_dim=20, sample_size=8, norm_num_groups=8,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, unet.load(), load(tensors)[1])


def test_what_is_wrong_is_said(tensors):
  for options, say in (
    ({'time_cond_proj_dim': 256}, 'time_cond_proj_dim=256: allowed is None'),
    ({'flip_sin_to_cos': False}, 'flip_sin_to_cos=False: allowed is None or True'),
    ({'norm_num_groups': 5}, r'block_out_channels=\(16, 24, 32\): .* norm_num_groups=5'),
    ({'attention_head_dim': 5}, r'attention_head_dim=\(5, 5, 5\): the heads must divide'),
    ({'attention_head_dim': [4]}, 'attention_head_dim=.*: must have one entry for each'),
  ):
    with pytest.raises(ConfigError, match=say):
      load(tensors, OPTIONS | options)
  with pytest.raises(ValueError, match='here has no UNet: it lacks mid_block'):
    load({'x': np.zeros(1)})
  gone = tensors.pop('up_blocks.1.attentions.1.transformer_blocks.0.norm2.weight')
  with pytest.raises(ValueError, match=r'wanted by the model: up_blocks\.1\.attentions\.1\.blocks'):
    load(tensors)
  tensors['up_blocks.1.attentions.1.transformer_blocks.0.norm2.weight'] = gone
  tensors['class_embedding.weight'] = gone
  with pytest.raises(ValueError, match=r'unused by the model: class_embedding\.weight'):
    load(tensors)
