"""DC-AE: sizes, shortcuts, both layouts, the decoder alone; its goldens are in test_replay.py."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.dcae import convert, modeling
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.testing import replay

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def count_by_hand(c):
  """Parameters of a model without empty levels, by the layer list of the facts."""
  conv = lambda inner, outer: 9 * inner * outer + outer
  total = 0
  for levels in (c.encoder, c.decoder):
    for level in levels:
      D, more = level.width, len(level.scales)
      block = conv(D, D) + 9 * D * D + 2 * D
      if level.attention:
        scales = more * 3 * D * (25 + c.attention_head_dim)
        block = 3 * D * D + scales + (1 + more) * D * D + 2 * D
        block += (D * 8 * D + 8 * D) + (9 * 8 * D + 8 * D) + 4 * D * D + 2 * D  # the feed-forward
      total += level.layers * block
    widths = [level.width for level in levels]
    total += sum(conv(a, b) for a, b in zip(widths, widths[1:]))
    total += conv(3, widths[0]) + conv(widths[-1], c.latent_channels)
  # the second half has its convolutions the other way round: the biases differ
  down, up = c.encoder, c.decoder
  total += sum(a.width - b.width for a, b in zip(up, up[1:])) + 3 - up[0].width
  return total + down[-1].width - c.latent_channels + 2 * up[0].width


@pytest.mark.parametrize(
  ('name', 'size', 'downscale'),
  [
    ('f32c32_sana', 312_250_275, 32),
    ('f128c512_in', 1_120_695_052, 128),
  ],
)
def test_released_sizes(name, size, downscale):
  config = modeling.SIZES[name]
  _, params = modules.structure_of(modeling.build_model, config)
  assert (modules.count_parameters(params), config.downscale) == (size, downscale)
  if name == 'f32c32_sana':
    assert size == count_by_hand(config)


def test_pixels_into_channels_and_back():
  """Cell (i, j) of channel c goes to channel 4 c + 2 i + j."""
  x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
  found = modeling.space_to_depth(x)
  for c, i, j in ((0, 0, 0), (1, 1, 0), (2, 0, 1)):
    np.testing.assert_array_equal(found[..., 4 * c + 2 * i + j], x[:, i::2, j::2, c])
  np.testing.assert_array_equal(modeling.depth_to_space(found), x)
  means = modeling.average_channels(found, 6)
  np.testing.assert_allclose(means[..., 0], (found[..., 0] + found[..., 1]) / 2)


def read_golden(name):
  config, source, inputs, _ = replay.read(str(GOLDEN / f'{name}.npz'))
  tensors = {name: source.read_tensor(name) for name in source.tensor_names()}
  return config['params'], tensors, inputs


@pytest.fixture(scope='module', params=['dcae_a', 'dcae_c_shuffle'])
def golden(request):
  return read_golden(request.param)


def load(tensors, options=None, part=''):
  source = source_of_arrays(tensors, options)
  config = convert.config_of(source, part)
  return config, convert.load_weights(source, config)


def test_the_file_decides(golden):
  """What can be read off the tensors agrees with what the config says."""
  options, tensors, _ = golden
  config = convert.config_of(source_of_arrays(tensors))
  said = convert.config_of(source_of_arrays(tensors, options))
  assert config == dataclasses.replace(said, scaling_factor=None)
  assert said.scaling_factor == options['scaling_factor']
  for side in ('encoder', 'decoder'):
    levels = getattr(config, side)
    assert [level.layers for level in levels] == options[f'{side}_layers_per_block']
    assert [list(level.scales) for level in levels] == options[f'{side}_qkv_multiscales']
    kinds = ['EfficientViTBlock' if level.attention else 'ResBlock' for level in levels]
    assert kinds == options[f'{side}_block_types']
  assert config.shuffle == (options['upsample_block_type'] == 'pixel_shuffle')
  assert config.unshuffle == (options['downsample_block_type'] == 'pixel_unshuffle')
  assert config.attention_head_dim == options['attention_head_dim']


def as_mit_writes(tensors):
  """The tensors under the names of MIT's file, q, k and v in one 1 x 1 convolution."""
  table = (
    (r'encoder\.conv_in\.', 'encoder.project_in.conv.'),
    (r'encoder\.conv_out\.', 'encoder.project_out.main.op_list.0.conv.'),
    (r'decoder\.conv_in\.', 'decoder.project_in.main.conv.'),
    (r'decoder\.norm_out\.', 'decoder.project_out.op_list.0.'),
    (r'decoder\.conv_out\.', 'decoder.project_out.op_list.2.conv.'),
    (r'\.(?:down|up)_blocks\.(\d+)\.(\d+)\.', r'.stages.\1.op_list.\2.'),
    (r'(op_list\.\d+)\.(conv[12])\.', r'\1.main.\2.conv.'),
    (r'(op_list\.\d+)\.norm\.', r'\1.main.conv2.norm.'),
    (r'(stages\.\d+\.op_list\.\d+)\.conv\.(weight|bias)', r'\1.main.conv.conv.\2'),
    (r'attn\.to_qkv_multiscale\.0\.proj_in', 'context_module.main.aggreg.0.0'),
    (r'attn\.to_qkv_multiscale\.0\.proj_out', 'context_module.main.aggreg.0.1'),
    (r'attn\.to_q\.', 'context_module.main.qkv.conv.'),
    (r'attn\.to_out\.', 'context_module.main.proj.conv.'),
    (r'attn\.norm_out\.', 'context_module.main.proj.norm.'),
    (r'(?<=\d\.)conv_out\.conv_(inverted|depth|point)\.', r'local_module.main.\1_conv.conv.'),
    (r'(?<=\d\.)conv_out\.norm\.', 'local_module.main.point_conv.norm.'),
  )
  found = {}
  for name, value in tensors.items():
    if re.search(r'\.to_[kv]\.', name):
      continue
    if '.to_q.' in name:
      value = np.concatenate([tensors[name.replace('to_q', f'to_{x}')] for x in 'qkv'])
    if re.search(r'\.to_(q|out)\.', name):
      value = value[:, :, None, None]
    for pattern, target in table:
      name = re.sub(pattern, target, name)
    found[name] = value
  return found


