"""PickScore: which picture people would pick for a prompt, by a CLIP H/14 tuned on their choices.

The score `pickscore_h14` is the published one, the scaled cosine (about 20). Kirstain et al. 2023,
arXiv 2305.01569; github.com/yuvalkirstain/PickScore; models/clip.
"""

import dataclasses

from vtts_jax.components import build_dataclass
from vtts_jax.verifiers.parts.dual_encoder import H14, Dual


@dataclasses.dataclass(frozen=True)
class PickScore(Dual):
  """PickScore v1; `Dual` has the settings. The tokenizer is that of the CLIP it was tuned from."""

  model_from: str = 'yuvalkirstain/PickScore_v1'
  tokenizer_from: str = H14

  size = 'h14'

  @property
  def names(self):
    return (self.published('pickscore_h14'),)

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    return {self.names[0]: self.merge(params).logits(self.cosine(params, vctx, images))}


def build(**given):
  return build_dataclass(PickScore, **given)
