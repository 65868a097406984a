"""Self-consistency: similarity of a sample to an earlier prediction of it; needs no reference.

This is the self-supervised verifier of Ma et al. (2025, arXiv 2501.09732): the cosine of the DINO
(or CLIP) embeddings of the final sample and of the clean picture predicted at a low noise level,
which the generator shows as 'early_image'.
"""

import dataclasses

from vtts_jax.verifiers.parts.image_encoder import EncoderVerifier, backbone_encoder

DEFAULTS = {'dino': 'facebook/dinov2-base', 'clip': 'openai/clip-vit-base-patch32'}


@dataclasses.dataclass(frozen=True)
class SelfConsistency(EncoderVerifier):
  """Score `self_consistency_<model>`, in [-1, 1]; `EncoderVerifier` has the other settings.

  Attributes:
    weights: '' selects facebook/dinov2-base or openai/clip-vit-base-patch32.
    backbone: 'dino' (DINO or DINOv2) or 'clip'.
  """

  backbone: str = 'dino'

  needs = frozenset({'image', 'early_image'})
  # the bill counts two embeddings per candidate
  images_read = 2

  @property
  def model_part(self):
    weights = self.weights or DEFAULTS.get(self.backbone)
    return backbone_encoder(self.backbone, weights, self.dtype)

  @property
  def names(self):
    return (f'self_consistency_{self.model_part.name}',)

  def score(self, params, vctx, observed):
    """Images and their early predictions, both `[B, M, H, W, 3]`, to `{name: [B, M]}`."""
    # both are unit vectors: the sum of products is their cosine
    last, early = (self.embed_images(params, observed[name]) for name in ('image', 'early_image'))
    return {self.names[0]: (last * early).sum(-1)}
