"""HPS v2: how people rank a picture for its prompt, by a CLIP H/14 trained on their rankings.

The scores `hpsv2_0_h14` and `hpsv2_1_h14` are what `hpsv2.score` returns, the cosine (about 0.2 ..
0.35); the benchmark's tables show 100 times that. Scores of the two versions are not comparable.
The published pipeline is its own copy of open_clip: texts are cleaned, pictures are padded and not
cropped, and a preprocessing beside the weights is not read.
Wu et al. 2023, arXiv 2306.09341; github.com/tgxs002/HPSv2, hpsv2/img_score.py and its open_clip's
transform.py; models/clip.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess
from vtts_jax.models.clip import modeling
from vtts_jax.verifiers.parts.dual_encoder import H14, DualEncoder

PUBLISHED = {'2.0': 'HPS_v2_compressed.pt', '2.1': 'HPS_v2.1_compressed.pt'}  # in xswu/HPSv2


@dataclasses.dataclass(frozen=True)
class HPSv2(DualEncoder):
  """HPS v2; `DualEncoder` has the other settings.

  Attributes:
    weights: the checkpoint of this version as safetensors. The published files are pickles, which
      are never loaded: models/clip/README.md has the two lines that convert one.
    version: '2.0' or '2.1'.
  """

  tokenizer: str = H14
  version: str = '2.1'

  size = 'h14'

  def __post_init__(self):
    if self.version not in PUBLISHED:
      allowed = ', '.join(map(repr, PUBLISHED))
      raise ConfigError(f'verifier.version={self.version!r}: must be one of {allowed}')
    if not self.weights:
      raise ConfigError(
        f"verifier.weights='': must be {PUBLISHED[self.version]} of xswu/HPSv2 as safetensors; "
        'that is a pickle, which is never loaded: models/clip/README.md says how to convert it'
      )
    super().__post_init__()

  @property
  def names(self):
    return (self.published_name(f'hpsv{self.version.replace(".", "_")}_h14'),)

  def preprocess(self, images):
    """Resizes the longer side to S without rounding to 8 bits, and pads with black, as published.
    CLIP's own preprocessing crops instead."""
    # the sides are static under jit, so the resizing is planned in Python
    size, sides = self.model_part.config.image_size, images.shape[1:3]
    new = tuple(round(side * (size / max(sides))) for side in sides)
    x = preprocess.resize_images(images, new, 'bicubic', rounded=False)
    before = [(size - side) // 2 for side in new]
    around = [(b, size - side - b) for b, side in zip(before, new)]
    # padded before normalising: black is 0 only until then
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    return preprocess.normalize_channels(x, modeling.MEAN, modeling.STD)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    return {self.names[0]: self.cosine_scores(params, vctx, observed['image'])}
