"""Similarity to reference pictures: DINO-I or CLIP-I, the mean cosine of embeddings.

DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 4.1) measures with it whether a subject
is preserved: DINO ViT-S/16 or CLIP ViT-B/32, averaged over the references of a prompt. The paper's
code was not released; pictures are cut as in the backbones' own code (facebookresearch/dino and
OpenAI's CLIP: torchvision's centre crop), or as a CLIP's own files say.
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
    weights: '' selects facebook/dino-vits16 or openai/clip-vit-base-patch32.
    backbone: 'dino' (DINO or DINOv2) or 'clip'.
  """

  backbone: str = 'dino'

  @property
  def model_part(self):
    # an unknown backbone has no default here; `backbone_encoder` names the allowed ones
    weights = self.weights or DEFAULTS.get(self.backbone)
    return backbone_encoder(self.backbone, weights, self.dtype)

  @property
  def names(self):
    return (f'{LABELS[self.backbone]}_{self.model_part.name}',)
