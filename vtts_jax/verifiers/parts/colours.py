"""Colours of boxes as GenEval tells them: CLIP on the crop, ten colours, three templates.

The box is cut out of the picture (first, where the object's mask is known, its surroundings are
painted #999), goes through CLIP's own preprocessing, and is compared with 'a photo of a red cup',
'a photo of a red-colored cup' and 'a photo of a red object', averaged. Published with ViT-L/14 of
OpenAI: github.com/djghosh13/geneval, evaluation/evaluate_images.py, and clip_benchmark's zero-shot
classifier. Crops are products with matrices made from the boxes, inside jit.

Letters: B prompts · M pictures · R = B M · E boxes of a picture · H W its sides · S CLIP's side ·
D width of embeddings · C = 10 colours.
"""

import jax
import jax.numpy as jnp

from vtts_jax.data import tokenizers
from vtts_jax.data.geneval import COLOURS
from vtts_jax.media import preprocess
from vtts_jax.models.clip import modeling
from vtts_jax.models.pretrained import Pretrained

TEMPLATES = ('a photo of a {} {}', 'a photo of a {}-colored {}', 'a photo of a {} object')
GROUND = 0x99 / 255
SHARPNESS = 100.0  # of the softmax, whatever the checkpoint's own temperature
RELEASED = {'openai/clip-vit-large-patch14': 'l14', 'openai/clip-vit-base-patch32': 'b32'}


class ColourClip(Pretrained):
  """A CLIP as classifier of colours."""

  @property
  def name(self):
    return f'clip_{RELEASED.get(self.weights.partition("@")[0], super().name)}'

  def tokenize(self, names):
    """Classes, B lists of E -> ids `[B, E, C, 3, W]`."""
    c, place = self.config, '' if self.is_random else self.weights
    queries = [
      template.format(hue, name)
      for row in names for name in row for hue in COLOURS for template in TEMPLATES
    ]  # fmt: skip
    ids, _ = tokenizers.tokenize_texts(queries, place, c.length, c.vocab)
    return ids.reshape(len(names), -1, len(COLOURS), len(TEMPLATES), c.length)

  def encode(self, params, ids):
    """Ids -> the classifier's unit rows `[B, E, C, D]`."""
    x = self.bind(params).embed_texts(ids.reshape(-1, ids.shape[-1]))
    return modeling.unit(x.reshape(*ids.shape[:-1], -1).mean(3))

  def classify(self, params, classifier, images, boxes, masks=None):
    """Log-probabilities `[B, M, E, C]` of each box's colour.

    Args:
      images: `[B, M, H, W, 3]` in [0, 1].
      boxes: `[B, M, E, 4]`, left, top, right, bottom in pixels.
      masks: `[B, M, E, H, W]`, what belongs to the object, or None where no one knows.
    """
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    masks = None if masks is None else flat(masks)
    crops = crop_boxes(flat(images), flat(boxes), self.config.image_size, masks)
    pixels = preprocess.normalize(flat(crops), modeling.MEAN, modeling.STD)
    x = self.bind(params).embed_images(pixels).reshape(*boxes.shape[:3], -1)
    return jax.nn.log_softmax(SHARPNESS * jnp.einsum('bmed,becd->bmec', x, classifier), -1)

  def flops(self, op: str) -> int:
    """Of 'text' (all rows of one class) or 'image' (one box)."""
    rows = len(COLOURS) * len(TEMPLATES) if op == 'text' else 1
    return rows * modeling.flops(self.config, op)


# ------------------------------------------------------------------------------------------ crops


def crop_boxes(images, boxes, side: int, masks=None):
  """The boxes of each picture as PIL cuts and torchvision's Resize and CenterCrop show them.

  Corners are rounded to pixels and kept inside the picture (a pixel at least); the shorter side
  becomes S with PIL's bicubic (the width first, as in Pillow before 13), the middle of the longer
  one is kept; to 1/255.

  Args:
    images: `[R, H, W, 3]`; boxes: `[R, E, 4]`; side: S; masks: `[R, E, H, W]`, or None to leave
      what surrounds the object.

  Returns:
    `[R, E, S, S, 3]`.
  """
  height, width = images.shape[1:3]
  # whole pixels, inside the picture
  corner = jnp.round(boxes).astype(jnp.int32)
  left, top, right, bottom = (corner[..., i] for i in range(4))
  left, top = jnp.clip(left, 0, width - 1), jnp.clip(top, 0, height - 1)
  wide, high = jnp.clip(right, left + 1, width) - left, jnp.clip(bottom, top + 1, height) - top
  short = jnp.minimum(wide, high)
  x = preprocess.quantize(images)[:, None]  # [R, 1, H, W, 3]
  if masks is not None:
    x = jnp.where(masks[..., None], x, GROUND)
  # One axis after the other. Sizes differ from box to box, so each box has its own matrix. The
  # first product makes a picture for each box (of one picture, or with masks of one for each).
  for letters, start, size, full in (
    ('rewi,rfhwc->rehic', left, wide, width), ('rehi,rfhwc->reiwc', top, high, height),
  ):  # fmt: skip
    table = _resize_matrices(start, size, side * size // short, side, full)
    shared = letters if x.shape[1] == 1 else letters.replace('f', 'e')
    x = preprocess.quantize(jnp.einsum(shared, table, x, precision='highest'))
  return x


def _resize_matrices(start, size, new, side, full):
  """Matrices `[R, E, full, S]`: `size [R, E]` pixels from `start` on, resized to `new` by PIL's
  antialiased bicubic filter, of which the middle S are kept."""
  size, new = size[..., None, None], new[..., None, None]
  skipped = jnp.round((new - side) / 2)
  scale = size / new
  stretch = jnp.maximum(scale, 1.0)
  centre = (jnp.arange(side) + skipped + 0.5) * scale  # [R, E, 1, S]
  at = jnp.arange(full)[:, None] - start[..., None, None]
  table = _cubic((at + 0.5 - centre) / stretch) * ((at >= 0) & (at < size))
  return table / table.sum(-2, keepdims=True)


def _cubic(x, a=-0.5):
  x = jnp.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
