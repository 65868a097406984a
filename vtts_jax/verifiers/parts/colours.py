"""Colours of boxes, classified as in GenEval: CLIP on the crop, ten colours, three templates.

If the object's mask is known, the pixels around it are painted #999. The box is cut out, passes
CLIP's preprocessing, and is compared with the average of 'a photo of a red cup', 'a photo of a
red-colored cup' and 'a photo of a red object'. GenEval uses OpenAI's ViT-L/14:
github.com/djghosh13/geneval, evaluation/evaluate_images.py, and clip_benchmark's zero-shot
classifier: texts are cleaned, and the centre crop is torchvision's. Cropping runs inside jit, as
products with matrices made from the boxes.

Letters: B prompts · M pictures · R = B M · E boxes of a picture · H W its sides · S CLIP's side ·
D width of embeddings · C = 10 colours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax.data import tokenizers
from vtts_jax.data.geneval import COLOURS
from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess
from vtts_jax.models.clip import modeling
from vtts_jax.models.pretrained import Pretrained, repository_of

TEMPLATES = ('a photo of a {} {}', 'a photo of a {}-colored {}', 'a photo of a {} object')
GROUND = 0x99 / 255  # GenEval paints the pixels outside the mask in this grey
SHARPNESS = 100.0  # logits scale of clip_benchmark, whatever the checkpoint's own temperature
RELEASED = {'openai/clip-vit-large-patch14': 'l14', 'openai/clip-vit-base-patch32': 'b32'}


class ColourClip(Pretrained):
  """A CLIP that classifies colours."""

  @property
  def name(self):
    return f'clip_{RELEASED.get(repository_of(self.weights), super().name)}'

  def tokenize(self, names):
    """Class names, B lists of E, to token ids `[B, E, C, 3, W]`."""
    c, place = self.config, '' if self.is_random else self.weights
    self._check_preprocessing()
    queries = [
      tokenizers.clean_text(template.format(hue, name))
      for row in names for name in row for hue in COLOURS for template in TEMPLATES
    ]  # fmt: skip
    ids, _ = tokenizers.tokenize_texts(queries, place, c.length, c.vocab)
    return ids.reshape(len(names), -1, len(COLOURS), len(TEMPLATES), c.length)

  def _check_preprocessing(self):
    # boxes have sizes that are traced: of a checkpoint's own preprocessing only the colours' mean
    # and deviation can be honoured
    how, plain = self.config.preprocessing, modeling.PREPROCESSING
    if dataclasses.replace(how, mean=plain.mean, std=plain.std, crop=plain.crop) != plain:
      raise ConfigError(
        f'{self.setting}={self.weights!r}: pictures are preprocessed as {how}; must be resized by '
        'the shorter side to the crop, by the bicubic filter'
      )

  def encode(self, params, ids):
    """Token ids to the classifier's unit rows `[B, E, C, D]`."""
    # the mean over the three templates is normalised again, as in zero-shot classification
    x = self.bind(params).embed_texts(ids.reshape(-1, ids.shape[-1]))
    return modeling.unit_vectors(x.reshape(*ids.shape[:-1], -1).mean(3))

  def classify_colours(self, params, classifier, images, boxes, masks=None):
    """Log-probabilities `[B, M, E, C]` of each box's colour.

    Args:
      images: `[B, M, H, W, 3]` in [0, 1].
      boxes: `[B, M, E, 4]`, left, top, right, bottom in pixels.
      masks: `[B, M, E, H, W]` bool, the object's pixels; None if they are not known.
    """
    merge_axes = lambda x: x.reshape(-1, *x.shape[2:])
    masks = None if masks is None else merge_axes(masks)
    # prompts and pictures become rows; the boxes of a picture stay together
    crops = crop_boxes(merge_axes(images), merge_axes(boxes), self.config.image_size, masks)
    how = self.config.preprocessing
    pixels = preprocess.normalize_channels(merge_axes(crops), how.mean, how.std)
    x = self.bind(params).embed_images(pixels).reshape(*boxes.shape[:3], -1)
    return jax.nn.log_softmax(SHARPNESS * jnp.einsum('bmed,becd->bmec', x, classifier), -1)

  def count_flops(self, op: str) -> int:
    """FLOPs of 'text' (all queries of one class) or 'image' (one box)."""
    rows = len(COLOURS) * len(TEMPLATES) if op == 'text' else 1
    return rows * modeling.count_flops(self.config, op)


# ------------------------------------------------------------------------------------------ crops


def crop_boxes(images, boxes, side: int, masks=None):
  """Crops each box as PIL does, then resizes and center-crops it as torchvision does.

  Corners are rounded to pixels and clipped to the picture; a box keeps at least one pixel. PIL's
  bicubic filter resizes the shorter side to S (the width first, as in Pillow before 13), the middle
  of the longer side is kept, and values are rounded to 1/255.

  Args:
    images: `[R, H, W, 3]`; boxes: `[R, E, 4]`; side: S; masks: `[R, E, H, W]`, or None to keep
      the pixels around the object.

  Returns:
    `[R, E, S, S, 3]`.
  """
  height, width = images.shape[1:3]
  # round as PIL does, and keep at least one pixel inside the picture
  corner = jnp.round(boxes).astype(jnp.int32)
  left, top, right, bottom = (corner[..., i] for i in range(4))
  left, top = jnp.clip(left, 0, width - 1), jnp.clip(top, 0, height - 1)
  wide, high = jnp.clip(right, left + 1, width) - left, jnp.clip(bottom, top + 1, height) - top
  short = jnp.minimum(wide, high)
  x = preprocess.quantize_pixels(images)[:, None]  # [R, 1, H, W, 3]
  if masks is not None:
    x = jnp.where(masks[..., None], x, GROUND)
  # The filter is separable: resize one axis after the other. Box sizes are traced, so each box gets
  # its own matrix of fixed shape. Without masks the boxes share one picture in the first product.
  for letters, start, size, full in (
    ('rewi,rfhwc->rehic', left, wide, width), ('rehi,rfhwc->reiwc', top, high, height),
  ):  # fmt: skip
    table = _resize_matrices(start, size, side * size // short, side, full)
    shared = letters if x.shape[1] == 1 else letters.replace('f', 'e')
    x = preprocess.quantize_pixels(jnp.einsum(shared, table, x, precision='highest'))
  return x


def _resize_matrices(start, size, new, side, full):
  """Matrices `[R, E, full, S]` that cut `size [R, E]` pixels from `start` on, resize them to `new`
  with PIL's antialiased bicubic filter, and keep the middle S."""
  size, new = size[..., None, None], new[..., None, None]
  skipped = jnp.round((new - side) / 2)
  scale = size / new
  # PIL widens the filter when it shrinks a picture, and only then
  stretch = jnp.maximum(scale, 1.0)
  centre = (jnp.arange(side) + skipped + 0.5) * scale  # [R, E, 1, S]
  at = jnp.arange(full)[:, None] - start[..., None, None]
  table = _cubic_kernel((at + 0.5 - centre) / stretch) * ((at >= 0) & (at < size))
  # taps outside the box are cut off, the others are renormalised
  return table / table.sum(-2, keepdims=True)


def _cubic_kernel(x, a=-0.5):
  """Keys' cubic convolution kernel; a = -0.5 is PIL's."""
  x = jnp.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
