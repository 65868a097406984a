"""ImageReward: how well people would like a picture for its prompt, by BLIP and a linear head.

The score `image_reward_blip_l` is the published one, about standard normal over the pictures that
people rated (-2 .. 2). Xu et al. (2023), arXiv 2304.05977; models/blip.
"""

import dataclasses
import functools

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.checkpoints import source as source_files
from vtts_jax.components import build_dataclass
from vtts_jax.data import tokenizers as texts
from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess as images
from vtts_jax.models import modules
from vtts_jax.models.blip import convert, modeling
from vtts_jax.models.clip import modeling as clip
from vtts_jax.verifiers.parts import image_encoder as towers

SIZES = {'tiny': modeling.TINY, **modeling.RELEASED}


@dataclasses.dataclass(frozen=True)
class ImageReward(core.Verifier):
  """ImageReward 1.0.

  Attributes:
    model_from: a safetensors file, a folder or a repository `owner/name@revision` of the hub.
    tokenizer_from: folder or repository with the tokenizer of BERT.
    random: '' loads; 'tiny' or a released size makes random weights, which read no file and hash
      the words.
    dtype: of the weights, 'float32' or 'bfloat16'; the head is computed in float32.
  """

  model_from: str = 'RE-N-Y/ImageReward'
  tokenizer_from: str = 'bert-base-uncased'
  random: str = ''
  dtype: str = 'float32'

  def __post_init__(self):
    if self.random and self.random not in SIZES:
      raise ConfigError(
        f"verifier.random={self.random!r}: must be '' or one of {', '.join(SIZES)}"
      )
    towers.check_dtype(self.dtype)

  @property
  def names(self):
    return ('image_reward_blip_l',)

  @property
  def config(self) -> modeling.Config:
    """Sizes; of a checkpoint, its headers are read."""
    return SIZES[self.random] if self.random else _config(self.model_from)

  def load(self):
    if not self.random:
      source = source_files.open_source(self.model_from)
      return convert.load(source, self.config, self.dtype)[1]
    return modules.drawn(modeling.build, self.config, self.dtype)

  def tokenize(self, prompts):
    place = '' if self.random else self.tokenizer_from
    ids, mask = texts.tokens(prompts, place, self.config.length, self.config.vocab)
    return {'ids': ids, 'mask': mask}

  def encode(self, params, prompt):
    """All that does not depend on a picture: the text after its first self-attention."""
    text = modules.model(modeling.build, self.config, params).text(prompt['ids'], prompt['mask'])
    return {'text': text, 'mask': prompt['mask']}

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    model = modules.model(modeling.build, self.config, params)
    b, m = images.shape[:2]
    shown = model.vision(prepare(images.reshape(b * m, *images.shape[2:]), self.config.size))
    text, mask = (jnp.repeat(vctx[name], m, axis=0) for name in ('text', 'mask'))
    return {self.names[0]: model.reward(model.fuse(text, mask, shown)[0]).reshape(b, m)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost(flops=modeling.flops(self.config, 'text'))
    return core.Cost(verify=1, flops=modeling.flops(self.config, 'image'))

  def check(self):
    _ = self.config


def prepare(pictures, size: int):
  """Pictures `[..., H, W, 3]` in [0, 1] as the network takes them, `[..., size, size, 3]`."""
  cut = images.center_crop(images.resize_shortest(pictures, size), size)
  return images.normalize(cut, clip.MEAN, clip.STD)


@functools.cache
def _config(place):
  return convert.config_of(source_files.open_source(place))


def build(**given):
  return build_dataclass(ImageReward, **given)
