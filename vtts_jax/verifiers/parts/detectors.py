"""Detectors by checkpoint: pictures to boxes in pixels and to scores of the classes a prompt names.

`Owl` reads any class, in words; `Yolo` knows COCO's eighty. Which of the two a checkpoint is, its
tensors say.

Letters: B prompts · M pictures · H W their sides · E classes of a prompt · T detections ·
C = 10 colours · Q queries of a prompt · W words of a query.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints import source as source_files
from vtts_jax.data import geneval
from vtts_jax.data import tokenizers as texts
from vtts_jax.errors import ConfigError
from vtts_jax.models import vit
from vtts_jax.models.owlvit import convert as owl_convert
from vtts_jax.models.owlvit import modeling as owl
from vtts_jax.models.yolos import convert as yolos_convert
from vtts_jax.models.yolos import modeling as yolos
from vtts_jax.verifiers.parts import image_encoder as towers

RELEASED = {  # checkpoint -> its name in scores and in `SIZES`
  'google/owlvit-base-patch32': 'owlvit_b32',
  'google/owlvit-base-patch16': 'owlvit_b16',
  'google/owlvit-large-patch14': 'owlvit_l14',
  'google/owlv2-base-patch16-ensemble': 'owlv2_b16',
  'google/owlv2-large-patch14-ensemble': 'owlv2_l14',
  'hustvl/yolos-tiny': 'yolos_tiny',
  'hustvl/yolos-small': 'yolos_small',
  'hustvl/yolos-base': 'yolos_base',
}
_TINY = vit.Config(16, 1, 2, 24, 'quick_gelu')
SIZES = {
  'tiny': owl.Config(_TINY, _TINY, size=32, patch=8, vocab=64, embed=8),
  'tiny_v2': owl.Config(_TINY, _TINY, size=32, patch=8, vocab=64, embed=8, v2=True),
  'tiny_yolos': yolos.Config(vit.Config(16, 2, 2, 24), (32, 48), shortest=32, tokens=20),
  **owl.RELEASED,
  **yolos.RELEASED,
}
COCO = 92  # classes of a closed-set detector, the gaps and no object among them


class Detector(towers.Tower):
  """What both have; `place`, `random` and `dtype` as in `towers.Tower`.

  Attributes:
    limits: confidence that an object must exceed, that when counting, and the overlap of two
      objects of a class.
    coloured: whether it can be asked for colours.
  """

  limits: tuple[float, float, float]
  coloured = False

  @property
  def name(self):
    known = RELEASED.get(self.place.partition('@')[0], towers.short_name(self.place))
    return self.random or known

  @property
  def config(self):
    return config_of(self.place, self.random)


class Owl(Detector):
  """OWL-ViT or OWLv2. Its limits: the threshold of its processor; stricter when counting, where
  GenEval is too; half-overlapping boxes of a class are one object."""

  limits, coloured = (0.1, 0.3, 0.5), True
  build = staticmethod(owl.build)

  def read(self, source):
    return owl_convert.load(source, dtype=self.dtype, config=self.config)[1]

  def tokenize(self, names, colours: bool):
    """Classes, B lists of E -> `{'ids': [B, Q, W]}`: each class, and then each in ten colours."""
    c, place = self.config, '' if self.random else self.place
    hues = [f'{hue} ' for hue in geneval.COLOURS] if colours else []
    words = [hue + name for row in names for hue in ['', *hues] for name in row]
    said = [f'a photo of {geneval.article(w)}' for w in words]
    ids, _ = texts.tokens(said, place, c.context, c.vocab)
    return {'ids': ids.reshape(len(names), -1, c.context)}

  def encode(self, params, prompt):
    """Unit queries `[B, Q, D]`."""
    ids = prompt['ids']
    return self.merge(params).text(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:2], -1)

  def detect(self, params, queries, images, entries: int):
    """Boxes `[B, M, T, 4]` (left, top, right, bottom in pixels), scores `[B, M, E, T]`, and
    colours' log-probabilities `[B, M, E, C, T]` or None."""
    model, (b, m, height, width) = self.merge(params), images.shape[:4]
    x = model.features(owl.prepare(self.config, images.reshape(b * m, *images.shape[2:])))
    logits = model.logits(x.reshape(b, -1, x.shape[-1]), queries)  # [B, M T, Q]
    logits = logits.reshape(b, m, x.shape[1], -1, entries).transpose(0, 1, 4, 3, 2)
    boxes = corners(model.boxes(x), owl.extent(self.config, height, width))
    scores, hues = jax.nn.sigmoid(logits[:, :, :, 0]), None
    if logits.shape[3] > 1:
      hues = jax.nn.log_softmax(logits[:, :, :, 1:], 3)
    return boxes.reshape(b, m, -1, 4), scores, hues

  def flops(self, op: str, queries: int) -> int:
    return owl.flops(self.config, op, queries)


