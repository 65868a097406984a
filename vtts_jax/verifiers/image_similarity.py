"""Likeness to reference pictures: DINO-I or CLIP-I, the mean cosine of their embeddings.

As DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 4.1) measures whether a subject is kept:
DINO ViT-S/16 or CLIP ViT-B/32, the average over the references of a prompt. Letters: B prompts, M
candidates, K references, H W image, D width of an embedding.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.data import references
from vtts_jax.verifiers.parts import image_encoder as towers

DEFAULTS = {'dino': 'facebook/dino-vits16', 'clip': 'openai/clip-vit-base-patch32'}
LABELS = {'dino': 'dino_i', 'clip': 'clip_i'}


@dataclasses.dataclass(frozen=True)
class ImageSimilarity(core.Verifier):
  """Score `dino_i_<model>` or `clip_i_<model>`, in [-1, 1].

  Attributes:
    references: a picture or a folder of pictures for every prompt, or a .jsonl of lines {"prompt":
      ..., "reference": picture, folder or list of these}.
    backbone: 'dino' (DINO or DINOv2) or 'clip'.
    model_from: checkpoint: file, folder or `owner/name@revision`; '' is facebook/dino-vits16 or
      openai/clip-vit-base-patch32.
    random: '' loads it; 'tiny' or a released size by name is random weights of that size.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  references: str = ''
  backbone: str = 'dino'
  model_from: str = ''
  random: str = ''
  dtype: str = 'float32'

  def __post_init__(self):
    _ = self.tower  # refuses what is unknown

  @property
  def tower(self):
    return towers.tower(self.backbone, self.model_from, self.random, self.dtype, DEFAULTS)

  @property
  def names(self):
    return (f'{LABELS[self.backbone]}_{self.tower.name}',)

  def check(self):
    references.index(self.references)

  def load(self):
    return self.tower.load()

  def tokenize(self, texts):
    return references.read(texts, self.references, self.tower.side, self.tower.shorter)

  def encode(self, params, prompt):
    """Pictures `[B, K, S, S, 3]` -> the mean of their unit embeddings `[B, D]`."""
    images = prompt['pictures'].astype(jnp.float32) / 255
    found = towers.flat(lambda x: self.tower.embed_fit(params, x), images)
    return references.mean(found, prompt['mask'])

  def features(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, D]`."""
    return towers.flat(lambda x: self.tower.embed(params, x), images)

  def score(self, params, vctx, images, **signals):
    found = self.features(params, images)
    return {self.names[0]: jnp.einsum('bmd,bd->bm', found, vctx)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost(flops=references.most(self.references) * self.tower.flops())
    return core.Cost(verify=1, flops=self.tower.flops())


def build(**given):
  return components.build_dataclass(ImageSimilarity, **given)
