"""Do a detector's objects satisfy the prompt: how many, in which colour, where? GenEval's rules.

A detector (OWL-ViT, OWLv2, or YOLOS for COCO's classes) looks for the classes that the prompt names
and the rules of GenEval (Ghosh et al. 2023, arXiv 2310.11513) are applied to what it finds, as they
stand or with partial credit; see geneval_rules.py. What a prompt asks for is read off its sentence
where it is one of GenEval's, or stands in a file in GenEval's format.

None of these detectors is the one behind the published benchmark. A benchmark score taken from the
detector that was searched on says little: by `Spatial.judges`, `metrics.geneval.column` calls it an
oracle's.

Letters: B prompts · M pictures · H W their sides · E entries of a prompt's metadata · K objects.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import components, core
from vtts_jax.data import geneval
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval_arrays as geneval_rules
from vtts_jax.verifiers.parts import colours, detectors

MODES = ('partial', 'strict')
COLOURS = ('', 'query', 'clip')


@dataclasses.dataclass(frozen=True)
class Spatial(core.Verifier):
  """Score `spatial_<detector>` in [0, 1], or `spatial_strict_<detector>`, 0 or 1; the name of the
  CLIP is appended where one tells the colours.

  Attributes:
    mode: 'partial' credit, or 'strict'.
    colour: who tells colours: 'query', the detector, asked for 'a photo of a red car' (not YOLOS);
      'clip', a CLIP on the box, as GenEval does, without its masks; '' is 'query' if that works.
    metadata: jsonl file in GenEval's format, found by `prompt`; '' reads GenEval's own prompts.
    entries: classes that a prompt asks for or forbids, at most.
    limits: confidence that an object must exceed, that when counting, overlap from which on two
      objects of a class are one (1: never); () is the detector's. GenEval's are (0.3, 0.9, 1).
    model_from: checkpoint of an OWL-ViT, OWLv2 or YOLOS: file, folder or `owner/name@revision`.
    clip_from: that of the CLIP, for colour='clip'.
    random: '' loads them; 'tiny', 'tiny_v2', 'tiny_yolos' or a released size is random weights of
      that size (of the CLIP: tiny).
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  mode: str = 'partial'
  colour: str = ''
  metadata: str = ''
  entries: int = 2
  limits: tuple[float, ...] = ()
  model_from: str = 'google/owlvit-base-patch32'
  clip_from: str = 'openai/clip-vit-large-patch14'
  random: str = ''
  dtype: str = 'float32'

  def __post_init__(self):
    for name, allowed in (('mode', MODES), ('colour', COLOURS)):
      value = getattr(self, name)
      if value not in allowed:
        raise ConfigError(
          f'verifier.{name}={value!r}: must be one of {", ".join(map(repr, allowed))}'
        )
    if self.entries < 1:
      raise ConfigError(f'verifier.entries={self.entries}: must be at least 1')
    fits = len(self.limits) == 3 and all(0 < x < 1 for x in self.limits[:2])
    if self.limits and not (fits and 0 < self.limits[2] <= 1):
      raise ConfigError(
        f'verifier.limits={self.limits}: must be () or two confidences within (0, 1) and an '
        'overlap within (0, 1]'
      )
    detectors.towers.check_dtype(self.dtype)
    if self.random:
      self.check()

  @property
  def model(self) -> detectors.Detector:
    return detectors.detector(self.model_from, self.random, self.dtype)

  @property
  def clip(self) -> colours.ColourClip | None:
    """Who tells colours, None where the detector does."""
    if self.colour == 'query' or (not self.colour and self.model.coloured):
      return None
    return colours.ColourClip(self.clip_from, 'tiny' if self.random else '', self.dtype)

  @property
  def judges(self) -> tuple[str, ...]:
    """Names of the models that decide: the detector, and the CLIP if there is one."""
    return (self.model.name, *([self.clip.name] if self.clip else []))

  @property
  def names(self):
    return ('_'.join(['spatial', *(['strict'] if self.mode == 'strict' else []), *self.judges]),)

  def check(self):
    coloured = self.model.coloured  # an unknown size is refused here
    if self.colour == 'query' and not coloured:
      raise ConfigError(
        f"verifier.colour='query': {self.model.name} cannot be asked for colours; must be 'clip'"
      )

  def load(self):
    self.check()
    clip = {'clip': self.clip.load()} if self.clip else {}
    return {'detector': self.model.load(), **clip}

  def tokenize(self, texts):
    """What is asked for and the words of it.

    Raises:
      ConfigError: a prompt without metadata, or with more than the settings allow.
    """
    rows = geneval.metadata(texts, self.metadata)
    targets, names = geneval_rules.targets(rows, self.entries)
    prompt = {'targets': targets, 'detector': self.model.tokenize(names, self.clip is None)}
    if self.clip:
      many = (targets['colour'] >= 0) & (targets['least'] > 1)
      if many.any():
        raise ConfigError(
          f'prompts: {texts[int(many.any(1).argmax())]!r} asks for the colour of several objects '
          "of a class; with colour='clip' it must be of one"
        )
      prompt['clip'] = self.clip.tokenize(names)
    return prompt

  def encode(self, params, prompt):
    vctx = {
      'targets': prompt['targets'],
      'detector': self.model.encode(params['detector'], prompt['detector']),
    }
    if self.clip:
      vctx['clip'] = self.clip.encode(params['clip'], prompt['clip'])
    return vctx

  def found(self, params, vctx, images):
    """The best objects of each class, best first: boxes `[B, M, E, K, 4]` in pixels, scores `[B, M,
    E, K]`, log-probabilities of colours `[B, M, E, K or 1, 10]`."""
    model, clip = self.model, self.clip
    boxes, scores, hues = model.detect(params['detector'], vctx['detector'], images, self.entries)
    index, best = geneval_rules.best(boxes, scores, (self.limits or model.limits)[2])
    boxes = jnp.take_along_axis(boxes[:, :, None], index[..., None], 3)
    if clip is None:
      hues = jnp.take_along_axis(hues, index[..., None, :], 4).swapaxes(3, 4)
    else:
      hues = clip.classify(params['clip'], vctx['clip'], images, boxes[:, :, :, 0])[..., None, :]
    return boxes, best, hues

  def detections(self, params, texts, images):
    """What was found in images `[B, M, H, W, 3]`, for `metrics.geneval.report` with `judges`.

    B lists of M lists of {'class', 'score', 'box', 'color'}; where a CLIP tells colours, of the
    best object of each class alone.
    """
    rows = geneval.metadata(texts, self.metadata)
    _, names = geneval_rules.targets(rows, self.entries)
    boxes, scores, hues = map(np.asarray, _found(self, params, self.tokenize(texts), images))
    hues = hues.argmax(-1)

    def seen(b, m, name, e):
      for k in np.flatnonzero(scores[b, m, e] > 0):
        hue = {'color': geneval.COLOURS[hues[b, m, e, k]]} if k < hues.shape[3] else {}
        box = boxes[b, m, e, k].tolist()
        yield {'class': name, 'score': float(scores[b, m, e, k]), 'box': box, **hue}

    first = [{name: row.index(name) for name in row} for row in names]
    return [
      [[d for name, e in first[b].items() for d in seen(b, m, name, e)] for m in range(len(row))]
      for b, row in enumerate(scores)
    ]

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    judge = getattr(geneval_rules, self.mode)
    confidence, counting, _ = self.limits or self.model.limits
    threshold = jnp.where(vctx['targets']['counting'], counting, confidence)
    earned = judge(vctx['targets'], *self.found(params, vctx, images), threshold)
    broken = jnp.isnan(images).any((2, 3, 4))
    return {self.names[0]: jnp.where(broken, jnp.nan, earned)}

  def cost(self, op):
    """A closed-set detector's is that of a square picture."""
    clip, queries = self.clip, self.entries * (1 if self.clip else 1 + len(geneval.COLOURS))
    part = 'text' if op == 'encode' else 'image'
    flops = self.model.flops(part, queries) + (self.entries * clip.flops(part) if clip else 0)
    return core.Cost(flops=flops) if op == 'encode' else core.Cost(verify=1, flops=flops)


@functools.partial(jax.jit, static_argnums=0)
def _found(verifier, params, prompt, images):
  return verifier.found(params, verifier.encode(params, prompt), images)


def build(**given):
  return components.build_dataclass(Spatial, **given)
