"""A CLIP-like score of the scene world: how well a picture fits a caption, by one of two models.

The score `scenes_clip_a` (or `_b`) is the model's logit: the scaled cosine of the two embeddings
plus a bias, 0 where the model is undecided. See scenes/models/clip.py; Radford et al. (2021).
"""

import dataclasses
import functools

from vtts_jax import core
from vtts_jax.components import build_dataclass
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.scenes import models as scenes
from vtts_jax.scenes import world as world
from vtts_jax.scenes.models import clip

WHICH = ('a', 'b')
_config = functools.cache(scenes.config)


@dataclasses.dataclass(frozen=True)
class ScenesClip(core.Verifier):
  """One dual encoder.

  Attributes:
    which: 'a' (trained half on spoiled and unfinished pictures) or 'b' (clean pictures only, and so
      easier to fool); trained independently of each other.
  """

  which: str = 'a'

  def __post_init__(self):
    if self.which not in WHICH:
      raise ConfigError(
        f'verifier.which={self.which!r}: must be one of {", ".join(map(repr, WHICH))}')

  @property
  def names(self):
    return (f'scenes_clip_{self.which}',)

  @property
  def model(self):
    """Name of the shipped weights."""
    return f'clip_{self.which}'

  def load(self):
    return scenes.load(self.model)[1]

  def tokenize(self, texts):
    return {'ids': world.tokenize(texts)}

  def encode(self, params, prompt):
    """Ids `[B, 12]` -> unit embeddings `[B, D]`."""
    return modules.merge(scenes.load(self.model)[0], params).text(prompt['ids'])

  def features(self, params, images):
    """Images `[B, M, 32, 32, 3]` -> unit embeddings `[B, M, D]`."""
    model = modules.merge(scenes.load(self.model)[0], params)
    return model.image(images.reshape(-1, *images.shape[2:])).reshape(*images.shape[:2], -1)

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, 32, 32, 3]` -> `{name: [B, M]}`."""
    model = modules.merge(scenes.load(self.model)[0], params)
    shown = model.image(images.reshape(-1, *images.shape[2:])).reshape(*images.shape[:2], -1)
    return {self.names[0]: model.logits(shown, vctx[:, None])}

  def cost(self, op):
    config = _config(self.model)
    if op == 'encode':
      return core.Cost(flops=clip.flops(config, 'text'))
    return core.Cost(verify=1, flops=clip.flops(config, 'image'))


def build(**given):
  return build_dataclass(ScenesClip, **given)
