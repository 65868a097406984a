"""CycleReward: what differs from ImageReward; its golden file is in test_replay.py."""

import pathlib

import numpy as np
import pytest

from vtts_jax import components
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.blip import convert, modeling
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
GOLDEN = pathlib.Path(__file__).parent / 'golden/cyclereward_a.npz'
PICTURES = np.random.default_rng(0).random((2, 3, 36, 40, 3), np.float32)


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    return {k: file[k] for k in file.files}


def test_released_size():
  _, params = modules.structure_of(modeling.build_model, modeling.SIZES['cycle_reward'])
  assert modules.count_parameters(params) == 446_206_689


def test_head(golden):
  """The head's numbers tell the two models apart; activations and standardisation are seen."""
  tensors = {k[7:]: v for k, v in golden.items() if k.startswith('params/')}
  source = source_of_arrays(tensors, {}, 'here')
  config = convert.config_of(source)
  assert (config.length, config.head_act, config.mean, config.std) == (16, 'gelu', 0, 1)
  head = convert.load_weights(source, config)['head']
  first, want = golden['out/cls_hidden'], golden['out/score'][:, 0]

  def reward(**changes):
    changed = modeling.dataclasses.replace(config, **changes)
    model = modules.bind_module(modeling.build_model, config, params | {'head': head})
    model.config = changed
    return np.abs(model.predict_reward(first) - want).max()

  params = convert.load_weights(source, config)
  assert reward() < 1e-4
  assert reward(head_act='') > 1 and reward(mean=modeling.MEAN, std=modeling.STD) > 0.1
  # ImageReward's numbers: dropouts stand between, and the last layer is the seventh
  numbers = {'4': '3', '6': '5', '8': '7'}
  renamed = {
    '.'.join([*k.split('.')[:2], numbers.get(k.split('.')[2], k.split('.')[2]), k.split('.')[3]])
    if k.startswith('mlp.') else k: v for k, v in tensors.items()
  }  # fmt: skip
  assert convert.config_of(source_of_arrays(renamed)).head_act == ''


def test_verifier():
  ver = components.load('verifiers.cyclereward', weights='random:tiny_cycle')
  assert ver.names == ('cyclereward_combo_blip_l_tiny_cycle_random',)
  laws.check_verifier(ver, ['a red cat', 'two dogs'], {'image': PICTURES})


def test_what_is_wrong_is_said(tmp_path):
  with pytest.raises(ConfigError, match="verifier.variant='both': must be one of combo, i2t, t2i"):
    components.load('verifiers.cyclereward', variant='both')
  with pytest.raises(ConfigError, match="weights='random:tiny': is an ImageReward"):
    components.load('verifiers.cyclereward', weights='random:tiny').check()


def test_a_file(tmp_path, golden):
  path = str(tmp_path / 'CycleReward-I2T.safetensors')
  write_weights(path, {k[7:]: v for k, v in golden.items() if k.startswith('params/')}, {})
  ver = components.load('verifiers.cyclereward', weights=path, variant='i2t')
  ver.check()
  assert ver.names == ('cyclereward_i2t_blip_l',) and ver.model_part.config.length == 16
