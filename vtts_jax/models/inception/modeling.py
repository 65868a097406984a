"""InceptionV3 of 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567), the network of FID and IS.

This is the TensorFlow graph that both metrics were published with, in the layout of its port to
torch (pytorch-fid): average pools do not count their padding, the last block pools by maximum, and
there are 1008 classes. Features are the mean over the last grid. Class probabilities are the
softmax without the bias, as the Inception Score was published (Salimans et al. 2016) and as ADM's
evaluator and torch-fidelity compute it; pytorch-fid computes none. Batch norms are folded into the
convolutions when a checkpoint is read. Checked against torch convolutions (tests/parity).

Letters: R rows · H W C image or grid · D features · K classes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import quantize_pixels
from vtts_jax.models import modules

# A block is a tuple of branches, and a branch is a chain of pools and convolutions (name, channels,
# kernel, stride = 1). A tuple of convolutions in a chain is a fork: they read the same grid, and
# their results are put side by side. Convolutions of stride 2 have no padding.


def _inception_a(pool):
  return (
    (('branch1x1', 64, 1),),
    (('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)),
    (('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3)),
    ('mean', ('branch_pool', pool, 1)),
  )


def _inception_c(c):
  row, column = (1, 7), (7, 1)
  return (
    (('branch1x1', 192, 1),),
    (('branch7x7_1', c, 1), ('branch7x7_2', c, row), ('branch7x7_3', 192, column)),
    (('branch7x7dbl_1', c, 1), ('branch7x7dbl_2', c, column), ('branch7x7dbl_3', c, row),
     ('branch7x7dbl_4', c, column), ('branch7x7dbl_5', 192, row)),
    ('mean', ('branch_pool', 192, 1)),
  )  # fmt: skip


def _inception_e(pool):
  def fork(name):
    return (name + 'a', 384, (1, 3)), (name + 'b', 384, (3, 1))

  return (
    (('branch1x1', 320, 1),),
    (('branch3x3_1', 384, 1), fork('branch3x3_2')),
    (('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3), fork('branch3x3dbl_3')),
    (pool, ('branch_pool', 192, 1)),
  )


BLOCKS = {
  'Mixed_5b': _inception_a(32),
  'Mixed_5c': _inception_a(64),
  'Mixed_5d': _inception_a(64),
  'Mixed_6a': (
    (('branch3x3', 384, 3, 2),),
    (('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3, 2)),
    ('halve',),
  ),
  'Mixed_6b': _inception_c(128),
  'Mixed_6c': _inception_c(160),
  'Mixed_6d': _inception_c(160),
  'Mixed_6e': _inception_c(192),
  'Mixed_7a': (
    (('branch3x3_1', 192, 1), ('branch3x3_2', 320, 3, 2)),
    (('branch7x7x3_1', 192, 1), ('branch7x7x3_2', 192, (1, 7)), ('branch7x7x3_3', 192, (7, 1)),
     ('branch7x7x3_4', 192, 3, 2)),
    ('halve',),
  ),
  'Mixed_7b': _inception_e('mean'),
  'Mixed_7c': _inception_e('largest'),
}  # fmt: skip
# (name, channels, kernel, stride, padding); pools by maximum follow the third and the fifth
STEM = (
  ('Conv2d_1a_3x3', 32, 3, 2, 'VALID'),
  ('Conv2d_2a_3x3', 32, 3, 1, 'VALID'),
  ('Conv2d_2b_3x3', 64, 3, 1, 'SAME'),
  ('Conv2d_3b_1x1', 80, 1, 1, 'VALID'),
  ('Conv2d_4a_3x3', 192, 3, 1, 'VALID'),
)
# the two that published numbers were computed with
PREPROCESSINGS = ('pytorch_fid', 'tensorflow')


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    side: side of the picture that the network sees.
    classes: K; the first output and the last 7 are no classes of ImageNet.
    thinner: every number of channels is divided by this and rounded up; 1 except in tests.

  Raises:
    ConfigError: a side too small for the network's strides.
  """

  side: int = 299
  classes: int = 1008
  thinner: int = 1

  def __post_init__(self):
    if self.side < 75:
      raise ConfigError(f'side={self.side}: at least 75, where the last grid is 1 x 1')

  def thin_channels(self, number):
    """Returns the channels of a network thinned by `thinner`."""
    return -(-number // self.thinner)


SIZES = {
  'tiny': Config(side=75, classes=12, thinner=16),
  'inception_2015_12_05': Config(side=299, classes=1008),
}


class Conv(nnx.Module):
  """A convolution of `[R, H, W, C]` with a bias, then relu."""

  def __init__(self, inner, outer, size, stride=1, padding=''):
    self.stride = stride
    self.padding = padding or ('SAME' if stride == 1 else 'VALID')
    size = (size, size) if isinstance(size, int) else size
    self.kernel = nnx.Param(jnp.zeros((*size, inner, outer)))
    self.bias = nnx.Param(jnp.zeros(outer))

  def __call__(self, x):
    kernel = self.kernel[...]
    # on a CPU a matmul takes half the time of a 1 x 1 convolution
    if kernel.shape[:2] == (1, 1):
      x = x @ kernel[0, 0]
    else:
      x = jax.lax.conv_general_dilated(
        x, kernel, (self.stride, self.stride), self.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )  # fmt: skip
    return jax.nn.relu(x + self.bias[...])


def _reduce_windows(x, combine, stride, edge=None):
  """Combines the 3 x 3 windows of `[R, H, W, C]`; `edge` puts a border of that value around."""
  # one axis after the other: two combinations each instead of eight
  for axis in (1, 2):
    if edge is not None:
      around = [(int(a == axis),) * 2 for a in range(4)]
      x = jnp.pad(x, around, constant_values=edge)
    end = x.shape[axis] - 2
    cut = [jax.lax.slice_in_dim(x, i, end + i, stride, axis) for i in range(3)]
    x = combine(combine(cut[0], cut[1]), cut[2])
  return x


def mean_pool(x):
  """Averages 3 x 3 windows over the cells inside the grid: padding is not counted."""
  # cells at the border have fewer neighbours
  count = _reduce_windows(np.ones((1, *x.shape[1:3], 1), np.float32), jnp.add, 1, 0)
  return _reduce_windows(x, jnp.add, 1, 0) / count.astype(x.dtype)


def max_pool(x):
  """Takes the maximum of 3 x 3 windows and keeps the grid."""
  return _reduce_windows(x, jnp.maximum, 1, -jnp.inf)


def halving_pool(x):
  """Takes the maximum of 3 x 3 windows with stride 2."""
  return _reduce_windows(x, jnp.maximum, 2)


POOLS = {'mean': mean_pool, 'largest': max_pool, 'halve': halving_pool}


class Block(nnx.Module):
  """One block of `BLOCKS`: its branches read the same grid, their results lie side by side."""

  def __init__(self, c: Config, table, inner):
    self.table, self.width = table, 0

    def add_conv(spec, inner):
      name, outer, size, *stride = spec
      outer = c.thin_channels(outer)
      setattr(self, name, Conv(inner, outer, size, *stride))
      return outer

    for branch in table:
      width = inner
      for step in branch:
        if isinstance(step, str):
          continue
        fork = isinstance(step[0], tuple)
        width = sum(add_conv(spec, width) for spec in step) if fork else add_conv(step, width)
      self.width += width

  def __call__(self, x):
    found = []
    for branch in self.table:
      y = x
      for step in branch:
        if isinstance(step, str):
          y = POOLS[step](y)
        elif isinstance(step[0], tuple):
          y = jnp.concatenate([getattr(self, spec[0])(y) for spec in step], -1)
        else:
          y = getattr(self, step[0])(y)
      found.append(y)
    return jnp.concatenate(found, -1)


class Inception(nnx.Module):
  """`__call__(images [R, side, side, 3])` of `preprocess` -> features `[R, D]` float32."""

  def __init__(self, config: Config, *, rngs):
    c, width = config, 3
    self.config = c
    for name, outer, size, stride, padding in STEM:
      setattr(self, name, Conv(width, c.thin_channels(outer), size, stride, padding))
      width = c.thin_channels(outer)
    for name, table in BLOCKS.items():
      block = Block(c, table, width)
      setattr(self, name, block)
      width = block.width
    self.width = width
    self.fc = nnx.Linear(width, c.classes, rngs=rngs)

  def stage_grids(self, x):
    """Returns the grid after each pool of the stem and after each block, {name: `[R, H, W, C]`}."""
    x, found = x.astype(self.Conv2d_1a_3x3.kernel.dtype), {}
    for name, *_ in STEM:
      x = getattr(self, name)(x)
      if name in ('Conv2d_2b_3x3', 'Conv2d_4a_3x3'):
        x = found[name] = halving_pool(x)
    for name in BLOCKS:
      x = found[name] = getattr(self, name)(x)
    return found

  def __call__(self, x):
    # the mean in float32: FID sums features over 50,000 pictures
    return jnp.mean(self.stage_grids(x)['Mixed_7c'], (1, 2), dtype=jnp.float32)

  def class_logits(self, features):
    """Features `[R, D]` -> logits `[R, K]` without the bias."""
    return jnp.matmul(features, self.fc.kernel[...].astype(jnp.float32), precision='highest')


# ---------------------------------------------------------------------------------------- pictures


@functools.cache
def _resize_matrix(old: int, new: int, preprocessing: str) -> np.ndarray:
  """Returns the matrix `[old, new]` of a linear resize without antialiasing.

  Pixels lie in the middle of their cells in torch's `F.interpolate(align_corners=False)`, and at
  the upper left corner in TensorFlow 1.
  """
  where = np.arange(new) * (old / new)
  if preprocessing == 'pytorch_fid':
    where = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
  low = np.minimum(where.astype(int), old - 1)
  high, share = np.minimum(low + 1, old - 1), where - low
  table = np.zeros((old, new))
  np.add.at(table, (low, np.arange(new)), 1 - share)
  np.add.at(table, (high, np.arange(new)), share)
  return table.astype(np.float32)


def preprocess(c: Config, pictures, preprocessing: str = 'pytorch_fid'):
  """Pictures `[..., H, W, 3]` in [0, 1] -> `[..., side, side, 3]` in about [-1, 1].

  'pytorch_fid' gives 2 x - 1. 'tensorflow' gives (255 x - 128) / 128 as the TensorFlow graph, which
  ADM's evaluator and torch-fidelity follow. The two give different features and must not be mixed:
  a FID belongs to the preprocessing of its reference.
  """
  # both pipelines start from 8 bit files
  x, old = quantize_pixels(pictures), pictures.shape[-3:-1]
  for letters, have in (('...hwc,wx->...hxc', old[1]), ('...hwc,hx->...xwc', old[0])):
    if have != c.side:
      x = jnp.einsum(letters, x, _resize_matrix(have, c.side, preprocessing), precision='highest')
  return 2 * x - 1 if preprocessing == 'pytorch_fid' else (255 * x - 128) / 128


def build_model(config: Config) -> Inception:
  """Builds a network whose convolutions are 0 until parameters are bound."""
  return Inception(config, rngs=nnx.Rngs(0))


def random_parameters(config: Config, dtype: str = 'float32'):
  """Returns random parameters, which are the same at every call.

  They are drawn on the host, because 94 initialisers take half a minute to compile.
  """
  draw = np.random.default_rng(0)

  def draw_leaf(shape):
    kernel = np.zeros(shape) if len(shape) == 1 else draw.normal(size=shape)
    # 2.4 and not He's 2, because means over 3 x 3 lose spread
    return jnp.asarray(kernel * np.sqrt(2.4 / np.prod(shape[:-1])), dtype)

  _, template = modules.abstract_module(lambda: build_model(config))
  return jax.tree.map(lambda x: draw_leaf(x.shape), template)


@functools.cache
def count_flops(c: Config) -> int:
  """FLOPs of the convolutions and the classifier for one picture."""
  # read off the traced program, because kernels, strides and padding differ from layer to layer
  graphdef, params = modules.abstract_module(lambda: build_model(c))
  picture = jax.ShapeDtypeStruct((1, c.side, c.side, 3), jnp.float32)

  def run_model(params, x):
    model = modules.bind_graph(graphdef, params)
    return model.class_logits(model(x))

  total = 0
  for eqn in jax.make_jaxpr(run_model)(params, picture).eqns:
    if eqn.primitive.name in ('conv_general_dilated', 'dot_general'):
      # the output channels come last; the sum goes over all other axes
      kernel = eqn.invars[1].aval.shape
      total += 2 * eqn.outvars[0].aval.size * math.prod(kernel[:-1])
  return total
