"""CLIPScore: how well a picture fits its prompt, measured by CLIP (any size) or SigLIP.

Hessel et al. (2021), arXiv 2104.08718: 2.5 max(cosine, 0). The score's name contains the backbone,
and the output if it is not CLIPScore: `clip_b16` is CLIPScore with OpenAI's B/16, `clip_b16_cosine`
is the cosine. The paper puts 'A photo depicts' before its captions; here prompts stand alone.

The published pipeline is OpenAI's: texts are cleaned (`data.tokenizers.clean_text`), the shorter
side is resized, torchvision's centre crop takes the middle. A checkpoint whose own files say
another preprocessing (size, mean, filter, squash) has that one. SigLIP is as in transformers:
pictures are squashed; its tokenizer cleans texts itself, and those of version 2 are lower-cased.
models/clip, models/siglip.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.verifiers.parts.dual_encoder import DualEncoder

OUTPUTS = ('clipscore', 'cosine', 'percent', 'logit')


@dataclasses.dataclass(frozen=True)
class Clip(DualEncoder):
  """CLIP or SigLIP; `DualEncoder` has the other settings.

  Attributes:
    weights: as in `DualEncoder`; any CLIP or SigLIP, e.g. 'google/siglip-base-patch16-224'.
    output: 'clipscore': 2.5 max(cosine, 0); 'cosine'; 'percent': 100 cosine; 'logit': the model's
      training logit (scaled cosine, for SigLIP plus its bias).
  """

  weights: str = 'openai/clip-vit-base-patch16'
  output: str = 'clipscore'

  def __post_init__(self):
    super().__post_init__()
    if self.output not in OUTPUTS:
      allowed = ', '.join(map(repr, OUTPUTS))
      raise ConfigError(f'verifier.output={self.output!r}: must be one of {allowed}')

  @property
  def names(self):
    # a plain CLIPScore is named by its backbone alone; other outputs are other numbers
    return (self.backbone_name + ('' if self.output == 'clipscore' else f'_{self.output}'),)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    cosine = self.cosine_scores(params, vctx, observed['image'])
    if self.output == 'clipscore':
      # the published rescaling: cosines of matching pairs lie below 0.4
      cosine = 2.5 * jnp.maximum(cosine, 0)
    elif self.output == 'percent':
      cosine = 100 * cosine
    elif self.output == 'logit':
      cosine = self.model_part.bind(params).pair_logits(cosine)
    return {self.names[0]: cosine}
