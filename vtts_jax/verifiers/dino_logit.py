"""How surely a classifier sees the class that was asked for: DINOv2's linear ImageNet head.

The supervised verifier of Ma et al. (2025, arXiv 2501.09732) for class-conditional generators.
Prompts are class numbers, or lines of a file of class names. Letters: B prompts, M candidates, H W
image, C classes, D width of an embedding.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.verifiers.parts import image_encoder as towers

SCORES = ('logit', 'log_prob')


@dataclasses.dataclass(frozen=True)
class DinoLogit(core.Verifier):
  """Score `dino_logit_<model>`, unbounded, or `dino_log_prob_<model>`, at most 0.

  Attributes:
    score_as: 'logit' of the class, or its 'log_prob' among all of them.
    class_names: text file whose line i (from 0) names class i; '' takes numbers only.
    model_from: checkpoint with a linear head: file, folder or `owner/name@revision`.
    random: '' loads it; 'tiny' (10 classes) or a released size by name is random weights of that
      size.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  score_as: str = 'logit'
  class_names: str = ''
  model_from: str = 'facebook/dinov2-base-imagenet1k-1-layer'
  random: str = ''
  dtype: str = 'float32'

  def __post_init__(self):
    if self.score_as not in SCORES:
      allowed = ', '.join(map(repr, SCORES))
      raise ConfigError(f'verifier.score_as={self.score_as!r}: must be one of {allowed}')
    _ = self.tower  # refuses what is unknown, and a size without a head

  @property
  def tower(self):
    return towers.DinoHead(self.model_from, self.random, self.dtype)

  @property
  def names(self):
    return (f'dino_{self.score_as}_{self.tower.name}',)

  def check(self):
    if self.class_names and not pathlib.Path(self.class_names).is_file():
      raise ConfigError(f'verifier.class_names={self.class_names!r}: no such file')

  def load(self):
    return self.tower.load()

  def tokenize(self, texts):
    """The classes, `{'label': [B]}`.

    Raises:
      ConfigError: a prompt that is none of the classes.
    """
    self.check()
    classes, where = self.tower.config.classes, self.class_names
    lines = pathlib.Path(where).read_text(encoding='utf-8').splitlines() if where else []
    number, found = {line.strip(): i for i, line in enumerate(lines)}, []
    for text in map(str.strip, texts):
      label = number.get(text, int(text) if text.isdecimal() else -1)
      if not 0 <= label < classes:
        allowed = f'a number in 0 .. {classes - 1}' + (f' or a line of {where}' if where else '')
        raise ConfigError(f'prompts: {text!r} is no class; must be {allowed}')
      found.append(label)
    return {'label': np.array(found, np.int32)}

  def features(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, D]`."""
    return towers.flat(lambda x: self.tower.embed(params, x), images)

  def score(self, params, vctx, images, **signals):
    found = towers.flat(lambda x: self.tower.logits(params, x), images)  # [B, M, C]
    if self.score_as == 'log_prob':
      found = jax.nn.log_softmax(found, -1)
    wanted = jax.nn.one_hot(vctx['label'], found.shape[-1])
    return {self.names[0]: (found * wanted[:, None]).sum(-1)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=self.tower.flops())


def build(**given):
  return components.build_dataclass(DinoLogit, **given)
