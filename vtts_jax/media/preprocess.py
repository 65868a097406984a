"""Pictures as the verifiers' own pipelines see them, inside jit: 8 bits, PIL's filters, crops.

A score is comparable only if the picture is what the published pipeline would have made of it: an
8 bit picture, resized by PIL's antialiasing filter (one axis after the other, rounded to 8 bits
after each), cropped and normalised. Filters are small matrices made at trace time, for the pixels
inside the crop only. `Preprocessing` says all of that for one network. Checked against PIL in
tests/test_images.py, against transformers in tests/parity.

Gradients pass straight through the rounding to 8 bits, so that a search can climb a score. Values
outside [0, 1] get no gradient.

Pictures are `[..., H, W, 3]` float32 in [0, 1]; leading axes are free.
Letters: H W C picture · S side of the network's square · X new height or width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vtts_jax.errors import ConfigError

Window = tuple[tuple[int, int], tuple[int, int]]  # (first, count) of rows, of columns


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

MODES = ('shortest', 'longest', 'squash', 'keep')
CROPS = ('torchvision', 'transformers')


@functools.cache
def _resize_matrices(
  old: int, new: int, method: str, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the matrix `[old, count]` by which PIL resizes one axis from `old` to `new` pixels, for
  the new pixels from `first` on; in PIL's integer steps of 2^-22.

  It is returned as the upper and the lower half of each number (steps of 2^-11 and 2^-22): float32
  sums of 8 bit pixels times a half are exact, sums of whole weights are not.
  """
  value, reach = FILTERS[method]
  scale = old / new
  # antialiasing: the filter widens where the picture shrinks
  stretch = max(scale, 1.0)
  table = np.zeros((old, count))
  for i in range(count):
    centre = (first + i + 0.5) * scale
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


def resize_images(
  images,
  size: tuple[int, int],
  method: str = 'bicubic',
  rounded: bool = True,
  window: Window | None = None,
):
  """Resizes pictures `[..., H, W, 3]` as PIL's `resize` does 8 bit pictures, bit for bit.

  Args:
    size: (height, width) of the result.
    method: a key of `FILTERS`.
    rounded: False for what torch's antialiased `interpolate` makes of floats: the result is neither
      rounded to 8 bits nor clipped to [0, 1].
    window: the rows and columns of the result that are wanted; None for all of them. The others are
      never made: 4 x 4000 pixels are 224 x 224000 before their crop.

  Raises:
    ConfigError: an unknown method, or a size of 0.
  """
  if method not in FILTERS:
    raise ConfigError(f'method={method!r}: must be one of {", ".join(FILTERS)}')
  _check_sides(images.shape[-3:-1], size)
  window = window or ((0, size[0]), (0, size[1]))
  return _resize_exactly(images, tuple(size), method, rounded, window)


