"""A trained detector as a verifier of the scene world: do its detections satisfy the caption?

The score `scenes_detector` is the log-probability, in [-30, 0], that the detections satisfy
GenEval's rules (`satisfaction_log_prob` in scenes/models/soft_detector.py). The detector is neither
the one behind the tokenizers' perceptual loss nor the rule-based oracle that measures accuracy.
"""

import dataclasses

from vtts_jax import core
from vtts_jax.scenes.models import SceneModel, soft_detector

MODEL = SceneModel('verifier_detector')


@dataclasses.dataclass(frozen=True)
class ScenesDetector(core.Verifier):
  """The detector of scenes/models/soft_detector.py; no settings."""

  names = ('scenes_detector',)
  gives = frozenset({'gradient'})

  def load(self):
    return MODEL.load()

  def tokenize(self, prompts):
    """Targets `[B, 7]` of the captions.

    Raises:
      ConfigError: a text outside the grammar; the message shows its forms.
    """
    return {'targets': soft_detector.parse_captions(core.texts_of(prompts))}

  def encode(self, params, prompt):
    return prompt['targets']

  def score(self, params, vctx, observed):
    images = observed['image']  # [B, M, 32, 32, 3]
    # the model knows rows only: prompts and candidates are one batch to it
    rows = MODEL.bind(params)(images.reshape(-1, *images.shape[2:]))
    kind, colour = (x.reshape(*images.shape[:2], *x.shape[1:]) for x in rows)
    return {'scenes_detector': soft_detector.satisfaction_log_prob(kind, colour, vctx)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=soft_detector.count_flops(MODEL.config))
