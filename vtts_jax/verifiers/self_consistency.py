"""Likeness of a sample to what was predicted of it earlier: no label, no reference.

Ma et al. (2025, arXiv 2501.09732), the self-supervised verifier: the cosine of the DINO (or CLIP)
embeddings of a prediction of the clean picture at a low noise level and of the final sample. It is
on the signal `early`, the pictures of that prediction. Letters: B prompts, M candidates, H W image,
D width of an embedding.
"""

import dataclasses

from vtts_jax import components, core
from vtts_jax.verifiers.parts import image_encoder as towers

DEFAULTS = {'dino': 'facebook/dinov2-base', 'clip': 'openai/clip-vit-base-patch32'}


@dataclasses.dataclass(frozen=True)
class SelfConsistency(core.Verifier):
  """Score `self_consistency_<model>`, in [-1, 1].

  Attributes:
    backbone: 'dino' (DINO or DINOv2) or 'clip'.
    model_from: checkpoint: file, folder or `owner/name@revision`; '' is facebook/dinov2-base or
      openai/clip-vit-base-patch32.
    random: '' loads it; 'tiny' or a released size by name is random weights of that size.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  backbone: str = 'dino'
  model_from: str = ''
  random: str = ''
  dtype: str = 'float32'

  uses = frozenset({'images', 'early'})

  def __post_init__(self):
    _ = self.tower  # refuses what is unknown

  @property
  def tower(self):
    return towers.tower(self.backbone, self.model_from, self.random, self.dtype, DEFAULTS)

  @property
  def names(self):
    return (f'self_consistency_{self.tower.name}',)

  def load(self):
    return self.tower.load()

  def features(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, D]`."""
    return towers.flat(lambda x: self.tower.embed(params, x), images)

  def score(self, params, vctx, images, *, early, **signals):
    """Images and what they looked like earlier, both `[B, M, H, W, 3]`."""
    found = self.features(params, images) * self.features(params, early)
    return {self.names[0]: found.sum(-1)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=2 * self.tower.flops())


def build(**given):
  return components.build_dataclass(SelfConsistency, **given)
