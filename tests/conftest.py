"""Tests compile many tiny programs: LLVM's lowest optimisation level and XLA's older CPU emitters
compile them three times as fast, and the workers of a run share what they have compiled."""

import os
import pathlib
import tempfile

import jaxlib.version
import numpy as np
import pytest

FLAGS = ['--xla_backend_optimization_level=0']
if jaxlib.version.__version_info__[:2] == (0, 10):  # an unknown flag ends the process
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
given = os.environ.get('XLA_FLAGS', '')
os.environ['XLA_FLAGS'] = ' '.join([given, *(f for f in FLAGS if f.split('=')[0] not in given)])


def pytest_configure(config):
  """One compilation cache for all workers of a run, gone with it."""
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  # xdist gives the controller's environment to its workers, which find the folder there
  folder = tempfile.TemporaryDirectory(prefix='vtts-tests-')
  config.add_cleanup(folder.cleanup)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(folder.name))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


@pytest.fixture(scope='module')
def host_weights():
  """Random weights drawn by numpy: the initialisers of a generator's models compile for seconds."""
  # after the flags above
  import jax
  import jax.numpy as jnp

  from vtts_jax.models import modules

  def draw_parameters(build, config, dtype):
    rng = np.random.default_rng(0)

    def draw_leaf(path, leaf):
      if path[-1].key in ('scale', 'weight'):  # of norms
        return jnp.ones(leaf.shape, dtype)
      inputs = leaf.shape[-2] if leaf.ndim > 1 else 16
      return jnp.asarray(rng.normal(0, inputs**-0.5, leaf.shape), dtype)

    _, template = modules.structure_of(build, config)
    return jax.tree_util.tree_map_with_path(draw_leaf, template)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(modules, 'random_parameters', draw_parameters)
    yield
