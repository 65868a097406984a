"""How surely a classifier sees the class that was asked for: DINOv2's linear ImageNet head.

The supervised verifier of Ma et al. (2025, arXiv 2501.09732) for class-conditional generators.
Prompts have a label, or their text is a class number or name. Letters: B prompts, M candidates, H W
image, C classes.
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
    weights: a checkpoint with a linear head, or 'random:' before such a size.
    output: 'logit' of the class, or its 'log_prob' among all of them.
    class_names: text file whose line i (from 0) names class i; '' takes numbers only.
  """

  weights: str = 'facebook/dinov2-base-imagenet1k-1-layer'
  output: str = 'logit'
  class_names: str = ''

  def __post_init__(self):
    super().__post_init__()
    if self.output not in OUTPUTS:
      allowed = ', '.join(map(repr, OUTPUTS))
      raise ConfigError(f'verifier.output={self.output!r}: must be one of {allowed}')
    if self.encoder.is_random:
      self.check()

  @property
  def encoder(self):
    return ImageEncoder('dino', self.weights, self.dtype)

  @property
  def names(self):
    return (f'dino_{self.output}_{self.encoder.name}',)

  def check(self):
    if not self.encoder.config.classes:
      raise ConfigError(
        f'verifier.weights={self.weights!r}: has no linear head; the released ones end in '
        'imagenet1k-1-layer'
      )
    _ = self._class_names

  @property
  def _class_names(self):
    if not self.class_names:
      return ()
    return classes.read_class_names(self.class_names, 'verifier.class_names')

  def tokenize(self, prompts):
    """The classes, `{'label': [B]}`; errors as in `class_labels`."""
    count, names = self.encoder.config.classes, self._class_names
    return {'label': classes.class_labels(prompts, count, 'verifier.class_names', names)}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    model, encoder = self.encoder.bind(params), self.encoder
    preprocess = lambda x: encoder.modeling.preprocess(encoder.config, x)
    logits = map_images(lambda x: model.logits(preprocess(x)), observed['image'])  # [B, M, C]
    if self.output == 'log_prob':
      logits = jax.nn.log_softmax(logits, -1)
    wanted = jax.nn.one_hot(vctx['label'], logits.shape[-1])
    return {self.names[0]: (logits * wanted[:, None]).sum(-1)}
