"""Pictures as the verifiers' own pipelines see them, inside jit: 8 bits, PIL's filters, crops.

A score is comparable only if the picture is what the published pipeline would have made of it: an
8 bit picture, resized by PIL's antialiasing filter (one axis after the other, rounded to 8 bits
after each), cropped and normalised. Filters are small matrices made at trace time. Checked against
PIL in tests/test_images.py.

Gradients pass straight through the rounding to 8 bits, so that a search can climb a score. Values
outside [0, 1] get no gradient.

Pictures are `[..., H, W, 3]` float32 in [0, 1]; leading axes are free.
Letters: H W C picture · X new height or width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError


def _linear_kernel(x):
  return max(0.0, 1 - abs(x))


def _cubic_kernel(x, a=-0.5):
  x = abs(x)
  if x < 1:
    return ((a + 2) * x - (a + 3)) * x * x + 1
  return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos_kernel(x):
  return _sinc(x) * _sinc(x / 3) if abs(x) < 3 else 0.0


def _sinc(x):
  return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


FILTERS = {  # PIL's filters and their reach
  'bilinear': (_linear_kernel, 1.0),
  'bicubic': (_cubic_kernel, 2.0),
  'lanczos': (_lanczos_kernel, 3.0),
}


@functools.cache
def _resize_matrices(old: int, new: int, method: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the matrix `[old, new]` by which PIL resizes one axis, in PIL's integer steps of 2^-22.

  It is returned as the upper and the lower half of each number (steps of 2^-11 and 2^-22): float32
  sums of 8 bit pixels times a half are exact, sums of whole weights are not.
  """
  value, reach = FILTERS[method]
  scale = old / new
  # antialiasing: the filter widens where the picture shrinks
  stretch = max(scale, 1.0)
  table = np.zeros((old, new))
  for i in range(new):
    centre = (i + 0.5) * scale
    low = max(int(centre - reach * stretch + 0.5), 0)
    high = min(int(centre + reach * stretch + 0.5), old)
    # PIL sums the weights inside the picture to one, so borders are not darkened
    row = np.array([value((x - centre + 0.5) / stretch) for x in range(low, high)])
    table[low:high, i] = row / row.sum()
  steps = np.round(table * 2**22).astype(np.int64)
  upper = (steps + 2**10) >> 11
  return upper.astype(np.float32), (steps - (upper << 11)).astype(np.float32)


@jax.custom_jvp
def quantize_pixels(images):
  """Rounds values to the nearest of 0, 1/255 .. 1, as a PNG holds them; NaN stays NaN."""
  return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


@quantize_pixels.defjvp
def _quantize_tangent(primals, tangents):
  return quantize_pixels(*primals), _mask_clipped(*primals, *tangents)


def _mask_clipped(images, tangent):
  """Returns the tangent where clipping to [0, 1] changes nothing, else 0."""
  return jnp.where((images >= 0) & (images <= 1), tangent, 0)


def resize_images(images, size: tuple[int, int], method: str = 'bicubic', rounded: bool = True):
  """Resizes pictures `[..., H, W, 3]` as PIL's `resize` does 8 bit pictures, bit for bit.

  Args:
    size: (height, width) of the result.
    method: a key of `FILTERS`.
    rounded: False for what torch's antialiased `interpolate` makes of floats: the result is neither
      rounded to 8 bits nor clipped to [0, 1].

  Raises:
    ConfigError: an unknown method.
  """
  if method not in FILTERS:
    raise ConfigError(f'method={method!r}: must be one of {", ".join(FILTERS)}')
  return _resize_exactly(images, tuple(size), method, rounded)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _resize_exactly(images, size, method, rounded):
  return _apply_matrices(jnp.round(jnp.clip(images, 0, 1) * 255), size, method, rounded) / 255


