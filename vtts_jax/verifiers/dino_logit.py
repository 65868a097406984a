"""How surely a classifier sees the class that a prompt asks for: DINOv2's linear ImageNet head.

The supervised verifier of Ma et al. (2025, arXiv 2501.09732) for class-conditional generators.
Prompts have a label, or their text is a class number or name. Pictures are cut as in DINOv2's own
evaluation (torchvision's centre crop), not as by transformers' BitImageProcessor. Letters: B
prompts, M candidates, H W image, C classes.
"""

import dataclasses

import jax

from vtts_jax.data import classes
from vtts_jax.errors import ConfigError
from vtts_jax.verifiers.parts.image_encoder import EncoderVerifier, ImageEncoder, map_images

OUTPUTS = ('logit', 'log_prob')


@dataclasses.dataclass(frozen=True)
class DinoLogit(EncoderVerifier):
  """Score `dino_logit_<model>`, unbounded, or `dino_log_prob_<model>`, at most 0.

  Attributes:
    weights: a checkpoint with a linear head, or 'random:SIZE' of a size that has one.
    output: the class's 'logit', or its 'log_prob' among all classes.
    class_names: text file whose line i (from 0) names class i; '' if prompts are class numbers.
  """

  weights: str = 'facebook/dinov2-base-imagenet1k-1-layer'
  output: str = 'logit'
  class_names: str = ''

  def __post_init__(self):
    super().__post_init__()
    if self.output not in OUTPUTS:
      allowed = ', '.join(map(repr, OUTPUTS))
      raise ConfigError(f'verifier.output={self.output!r}: must be one of {allowed}')
    # random sizes are known without reading a file, so a size without a head fails here
    if self.model_part.is_random:
      self.check()

  @property
  def model_part(self):
    return ImageEncoder('dino', self.weights, self.dtype)

  @property
  def names(self):
    return (f'dino_{self.output}_{self.model_part.name}',)

  def check(self):
    if not self.model_part.config.classes:
      raise ConfigError(
        f'verifier.weights={self.weights!r}: has no linear head; the released ones end in '
        'imagenet1k-1-layer'
      )
    _ = self._class_names  # raises if the file cannot be read

  @property
  def _class_names(self):
    if not self.class_names:
      return ()
    return classes.read_class_names(self.class_names, 'verifier.class_names')

  def tokenize(self, prompts):
    """Class numbers `{'label': [B]}`; raises the errors of `class_labels`."""
    count, names = self.model_part.config.classes, self._class_names
    return {'label': classes.class_labels(prompts, count, 'verifier.class_names', names)}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    part, model = self.model_part, self.model_part.bind(params)

    def classify_rows(images):
      return model.class_logits(part.modeling.preprocess(part.config, images))

    logits = map_images(classify_rows, observed['image'])  # [B, M, C]
    # a logit ignores the other classes and keeps rising; a log-probability saturates at 0
    if self.output == 'log_prob':
      logits = jax.nn.log_softmax(logits, -1)
    # a product instead of a gather: faster on TPUs, and NaN stays with its picture
    wanted = jax.nn.one_hot(vctx['label'], logits.shape[-1])
    return {self.names[0]: (logits * wanted[:, None]).sum(-1)}
