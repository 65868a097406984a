"""Detectors: pictures to boxes in pixels and to scores of the classes that a prompt names.

`OwlDetector` reads any class in words; `YolosDetector` knows COCO's eighty. The tensors of a
checkpoint tell which of the two it is.

Letters: B prompts · M pictures · H W their sides · E classes of a prompt · T detections ·
C = 10 colours · Q queries of a prompt · W words of a query · D width of an embedding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints.source import open_source
from vtts_jax.data import geneval, tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.metrics.geneval_arrays import OFFICIAL_LIMITS, Limits
from vtts_jax.models.owlvit import modeling as owl
from vtts_jax.models.pretrained import RANDOM, Pretrained
from vtts_jax.models.yolos import modeling as yolos

RELEASED = {  # checkpoint -> its name in scores and in `SIZES` of its family
  'google/owlvit-base-patch32': 'owlvit_b32',
  'google/owlvit-base-patch16': 'owlvit_b16',
  'google/owlvit-large-patch14': 'owlvit_l14',
  'google/owlv2-base-patch16-ensemble': 'owlv2_b16',
  'google/owlv2-large-patch14-ensemble': 'owlv2_l14',
  'hustvl/yolos-tiny': 'yolos_tiny',
  'hustvl/yolos-small': 'yolos_small',
  'hustvl/yolos-base': 'yolos_base',
}
COCO = 92  # outputs of a COCO detector: 80 classes, the gaps of their numbering, no object


class Detector(Pretrained):
  """The interface of both detectors.

  Attributes:
    limits: confidences that a detection must exceed to count as an object.
    reads_colours: whether its queries may contain colours.
  """

  limits: Limits
  reads_colours = False

  @property
  def name(self):
    return RELEASED.get(self.weights.partition('@')[0], super().name)


class OwlDetector(Detector):
  """OWL-ViT or OWLv2. Its limits: the threshold of its processor; a higher one when counting, as in
  GenEval; boxes of a class that overlap by half are one object."""

  limits = Limits(0.1, 0.3, 0.5)
  reads_colours = True

  def tokenize(self, names, with_colours: bool):
    """Class names, B lists of E, to `{'ids': [B, Q, W]}`: first each class, then each class in
    each of ten colours."""
    hues = [f'{hue} ' for hue in geneval.COLOURS] if with_colours else []
    # uncoloured queries first, then one block of E queries per colour
    words = [hue + name for row in names for hue in ['', *hues] for name in row]
    queries = [f'a photo of {geneval.with_article(w)}' for w in words]
    c, place = self.config, '' if self.is_random else self.weights
    ids, _ = tokenizers.tokenize_texts(queries, place, c.context, c.vocab)
    return {'ids': ids.reshape(len(names), -1, c.context)}

  def encode(self, params, prompt):
    """Unit queries `[B, Q, D]`."""
    ids = prompt['ids']
    return self.bind(params).text(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:2], -1)

  def detect_objects(self, params, queries, images, entries: int):
    """Detects in images `[B, M, H, W, 3]`; queries are those of `encode`.

    Returns:
      Boxes `[B, M, T, 4]` (left, top, right, bottom in pixels), scores `[B, M, E, T]`, and
      log-probabilities of colours `[B, M, E, T, C]` or None.
    """
    model, (b, m, height, width) = self.bind(params), images.shape[:4]
    x = model.patch_features(owl.preprocess(self.config, images.reshape(b * m, *images.shape[2:])))
    # candidates of a prompt share its queries, so their patches are compared in one product
    logits = model.query_logits(x.reshape(b, -1, x.shape[-1]), queries)  # [B, M T, Q]
    # Q = (1 + colours) E, and [B, M, T, 1 + colours, E] -> [B, M, E, T, 1 + colours]
    logits = logits.reshape(b, m, x.shape[1], -1, entries).transpose(0, 1, 4, 2, 3)
    boxes = corners_of(model.predict_boxes(x), owl.box_extent(self.config, height, width))
    # a colour's probability is its share among the ten coloured queries of the class
    hues = jax.nn.log_softmax(logits[..., 1:], -1) if logits.shape[-1] > 1 else None
    return boxes.reshape(b, m, -1, 4), jax.nn.sigmoid(logits[..., 0]), hues

  def count_flops(self, op: str, queries: int) -> int:
    """FLOPs of 'text' (all queries of a prompt) or 'image' (one picture against them)."""
    return owl.count_flops(self.config, op, queries)


class YolosDetector(Detector):
  """YOLOS, with GenEval's own limits."""

  limits = OFFICIAL_LIMITS

  @property
  def config(self):
    found = super().config
    # class numbers are COCO's; another head would name wrong classes
    if found.classes != COCO:
      raise ConfigError(
        f"{self.setting}={self.weights!r}: has {found.classes} classes; must be COCO's {COCO}"
      )
    return found

  def tokenize(self, names, with_colours: bool):
    """Class names, B lists of E, to `{'index': [B, E]}` in COCO's numbering.

    Raises:
      ConfigError: a class that COCO does not have.
    """
    unknown = sorted({name for row in names for name in row} - set(geneval.CLASSES))
    if unknown:
      raise ConfigError(
        f"prompts: {', '.join(map(repr, unknown))}: no class of COCO's, and {self.name} knows no "
        'others; an OWL-ViT does'
      )
    return {'index': np.array([[geneval.CLASSES[n] for n in row] for row in names], np.int32)}

  def encode(self, params, prompt):
    return prompt['index']

  def detect_objects(self, params, index, images, entries: int):
    """As in `OwlDetector`; a score is the softmax probability of the class."""
    b, m, height, width = images.shape[:4]
    x = yolos.preprocess(self.config, images.reshape(b * m, *images.shape[2:]))
    logits, boxes = self.bind(params)(x)
    share = jax.nn.softmax(logits).reshape(b, m, *logits.shape[1:])
    # only the classes of the prompt are kept: 92 columns become E
    scores = jnp.take_along_axis(share, index[:, None, None], 3).swapaxes(2, 3)
    return corners_of(boxes, (width, height)).reshape(b, m, -1, 4), scores, None

  def count_flops(self, op: str, queries: int) -> int:
    """FLOPs of one square picture; 'text' is 0, because no text is encoded."""
    return yolos.count_flops(self.config, 1, 1) if op == 'image' else 0


