"""CLIPScore: how well a picture fits its prompt, by CLIP (any size) or SigLIP.

Hessel et al. (2021), arXiv 2104.08718: 2.5 max(cosine, 0). The score's name has the backbone, and
the scale where it is another: `clip_b16` is CLIPScore with OpenAI's B/16, `clip_b16_cosine` the
cosine. Prompts are read as they are; the paper puts 'A photo depicts' before its captions.
models/clip, models/siglip.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax.components import build_dataclass
from vtts_jax.errors import ConfigError
from vtts_jax.verifiers.parts.dual_encoder import Dual

SCALES = ('clipscore', 'cosine', 'percent', 'logit')


@dataclasses.dataclass(frozen=True)
class Clip(Dual):
  """CLIP or SigLIP; `Dual` has the other settings.

  Attributes:
    model_from: as in `Dual`; 'google/siglip-base-patch16-224' is as good.
    scale: 'clipscore': 2.5 max(cosine, 0); 'cosine'; 'percent': 100 cosine; 'logit': what the model
      was trained on, for SigLIP with its bias.
  """

  model_from: str = 'openai/clip-vit-base-patch16'
  scale: str = 'clipscore'

  def __post_init__(self):
    super().__post_init__()
    if self.scale not in SCALES:
      allowed = ', '.join(map(repr, SCALES))
      raise ConfigError(f'verifier.scale={self.scale!r}: must be one of {allowed}')

  @property
  def names(self):
    return (self.backbone + ('' if self.scale == 'clipscore' else f'_{self.scale}'),)

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    cosine = self.cosine(params, vctx, images)
    if self.scale == 'clipscore':
      cosine = 2.5 * jnp.maximum(cosine, 0)
    elif self.scale == 'percent':
      cosine = 100 * cosine
    elif self.scale == 'logit':
      cosine = self.merge(params).logits(cosine)
    return {self.names[0]: cosine}


def build(**given):
  return build_dataclass(Clip, **given)
