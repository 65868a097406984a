"""The oracle of the scene world: reads a picture by fixed rules and grades it; nothing is learned.

The background is the picture's median colour. A pixel is foreground if some palette colour is
nearer than the background. Objects are 4-connected components. The pixels of an object vote for its
colour; its shape is the nearest of 1200 templates (shape x radius x sub-pixel shift x softness of
the edge). A component that fits no template well is not an object, so smeared and half-drawn shapes
count as missing. Numpy and scipy only.

Letters: R images · C components · W = 14 window side · M templates.
"""

import functools

import numpy as np
from scipy import ndimage

from vtts_jax.metrics import geneval
from vtts_jax.scenes import world

WINDOW = 14
MIN_AREA = 12  # pixels; the smallest clean object has 36
MAX_ERROR = 0.15  # squared template error over template energy; a shape cut in half exceeds it
SOFTNESS = (0.0, 0.6, 1.0)  # pixels; standard deviation of a Gaussian blur of the template
_INK = np.array(list(world.PALETTE.values()), np.float32)
_CHUNK = 128


@functools.cache
def _shape_templates():
  """All templates: (`[M, W * W]` float32, shape index `[M]`, energy `[M]`)."""
  grid = np.arange(WINDOW) + 0.5 - WINDOW / 2
  out, shapes = [], []
  for s, name in enumerate(world.SHAPES):
    for radius in (3.5, 4.0, 4.5, 5.0, 5.5):
      for oy in (-0.5, 0.0, 0.5, 1.0):
        for ox in (-0.5, 0.0, 0.5, 1.0):
          dy, dx = np.meshgrid(grid - oy, grid - ox, indexing='ij')
          out.append(world.pixel_coverage(name, radius, dy, dx))
          shapes.append(s)
  sharp = np.stack(out)
  # the window is padded with 0; the kernel spans the whole window, so nothing is truncated
  blur = lambda s: ndimage.gaussian_filter(sharp, (0, s, s), mode='constant', radius=WINDOW // 2)
  out = np.concatenate([blur(s) if s else sharp for s in SOFTNESS]).reshape(-1, WINDOW**2)
  shapes = shapes * len(SOFTNESS)
  return out, np.array(shapes), (out**2).sum(1)


def _label_components(foreground):
  """4-connected components of `[R, H, W]` bool: (labels `[R, H, W]` from 0, -1 outside; C)."""
  # a structure that does not connect neighbouring images labels all of them in one call
  within_image = np.zeros((3, 3, 3), bool)
  within_image[1] = ndimage.generate_binary_structure(2, 1)
  label, number = ndimage.label(foreground, within_image)
  return label - 1, number


def detect_objects(images):
  """Objects of `images [R, 32, 32, 3]`: R lists of {'class', 'color', 'box', 'score'}, best first.

  `score` is 1 minus the template error. Images are float in [0, 1] or uint8; pixels that are not
  finite count as background.

  Raises:
    ValueError: images of another shape.
  """
  images = np.asarray(images)
  images = np.float32(images) / np.float32(255 if images.dtype == np.uint8 else 1)
  if images.ndim != 4 or images.shape[1:] != (world.SIZE, world.SIZE, 3):
    raise ValueError(f'images has shape {images.shape}; allowed is [R, 32, 32, 3]')
  out = []
  for start in range(0, len(images), _CHUNK):
    out += _detect_chunk(np.nan_to_num(images[start:start + _CHUNK], nan=world.GROUND))
  return out


def _detect_chunk(images):
  """`detect_objects` of up to _CHUNK float32 images."""
  ground = np.median(images.reshape(len(images), -1, 3), 1)  # [R, 3]
  flat = images.reshape(len(images), -1, 3)
  # squared distances without their common term |x|^2, which changes no comparison
  gaps = (_INK**2).sum(1) - 2 * flat @ _INK.T  # [R, HW, 8]
  none = (ground**2).sum(1)[:, None] - 2 * (flat @ ground[..., None])[..., 0]
  nearest = gaps.argmin(-1)
  foreground = (gaps.min(-1) < none).reshape(images.shape[:3])
  label, number = _label_components(foreground)
  out = [[] for _ in images]
  if not number:
    return out
  row, y, x = np.nonzero(foreground)
  # statistics of all components at once: area, colour votes, bounding box, image
  of = label[row, y, x]
  area = np.bincount(of, minlength=number)
  ink = np.bincount(of * 8 + nearest.reshape(label.shape)[row, y, x],
                    minlength=number * 8).reshape(-1, 8).argmax(1)  # [C]
  low, high = np.full((number, 2), 99), np.full((number, 2), -1)
  for axis, value in enumerate((y, x)):
    np.minimum.at(low[:, axis], of, value)
    np.maximum.at(high[:, axis], of, value)
  owner = np.zeros(number, np.int64)
  owner[of] = row
  keep = np.flatnonzero(area >= MIN_AREA)
  if not len(keep):
    return out
  # a window around the middle of each component, padded so that it may reach over the border
  corner = (low[keep] + high[keep] + 1) // 2 - WINDOW // 2  # [C, 2]
  pad = WINDOW
  span = np.arange(WINDOW) + pad
  index = (owner[keep][:, None, None], corner[:, :1, None] + span[:, None],
           corner[:, 1:, None] + span)
  around = ((0, 0), (pad, pad), (pad, pad))
  centred = np.pad(images - ground[:, None, None], around + ((0, 0),))[index]  # [C, W, W, 3]
  mine = np.pad(label, around, constant_values=-1)[index]
  # alpha: how far a pixel has moved from the ground towards the object's colour, 0 .. 1
  toward = _INK[ink[keep]] - ground[owner[keep]]  # [C, 3]
  alpha = np.einsum('cyxk,ck->cyx', centred, toward) / (toward**2).sum(1)[:, None, None]
  # pixels of other components in the window count as ground
  alpha = np.clip(alpha, 0, 1) * ((mine < 0) | (mine == keep[:, None, None]))
  alpha = alpha.reshape(len(keep), -1)
  templates, shapes, energy = _shape_templates()
  # |alpha - template|^2 over |template|^2, expanded so that it is one matrix product
  error = ((alpha**2).sum(1)[:, None] - 2 * alpha @ templates.T + energy) / energy  # [C, M]
  best = error.argmin(1)
  for c, m, e in zip(keep, best, error[np.arange(len(keep)), best]):
    if e <= MAX_ERROR:
      box = [*low[c, ::-1].tolist(), *(high[c, ::-1] + 1).tolist()]
      out[owner[c]].append({'class': world.SHAPES[shapes[m]], 'color': world.COLOURS[ink[c]],
                            'box': box, 'score': float(1 - e)})
  return [sorted(found, key=lambda d: -d['score']) for found in out]


def grade(images, prompts):
  """Whether `images [R, 32, 32, 3]` (float in [0, 1] or uint8) satisfy their prompts: `[R]` bool.

  Args:
    prompts: R rows with GenEval's metadata, as `world.prompts` makes them.

  Raises:
    ValueError: the numbers of images and prompts differ.
  """
  if len(images) != len(prompts):
    raise ValueError(f'{len(images)} images but {len(prompts)} prompts; give one each')
  found = detect_objects(images)
  return np.array([geneval.evaluate_detections(p, d)[0] for p, d in zip(prompts, found)], bool)


def report_grades(images, prompts):
  """{'correct': `[R]` bool, 'overall', 'images', 'by_tag'}, see `geneval.summarize_by_tag`."""
  correct = grade(images, prompts)
  return {'correct': correct, **geneval.summarize_by_tag([p['tag'] for p in prompts], correct)}
