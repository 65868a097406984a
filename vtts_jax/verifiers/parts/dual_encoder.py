"""The base of verifiers on dual encoders: CLIP or SigLIP, its weights, tokens and embeddings.

Letters: B prompts · M pictures of a prompt · R = B M · H W their sides · T tokens · E width of the
joint space.
"""

import dataclasses
import functools
import os

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.models import pretrained
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.pretrained import RANDOM, Pretrained
from vtts_jax.models.siglip import modeling as siglip
from vtts_jax.verifiers.parts.image_encoder import map_images

H14 = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
KNOWN = {  # names of checkpoints within the names of scores; others use their own name
  'openai/clip-vit-base-patch32': 'clip_b32',
  'openai/clip-vit-base-patch16': 'clip_b16',
  'openai/clip-vit-large-patch14': 'clip_l14',
  'openai/clip-vit-large-patch14-336': 'clip_l14_336',
  H14: 'clip_h14',
  'laion/CLIP-ViT-bigG-14-laion2B-39B-b160k': 'clip_bigg14',
}


@dataclasses.dataclass(frozen=True)
class DualEncoder(core.Verifier):
  """A verifier on CLIP or SigLIP; a subclass defines `names` and `score`.

  Attributes:
    weights: a safetensors file, a folder, or a repository `owner/name@revision` of the hub. Or
      'random:SIZE', with 'tiny', 'siglip_tiny' or a released size ('b16', 'siglip_b16_224'):
      random weights, which read no file and hash the words.
    tokenizer: folder or repository with the tokenizer; '' takes it from `weights`.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'; cosines are always float32.
    part: '' to load both towers, 'image' for the image tower only (not a setting).
    size: the released CLIP that a checkpoint must have; '' allows any (not a setting).
    cleans_text: whether the score was published with a pipeline that cleans texts as OpenAI's CLIP
      and open_clip do, which transformers does not (not a setting). SigLIP's tokenizers never do.
    crop: whose centre crop the score was published with, 'torchvision' or 'transformers'; '' for
      that of the checkpoint (not a setting).
  """

  weights: str = ''
  tokenizer: str = ''
  dtype: str = 'float32'

  gives = frozenset({'features', 'gradient'})
  part = ''
  size = ''
  cleans_text = True
  crop = ''

  def __post_init__(self):
    # a subclass with a fixed size or one tower is made for CLIP
    sizes = {**clip.SIZES, **({} if self.size or self.part else siglip.SIZES)}
    size = self.weights.removeprefix(RANDOM)
    if size != self.weights and size not in sizes:
      allowed = ', '.join(RANDOM + name for name in sizes)
      raise ConfigError(
        f'verifier.weights={self.weights!r}: must be a checkpoint or one of {allowed}'
      )
    if size == self.weights:
      Pretrained('clip', self.weights, self.dtype)  # raises on unknown settings, reads no file

  @property
  def model_part(self) -> Pretrained:
    """The model; reads the header of a checkpoint to tell CLIP from SigLIP."""
    # HPS, PickScore and the aesthetic heads exist for CLIP only
    family = 'clip' if self.size or self.part else _family_of(self.weights)
    return Pretrained(family, self.weights, self.dtype, self.part)

  @property
  def backbone_name(self) -> str:
    """The backbone's part of a score name, such as 'clip_b16'.

    A local folder with a released CLIP's sizes has that CLIP's name, as its copy on the hub. (Give
    a fine-tune as its file: a file has its own name.)
    """
    if self._is_random:
      name = self.model_part.name
    else:
      known = KNOWN.get(pretrained.repository_of(self.weights)) or self._name_of_folder()
      # checkpoints outside the table are named after their file or repository
      name = known or pretrained.short_name(self.weights).lower()
    return name if name.startswith(('clip', 'siglip')) else f'clip_{name}'

  def _name_of_folder(self):
    """Returns the name of the released CLIP whose sizes a local folder has; '' for none."""
    if not os.path.isdir(self.weights):
      return ''
    try:
      config = self.model_part.config
    # a folder without a model: `check` says so
    except ConfigError:
      return ''
    if isinstance(config, siglip.Config):
      return ''
    config = dataclasses.replace(config, eos=None)
    names = [f'clip_{name}' for name, c in clip.SIZES.items() if c == config]
    return next((name for name in names if name in KNOWN.values()), '')

  @property
  def _is_random(self):
    return self.weights.startswith(RANDOM)

  def published_name(self, name: str) -> str:
    """The name of a score that belongs to one published checkpoint; random weights are marked."""
    return f'{name}_{self.model_part.name}' if self._is_random else name

  def check(self):
    config = self.model_part.config
    wanted = clip.SIZES[self.size] if self.size and not self._is_random else None
    if wanted and _plain_sizes(config) != wanted:
      raise ConfigError(
        f'verifier.weights={self.weights!r}: must be CLIP {self.size}; it is {config}'
      )

  def load(self):
    self.check()
    return self.model_part.load()

  def shardings(self, mesh):
    return self.model_part.shardings(mesh)

  def tokenize(self, prompts):
    return {'ids': self.token_ids(core.texts_of(prompts))}

  def token_ids(self, texts):
    """Token ids `[B, T]` int32 of texts.

    Raises:
      ConfigError: `weights` is a single file and no tokenizer is given.
    """
    # a single safetensors file has no tokenizer beside it
    place = '' if self._is_random else self.tokenizer or self.weights
    if place.endswith('.safetensors'):
      raise ConfigError(
        f'verifier.tokenizer={self.tokenizer!r}: must be a folder or a repository with a '
        f'tokenizer; there is none in {place}'
      )
    config = self.model_part.config
    if isinstance(config, siglip.Config):
      texts = [text.lower() for text in texts] if config.lower_cases else texts
    elif self.cleans_text:
      texts = [tokenizers.clean_text(text) for text in texts]
    return tokenizers.tokenize_texts(texts, place, config.length, config.vocab)[0]

  def encode(self, params, prompt):
    """Ids `[B, T]` -> unit embeddings `[B, E]`."""
    return self.model_part.bind(params).embed_texts(prompt['ids'])

  def preprocess(self, images):
    """Pictures `[R, H, W, 3]` in [0, 1] to network inputs."""
    model, config = self.model_part, self.model_part.config
    if self.crop:
      how = dataclasses.replace(config.preprocessing, crop=self.crop)
      config = dataclasses.replace(config, preprocessing=how)
    return model.modeling.preprocess(config, images)

  def embed_images(self, params, images):
    """Images `[B, M, H, W, 3]` to unit embeddings `[B, M, E]`; NaN for an image with any NaN."""
    model = self.model_part.bind(params)
    found = map_images(lambda x: model.embed_images(self.preprocess(x)), images)
    # a NaN outside the center crop would go unnoticed
    broken = jnp.isnan(images).any((2, 3, 4))
    return jnp.where(broken[..., None], jnp.nan, found)

  def cosine_scores(self, params, vctx, images):
    """Cosines `[B, M]` of texts `[B, E]` and images `[B, M, H, W, 3]`."""
    return jnp.sum(self.embed_images(params, images) * vctx[:, None], -1)

  def cost(self, op):
    """Matrix products of the networks. `preprocess` is left out: its cost is small and depends on
    the pictures' size."""
    model = self.model_part
    if op == 'encode':
      return core.Cost(flops=model.modeling.count_flops(model.config, 'text'))
    return core.Cost(verify=1, flops=model.modeling.count_flops(model.config, 'image'))


def _plain_sizes(config):
  """Returns the config with what differs between repackaged copies of one checkpoint as released:
  the end token, and the preprocessing."""
  return dataclasses.replace(config, eos=None, preprocessing=clip.PREPROCESSING)


@functools.cache
def _family_of(weights):
  """'clip' or 'siglip', by the size's name or by a tensor that only SigLIP has."""
  if weights.startswith(RANDOM):
    return 'siglip' if weights.removeprefix(RANDOM) in siglip.SIZES else 'clip'
  try:
    source = pretrained.open_weights('clip', weights)
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f'verifier.weights={weights!r}: {error}') from error
  return 'siglip' if 'vision_model.head.probe' in source else 'clip'
