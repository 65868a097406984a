"""The grids of a multi-scale tokenizer: which tokens are whose, and resizing from one to another.

A picture is a sequence of grids, coarse to fine; the tokens of all grids stand one after another,
row by row. Resizing is that of `torch.nn.functional.interpolate`: both directions of a grid are a
product with a matrix of weights.

Letters: S scales · T tokens of all scales · H W a grid · Z channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]


def scale_ends(grids: Sequence[Grid]) -> tuple[int, ...]:
  """Returns the tokens up to the end of each scale, with a 0 in front: S + 1 numbers."""
  return (0, *np.cumsum([h * w for h, w in grids]).tolist())


def scale_of_tokens(grids: Sequence[Grid]) -> np.ndarray:
  """Returns the scale of every token, `[T]`."""
  return np.repeat(np.arange(len(grids)), [h * w for h, w in grids])


def visible_tokens(grids: Sequence[Grid], first: int, last: int) -> np.ndarray:
  """Returns whom the tokens of the scales `first` .. `last` - 1 see, among those of the scales
  before `last`: bool `[queries, keys]`."""
  # tokens of a scale are drawn at once, so they see each other
  scale = scale_of_tokens(grids[:last])
  return scale[scale >= first][:, None] >= scale


def area_weights(inner: int, outer: int) -> np.ndarray:
  """Weights `[outer, inner]` of mode 'area': means of cells that overlap where sides do not
  divide each other."""
  place = np.arange(outer)
  # integers: a rounded border would put a cell into the wrong mean
  start, end = place * inner // outer, -(-(place + 1) * inner // outer)
  cell = np.arange(inner)
  inside = (cell >= start[:, None]) & (cell < end[:, None])
  return inside / inside.sum(1, keepdims=True)


def linear_weights(inner: int, outer: int) -> np.ndarray:
  """Weights `[outer, inner]` of mode 'bilinear' (in one direction) without antialiasing."""
  # cells have their centres at halves; what lies before the first centre is the first cell
  place = np.maximum((np.arange(outer) + 0.5) * inner / outer - 0.5, 0)
  low = np.floor(place).astype(int)
  high = np.minimum(low + 1, inner - 1)
  weights = np.zeros((outer, inner))
  np.add.at(weights, (np.arange(outer), low), 1 - (place - low))
  np.add.at(weights, (np.arange(outer), high), place - low)
  return weights


def cubic_weights(inner: int, outer: int, a: float = -0.75) -> np.ndarray:
  """Weights `[outer, inner]` of mode 'bicubic' without antialiasing.

  jax.image's 'cubic' is another one: its `a` is -0.5, and it renormalises at the edge where torch
  repeats the last cell.
  """
  place = (np.arange(outer) + 0.5) * inner / outer - 0.5
  low = np.floor(place).astype(int)
  weights = np.zeros((outer, inner))
  for tap in range(-1, 3):
    x = np.abs(place - (low + tap))
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    # taps outside repeat the last cell, so its weights add up
    cell = np.clip(low + tap, 0, inner - 1)
    np.add.at(weights, (np.arange(outer), cell), np.where(x <= 1, near, far))
  return weights


WEIGHTS = {'area': area_weights, 'linear': linear_weights, 'cubic': cubic_weights}


def resize_grid(x: jax.Array, grid: Grid, kind: str) -> jax.Array:
  """Resizes `x [..., H, W, Z]` to `[..., *grid, Z]`, float32; `kind` is one of `WEIGHTS`."""
  if x.shape[-3:-1] == tuple(grid):
    return x.astype(jnp.float32)
  rows, columns = (WEIGHTS[kind](a, b).astype(np.float32) for a, b in zip(x.shape[-3:-1], grid))
  # a residual of ten scales is quantised by what is left of it, so nothing may be rounded here
  x = jnp.einsum('hr,...rwz->...hwz', rows, x.astype(jnp.float32), precision='highest')
  return jnp.einsum('wc,...hcz->...hwz', columns, x, precision='highest')


def count_resize_flops(inner: Grid, outer: Grid, channels: int) -> int:
  """FLOPs of `resize_grid` for one picture."""
  if inner == outer:
    return 0
  return 2 * channels * outer[0] * inner[1] * (inner[0] + outer[1])
