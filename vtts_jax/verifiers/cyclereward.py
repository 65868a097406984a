"""CycleReward: how well a picture and a text can be told from each other, by BLIP and an MLP.

Trained on which text describes a picture better (or which picture a text) by how well one is
recovered from the other; no people rated anything. Bahng et al. (ICCV 2025), arXiv 2506.02095;
models/blip. The score is the raw output, on no scale of its own.

Letters: B prompts.
"""

import dataclasses

from vtts_jax.errors import ConfigError
from vtts_jax.models.pretrained import RANDOM
from vtts_jax.verifiers.image_reward import ImageReward

VARIANTS = ('combo', 'i2t', 't2i')


@dataclasses.dataclass(frozen=True)
class CycleReward(ImageReward):
  """CycleReward; the released variants differ in their weights alone.

  Attributes:
    weights: as in `models.pretrained`. The released files are pickles: README.md of `models/blip`
      says how to save them anew.
    tokenizer: folder or repository with BERT's tokenizer; random weights hash the words instead.
    dtype: of the weights, 'float32' or 'bfloat16'; the head is computed in float32.
    variant: which of the three the weights are, part of the score's name: 'combo' (trained on both
      kinds of pairs, recommended), 'i2t' (texts of a picture) or 't2i' (pictures of a text).
  """

  weights: str = 'CycleReward-Combo.safetensors'
  variant: str = 'combo'

  def __post_init__(self):
    super().__post_init__()
    if self.variant not in VARIANTS:
      raise ConfigError(f'verifier.variant={self.variant!r}: must be one of {", ".join(VARIANTS)}')

  @property
  def names(self):
    random = f'_{self.model_part.name}' if self.model_part.is_random else ''
    return (f'cyclereward_{self.variant}_blip_l{random}',)

  def check(self):
    # ImageReward's weights are of the same network, and would give a number here
    if not self.model_part.config.head_act:
      allowed = f'CycleReward or {RANDOM}tiny_cycle'
      raise ConfigError(f'verifier.weights={self.weights!r}: is an ImageReward; must be {allowed}')
