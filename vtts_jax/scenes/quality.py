"""A learned score of how clean a scene picture is, whatever the prompt says.

The score `scenes_quality` lies in [0, 1]: near 1 for a clean rendering, lower the more a picture is
blurred, unfinished, cut or mixed (scenes/models/quality.py). It reads no prompt, so a search on it
alone shows what happens when a verifier ignores the request.
"""

import dataclasses
import functools

import jax

from vtts_jax import core
from vtts_jax.components import build_dataclass
from vtts_jax.models import modules
from vtts_jax.scenes import models as scenes
from vtts_jax.scenes.models import quality

MODEL = 'quality'
_config = functools.cache(scenes.config)


@dataclasses.dataclass(frozen=True)
class ScenesQuality(core.Verifier):
  """The scorer of scenes/models/quality.py; no settings."""

  @property
  def names(self):
    return ('scenes_quality',)

  def load(self):
    return scenes.load(MODEL)[1]

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, 32, 32, 3]` -> `{'scenes_quality': [B, M]}`."""
    model = modules.merge(scenes.load(MODEL)[0], params)
    logits = model(images.reshape(-1, *images.shape[2:]))
    return {'scenes_quality': jax.nn.sigmoid(logits).reshape(images.shape[:2])}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=quality.flops(_config(MODEL)))


def build(**given):
  return build_dataclass(ScenesQuality, **given)