@_resize_exactly.defjvp
def _resize_tangent(size, method, rounded, primals, tangents):
  # the tangent of the unrounded, linear resize: rounding passes it straight through
  tangent = _apply_matrices(_mask_clipped(*primals, *tangents), size, method, rounded=False)
  return _resize_exactly(*primals, size, method, rounded), tangent


def _apply_matrices(x, size, method, rounded):
  old = x.shape[-3:-1]
  # Each axis is rounded, so their order changes bits. Pillow 13 takes the width first unless the
  # height loses more than twice as many rows as the width columns (found by trying sizes); before,
  # it always took the width first.
  tall = old[0] - size[0] > max(0, 2 * (old[1] - size[1]))
  for axis in (0, 1) if tall else (1, 0):
    if old[axis] != size[axis]:
      letters = ('...hwc,hx->...xwc', '...hwc,wx->...hxc')[axis]
      pair = _resize_matrices(old[axis], size[axis], method)
      # highest: a TPU's default would round the weights to bfloat16
      upper, lower = (jnp.einsum(letters, x, half, precision='highest') for half in pair)
      x = _round_to_bytes(upper, lower) if rounded else upper / 2**11 + lower / 2**22
  return x


def _round_to_bytes(upper, lower):
  """Rounds upper 2^-11 + lower 2^-22 to 0 .. 255, halves up, as PIL's integers; NaN stays NaN."""
  # in int32, as PIL: a float32 sum of both halves would lose the last bits and turn halves over
  steps = upper.astype(jnp.int32) * 2**11 + lower.astype(jnp.int32) + 2**21
  return jnp.where(jnp.isnan(upper), upper, jnp.clip(steps >> 22, 0, 255).astype(jnp.float32))


def resize_shortest(images, size: int, method: str = 'bicubic'):
  """Resizes the shorter side to `size`, the longer in proportion and rounded down.

  This is torchvision's `Resize`: pictures `[..., H, W, 3]`, errors as in `resize_images`.
  """
  height, width = images.shape[-3:-1]
  short = min(height, width)
  return resize_images(images, (size * height // short, size * width // short), method)


def center_crop(images, size: int):
  """Cuts the middle `[..., size, size, 3]` out of pictures, as torchvision does.

  Raises:
    ConfigError: the picture is smaller.
  """
  height, width = images.shape[-3:-1]
  if min(height, width) < size:
    raise ConfigError(f'crop of {size} from a picture of {height} x {width}: must not be larger')
  # Python's round takes an odd half to the even pixel, and so does torchvision
  top, left = round((height - size) / 2), round((width - size) / 2)
  return images[..., top : top + size, left : left + size, :]


def normalize_channels(images, mean, std):
  """Returns (images - mean) / std per channel of pictures `[..., H, W, 3]`."""
  return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def check_images(images, where: str = 'images') -> None:
  """Checks pictures on the host.

  Raises:
    ConfigError: `images` is not `[..., H, W, 3]`, floating, finite and in [0, 1]; the message names
      the first picture at fault.
  """
  images = np.asarray(images)
  if images.ndim < 3 or images.shape[-1] != 3:
    raise ConfigError(f'{where}: shape {images.shape}; must be [..., height, width, 3]')
  if not np.issubdtype(images.dtype, np.floating):
    raise ConfigError(f'{where}: dtype {images.dtype}; must be floating, in [0, 1] (bytes / 255)')
  flat = images.reshape(-1, *images.shape[-3:])
  # NaN goes through min and max and fails both comparisons
  low, high = flat.min(axis=(1, 2, 3)), flat.max(axis=(1, 2, 3))
  bad = np.flatnonzero(~((low >= 0) & (high <= 1)))
  if len(bad):
    i = bad[0]
    raise ConfigError(
      f'{where}: picture {i} has values in [{low[i]:.4g}, {high[i]:.4g}] ({len(bad)} of '
      f'{len(flat)} pictures are out of range); must be in [0, 1] without NaN'
    )
