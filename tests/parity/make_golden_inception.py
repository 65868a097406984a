"""Writes tests/golden/inception_a.npz: InceptionV3 of FID, thin and random, in plain torch.

    python tests/parity/make_golden_inception.py              # where the parity extra is
    python tests/parity/make_golden_inception.py compare      # and pytorch-fid, torch-fidelity

`Reference` is written down from the network's description alone, with the names of pytorch-fid; its
`state` grows as it runs, so on the device 'meta' it lists what a released file holds. It gives the
same numbers as the classes of pytorch-fid and torch-fidelity on the same weights: `compare`.
"""

import json
import sys
import tempfile
import time

import make_golden
import numpy as np
import reference
from reference import torch

F = torch.nn.functional


class Reference:
  """`__call__(x [R, 3, S, S])` -> {stage: array}, from `state` or, where it lacks a tensor, random
  ones; channels divided by `thinner`."""

  def __init__(self, thinner=1, classes=1008, seed=0, device='cpu'):
    self.thin, self.classes, self.state, self.device = thinner, classes, {}, device
    self.draw = torch.Generator().manual_seed(seed)

  def get(self, name, *shape, scale=0.2, around=0.0):
    if name not in self.state:
      value = torch.empty(shape, device='meta')
      if self.device != 'meta':
        value = (around + scale * torch.randn(shape, generator=self.draw)).bfloat16().float()
      self.state[name] = value
    return self.state[name]

  def conv(self, x, name, out, size, stride=1, pad=None):
    size = (size, size) if isinstance(size, int) else size
    pad = tuple((n - 1) // 2 for n in size) if pad is None else pad
    out, inner = -(-out // self.thin), x.shape[1]
    weight = self.get(
      f'{name}.conv.weight', out, inner, *size, scale=(2 / inner / size[0] / size[1]) ** 0.5
    )
    gain, shift = (
      self.get(f'{name}.bn.{k}', out, around=a) for k, a in (('weight', 1), ('bias', 0))
    )
    mean = self.get(f'{name}.bn.running_mean', out)
    spread = self.get(f'{name}.bn.running_var', out, scale=0.1, around=1.0)
    x = F.conv2d(x, weight, stride=stride, padding=pad)
    return F.relu(F.batch_norm(x, mean, spread, gain, shift, eps=1e-3))

  def pool(self, x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

  def a(self, x, n, pool):
    five = self.conv(self.conv(x, n + '.branch5x5_1', 48, 1), n + '.branch5x5_2', 64, 5)
    three = self.conv(x, n + '.branch3x3dbl_1', 64, 1)
    three = self.conv(three, n + '.branch3x3dbl_2', 96, 3)
    three = self.conv(three, n + '.branch3x3dbl_3', 96, 3)
    pooled = self.conv(self.pool(x), n + '.branch_pool', pool, 1)
    return torch.cat([self.conv(x, n + '.branch1x1', 64, 1), five, three, pooled], 1)

  def b(self, x, n):
    three = self.conv(x, n + '.branch3x3dbl_1', 64, 1)
    three = self.conv(three, n + '.branch3x3dbl_2', 96, 3)
    three = self.conv(three, n + '.branch3x3dbl_3', 96, 3, 2, 0)
    return torch.cat(
      [self.conv(x, n + '.branch3x3', 384, 3, 2, 0), three, F.max_pool2d(x, 3, 2)], 1
    )

  def c(self, x, n, c):
    seven = self.conv(x, n + '.branch7x7_1', c, 1)
    seven = self.conv(seven, n + '.branch7x7_2', c, (1, 7))
    seven = self.conv(seven, n + '.branch7x7_3', 192, (7, 1))
    twice = self.conv(x, n + '.branch7x7dbl_1', c, 1)
    twice = self.conv(twice, n + '.branch7x7dbl_2', c, (7, 1))
    twice = self.conv(twice, n + '.branch7x7dbl_3', c, (1, 7))
    twice = self.conv(twice, n + '.branch7x7dbl_4', c, (7, 1))
    twice = self.conv(twice, n + '.branch7x7dbl_5', 192, (1, 7))
    pooled = self.conv(self.pool(x), n + '.branch_pool', 192, 1)
    return torch.cat([self.conv(x, n + '.branch1x1', 192, 1), seven, twice, pooled], 1)

  def d(self, x, n):
    three = self.conv(self.conv(x, n + '.branch3x3_1', 192, 1), n + '.branch3x3_2', 320, 3, 2, 0)
    seven = self.conv(x, n + '.branch7x7x3_1', 192, 1)
    seven = self.conv(seven, n + '.branch7x7x3_2', 192, (1, 7))
    seven = self.conv(seven, n + '.branch7x7x3_3', 192, (7, 1))
    seven = self.conv(seven, n + '.branch7x7x3_4', 192, 3, 2, 0)
    return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

  def e(self, x, n, pooled):
    fork = lambda y, name: [
      self.conv(y, name + 'a', 384, (1, 3)),
      self.conv(y, name + 'b', 384, (3, 1)),
    ]
    three = fork(self.conv(x, n + '.branch3x3_1', 384, 1), n + '.branch3x3_2')
    twice = self.conv(self.conv(x, n + '.branch3x3dbl_1', 448, 1), n + '.branch3x3dbl_2', 384, 3)
    pooled = self.conv(pooled, n + '.branch_pool', 192, 1)
    first = self.conv(x, n + '.branch1x1', 320, 1)
    return torch.cat([first, *three, *fork(twice, n + '.branch3x3dbl_3'), pooled], 1)

  def __call__(self, x):
    found = {}
    x = self.conv(x, 'Conv2d_1a_3x3', 32, 3, 2, 0)
    x = self.conv(x, 'Conv2d_2a_3x3', 32, 3, 1, 0)
    x = F.max_pool2d(self.conv(x, 'Conv2d_2b_3x3', 64, 3), 3, 2)
    found['Conv2d_2b_3x3'] = x
    x = self.conv(self.conv(x, 'Conv2d_3b_1x1', 80, 1), 'Conv2d_4a_3x3', 192, 3, 1, 0)
    x = found['Conv2d_4a_3x3'] = F.max_pool2d(x, 3, 2)
    for name, pool in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
      x = found[name] = self.a(x, name, pool)
    x = found['Mixed_6a'] = self.b(x, 'Mixed_6a')
    for name, c in (('Mixed_6b', 128), ('Mixed_6c', 160), ('Mixed_6d', 160), ('Mixed_6e', 192)):
      x = found[name] = self.c(x, name, c)
    x = found['Mixed_7a'] = self.d(x, 'Mixed_7a')
    x = found['Mixed_7b'] = self.e(x, 'Mixed_7b', self.pool(x))
    x = found['Mixed_7c'] = self.e(x, 'Mixed_7c', F.max_pool2d(x, 3, 1, 1))
    x = found['features'] = x.mean((2, 3))
    weight = self.get('fc.weight', self.classes, x.shape[1], scale=0.5)
    self.get('fc.bias', self.classes)
    found['logits'] = x @ weight.T
    return found


def resized(x, side, preprocessing):
  """Pictures `[R, 3, H, W]` in [0, 1] as the network sees them; TensorFlow's way in plain loops."""
  if preprocessing == 'pytorch_fid':
    return 2 * F.interpolate(x, size=(side, side), mode='bilinear', align_corners=False) - 1
  out = 255 * x
  for axis in (2, 3):
    old, rows = out.shape[axis], []
    for i in range(side):
      at = i * old / side
      low, high = int(at), min(int(at) + 1, old - 1)
      rows.append((1 - at + low) * out.select(axis, low) + (at - low) * out.select(axis, high))
    out = torch.stack(rows, axis)
  return (out - 128) / 128


def inception():
  """(config, inputs, outputs before, outputs after a change of all weights by 1e-6)."""
  made = Reference(thinner=64, classes=7, seed=3)
  pictures = np.random.default_rng(4).integers(0, 256, (2, 30, 23, 3), np.uint8)
  x = torch.from_numpy(reference.nchw(pictures)).float() / 255

  def outputs():
    seen = {k: resized(x, 139, k) for k in ('pytorch_fid', 'tensorflow')}
    found = made(seen['pytorch_fid'])
    grids = {f'mean_{k}': v.mean((2, 3)) for k, v in found.items() if v.ndim == 4}
    shown = {f'seen_{k}': v[:, :, ::9, ::9].permute(0, 2, 3, 1) for k, v in seen.items()}
    whole = {**shown, **grids, 'features': found['features'], 'logits': found['logits']}
    return {k: v.numpy().copy() for k, v in whole.items()}

  before = outputs()
  state = {k: v.numpy().copy() for k, v in made.state.items()}
  for value in made.state.values():
    value.mul_(1 + 1e-6 * torch.randn(value.shape))
  names = [[k, list(v.shape)] for k, v in state.items()]
  config = {'model': 'inception', 'options': {'thinner': 64, 'side': 139}, 'names': names}
  flat = np.concatenate([v.ravel() for v in state.values()])
  return config, flat, pictures, before, outputs()


def compare():
  """Prints the differences to the two packages at full size and the time of a batch of 8."""
  import jax
  from pytorch_fid import inception as fid
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  from vtts_jax.checkpoints.source import source_of_arrays
  from vtts_jax.models import modules
  from vtts_jax.models.inception import convert, modeling

  made, pixels = Reference(seed=1), np.random.default_rng(0).integers(0, 256, (2, 200, 256, 3))
  x = torch.from_numpy(reference.nchw(pixels)).float() / 255
  want = {how: made(resized(x, 299, how)) for how in modeling.PREPROCESSINGS}
  fid.load_state_dict_from_url = lambda *args, **options: made.state
  theirs = fid.InceptionV3().eval()
  with tempfile.TemporaryDirectory() as folder:
    torch.save(made.state, f'{folder}/state.pth')
    wanted = ['2048', 'logits_unbiased']
    other = FeatureExtractorInceptionV3('inception', wanted, f'{folder}/state.pth')
  gap = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max())
  with torch.no_grad():
    print('pytorch-fid', gap(theirs(x)[0][:, :, 0, 0], want['pytorch_fid']['features']))
    features, logits = other(torch.from_numpy(reference.nchw(pixels).astype(np.uint8)))
  print('torch-fidelity', gap(features, want['tensorflow']['features']), 'logits',
        gap(logits, want['tensorflow']['logits']), 'of', logits.std().item())  # fmt: skip
  held = other.state_dict()
  names = {k: v.shape for k, v in held.items() if 'num_batches' not in k}
  print(len(held), 'names, the same:', names == {k: v.shape for k, v in made.state.items()})
  source = source_of_arrays({k: v.numpy() for k, v in made.state.items()})
  config = convert.config_of(source)
  graphdef, params = modules.split_module(reference.bind_port(convert, modeling, source))
  run = jax.jit(lambda p, x: modules.bind_graph(graphdef, p)(modeling.preprocess(config, x)))
  shown = pixels.astype(np.float32) / 255
  print('ours', gap(run(params, shown), want['pytorch_fid']['features']))
  batch = np.random.default_rng(2).random((8, 299, 299, 3), np.float32)
  turned = torch.from_numpy(reference.nchw(batch))
  times = {'ours': [], 'pytorch-fid': []}
  for _ in range(6):  # the first of ours compiles
    start = time.perf_counter()
    run(params, batch).block_until_ready()
    between = time.perf_counter()
    with torch.no_grad():
      theirs(turned)
    times['ours'].append(between - start)
    times['pytorch-fid'].append(time.perf_counter() - between)
  print('seconds for 8:', {k: round(min(v), 2) for k, v in times.items()})


if __name__ == '__main__':
  torch.manual_seed(0)
  if sys.argv[1:] == ['compare']:
    compare()
    sys.exit()
  config, flat, pictures, before, after = inception()
  np.savez_compressed(
    make_golden.FOLDER / 'inception_a.npz',
    **{'config': json.dumps(config), 'params/flat': flat, 'in/pictures': pictures},
    **{f'out/{k}': v for k, v in before.items()},
  )
  numbers = {k: float(np.abs(after[k] - before[k]).max()) for k in before}
  make_golden.add({'inception_a.npz': numbers})
