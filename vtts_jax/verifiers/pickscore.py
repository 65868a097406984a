"""PickScore: which picture people prefer for a prompt, by a CLIP H/14 trained on their choices.

The score `pickscore_h14` is the published one, the scaled cosine (about 20). The published pipeline
is transformers' CLIPProcessor: texts are not cleaned, and the centre crop takes the first of two
middles. Kirstain et al. 2023, arXiv 2305.01569; github.com/yuvalkirstain/PickScore; models/clip.
"""

import dataclasses

from vtts_jax.verifiers.parts.dual_encoder import H14, DualEncoder


@dataclasses.dataclass(frozen=True)
class PickScore(DualEncoder):
  """PickScore v1; `DualEncoder` has the settings. The tokenizer is that of the CLIP that PickScore
  was fine-tuned from."""

  weights: str = 'yuvalkirstain/PickScore_v1'
  tokenizer: str = H14

  size = 'h14'
  cleans_text = False
  crop = 'transformers'

  @property
  def names(self):
    return (self.published_name('pickscore_h14'),)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    # people's choices were fitted as a softmax over scaled cosines
    cosine = self.cosine_scores(params, vctx, observed['image'])
    return {self.names[0]: self.model_part.bind(params).pair_logits(cosine)}
