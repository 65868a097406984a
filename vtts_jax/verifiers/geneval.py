"""GenEval: do the detected objects satisfy the prompt in number, colour and position?

A detector (OWL-ViT, OWLv2, or YOLOS for COCO's classes) looks for the classes that the prompt
names. The rules of GenEval (Ghosh et al. 2023, arXiv 2310.11513) judge what it finds, strictly or
with partial credit; see metrics/geneval_arrays.py. The prompt's row says what is asked for
('include', 'exclude', 'tag'); if it does not, the sentence is parsed by GenEval's grammar.

None of these detectors is the one behind the published benchmark. A benchmark score from the same
detector that guided the search is meaningless; `metrics.geneval.benchmark_label` compares
`GenEval.scoring_models` and labels such a score as an oracle's.

Letters: B prompts · M pictures · H W their sides · E entries of a prompt's metadata ·
K best objects of an entry · C = 10 colours.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.data import geneval
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval_arrays as rules
from vtts_jax.verifiers.parts import colours, detectors

OUTPUTS = ('partial', 'strict')
COLOUR_MODELS = ('', 'query', 'clip')


@dataclasses.dataclass(frozen=True)
class GenEval(core.Verifier):
  """Score `geneval_partial_<detector>` in [0, 1], or `geneval_<detector>`, 0 or 1; the name of the
  CLIP is appended if one classifies the colours.

  Attributes:
    output: 'partial' credit, or 'strict'.
    colour: which model classifies colours. 'query': the detector, asked for 'a photo of a red car'
      (not YOLOS). 'clip': a CLIP on the box, as in GenEval but without its masks. '': 'query' if
      the detector can, else 'clip'.
    entries: largest number of classes that a prompt asks for or forbids.
    limits: (confidence that an object must exceed, the same when counting, overlap above which two
      boxes of a class are one object; 1 for never). () selects the detector's own. GenEval's are
      (0.3, 0.9, 1).
    weights: an OWL-ViT, OWLv2 or YOLOS, as in `models.pretrained`.
    backbone: 'owlvit' or 'yolos'; '' reads it from the checkpoint ('owlvit' for random weights).
    clip_weights: the CLIP of colour='clip'.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  output: str = 'partial'
  colour: str = ''
  entries: int = 2
  limits: tuple[float, ...] = ()
  weights: str = 'google/owlvit-base-patch32'
  backbone: str = ''
  clip_weights: str = 'openai/clip-vit-large-patch14'
  dtype: str = 'float32'

  def __post_init__(self):
    allowed = {'output': OUTPUTS, 'colour': COLOUR_MODELS, 'backbone': ('', *detectors.FAMILIES)}
    for name, values in allowed.items():
      if getattr(self, name) not in values:
        raise ConfigError(
          f'verifier.{name}={getattr(self, name)!r}: must be one of {", ".join(map(repr, values))}'
        )
    if self.entries < 1:
      raise ConfigError(f'verifier.entries={self.entries}: must be at least 1')
    # a confidence of 0 or 1 would accept everything or nothing
    fits = len(self.limits) == 3 and all(0 < x < 1 for x in self.limits[:2])
    if self.limits and not (fits and 0 < self.limits[2] <= 1):
      raise ConfigError(
        f'verifier.limits={self.limits}: must be () or two confidences within (0, 1) and an '
        'overlap within (0, 1]'
      )
    # check at once if no file must be read for it; else `check` does
    if self.backbone or detectors.known_backbone(self.weights):
      self._check_parts()

  @property
  def object_detector(self) -> detectors.Detector:
    """The model that finds objects."""
    return detectors.make_detector(self.weights, self.backbone, self.dtype)

  @property
  def colour_clip(self) -> colours.ColourClip | None:
    """The CLIP that classifies colours; None if the detector does."""
    if self.colour == 'query' or (not self.colour and self.object_detector.reads_colours):
      return None
    setting = 'verifier.clip_weights'
    return colours.ColourClip('clip', self.clip_weights, self.dtype, setting=setting)

  @property
  def scoring_models(self) -> tuple[str, ...]:
    """Names of the models that decide the score: the detector and, if used, the CLIP."""
    clip = self.colour_clip
    return (self.object_detector.name, *([clip.name] if clip else []))

  @property
  def names(self):
    # only the strict score may carry the name that `metrics.geneval.benchmark_label` uses
    kind = ['partial'] if self.output == 'partial' else []
    return ('_'.join(['geneval', *kind, *self.scoring_models]),)

  def check(self):
    self._check_parts()
    _ = self.object_detector.config, self.colour_clip and self.colour_clip.config

  def _check_parts(self):
    detector, _ = self.object_detector, self.colour_clip  # both raise on unknown settings
    if self.colour == 'query' and not detector.reads_colours:
      raise ConfigError(
        f"verifier.colour='query': {detector.name} cannot be asked for colours; must be 'clip'"
      )

  def load(self):
    return {name: part.load() for name, part in self._model_parts().items()}

  def shardings(self, mesh):
    return {name: part.shardings(mesh) for name, part in self._model_parts().items()}

  def _model_parts(self):
    clip = self.colour_clip
    return {'detector': self.object_detector, **({'clip': clip} if clip else {})}

  def tokenize(self, prompts: Sequence[core.Prompt]):
    """What the prompts ask for, as arrays, and the words of its classes.

    Raises:
      ConfigError: a prompt without metadata, or with more entries than the settings allow.
    """
    # a row's own metadata come first, then GenEval's grammar on its text
    rows = geneval.metadata_of(prompts)
    targets, names = rules.read_targets(rows, self.entries)
    clip = self.colour_clip
    arrays = {'targets': targets, 'detector': self.object_detector.tokenize(names, clip is None)}
    if clip:
      # the CLIP reads one crop per entry, the best object, so it cannot count coloured objects
      many = ((targets['colour'] >= 0) & (targets['least'] > 1)).any(1)
      if many.any():
        text = rows[int(many.argmax())].get('text')
        raise ConfigError(
          f'prompts: {text!r} asks for the colour of several objects of a class; with '
          "colour='clip' it must be of one"
        )
      arrays['clip'] = clip.tokenize(names)
    return arrays

  def encode(self, params, prompt):
    vctx = {
      'targets': prompt['targets'],
      'detector': self.object_detector.encode(params['detector'], prompt['detector']),
    }
    if 'clip' in prompt:
      vctx['clip'] = self.colour_clip.encode(params['clip'], prompt['clip'])
    return vctx

  @property
  def _object_limits(self) -> rules.Limits:
    return rules.Limits(*self.limits) if self.limits else self.object_detector.limits

  def find_objects(self, params, vctx, images):
    """The best objects of each class in images `[B, M, H, W, 3]`, best first.

    Returns:
      Boxes `[B, M, E, K, 4]` in pixels, scores `[B, M, E, K]`, log-probabilities of colours
      `[B, M, E, K or 1, C]`.
    """
    boxes, scores, hues = self.object_detector.detect_objects(
      params['detector'], vctx['detector'], images, self.entries
    )
    boxes = boxes[:, :, None]
    index, best = rules.select_best(boxes, scores, self._object_limits.overlap)
    boxes = jnp.take_along_axis(boxes, index[..., None], 3)
    if 'clip' not in vctx:
      return boxes, best, jnp.take_along_axis(hues, index[..., None], 3)
    # a crop costs a pass of the CLIP, so only the best object of an entry gets one
    first, clip = boxes[:, :, :, 0], self.colour_clip
    hues = clip.classify_colours(params['clip'], vctx['clip'], images, first)
    return boxes, best, hues[:, :, :, None]

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = observed['image']
    score_rules = rules.score_partial if self.output == 'partial' else rules.score_strict
    found = self.find_objects(params, vctx, images)
    earned = score_rules(vctx['targets'], *found, self._object_limits)
    # comparisons with NaN are False, so a picture with NaN would get a finite score
    broken = jnp.isnan(images).any((2, 3, 4))
    return {self.names[0]: jnp.where(broken, jnp.nan, earned)}

  def list_detections(self, params, prompts: Sequence[core.Prompt], images):
    """Detections in images `[B, M, H, W, 3]`, for `metrics.geneval.report_benchmark`.

    Returns:
      B lists of M lists of {'class', 'score', 'box', 'color'}. With a CLIP for colours only the
      best object of each class has a 'color'.
    """
    arrays = self.tokenize(prompts)
    _, names = rules.read_targets(geneval.metadata_of(prompts), self.entries)
    boxes, scores, hues = map(np.asarray, _find_objects(self, params, arrays, images))
    hues = hues.argmax(-1)

    def list_entry(b, m, name, e):
      # score 0 marks the slots after the last object
      for k in np.flatnonzero(scores[b, m, e] > 0):
        hue = {'color': geneval.COLOURS[hues[b, m, e, k]]} if k < hues.shape[3] else {}
        box = boxes[b, m, e, k].tolist()
        yield {'class': name, 'score': float(scores[b, m, e, k]), 'box': box, **hue}

    # two entries of one class find the same objects: list those of the first only
    first = [{name: row.index(name) for name in row} for row in names]
    return [
      [
        [found for name, e in first[b].items() for found in list_entry(b, m, name, e)]
        for m in range(len(row))
      ]
      for b, row in enumerate(scores)
    ]

  def cost(self, op):
    """As in `core.Verifier`; YOLOS is counted for a square picture."""
    clip = self.colour_clip
    queries = self.entries * (1 if clip else 1 + len(geneval.COLOURS))
    part = 'text' if op == 'encode' else 'image'
    flops = self.object_detector.count_flops(part, queries)
    flops += self.entries * clip.count_flops(part) if clip else 0
    return core.Cost(verify=float(op == 'score'), flops=flops)


@functools.partial(jax.jit, static_argnums=0)
def _find_objects(verifier, params, prompt, images):
  return verifier.find_objects(params, verifier.encode(params, prompt), images)
