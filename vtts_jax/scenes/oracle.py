"""The oracle of the scene world: reads a picture by rule, with nothing learned, and judges it.

Background = the picture's median colour. A pixel is foreground where some palette colour is nearer
than the background; objects are 4-connected components; an object's colour is the vote of its
pixels and its shape the nearest of 1200 templates (shape x radius x sub-pixel shift x softness of
the edge). What fits no template well is no object of any class: that is how a smeared or half-drawn
shape is counted as missing. Numpy only.

Letters: R images · C components · W = 14 window side · M templates.
"""

import functools

import numpy as np

from vtts_jax.metrics import geneval
from vtts_jax.scenes import world as world

WINDOW = 14
MIN_AREA = 12  # pixels; the smallest clean object has 36
MAX_ERROR = 0.15  # squared template error over template energy: a shape cut in half is above it
SOFTNESS = (0.0, 0.6, 1.0)  # pixels; standard deviation of a Gaussian over the template
_INK = np.array(list(world.PALETTE.values()), np.float32)
_CHUNK = 128


@functools.cache
def _templates():
  """(`[M, W * W]` float32, `[M]` shape index, `[M]` energy)."""
  grid = np.arange(WINDOW) + 0.5 - WINDOW / 2
  out, shapes = [], []
  for s, name in enumerate(world.SHAPES):
    for radius in (3.5, 4.0, 4.5, 5.0, 5.5):
      for oy in (-0.5, 0.0, 0.5, 1.0):
        for ox in (-0.5, 0.0, 0.5, 1.0):
          dy, dx = np.meshgrid(grid - oy, grid - ox, indexing='ij')
          out.append(world.coverage(name, radius, dy, dx))
          shapes.append(s)
  sharp = np.stack(out)
  out = np.concatenate([_soften(sharp, sigma) for sigma in SOFTNESS]).reshape(-1, WINDOW**2)
  shapes = shapes * len(SOFTNESS)
  return out, np.array(shapes), (out**2).sum(1)


def _soften(x, sigma):
  """Gaussian blur of `[M, W, W]`."""
  if not sigma:
    return x
  near = np.exp(-((np.arange(WINDOW)[:, None] - np.arange(WINDOW)) ** 2) / (2 * sigma**2))
  near = (near / near[WINDOW // 2].sum()).astype(np.float32)
  return near @ x @ near.T


def _components(foreground):
  """4-connected components of `[R, H, W]` bool: (`[R, H, W]` int, -1 outside, else 0 .. C-1; C)."""
  r, h, w = foreground.shape
  label = np.zeros((r, h + 2, w + 2), np.int32)
  inner = label[:, 1:-1, 1:-1]
  inner[...] = np.arange(1, r * h * w + 1, dtype=np.int32).reshape(r, h, w) * foreground
  while True:  # the largest label spreads
    best = np.maximum(np.maximum(label[:, :-2, 1:-1], label[:, 2:, 1:-1]),
                      np.maximum(label[:, 1:-1, :-2], label[:, 1:-1, 2:]))
    best = np.maximum(best, inner) * foreground
    if np.array_equal(best, inner):
      break
    inner[...] = best
  names, index = np.unique(inner, return_inverse=True)
  skip = int(names[0] == 0)
  return index.reshape(r, h, w) - skip, len(names) - skip


def detect(images):
  """Objects of `images [R, 32, 32, 3]` in [0, 1]: R lists of {'class', 'color', 'box', 'score'}.

  Best first; `score` is 1 minus the template error. Not-finite pixels count as background.
  """
  images = np.asarray(images, np.float32)
  if images.ndim != 4 or images.shape[1:] != (world.SIZE, world.SIZE, 3):
    raise ValueError(f'images has shape {images.shape}; allowed is [R, 32, 32, 3]')
  out = []
  for start in range(0, len(images), _CHUNK):
    out += _detect(np.nan_to_num(images[start:start + _CHUNK], nan=world.GROUND))
  return out


def _detect(images):
  ground = np.median(images.reshape(len(images), -1, 3), 1)  # [R, 3]
  flat = images.reshape(len(images), -1, 3)
  gaps = (_INK**2).sum(1) - 2 * flat @ _INK.T  # [R, HW, 8], squared distance minus |x|^2
  none = (ground**2).sum(1)[:, None] - 2 * (flat @ ground[..., None])[..., 0]
  nearest = gaps.argmin(-1)
  foreground = (gaps.min(-1) < none).reshape(images.shape[:3])
  label, number = _components(foreground)
  out = [[] for _ in images]
  if not number:
    return out
  row, y, x = np.nonzero(foreground)
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
  corner = (low[keep] + high[keep] + 1) // 2 - WINDOW // 2  # [C, 2]
  pad = WINDOW
  span = np.arange(WINDOW) + pad
  index = (owner[keep][:, None, None], corner[:, :1, None] + span[:, None],
           corner[:, 1:, None] + span)
  around = ((0, 0), (pad, pad), (pad, pad))
  centred = np.pad(images - ground[:, None, None], around + ((0, 0),))[index]  # [C, W, W, 3]
  mine = np.pad(label, around, constant_values=-1)[index]
  toward = _INK[ink[keep]] - ground[owner[keep]]  # [C, 3]
  alpha = np.einsum('cyxk,ck->cyx', centred, toward) / (toward**2).sum(1)[:, None, None]
  alpha = np.clip(alpha, 0, 1) * ((mine < 0) | (mine == keep[:, None, None]))
  alpha = alpha.reshape(len(keep), -1)
  templates, shapes, energy = _templates()
  error = ((alpha**2).sum(1)[:, None] - 2 * alpha @ templates.T + energy) / energy  # [C, M]
  best = error.argmin(1)
  for c, m, e in zip(keep, best, error[np.arange(len(keep)), best]):
    if e <= MAX_ERROR:
      box = [*low[c, ::-1].tolist(), *(high[c, ::-1] + 1).tolist()]
      out[owner[c]].append({'class': world.SHAPES[shapes[m]], 'color': world.COLOURS[ink[c]],
                            'box': box, 'score': float(1 - e)})
  return [sorted(found, key=lambda d: -d['score']) for found in out]


def score(images, metadata):
  """Which of `images [R, 32, 32, 3]` satisfy their metadata (R dictionaries): `[R]` bool."""
  if len(images) != len(metadata):
    raise ValueError(f'{len(images)} images but {len(metadata)} metadata entries; give one each')
  return np.array([geneval.evaluate(m, d)[0] for m, d in zip(metadata, detect(images))], bool)


def report(images, metadata):
  """{'correct': `[R]` bool, 'overall', 'images', 'by_tag'}, see `geneval.summarize`."""
  ok = score(images, metadata)
  return {'correct': ok, **geneval.summarize([m['tag'] for m in metadata], ok)}
