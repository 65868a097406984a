"""DreamSim: perceptual similarity to reference pictures, as one minus the DreamSim distance.

Fu, Tamir et al. (2023, arXiv 2306.09344); models/dreamsim/README.md describes the files. With
several references the score is the mean over them.
"""

import dataclasses

from vtts_jax.errors import ConfigError
from vtts_jax.models.dreamsim import modeling
from vtts_jax.verifiers.parts.image_encoder import ImageEncoder, ReferenceVerifier


@dataclasses.dataclass(frozen=True)
class DreamSim(ReferenceVerifier):
  """Score `dreamsim_<branches>`, a cosine, in [-1, 1]; `ReferenceVerifier` has the other settings.

  Attributes:
    weights: folder of base weights and adapters, or one file with the adapters merged. The
      published files are pickles, which are never downloaded: models/dreamsim/README.md shows how
      to make a folder of them.
    branches: the released model: 'ensemble', or one of its branches 'dino_vitb16',
      'dinov2_vitb14', 'clip_vitb32', 'open_clip_vitb32'.
  """

  branches: str = 'ensemble'

  def __post_init__(self):
    if self.branches not in modeling.MEMBERS:
      allowed = ', '.join(modeling.MEMBERS)
      raise ConfigError(f'verifier.branches={self.branches!r}: must be one of {allowed}')
    # the published files are pickles: there is no repository to default to
    if not self.weights:
      raise ConfigError(
        "verifier.weights='': must be a folder or file of DreamSim's weights, or random:tiny; "
        'models/dreamsim/README.md says how to make one'
      )
    super().__post_init__()

  @property
  def model_part(self):
    return ImageEncoder('dreamsim', self.weights, self.dtype, self.branches)

  @property
  def names(self):
    # a random model must not carry the name of a released one
    return (f'dreamsim_{self.model_part.name if self.model_part.is_random else self.branches}',)