class Yolo(Detector):
  """YOLOS. Its limits are GenEval's own."""

  limits = (0.3, 0.9, 1.0)
  build = staticmethod(yolos.build)

  def read(self, source):
    return yolos_convert.load(source, dtype=self.dtype, config=self.config)[1]

  def tokenize(self, names, colours: bool):
    """Classes, B lists of E -> `{'index': [B, E]}` in COCO's numbering.

    Raises:
      ConfigError: a class that is none of COCO's.
    """
    odd = sorted({name for row in names for name in row} - set(geneval.CLASSES))
    if odd:
      raise ConfigError(
        f"prompts: {', '.join(map(repr, odd))}: no class of COCO's, and {self.name} knows no "
        'others; an OWL-ViT does'
      )
    return {'index': np.array([[geneval.CLASSES[n] for n in row] for row in names], np.int32)}

  def encode(self, params, prompt):
    return prompt['index']

  def detect(self, params, index, images, entries: int):
    """As in `Owl`; a score is the softmax's share of the class."""
    b, m, height, width = images.shape[:4]
    x = yolos.prepare(self.config, images.reshape(b * m, *images.shape[2:]))
    logits, boxes = self.merge(params)(x)
    share = jax.nn.softmax(logits).reshape(b, m, *logits.shape[1:])
    scores = jnp.take_along_axis(share, index[:, None, None], 3).swapaxes(2, 3)
    return corners(boxes, (width, height)).reshape(b, m, -1, 4), scores, None

  def flops(self, op: str, queries: int) -> int:
    """Of a square picture."""
    return yolos.flops(self.config, 1, 1) if op == 'image' else 0


def corners(boxes, extent):
  """Centre and sides as shares `[..., 4]` -> left, top, right, bottom in pixels."""
  centre, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([centre - half, centre + half], -1) * jnp.array([*extent, *extent], float)


@functools.cache
def config_of(place: str, random: str):
  """The sizes of a detector; reads headers only.

  Raises:
    ConfigError: an unknown size, or a closed-set detector of other classes than COCO's.
  """
  if random:
    if random not in SIZES:
      raise ConfigError(f'verifier.random={random!r}: must be one of {", ".join(SIZES)}')
    return SIZES[random]
  source = source_files.open_source(place)
  if 'vit.embeddings.detection_tokens' not in source:
    return owl_convert.config_of(source)
  found = yolos_convert.config_of(source)
  if found.classes != COCO:
    raise ConfigError(
      f"verifier.model_from={place!r}: has {found.classes} classes; must be COCO's {COCO}"
    )
  return found


def detector(place: str, random: str, dtype: str) -> Detector:
  """The detector of a verifier's settings; errors as in `config_of`."""
  known = SIZES.get(RELEASED.get(place.partition('@')[0])) if not random else None
  closed = isinstance(known or config_of(place, random), yolos.Config)
  return (Yolo if closed else Owl)(place, random, dtype)
