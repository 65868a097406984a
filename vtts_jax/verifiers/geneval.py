"""Do a detector's objects satisfy the prompt: how many, in which colour, where? GenEval's rules.

A detector (OWL-ViT, OWLv2, or YOLOS for COCO's classes) looks for the classes that the prompt names
and the rules of GenEval (Ghosh et al. 2023, arXiv 2310.11513) are applied to what it finds, as they
stand or with partial credit; see metrics/geneval_arrays.py. What a prompt asks for is in its row
('include', 'exclude', 'tag'), or is read off its sentence where that is one of GenEval's.

None of these detectors is the one behind the published benchmark. A benchmark score taken from the
detector that was searched on says little: by `GenEval.scoring_models`,
`metrics.geneval.benchmark_label` calls it an oracle's.

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
  CLIP is appended where one tells the colours.

  Attributes:
    output: 'partial' credit, or 'strict'.
    colour: what tells colours: 'query', the detector, asked for 'a photo of a red car' (not
      YOLOS); 'clip', a CLIP on the box, as GenEval does, without its masks; '' is 'query' where
      that works.
    entries: classes that a prompt asks for or forbids, at most.
    limits: confidence that an object must exceed, that when counting, overlap from which on two
      objects of a class are one (1: never); () is the detector's. GenEval's are (0.3, 0.9, 1).
    weights: of an OWL-ViT, OWLv2 or YOLOS, as in `models.pretrained`.
    backbone: 'owlvit' or 'yolos'; '' is what the checkpoint holds, and 'owlvit' for random weights.
    clip_weights: of the CLIP, for colour='clip'.
    dtype: of the parameters, 'float32' or 'bfloat16'.
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
    fits = len(self.limits) == 3 and all(0 < x < 1 for x in self.limits[:2])
    if self.limits and not (fits and 0 < self.limits[2] <= 1):
      raise ConfigError(
        f'verifier.limits={self.limits}: must be () or two confidences within (0, 1) and an '
        'overlap within (0, 1]'
      )
    if self.backbone or detectors.known_backbone(self.weights):
      self._check_parts()  # reads no file

  @property
  def detector(self) -> detectors.Detector:
    """What finds objects."""
    return detectors.make_detector(self.weights, self.backbone, self.dtype)

  @property
  def colour_clip(self) -> colours.ColourClip | None:
    """What tells colours; None where the detector does."""
    if self.colour == 'query' or (not self.colour and self.detector.reads_colours):
      return None
    setting = 'verifier.clip_weights'
    return colours.ColourClip('clip', self.clip_weights, self.dtype, setting=setting)

  @property
  def scoring_models(self) -> tuple[str, ...]:
    """Names of the models that decide: the detector, and the CLIP if there is one."""
    clip = self.colour_clip
    return (self.detector.name, *([clip.name] if clip else []))

  @property
  def names(self):
    # a strict score is what `metrics.geneval.benchmark_label` names so; partial credit is not
    kind = ['partial'] if self.output == 'partial' else []
    return ('_'.join(['geneval', *kind, *self.scoring_models]),)

  def check(self):
    self._check_parts()
    _ = self.detector.config, self.colour_clip and self.colour_clip.config

  def _check_parts(self):
    detector, _ = self.detector, self.colour_clip  # they refuse what they do not know
    if self.colour == 'query' and not detector.reads_colours:
      raise ConfigError(
        f"verifier.colour='query': {detector.name} cannot be asked for colours; must be 'clip'"
      )

  def load(self):
    return {name: part.load() for name, part in self._parts().items()}

  def shardings(self, mesh):
    return {name: part.shardings(mesh) for name, part in self._parts().items()}

  def _parts(self):
    clip = self.colour_clip
    return {'detector': self.detector, **({'clip': clip} if clip else {})}

  def tokenize(self, prompts: Sequence[core.Prompt]):
    """What is asked for, and the words of it.

    Raises:
      ConfigError: a prompt without metadata, or with more than the settings allow.
    """
    rows = geneval.metadata_of(prompts)
    targets, names = rules.read_targets(rows, self.entries)
    clip = self.colour_clip
    arrays = {'targets': targets, 'detector': self.detector.tokenize(names, clip is None)}
    if clip:
      # the CLIP reads one crop of each entry, that of the best object
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
      'detector': self.detector.encode(params['detector'], prompt['detector']),
    }
    if 'clip' in prompt:
      vctx['clip'] = self.colour_clip.encode(params['clip'], prompt['clip'])
    return vctx

  @property
  def _limits(self) -> rules.Limits:
    return rules.Limits(*self.limits) if self.limits else self.detector.limits

  def find_objects(self, params, vctx, images):
    """The best objects of each class in images `[B, M, H, W, 3]`, best first: boxes `[B, M, E, K,
    4]` in pixels, scores `[B, M, E, K]`, log-probabilities of colours `[B, M, E, K or 1, C]`."""
    boxes, scores, hues = self.detector.detect(
      params['detector'], vctx['detector'], images, self.entries
    )
    boxes = boxes[:, :, None]
    index, best = rules.select_best(boxes, scores, self._limits.overlap)
    boxes = jnp.take_along_axis(boxes, index[..., None], 3)
    if 'clip' not in vctx:
      return boxes, best, jnp.take_along_axis(hues, index[..., None], 3)
    hues = self.colour_clip.classify(params['clip'], vctx['clip'], images, boxes[:, :, :, 0])
    return boxes, best, hues[:, :, :, None]

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = observed['image']
    score_rules = rules.score_partial if self.output == 'partial' else rules.score_strict
    earned = score_rules(vctx['targets'], *self.find_objects(params, vctx, images), self._limits)
    # a comparison with NaN is just False: without this a broken picture would have a score
    broken = jnp.isnan(images).any((2, 3, 4))
    return {self.names[0]: jnp.where(broken, jnp.nan, earned)}

  def list_detections(self, params, prompts: Sequence[core.Prompt], images):
    """What was found in images `[B, M, H, W, 3]`, for `metrics.geneval.report_benchmark`.

    B lists of M lists of {'class', 'score', 'box', 'color'}; where a CLIP tells colours, the best
    object of each class alone has a 'color'.
    """
    arrays = self.tokenize(prompts)
    _, names = rules.read_targets(geneval.metadata_of(prompts), self.entries)
    boxes, scores, hues = map(np.asarray, _find_objects(self, params, arrays, images))
    hues = hues.argmax(-1)

    def objects(b, m, name, e):
      for k in np.flatnonzero(scores[b, m, e] > 0):  # 0 marks what was left out
        hue = {'color': geneval.COLOURS[hues[b, m, e, k]]} if k < hues.shape[3] else {}
        box = boxes[b, m, e, k].tolist()
        yield {'class': name, 'score': float(scores[b, m, e, k]), 'box': box, **hue}

    # two entries of one class have found the same objects: the first tells them
    first = [{name: row.index(name) for name in row} for row in names]
    return [
      [[d for name, e in first[b].items() for d in objects(b, m, name, e)] for m in range(len(row))]
      for b, row in enumerate(scores)
    ]

  def cost(self, op):
    """A closed-set detector's is that of a square picture."""
    clip = self.colour_clip
    queries = self.entries * (1 if clip else 1 + len(geneval.COLOURS))
    part = 'text' if op == 'encode' else 'image'
    flops = self.detector.flops(part, queries) + (self.entries * clip.flops(part) if clip else 0)
    return core.Cost(verify=float(op == 'score'), flops=flops)


@functools.partial(jax.jit, static_argnums=0)
def _find_objects(verifier, params, prompt, images):
  return verifier.find_objects(params, verifier.encode(params, prompt), images)
