"""A CLIP-like verifier of the scene world: how well a picture fits a caption.

The score `scenes_clip_a` (or `_b`) is the model's logit: the scaled cosine of both embeddings plus
a bias; 0 means undecided. See scenes/models/clip.py; Radford et al. (2021).
"""

import dataclasses

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.scenes import world
from vtts_jax.scenes.models import SceneModel, clip

WHICH = ('a', 'b')


@dataclasses.dataclass(frozen=True)
class ScenesClip(core.Verifier):
  """One of two independently trained dual encoders.

  Attributes:
    which: 'a' (half of its training pictures are corrupted or unfinished) or 'b' (clean pictures
      only, which makes it easier to fool).
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
  def model_part(self) -> SceneModel:
    """The dual encoder."""
    return SceneModel(f'clip_{self.which}')

  def load(self):
    return self.model_part.load()

  def tokenize(self, prompts):
    return {'ids': world.tokenize_texts(core.texts_of(prompts))}

  def encode(self, params, prompt):
    """Word ids `[B, 12]` to unit embeddings `[B, D]`."""
    return self.model_part.bind(params).embed_texts(prompt['ids'])

  def embed_images(self, params, images):
    """Images `[B, M, 32, 32, 3]` to unit embeddings `[B, M, D]`."""
    # the model knows rows only: prompts and candidates are one batch to it
    rows = self.model_part.bind(params).embed_images(images.reshape(-1, *images.shape[2:]))
    return rows.reshape(*images.shape[:2], -1)

  def score(self, params, vctx, observed):
    embeddings = self.embed_images(params, observed['image'])
    return {self.names[0]: self.model_part.bind(params).pair_logits(embeddings, vctx[:, None])}

  def cost(self, op):
    tower = 'text' if op == 'encode' else 'image'
    flops = clip.count_flops(self.model_part.config, tower)
    return core.Cost(verify=float(op == 'score'), flops=flops)