def _check_sides(old, size):
  if min(size) < 1:
    raise ConfigError(
      f'a picture of {old[0]} x {old[1]} is too thin: it would be resized to {size[0]} x {size[1]}'
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _resize_exactly(images, size, method, rounded, window):
  pixels = jnp.round(jnp.clip(images, 0, 1) * 255)
  return _apply_matrices(pixels, size, method, rounded, window) / 255


@_resize_exactly.defjvp
def _resize_tangent(size, method, rounded, window, primals, tangents):
  # the tangent of the unrounded, linear resize: rounding passes it straight through
  tangent = _apply_matrices(_mask_clipped(*primals, *tangents), size, method, False, window)
  return _resize_exactly(*primals, size, method, rounded, window), tangent


def _apply_matrices(x, size, method, rounded, window):
  old = x.shape[-3:-1]
  # Each axis is rounded, so their order changes bits. Pillow 13 takes the width first unless the
  # height loses more than twice as many rows as the width columns (found by trying sizes); before,
  # it always took the width first.
  tall = old[0] - size[0] > max(0, 2 * (old[1] - size[1]))
  for axis in (0, 1) if tall else (1, 0):
    first, count = window[axis]
    if old[axis] == size[axis]:
      x = jax.lax.slice_in_dim(x, first, first + count, axis=x.ndim - 3 + axis)
      continue
    letters = ('...hwc,hx->...xwc', '...hwc,wx->...hxc')[axis]
    pair = _resize_matrices(old[axis], size[axis], method, first, count)
    # highest: a TPU's default would round the weights to bfloat16
    upper, lower = (jnp.einsum(letters, x, half, precision='highest') for half in pair)
    x = _round_to_bytes(upper, lower) if rounded else upper / 2**11 + lower / 2**22
  return x


def _round_to_bytes(upper, lower):
  """Rounds upper 2^-11 + lower 2^-22 to 0 .. 255, halves up, as PIL's integers; NaN stays NaN."""
  # in int32, as PIL: a float32 sum of both halves would lose the last bits and turn halves over
  steps = upper.astype(jnp.int32) * 2**11 + lower.astype(jnp.int32) + 2**21
  return jnp.where(jnp.isnan(upper), upper, jnp.clip(steps >> 22, 0, 255).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How a picture becomes the S x S input of a network: resized, cut or padded, normalised.

  Attributes:
    mean, std: of each channel, for pictures in [0, 1].
    mode: 'shortest' resizes the shorter side to `size` and the longer in proportion, rounded down;
      'longest' the longer side; 'squash' both sides, so that proportions are lost; 'keep' none. The
      middle S x S is then cut out. What is smaller is padded.
    method: a key of `FILTERS`.
    size: what the side is resized to; 0 for S.
    crop: whose centre crop it is, where the middle lies between two pixels: 'torchvision' rounds to
      the even one (OpenAI's CLIP, open_clip, DINO), 'transformers' takes the first.
    fill: grey of the padding, in [0, 1].

  Raises:
    ConfigError: an unknown mode, method or crop.
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  mode: str = 'shortest'
  method: str = 'bicubic'
  size: int = 0
  crop: str = 'torchvision'
  fill: float = 0.0

  def __post_init__(self):
    for name, allowed in (('mode', MODES), ('method', FILTERS), ('crop', CROPS)):
      if getattr(self, name) not in allowed:
        raise ConfigError(
          f'{name}={getattr(self, name)!r}: must be one of {", ".join(map(repr, allowed))}'
        )

  def fit_images(self, images, side: int):
    """Pictures `[..., H, W, 3]` in [0, 1] to `[..., S, S, 3]` of 8 bits, not yet normalised.

    Raises:
      ConfigError: a picture so thin that one of its sides is resized to 0.
    """
    size, window, around = self._plan_crop(images.shape[-3:-1], side)
    x = resize_images(images, size, self.method, window=window)
    if any(map(any, around)):
      more = [(0, 0)] * (x.ndim - 3)
      x = jnp.pad(x, (*more, *around, (0, 0)), constant_values=self.fill)
    return x

  def fit_picture(self, picture: np.ndarray, side: int) -> np.ndarray:
    """The same on the host, by PIL: uint8 `[H, W, 3]` to uint8 `[S, S, 3]`."""
    size, window, around = self._plan_crop(picture.shape[:2], side)
    resample = Image.Resampling[self.method.upper()]
    x = np.asarray(Image.fromarray(picture).resize(size[::-1], resample))
    (top, rows), (left, columns) = window
    x = x[top : top + rows, left : left + columns]
    return np.pad(x, (*around, (0, 0)), constant_values=round(self.fill * 255))

  def _plan_crop(self, old, side):
    """Returns the (height, width) that a picture is resized to, the window of it that is kept, and
    the padding (before, after) of rows and columns."""
    target = self.size or side
    if self.mode == 'keep':
      size = tuple(old)
    elif self.mode == 'squash':
      size = (target, target)
    elif self.mode == 'shortest':
      size = tuple(target * length // min(old) for length in old)
    else:
      # as open_clip, whose rounding this is
      size = tuple(round(length / (max(old) / target)) for length in old)
    _check_sides(old, size)
    starts = [self._crop_start(length, side) for length in size]
    window = tuple((max(at, 0), min(length, side)) for at, length in zip(starts, size))
    around = [(max(-at, 0), max(side - length + min(at, 0), 0)) for at, length in zip(starts, size)]
    return size, window, around

  def _crop_start(self, length, side):
    """Returns the first pixel of the crop on one axis; negative where pixels are padded."""
    if self.crop == 'transformers':
      return (length - side) // 2
    # Python's round takes an odd half to the even pixel, and so does torchvision; its padding has
    # the odd pixel at the end
    return round((length - side) / 2) if length >= side else -((side - length) // 2)


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
