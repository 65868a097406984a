"""What the verifiers on dual encoders share: CLIP or SigLIP, its weights, words and embeddings.

Letters: B prompts · M pictures of a prompt · R = B M · H W their sides · T tokens · E width of the
joint space.
"""

import dataclasses
import functools
from dataclasses import replace

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.checkpoints import source as source_files
from vtts_jax.data import tokenizers as texts
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import convert as clip_convert
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.siglip import convert as siglip_convert
from vtts_jax.models.siglip import modeling as siglip
from vtts_jax.verifiers.parts.image_encoder import check_dtype, flat, short_name

H14 = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
KNOWN = {  # what a checkpoint is called in the name of a score; any other by its own name
  'openai/clip-vit-base-patch32': 'clip_b32',
  'openai/clip-vit-base-patch16': 'clip_b16',
  'openai/clip-vit-large-patch14': 'clip_l14',
  'openai/clip-vit-large-patch14-336': 'clip_l14_336',
  H14: 'clip_h14',
  'laion/CLIP-ViT-bigG-14-laion2B-39B-b160k': 'clip_bigg14',
}
_TINY = vit.Config(16, 2, 2, 32, 'quick_gelu')
_SMALL = vit.Config(16, 2, 2, 32, 'gelu_tanh', siglip.EPS)
SIZES = {  # of random weights
  'tiny': clip.Config(_TINY, _TINY, 12, image_size=32, vocab=256, length=16),
  **clip.RELEASED,
  'siglip_tiny': siglip.Config(_SMALL, _SMALL, image_size=32, vocab=256, length=16),
  **{f'siglip_{name}': c for name, c in siglip.RELEASED.items()},
}


@dataclasses.dataclass(frozen=True)
class Dual(core.Verifier):
  """A verifier on a dual encoder; `score` is the subclass's.

  Attributes:
    model_from: a safetensors file, a folder or a repository `owner/name@revision` of the hub.
    tokenizer_from: folder or repository with the tokenizer; '' for `model_from`.
    random: '' loads; 'tiny', 'siglip_tiny' or a released size ('b16', 'siglip_b16_224') makes
      random weights, which read no file and hash the words.
    dtype: of the weights, 'float32' or 'bfloat16'; cosines are taken in float32.
    towers: 'both', or 'image' where no text is read (not a setting).
    size: the released CLIP that the checkpoint must be, '' for any (not a setting).
  """

  model_from: str = ''
  tokenizer_from: str = ''
  random: str = ''
  dtype: str = 'float32'

  towers = 'both'
  size = ''

  def __post_init__(self):
    clips_only = self.size or self.towers == 'image'
    sizes = [k for k, c in SIZES.items() if isinstance(c, clip.Config) or not clips_only]
    if self.random and self.random not in sizes:
      raise ConfigError(
        f"verifier.random={self.random!r}: must be '' or one of {', '.join(sizes)}"
      )
    check_dtype(self.dtype)

  @property
  def config(self) -> clip.Config | siglip.Config:
    """Sizes; of a checkpoint, its headers are read."""
    if self.random:
      found = SIZES[self.random]
      return replace(found, text=None) if self.towers == 'image' else found
    found = _config(self.model_from, self.towers)
    is_clip = isinstance(found, clip.Config)
    if self.size and (not is_clip or replace(found, eos=None) != clip.RELEASED[self.size]):
      raise ConfigError(
        f'verifier.model_from={self.model_from!r}: must be CLIP {self.size}; it is {found}'
      )
    return found

  @property
  def backbone(self) -> str:
    """For the name of a score: 'clip_b16'."""
    if self.random:
      name = f'{self.random}_random'
    else:
      known = KNOWN.get(self.model_from.partition('@')[0])
      name = known or short_name(self.model_from).lower()
    return name if name.startswith(('clip', 'siglip')) else f'clip_{name}'

  def published(self, name: str) -> str:
    """The name of a score that is published for one checkpoint; random weights say so."""
    return f'{name}_{self.random}_random' if self.random else name

  @property
  def modeling(self):
    """The module of the model's family."""
    return clip if isinstance(self.config, clip.Config) else siglip

  def load(self):
    if not self.random:
      self.check()
      return self.read(source_files.open_source(self.model_from))
    return modules.drawn(self.modeling.build, self.config, self.dtype)

  def read(self, source):
    """The parameters in a checkpoint."""
    if self.modeling is siglip:
      return siglip_convert.load(source, self.dtype)[1]
    return clip_convert.load(source, self.dtype, towers=self.towers)[1]

  def merge(self, params):
    """The model."""
    return modules.model(self.modeling.build, self.config, params)

  def ids(self, prompts):
    """Token ids `[B, T]` int32 of prompts."""
    place = '' if self.random else self.tokenizer_from or self.model_from
    if place.endswith('.safetensors'):
      raise ConfigError(
        f'verifier.tokenizer_from={self.tokenizer_from!r}: must be a folder or a repository with a '
        f'tokenizer; there is none in {place}'
      )
    return texts.tokens(prompts, place, self.config.length, self.config.vocab)[0]

  def tokenize(self, prompts):
    return {'ids': self.ids(prompts)}

  def encode(self, params, prompt):
    """Ids `[B, T]` -> unit embeddings `[B, E]`."""
    return self.merge(params).embed_text(prompt['ids'])

  def prepare(self, images):
    """Pictures `[R, H, W, 3]` in [0, 1] as the model takes them."""
    return self.modeling.preprocess(self.config, images)

  def features(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, E]`; NaN for one with a NaN anywhere,
    even where the model does not look."""
    model = self.merge(params)
    shown = flat(lambda x: model.embed_image(self.prepare(x)), images)
    broken = jnp.isnan(images).any((2, 3, 4))
    return jnp.where(broken[..., None], jnp.nan, shown)

  def cosine(self, params, vctx, images):
    """Cosines `[B, M]` of texts `[B, E]` and images `[B, M, H, W, 3]`."""
    return jnp.sum(self.features(params, images) * vctx[:, None], -1)

  def cost(self, op):
    """Matmuls of the networks; what `prepare` spends depends on the pictures' size and is small."""
    if op == 'encode':
      return core.Cost(flops=self.modeling.flops(self.config, 'text'))
    return core.Cost(verify=1, flops=self.modeling.flops(self.config, 'image'))

  def check(self):
    _ = self.config


@functools.cache
def _config(place, towers):
  try:
    source = source_files.open_source(place)
    if 'vision_model.head.probe' in source and towers == 'both':
      return siglip_convert.config_of(source)
    return clip_convert.config_of(source, towers)
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f'verifier.model_from={place!r}: {error}') from error