def test_mit_layout(golden):
  _, tensors, _ = golden
  mit = as_mit_writes(tensors)
  assert not any('blocks' in name or 'conv_in' in name or 'to_' in name for name in mit)
  config, params = load(tensors)
  same, again = load(mit)
  assert same == config
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_decoder_alone_and_controls():
  """Half of the parameters; q and v must not be confused; bfloat16 stays near."""
  options, tensors, inputs = read_golden('dcae_c_shuffle')
  config, params = load(tensors, options, 'decoder')
  whole = load(tensors, options)
  assert config == modeling.part_of(whole[0], 'decoder') and params.keys() == {'decoder'}
  jax.tree.map(np.testing.assert_array_equal, params['decoder'], whole[1]['decoder'])
  half = modules.bind_module(modeling.build_model, config, params)
  with pytest.raises(ConfigError, match=r'encoder=\(\)'):
    half.encode(jnp.zeros((1, 4, 4, 3)))
  bind = lambda params: modules.bind_module(modeling.build_model, config, params)
  decode = jax.jit(lambda params, x: bind(params).decode(x))
  latents = inputs['latents'].transpose(0, 2, 3, 1)
  want = decode(params, latents)
  low = decode(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), latents.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  assert np.abs(low - want).mean() < 0.05 * np.abs(want).mean()
  turn = {'to_q': 'to_v', 'to_v': 'to_q'}
  wrong = {re.sub(r'to_[qv]\b', lambda m: turn[m[0]], name): v for name, v in tensors.items()}
  assert np.abs(decode(load(wrong, options, 'decoder')[1], latents) - want).max() > 0.1


def test_what_is_wrong_is_said():
  options, tensors, _ = read_golden('dcae_a')
  with pytest.raises(ValueError, match='has no DC-AE: no .*decoder'):
    load({'x': np.zeros(1)})
  for said, message in (
    ({'_class_name': 'AutoencoderKL'}, "_class_name='AutoencoderKL': allowed is 'AutoencoderDC'"),
    ({'decoder_norm_types': 'layer_norm'}, "decoder_norm_types='layer_norm': allowed are batch_n"),
    ({'decoder_act_fns': 'gelu'}, "act='gelu': must be one of silu, relu"),
    ({'encoder_out_shortcut': False}, 'encoder_out_shortcut=False: allowed is True'),
  ):
    with pytest.raises(ConfigError, match=message):
      load(tensors, options | said)
  with pytest.raises(ValueError, match=r'unused by the model: quant_conv\.weight \(1,\)'):
    load(tensors | {'quant_conv.weight': np.zeros(1)}, options)
  with pytest.raises(ValueError, match=r'wanted by the model: decoder\.norm_out\.bias'):
    load({k: v for k, v in tensors.items() if k != 'decoder.norm_out.bias'}, options)
  whole = modules.bind_module(modeling.build_model, *load(tensors))
  with pytest.raises(ConfigError, match=r'image size=\(6, 4\): multiples of 4'):
    whole.encode(jnp.zeros((1, 6, 4, 3)))
  with pytest.raises(ConfigError, match='scaling_factor=None'):
    whole.scale_latents(1.0)


def test_inside_a_pipeline(tmp_path):
  """A pipeline's folder has it in `vae`; a folder of its own is opened as it is."""
  tensors = read_golden('dcae_a')[1]
  (tmp_path / 'vae').mkdir()
  write_weights(tmp_path / 'vae/diffusion_pytorch_model.safetensors', tensors)
  for place in (tmp_path, tmp_path / 'vae'):
    model = Pretrained('dcae', str(place), part='decoder')
    assert model.config == convert.config_of(source_of_arrays(tensors), 'decoder')