FAMILIES = {'owlvit': OwlDetector, 'yolos': YolosDetector}
SIZES = {'owlvit': owl.SIZES, 'yolos': yolos.SIZES}


def make_detector(weights: str, backbone: str, dtype: str) -> Detector:
  """The detector of a verifier's settings; `backbone` is a key of `FAMILIES`, or '' to find it from
  the weights.

  Raises:
    ConfigError: a missing checkpoint, an unknown size or dtype.
  """
  # the name decides if it can, so that a released checkpoint is not opened for its family
  backbone = backbone or known_backbone(weights) or _read_backbone(weights)
  return FAMILIES[backbone](backbone, weights, dtype)


def known_backbone(weights: str) -> str:
  """The family of `weights` if their name tells it; '' if a file must be read."""
  if weights.startswith(RANDOM):
    name = weights.removeprefix(RANDOM)
  else:
    name = RELEASED.get(weights.partition('@')[0], '')
    if weights and not name:
      return ''
  # a size of both families or of none counts as OWL-ViT, which raises on an unknown size
  return next((family for family, sizes in SIZES.items() if name in sizes), 'owlvit')


@functools.cache
def _read_backbone(weights):
  try:
    source = open_source(weights)
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f'verifier.weights={weights!r}: {error}') from error
  # only YOLOS has detection tokens
  return 'yolos' if 'vit.embeddings.detection_tokens' in source else 'owlvit'


def corners_of(boxes, extent):
  """Relative boxes `[..., 4]` (centre, sides) to left, top, right, bottom in pixels; `extent` is
  (width, height)."""
  centre, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([centre - half, centre + half], -1) * jnp.array([*extent, *extent], float)
