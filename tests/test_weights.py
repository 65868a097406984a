"""Checkpoints become parameters: sources, key rules, one clear error for each way to be wrong."""

import json
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from vtts_jax.checkpoints.cache import convert_with_cache
from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.files import read_metadata, read_weights, write_weights
from vtts_jax.checkpoints.source import (
  Source,
  name_pipeline_part,
  open_pipeline_part,
  open_source,
  read_config,
  source_of_arrays,
)
from vtts_jax.models import modules

RULES = [
  (r'layer\.(\d+)\.weight', r'layers.\1.kernel', 'T'),
  (r'layer\.(\d+)\.bias', r'layers.\1.bias', ''),
  (r'conv\.weight', 'conv.kernel', 'conv'),
  (r'up\.weight', 'up.kernel', 'convT'),
  (r'tied\.(a|b)', 'table', lambda x: 2 * x),
  (r'count', 'count', ''),
  (r'train\..*', None, ''),
]


class Toy(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs) for _ in range(2)])
    self.conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
    self.up = nnx.ConvTranspose(2, 4, (3, 3), use_bias=False, rngs=rngs)
    self.table = nnx.Param(jnp.zeros((5, 2)))
    self.count = nnx.Variable(jnp.zeros((), jnp.int32))


def tensors():
  """The checkpoint in torch's layout; `train.` is knowingly left."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(5, 2))
  new = {
    'conv.weight': rng.normal(size=(4, 2, 3, 3)),
    'up.weight': rng.normal(size=(2, 4, 3, 3)),
    'tied.a': table,
    'tied.b': table,
    'train.step': np.zeros(3),
  }
  for i in range(2):
    new[f'layer.{i}.weight'] = rng.normal(size=(6, 4))
    new[f'layer.{i}.bias'] = rng.normal(size=6)
  new = {k: v.astype(np.float32) for k, v in new.items()}
  return new | {'count': np.array(7)}


@pytest.fixture(scope='module')
def template():
  return modules.abstract_module(lambda: Toy(nnx.Rngs(0)))[1]


def shards(folder, values, stem='model'):
  """Two files and their index, as transformers writes them."""
  os.makedirs(folder, exist_ok=True)
  names, index = sorted(values), {}
  for i, part in enumerate((names[:4], names[4:])):
    file = f'{stem}-0000{i + 1}-of-00002.safetensors'
    save_file({k: values[k] for k in part}, os.path.join(folder, file), metadata={'format': 'pt'})
    index |= dict.fromkeys(part, file)
  with open(os.path.join(folder, f'{stem}.safetensors.index.json'), 'w') as handle:
    json.dump({'metadata': {}, 'weight_map': index}, handle)
  return folder


def check(params, values):
  for i in range(2):
    np.testing.assert_array_equal(params['layers'][i]['kernel'], values[f'layer.{i}.weight'].T)
    np.testing.assert_array_equal(params['layers'][i]['bias'], values[f'layer.{i}.bias'])
  np.testing.assert_array_equal(
    params['conv']['kernel'], values['conv.weight'].transpose(2, 3, 1, 0)
  )
  np.testing.assert_array_equal(params['up']['kernel'], values['up.weight'].transpose(2, 3, 0, 1))
  np.testing.assert_array_equal(params['table'], 2 * values['tied.a'])
  assert params['count'] == 7 and params['count'].dtype == jnp.int32


def test_shards_and_single_file_give_the_same(tmp_path, template):
  values = tensors()
  check(convert_weights(source_of_arrays(values), RULES, template), values)
  source = open_source(shards(tmp_path / 'shards', values))
  assert sorted(source.tensor_names()) == sorted(values) and source.config == {}
  check(convert_weights(source, RULES, template), values)
  save_file(values, tmp_path / 'one.safetensors')
  one = open_source(tmp_path / 'one.safetensors')
  check(convert_weights(one, RULES, template), values)


def test_dtype_touches_floats_only(template):
  params = convert_weights(source_of_arrays(tensors()), RULES, template, jnp.bfloat16)
  assert params['table'].dtype == jnp.bfloat16 and params['count'].dtype == jnp.int32


def test_bfloat16_file(tmp_path, template):
  values = {k: v.astype(jnp.bfloat16) if v.dtype == np.float32 else v for k, v in tensors().items()}
  source = open_source(shards(tmp_path, values))
  assert source.header['tied.a'] == ((5, 2), 'bfloat16')
  params = convert_weights(source, RULES, template)
  assert params['table'].dtype == jnp.float32
  check(params, {k: v.astype(np.float32) if k != 'count' else v for k, v in values.items()})



@pytest.mark.parametrize('kind', [np.float32, np.float16, jnp.bfloat16])
def test_weights_with_nan_are_refused_by_name(template, kind):
  values = tensors()
  values['conv.weight'] = values['conv.weight'].astype(kind)
  values['conv.weight'][1, 0, 2, 2] = np.nan
  with pytest.raises(ValueError, match=r'conv\.weight holds NaN'):
    convert_weights(source_of_arrays(values), RULES, template)


def test_one_tensor_at_a_time(template):
  values, alive, most = tensors(), [], 0

  def read(name):
    nonlocal most
    most = max(most, sum(ref() is not None for ref in alive))
    new = values[name].copy()
    alive.append(weakref.ref(new))
    return new

  source = Source('spy', source_of_arrays(values).header, read)
  convert_weights(source, RULES, template, jnp.bfloat16)
  assert len(alive) == len(values) - 1  # `train.step` is never read
  assert most <= 1


# ------------------------------------------------------------------------------------------- errors


def broken(**changes):
  values = tensors() | changes
  return source_of_arrays({k: v for k, v in values.items() if v is not None})


@pytest.mark.parametrize(
  ('changes', 'say'),
  [
    ({'layer.1.bias': None}, 'missing from the checkpoint, wanted by the model: layers.1.bias'),
    ({'extra': np.zeros(2)}, r'in the checkpoint, unused by the model: extra \(2,\)'),
    ({'layer.2.bias': np.zeros(6)}, r'layer.2.bias \(6,\), for layers.2.bias, which the model'),
    (
      {'layer.0.weight': np.zeros((4, 6), 'f')},
      r"layer.0.weight: .* shape \(4, 6\), \(6, 4\) after 'T', .* wants \(4, 6\)",
    ),
    ({'layer.0.bias': np.zeros(6, int)}, 'layer.0.bias: .* dtype int64, .* wants float32'),
    ({'count': np.zeros((), 'f')}, 'count: .* dtype float32, .* wants int32'),
    ({'tied.b': np.zeros((5, 2), 'f')}, 'tied.a and tied.b both go to table and differ'),
    ({'tied.b': None, 'tied.a': np.zeros((2, 5), 'f')}, r'tied.a: .* shape \(2, 5\), table'),
  ],
)
def test_what_does_not_fit(template, changes, say):
  with pytest.raises(ValueError, match=say):
    convert_weights(broken(**changes), RULES, template)


def test_both_sides_are_listed_and_nothing_is_read(template):
  values = {'encoder.w': np.zeros(2), 'layer.0.bias': np.zeros(6)}
  source = Source('other.safetensors', source_of_arrays(values).header, None)
  with pytest.raises(ValueError, match='looks like another model') as error:
    convert_weights(source, RULES, template)
  for name in ('other.safetensors', 'encoder.w', 'conv.kernel', 'table', 'layers.1.kernel'):
    assert name in str(error.value)


def test_truncated_file(tmp_path):
  path = tmp_path / 'model.safetensors'
  save_file(tensors(), path)
  whole = path.read_bytes()
  for size in (len(whole) - 8, 40, 3):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'model.safetensors.* is truncated or no safetensors'):
      open_source(tmp_path)


def test_unknown_dtype(tmp_path):
  header = json.dumps({'x': {'dtype': 'F8_E4M3', 'shape': [2], 'data_offsets': [0, 2]}}).encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(2))
  with pytest.raises(ValueError, match='x has dtype F8_E4M3; allowed are F64, F32'):
    open_source(path)


def test_missing_shard_and_broken_index(tmp_path):
  shards(tmp_path, tensors())
  second = tmp_path / 'model-00002-of-00002.safetensors'
  save_file({'count': np.zeros(())}, second)
  with pytest.raises(ValueError, match='shards do not hold: count, layer.1.bias'):
    open_source(tmp_path)
  second.unlink()
  with pytest.raises(FileNotFoundError, match='1 of 2 shards are missing: model-00002-of-00002'):
    open_source(tmp_path)
  (tmp_path / 'model.safetensors.index.json').unlink()
  with pytest.raises(FileNotFoundError, match='shards but no .*index.json'):
    open_source(tmp_path)


def test_folders_without_weights(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file or folder'):
    open_source(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match='has no .*safetensors'):
    open_source(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x04')
  with pytest.raises(FileNotFoundError, match='pickles are never loaded'):
    open_source(tmp_path)
  with pytest.raises(ValueError, match='pickles are never loaded'):
    open_source(tmp_path / 'pytorch_model.bin')
  for name in 'ab':
    save_file({'x': np.zeros(1)}, tmp_path / f'{name}.safetensors')
  with pytest.raises(ValueError, match='name one: a.safetensors, b.safetensors'):
    open_source(tmp_path)
  assert open_source(tmp_path, file='b.safetensors').tensor_names() == ['x']
  save_file({'y': np.zeros(1)}, tmp_path / 'diffusion_pytorch_model.safetensors')
  save_file({'z': np.zeros(1)}, tmp_path / 'diffusion_pytorch_model.fp16.safetensors')
  assert open_source(tmp_path).tensor_names() == ['y']


# ------------------------------------------------------------------------------------------- config


def test_config_beside_and_inside(tmp_path):
  (tmp_path / 'config.json').write_text('{"depth": 3, "deep": {"width": 8}}')
  said = {'format': 'pt', 'width': '5', 'model': "{'heads': 2, 'none': None}", 'note': 'a: b'}
  save_file({'x': np.zeros(1)}, tmp_path / 'model.safetensors', metadata=said)
  source = open_source(tmp_path)
  assert source.config == {
    'depth': 3, 'deep': {'width': 8}, 'width': 5, 'model': {'heads': 2, 'none': None},
    'note': 'a: b',
  }  # fmt: skip
  assert source.find_option('width') == 5 and source.find_option('size', 'heads') == 2
  assert source.find_option('none', default=1) == 1
  (tmp_path / 'config.yaml').write_text('depth: 4\nnorm: {eps: 1.0e-6}\n')
  source = open_source(tmp_path)
  assert source.find_option('depth') == 4 and source.find_option('eps') == 1e-6
  assert source.select_prefix('x').config == {}


@pytest.mark.parametrize(
  ('name', 'text', 'say'),
  [
    ('config.json', '{', 'does not parse'),
    ('config.yaml', 'a: [', 'does not parse'),
    ('config.yaml', '!!python/object/apply:os.getcwd []', 'does not parse'),
    ('config.yaml', '- 1', 'a mapping is needed'),
  ],
)
def test_bad_config(tmp_path, name, text, say):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=say):
    read_config(tmp_path)


# ---------------------------------------------------------------------------------------------- hub


def hub(root, repo, commit, ref='main'):
  """A repository in the layout of the hub's local cache."""
  base = root / f'models--{repo.replace("/", "--")}'
  (base / 'refs').mkdir(parents=True, exist_ok=True)
  (base / 'refs' / ref).write_text(commit)
  return base / 'snapshots' / commit


