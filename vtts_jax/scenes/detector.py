"""A trained detector of the scene world as verifier: do its soft detections satisfy the caption?

The score `scenes_detector` is the log-probability, in [-30, 0], that GenEval's rules hold of what
the detector sees (scenes/models/soft_detector.py `satisfaction`). It is neither the detector behind the
tokenizers' perceptual loss nor the rule-based oracle that measures accuracy.
"""

import dataclasses
import functools

from vtts_jax import core
from vtts_jax.components import build_dataclass
from vtts_jax.models import modules
from vtts_jax.scenes import models as scenes
from vtts_jax.scenes.models import soft_detector as judge

MODEL = 'verifier_detector'
_config = functools.cache(scenes.config)


@dataclasses.dataclass(frozen=True)
class ScenesDetector(core.Verifier):
  """The detector of scenes/models/soft_detector.py; no settings."""

  @property
  def names(self):
    return ('scenes_detector',)

  def load(self):
    return scenes.load(MODEL)[1]

  def tokenize(self, texts):
    """Targets `[B, 7]` by the closed grammar; a text outside it is an error that shows the form."""
    return {'targets': judge.parse(texts)}

  def encode(self, params, prompt):
    return prompt['targets']

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, 32, 32, 3]` -> `{'scenes_detector': [B, M]}`."""
    model = modules.merge(scenes.load(MODEL)[0], params)
    b, m = images.shape[:2]
    kind, colour = model(images.reshape(b * m, *images.shape[2:]))
    split = lambda x: x.reshape(b, m, *x.shape[1:])
    return {'scenes_detector': judge.satisfaction(split(kind), split(colour), vctx)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=judge.flops(_config(MODEL)))


def build(**given):
  return build_dataclass(ScenesDetector, **given)
