"""A CLIP-like score of the scene world: how well a picture fits a caption, by one of two models.

The score `scenes_clip_a` (or `_b`) is the model's logit: the scaled cosine of the two embeddings
plus a bias, 0 where the model is undecided. See scenes/models/clip.py; Radford et al. (2021).
"""

import dataclasses

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.scenes import world
from vtts_jax.scenes.models import SceneModel, clip

WHICH = ('a', 'b')


@dataclasses.dataclass(frozen=True)
class ScenesClip(core.Verifier):
  """One dual encoder.

  Attributes:
    which: 'a' (trained half on corrupted and unfinished pictures) or 'b' (clean pictures only, and
      so easier to fool); trained independently of each other.
  """

  which: str = 'a'

  gives = frozenset({'features', 'gradient'})

  def __post_init__(self):
    if self.which not in WHICH:
      raise ConfigError(f'verifier.which={self.which!r}: must be one of {", ".join(WHICH)}')

  @property
  def names(self):
    return (f'scenes_clip_{self.which}',)

  @property
  def encoder(self) -> SceneModel:
    return SceneModel(f'clip_{self.which}')

  def load(self):
    return self.encoder.load()

  def tokenize(self, prompts):
    return {'ids': world.tokenize_texts(core.texts_of(prompts))}

  def encode(self, params, prompt):
    """Ids `[B, 12]` -> unit embeddings `[B, D]`."""
    return self.encoder.bind(params).text(prompt['ids'])

  def embed_images(self, params, images):
    """Images `[B, M, 32, 32, 3]` -> unit embeddings `[B, M, D]`."""
    rows = self.encoder.bind(params).image(images.reshape(-1, *images.shape[2:]))
    return rows.reshape(*images.shape[:2], -1)

  def score(self, params, vctx, observed):
    embeddings = self.embed_images(params, observed['image'])
    return {self.names[0]: self.encoder.bind(params).logits(embeddings, vctx[:, None])}

  def cost(self, op):
    tower = 'text' if op == 'encode' else 'image'
    return core.Cost(verify=float(op == 'score'), flops=clip.flops(self.encoder.config, tower))