def test_hub_from_the_local_cache_without_a_network(tmp_path, template, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  values, commit = tensors(), 'a' * 40
  folder = hub(tmp_path, 'owner/toy', commit)
  shards(folder / 'vae', values)
  save_file({'x': np.zeros(1)}, folder / 'model.safetensors')
  for place, options in (
    (f'owner/toy@{commit}', {}),
    ('owner/toy', {'revision': commit}),
    ('owner/toy', {}),
  ):
    source = open_source(place, subfolder='vae', **options)
    assert source.identity == f'owner/toy@{commit}'
    check(convert_weights(source, RULES, template), values)
  # a model of a pipeline: by the folder's name, or because the family knows where it lies
  for source in (
    open_source(f'owner/toy/vae@{commit}'),
    open_source(name_pipeline_part(f'owner/toy@{commit}', 'vae')),
    open_pipeline_part('owner/toy', 'vae'),
    open_pipeline_part('owner/toy/vae', 'vae'),
    open_pipeline_part(str(folder), 'vae'),
  ):
    check(convert_weights(source, RULES, template), values)
  assert open_pipeline_part('owner/toy', 'transformer').tensor_names() == ['x']
  assert name_pipeline_part('random:tiny', 'vae') == 'random:tiny'
  assert name_pipeline_part('owner/toy/ae.safetensors@v1', 'vae') == ''
  assert open_source('owner/toy').tensor_names() == ['x']
  save_file({'y': np.zeros(1)}, folder / 'ae.safetensors')
  assert open_source('owner/toy', file='ae.safetensors').tensor_names() == ['y']
  assert open_source(f'owner/toy/ae.safetensors@{commit}').tensor_names() == ['y']
  with pytest.raises(FileNotFoundError, match=r'owner/toy@v2.*not in the local hub cache'):
    open_source('owner/toy@v2')
  with pytest.raises(FileNotFoundError, match='owner/other'):
    open_source('owner/other')


def test_hub_downloads_what_the_cache_lacks(tmp_path, monkeypatch):
  import huggingface_hub

  asked = []

  def download(name, *, revision, allow_patterns, local_files_only=False):
    asked.append((name, revision, local_files_only, tuple(allow_patterns)))
    folder = tmp_path / ('b' * 40)
    folder.mkdir(exist_ok=True)
    if local_files_only:  # an earlier visit left the config alone
      return str(folder)
    save_file({'x': np.zeros(1)}, folder / 'model.safetensors')
    return str(folder)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert open_source('owner/toy@v1').identity == f'owner/toy@{"b" * 40}'
  assert [a[:3] for a in asked] == [('owner/toy', 'v1', True), ('owner/toy', 'v1', False)]
  assert not any(p.endswith(('.bin', '.pt')) for p in asked[1][3])


# -------------------------------------------------------------------------------------------- cache


def test_cached_copy(tmp_path, template):
  values = tensors()
  path = tmp_path / 'model.safetensors'
  save_file(values, path)
  keep = tmp_path / 'kept'
  check(convert_with_cache(keep, open_source(path), RULES, template), values)
  assert len(os.listdir(keep)) == 1
  source = open_source(path)
  blind = Source(source.where, source.header, None, identity=source.identity)
  check(convert_with_cache(keep, blind, RULES, template), values)  # nothing is read again
  half = convert_with_cache(keep, source, RULES, template, jnp.bfloat16)
  assert half['table'].dtype == jnp.bfloat16 and len(os.listdir(keep)) == 2
  values['layer.0.bias'] = values['layer.0.bias'] + 1
  save_file(values, path)
  os.utime(path, ns=(1, 1))
  check(convert_with_cache(keep, open_source(path), RULES, template), values)
  with pytest.raises(ValueError, match='no identity'):
    convert_with_cache(keep, source_of_arrays(values), RULES, template)


SHARDED = """
import jax, numpy as np, sys
from jax.sharding import PartitionSpec as P
from flax import nnx
sys.path.insert(0, sys.argv[1])
import test_weights as t
from vtts_jax.checkpoints.cache import convert_with_cache
from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import open_source
from vtts_jax.engine import sharding
from vtts_jax.models import modules
template = modules.abstract_module(lambda: t.Toy(nnx.Rngs(0)))[1]
values = t.tensors()
source = open_source(sys.argv[2])
for model in (2, 1):  # kept under one layout, loaded under two
  mesh = sharding.make_mesh(model)
  places = modules.shardings_by_rule(template, mesh, [(r'layers/.*kernel', P('data', 'model'))])
  for new in (
    convert_weights(source, t.RULES, template, sharding=places),
    convert_with_cache(sys.argv[3], source, t.RULES, template, sharding=places),
  ):
    t.check(new, values)
    kernel = new['layers'][1]['kernel']
    assert kernel.sharding == places['layers'][1]['kernel']
    assert kernel.addressable_shards[0].data.shape == (4 // (4 // model), 6 // model)
"""


def test_any_sharding(tmp_path):
  shards(tmp_path / 'model', tensors())
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  command = [sys.executable, '-c', SHARDED, os.path.dirname(__file__)]
  command += [str(tmp_path / 'model'), str(tmp_path / 'kept')]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]


# -------------------------------------------------------------------------------- our own files


def test_save_and_load(tmp_path):
  _, params = modules.split_module(Toy(nnx.Rngs(0)))
  path = str(tmp_path / 'x.safetensors')
  write_weights(path, params, {'config': {'a': 1}}, jnp.float16)
  assert read_metadata(path) == {'config': '{"a": 1}'}
  back = read_weights(path, params)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  np.testing.assert_allclose(back['conv']['kernel'], params['conv']['kernel'], atol=1e-3)
  with pytest.raises(ValueError, match='missing from the file: extra'):
    read_weights(path, params | {'extra': jnp.zeros(1)})
