"""InceptionV3 stage by stage against plain torch convolutions, written down independently."""

import re

import jax
import make_golden_inception as golden
import numpy as np
import pytest
import reference
from reference import torch

from vtts_jax.checkpoints.files import flatten_tree
from vtts_jax.checkpoints.source import Source, source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.inception import convert, modeling

CLOSE = {'atol': 1e-4, 'rtol': 1e-4}


def test_every_stage():
  theirs = golden.Reference(thinner=16, classes=9, seed=1)
  x = np.random.default_rng(0).normal(size=(3, 155, 155, 3)).astype(np.float32)
  want = theirs(torch.from_numpy(reference.nchw(x)))
  source = source_of_arrays({k: v.numpy() for k, v in theirs.state.items()})
  model = reference.bind_port(convert, modeling, source, side=155)
  graphdef, params = modules.split_module(model)
  have = jax.jit(lambda p, x: modules.bind_graph(graphdef, p).stage_grids(x))(params, x)
  assert set(have) | {'features', 'logits'} == set(want)
  for name, grid in have.items():
    print(name, np.abs(reference.nchw(grid) - want[name].numpy()).max(), want[name].std().item())
    np.testing.assert_allclose(reference.nchw(grid), want[name], **CLOSE, err_msg=name)
  features = model(x)
  np.testing.assert_allclose(features, want['features'], **CLOSE)
  np.testing.assert_allclose(model.class_logits(features), want['logits'], **CLOSE)


def test_released_names_and_counts():
  """Every tensor of the released file is used or knowingly left, and all of ours are filled."""
  theirs = golden.Reference(device='meta')
  theirs(torch.empty((1, 3, 299, 299), device='meta'))
  header = {k: (tuple(v.shape), 'float32') for k, v in theirs.state.items()}
  norms = [n.removesuffix('.weight') for n in header if n.endswith('.bn.weight')]
  assert len(norms) == 94
  source = Source('released', header, lambda name: None)
  assert convert.config_of(source) == modeling.SIZES['inception_2015_12_05']
  counters = {f'{n}.num_batches_tracked': ((), 'int64') for n in norms}
  source = Source('released', header | counters, lambda name: None)
  whole = convert.fold_batch_norms(source)
  _, template = modules.abstract_module(lambda: modeling.build_model(modeling.Config()))
  want = flatten_tree(template)
  found = {}
  for name in whole.tensor_names():
    pattern, target, op = next(r for r in convert.RULES if re.fullmatch(r[0], name))
    shape = whole.shape_of(name)
    found[re.fullmatch(pattern, name).expand(target)] = shape[::-1] if op else shape
  assert found == {k: v.shape for k, v in want.items()}
  learned = [v for k, v in theirs.state.items() if 'running' not in k]
  shifts = sum(v.numel() for k, v in theirs.state.items() if k.endswith('.bn.weight'))
  count = sum(v.numel() for v in learned)
  assert count == 23_850_960  # as of torchvision's class with 1008 outputs and no second head
  assert sum(int(np.prod(v.shape)) for v in want.values()) == count - shifts


@pytest.mark.parametrize('preprocessing', modeling.PREPROCESSINGS)
@pytest.mark.parametrize('shape', [(64, 64), (299, 299), (400, 256), (150, 301)])
def test_preprocessing(shape, preprocessing):
  pixels = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), np.uint8)
  x = torch.from_numpy(reference.nchw(pixels)).float() / 255
  want = reference.nhwc(golden.resized(x, 299, preprocessing))
  have = modeling.preprocess(modeling.Config(), pixels.astype(np.float32) / 255, preprocessing)
  np.testing.assert_allclose(have, want, atol=1e-4)
