"""A learned quality verifier of the scene world: how clean a picture is; the prompt is not read.

The score `scenes_quality` lies in [0, 1]: near 1 for a clean rendering, lower for a blurred,
unfinished, cut or mixed picture (scenes/models/quality.py). It ignores the prompt, so a search on
it alone shows what happens when a verifier ignores the request.
"""

import dataclasses

import jax

from vtts_jax import core
from vtts_jax.scenes.models import SceneModel, quality

MODEL = SceneModel('quality')


@dataclasses.dataclass(frozen=True)
class ScenesQuality(core.Verifier):
  """The scorer of scenes/models/quality.py; no settings."""

  names = ('scenes_quality',)
  gives = frozenset({'gradient'})

  def load(self):
    return MODEL.load()

  def score(self, params, vctx, observed):
    images = observed['image']  # [B, M, 32, 32, 3]
    # the model knows rows only: prompts and candidates are one batch to it
    logits = MODEL.bind(params)(images.reshape(-1, *images.shape[2:]))
    return {'scenes_quality': jax.nn.sigmoid(logits).reshape(images.shape[:2])}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=quality.count_flops(MODEL.config))
