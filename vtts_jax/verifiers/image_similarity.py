"""Likeness to reference pictures: DINO-I or CLIP-I, the mean cosine of their embeddings.

As DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 4.1) measures whether a subject is kept:
DINO ViT-S/16 or CLIP ViT-B/32, the average over the references of a prompt.
"""

import dataclasses

from vtts_jax.verifiers.parts.image_encoder import ReferenceVerifier, backbone_encoder

DEFAULTS = {'dino': 'facebook/dino-vits16', 'clip': 'openai/clip-vit-base-patch32'}
LABELS = {'dino': 'dino_i', 'clip': 'clip_i'}


@dataclasses.dataclass(frozen=True)
class ImageSimilarity(ReferenceVerifier):
  """Score `dino_i_<model>` or `clip_i_<model>`, in [-1, 1]; `ReferenceVerifier` has the other
  settings.

  Attributes:
    weights: '' is facebook/dino-vits16 or openai/clip-vit-base-patch32.
    backbone: 'dino' (DINO or DINOv2) or 'clip'.
  """

  backbone: str = 'dino'

  @property
  def encoder(self):
    weights = self.weights or DEFAULTS.get(self.backbone)
    return backbone_encoder(self.backbone, weights, self.dtype)

  @property
  def names(self):
    return (f'{LABELS[self.backbone]}_{self.encoder.name}',)
