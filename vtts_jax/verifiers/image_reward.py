"""ImageReward: how well people would like a picture for its prompt, by BLIP and a linear head.

The score `image_reward_blip_l` is the published one, about standard normal over the pictures that
people rated (-2 .. 2). Xu et al. (2023), arXiv 2304.05977; models/blip.

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
    tokenizer: folder or repository with the tokenizer of BERT; random weights hash the words.
    dtype: of the weights, 'float32' or 'bfloat16'; the head is computed in float32.
  """

  weights: str = 'RE-N-Y/ImageReward'
  tokenizer: str = 'bert-base-uncased'
  dtype: str = 'float32'

  gives = frozenset({'gradient'})

  def __post_init__(self):
    _ = self.blip  # refuses what is unknown

  @property
  def blip(self) -> Pretrained:
    """The model with its head."""
    return Pretrained('blip', self.weights, self.dtype)

  @property
  def names(self):
    return ('image_reward_blip_l' + (f'_{self.blip.name}' if self.blip.is_random else ''),)

  def check(self):
    _ = self.blip.config

  def load(self):
    return self.blip.load()

  def shardings(self, mesh):
    return self.blip.shardings(mesh)

  def tokenize(self, prompts):
    config, place = self.blip.config, '' if self.blip.is_random else self.tokenizer
    ids, mask = tokenizers.tokenize_texts(
      core.texts_of(prompts), place, config.length, config.vocab, setting='the length'
    )
    return {'ids': ids, 'mask': mask}

  def encode(self, params, prompt):
    """All that does not depend on a picture: the text after its first self-attention."""
    text = self.blip.bind(params).text(prompt['ids'], prompt['mask'])
    return {'text': text, 'mask': prompt['mask']}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    model, images = self.blip.bind(params), observed['image']
    text, mask = (jnp.repeat(vctx[name], images.shape[1], axis=0) for name in ('text', 'mask'))

    def reward(rows):
      tokens = model.vision(preprocess_pictures(rows, self.blip.config.size))
      return model.reward(model.fuse(text, mask, tokens)[0])

    return {self.names[0]: map_images(reward, images)}

  def cost(self, op):
    config = self.blip.config
    if op == 'encode':
      return core.Cost(flops=modeling.flops(config, 'text'))
    return core.Cost(verify=1, flops=modeling.flops(config, 'image'))


def preprocess_pictures(images, size: int):
  """Pictures `[..., H, W, 3]` in [0, 1] as the network takes them, `[..., size, size, 3]`."""
  square = preprocess.center_crop(preprocess.resize_shortest(images, size), size)
  return preprocess.normalize(square, clip.MEAN, clip.STD)
