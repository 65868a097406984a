"""Pictures as the verifiers' own pipelines see them, inside jit: 8 bits, PIL's filters, crops.

A score is only comparable if the picture is what the published pipeline would have made of it: an
8 bit picture, resized by PIL with its antialiasing filter (one axis after the other, rounded to 8
bits after each), cropped and normalised. Filters are small matrices made at trace time. Checked
against PIL in tests/test_images.py.

Gradients pass through the rounding to 8 bits as if there were none (straight through), so that a
score can be climbed; values outside [0, 1] get none.

Pictures are `[..., H, W, 3]` float32 in [0, 1]; leading axes are free.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError


def _cubic(x, a=-0.5):
  x = abs(x)
  if x < 1:
    return ((a + 2) * x - (a + 3)) * x * x + 1
  return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x):
  sinc = lambda x: 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)
  return sinc(x) * sinc(x / 3) if abs(x) < 3 else 0.0


FILTERS = {  # PIL's filters and their reach
  'bilinear': (lambda x: max(0.0, 1 - abs(x)), 1.0),
  'bicubic': (_cubic, 2.0),
  'lanczos': (_lanczos, 3.0),
}


@functools.cache
def _weights(old: int, new: int, method: str) -> tuple[np.ndarray, np.ndarray]:
  """The matrix `[old, new]` by which PIL resizes one axis, in its steps of 2^-22: the upper and the
  lower half of each number, so that float32 sums of 8 bit pixels are exact."""
  value, reach = FILTERS[method]
  scale = old / new
  stretch = max(scale, 1.0)  # antialiasing: the filter widens where the picture shrinks
  table = np.zeros((old, new))
  for i in range(new):
    centre = (i + 0.5) * scale
    low = max(int(centre - reach * stretch + 0.5), 0)
    high = min(int(centre + reach * stretch + 0.5), old)
    row = np.array([value((x - centre + 0.5) / stretch) for x in range(low, high)])
    table[low:high, i] = row / row.sum()
  steps = np.round(table * 2**22).astype(np.int64)
  upper = (steps + 2**10) >> 11
  return upper.astype(np.float32), (steps - (upper << 11)).astype(np.float32)


@jax.custom_jvp
def quantize(images):
  """Values to the nearest of 0, 1/255 .. 1, as a PNG holds them; NaN stays."""
  return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


@quantize.defjvp
def _quantize_tangent(primals, tangents):
  return quantize(*primals), _inside(*primals, *tangents)


def _inside(images, tangent):
  return jnp.where((images >= 0) & (images <= 1), tangent, 0)


def resize(images, size: tuple[int, int], method: str = 'bicubic', rounded: bool = True):
  """PIL's `resize` of 8 bit pictures to `size` (height, width), bit for bit.

  The width comes first, unless the height loses more than twice as many rows as the width columns:
  so Pillow 13, found by trying sizes. Before, the width came first always.

  Args:
    rounded: False for what torch's antialiased `interpolate` makes of floats: the 8 bit picture is
      neither rounded nor cut off at 0 and 1 again.

  Raises:
    ConfigError: an unknown method.
  """
  if method not in FILTERS:
    raise ConfigError(f'method={method!r}: must be one of {", ".join(FILTERS)}')
  return _resize(images, tuple(size), method, rounded)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _resize(images, size, method, rounded):
  return _resample(jnp.round(jnp.clip(images, 0, 1) * 255), size, method, rounded) / 255


@_resize.defjvp
def _resize_tangent(size, method, rounded, primals, tangents):
  tangent = _resample(_inside(*primals, *tangents), size, method, rounded=False)
  return _resize(*primals, size, method, rounded), tangent


def _resample(x, size, method, rounded):
  old = x.shape[-3:-1]
  tall = old[0] - size[0] > max(0, 2 * (old[1] - size[1]))
  for axis in (0, 1) if tall else (1, 0):
    if old[axis] != size[axis]:
      letters = ('...hwc,hx->...xwc', '...hwc,wx->...hxc')[axis]
      pair = _weights(old[axis], size[axis], method)
      upper, lower = (jnp.einsum(letters, x, half, precision='highest') for half in pair)
      x = _whole(upper, lower) if rounded else upper / 2**11 + lower / 2**22
  return x


def _whole(upper, lower):
  """upper 2^-11 + lower 2^-22 to the nearest of 0 .. 255, halves up, as PIL's integers; NaN
  stays."""
  steps = upper.astype(jnp.int32) * 2**11 + lower.astype(jnp.int32) + 2**21
  return jnp.where(jnp.isnan(upper), upper, jnp.clip(steps >> 22, 0, 255).astype(jnp.float32))


def resize_shortest(images, size: int, method: str = 'bicubic'):
  """The shorter side to `size`, the longer in proportion, rounded down (torchvision's Resize)."""
  height, width = images.shape[-3:-1]
  short = min(height, width)
  return resize(images, (size * height // short, size * width // short), method)


def center_crop(images, size: int):
  """The middle `size` x `size`, as torchvision cuts it.

  Raises:
    ConfigError: the picture is smaller.
  """
  height, width = images.shape[-3:-1]
  if min(height, width) < size:
    raise ConfigError(f'crop of {size} from a picture of {height} x {width}: must not be larger')
  top, left = round((height - size) / 2), round((width - size) / 2)
  return images[..., top : top + size, left : left + size, :]


def normalize(images, mean, std):
  """(images - mean) / std per channel."""
  return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def check(images, where: str = 'images') -> None:
  """On the host: raises `ConfigError` unless `images` is `[..., H, W, 3]`, floating, finite and in
  [0, 1]; the message names the first picture at fault."""
  images = np.asarray(images)
  if images.ndim < 3 or images.shape[-1] != 3:
    raise ConfigError(f'{where}: shape {images.shape}; must be [..., height, width, 3]')
  if not np.issubdtype(images.dtype, np.floating):
    raise ConfigError(f'{where}: dtype {images.dtype}; must be floating, in [0, 1] (bytes / 255)')
  flat = images.reshape(-1, *images.shape[-3:])
  low, high = flat.min(axis=(1, 2, 3)), flat.max(axis=(1, 2, 3))  # NaN goes through both
  bad = np.flatnonzero(~((low >= 0) & (high <= 1)))
  if len(bad):
    i = bad[0]
    raise ConfigError(
      f'{where}: picture {i} has values in [{low[i]:.4g}, {high[i]:.4g}] ({len(bad)} of '
      f'{len(flat)} pictures are out of range); must be in [0, 1] without NaN'
    )
