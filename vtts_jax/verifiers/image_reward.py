"""ImageReward: how much people like a picture for its prompt, by BLIP and a linear head.

The score `image_reward_blip_l` is the published one, roughly standard normal over the rated
pictures (-2 .. 2). Xu et al. (2023), arXiv 2304.05977; models/blip.

Letters: B prompts · M candidates · H W sides of an image.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.media import preprocess
from vtts_jax.models.blip import modeling
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.verifiers.parts.image_encoder import map_images


@dataclasses.dataclass(frozen=True)
class ImageReward(core.Verifier):
  """ImageReward 1.0.

  Attributes:
    weights: as in `models.pretrained`.
    tokenizer: folder or repository with BERT's tokenizer; random weights hash the words instead.
    dtype: of the weights, 'float32' or 'bfloat16'; the head is computed in float32.
  """

  weights: str = 'RE-N-Y/ImageReward'
  tokenizer: str = 'bert-base-uncased'
  dtype: str = 'float32'

  gives = frozenset({'gradient'})

  def __post_init__(self):
    _ = self.model_part  # raises on unknown settings

  @property
  def model_part(self) -> Pretrained:
    """BLIP and the reward head."""
    return Pretrained('blip', self.weights, self.dtype)

  @property
  def names(self):
    random = f'_{self.model_part.name}' if self.model_part.is_random else ''
    return (f'image_reward_blip_l{random}',)

  def check(self):
    _ = self.model_part.config

  def load(self):
    return self.model_part.load()

  def shardings(self, mesh):
    return self.model_part.shardings(mesh)

  def tokenize(self, prompts):
    # random weights have no tokenizer: their words are hashed
    config, place = self.model_part.config, '' if self.model_part.is_random else self.tokenizer
    ids, mask = tokenizers.tokenize_texts(
      core.texts_of(prompts), place, config.length, config.vocab, setting='the length'
    )
    return {'ids': ids, 'mask': mask}

  def encode(self, params, prompt):
    """Runs what depends on the text alone: the first self-attention layer of the text tower."""
    text = self.model_part.bind(params).encode_text(prompt['ids'], prompt['mask'])
    return {'text': text, 'mask': prompt['mask']}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    model, images = self.model_part.bind(params), observed['image']
    # one row of text for each candidate, because the cross-attention runs row by row
    text, mask = (jnp.repeat(vctx[name], images.shape[1], axis=0) for name in ('text', 'mask'))

    def score_rows(rows):
      tokens = model.vision(preprocess_pictures(rows, self.model_part.config.size))
      return model.predict_reward(model.fuse_image(text, mask, tokens)[0])

    return {self.names[0]: map_images(score_rows, images)}

  def cost(self, op):
    config = self.model_part.config
    if op == 'encode':
      return core.Cost(flops=modeling.count_flops(config, 'text'))
    return core.Cost(verify=1, flops=modeling.count_flops(config, 'image'))


def preprocess_pictures(images, size: int):
  """Pictures `[..., H, W, 3]` in [0, 1] to network inputs `[..., size, size, 3]`."""
  how = clip.PREPROCESSING
  return preprocess.normalize_channels(how.fit_images(images, size), how.mean, how.std)
