"""Picture towers by name: pictures to unit embeddings, for the verifiers that compare pictures.

Letters: R pictures · H W their sides · S side that the tower reads · D width of an embedding.
"""

import dataclasses
import functools
import re

from vtts_jax.checkpoints import source as source_files
from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess as pictures
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import convert as clip_convert
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.dino import convert as dino_convert
from vtts_jax.models.dino import modeling as dino

DTYPES = ('float32', 'bfloat16')
CLIPS = {  # of a random one, the picture's half alone
  'tiny': clip.Config(vit.Config(16, 2, 2, 32, 'quick_gelu'), None, 12, patch=32),
  **{name: dataclasses.replace(c, text=None) for name, c in clip.RELEASED.items()},
}


def check_dtype(dtype: str) -> None:
  """Raises `ConfigError` unless it is one of `DTYPES`."""
  if dtype not in DTYPES:
    raise ConfigError(f'verifier.dtype={dtype!r}: must be one of {", ".join(DTYPES)}')


def short_name(place: str) -> str:
  """What a checkpoint is called in a score's name: its own name, without owner and revision."""
  name = place.partition('@')[0].rstrip('/').rpartition('/')[2].removesuffix('.safetensors')
  return re.sub(r'\W', '_', name)


@dataclasses.dataclass(frozen=True)
class Tower:
  """A model of pictures.

  Attributes:
    place: checkpoint: file, folder or `owner/name@revision`.
    random: or the size of a random one ('tiny' or a released name); '' loads.
    dtype: of the parameters.
  """

  place: str
  random: str = ''
  dtype: str = 'float32'

  def __post_init__(self):
    check_dtype(self.dtype)
    if self.random:
      _ = self.config  # refuses an unknown size

  @property
  def name(self) -> str:
    """For the name of a score."""
    return self.random or short_name(self.place)

  def load(self):
    """The parameters."""
    if not self.random:
      return self.read(source_files.open_source(self.place))
    return modules.drawn(self.build, self.config, self.dtype)

  def merge(self, params):
    """The model."""
    return modules.model(self.build, self.config, params)


class DinoTower(Tower):
  """DINO or DINOv2, without a head: the class token."""

  side, shorter = dino.SIDE, dino.RESIZED
  build = staticmethod(dino.build)
  head = False

  @property
  def config(self) -> dino.Config:
    return _dino_config(self.place, self.random, self.head)

  def read(self, source):
    return dino_convert.load(source, dtype=self.dtype, config=self.config)[1]

  def embed(self, params, images):
    """Pictures `[R, H, W, 3]` in [0, 1] -> unit embeddings `[R, D]` float32."""
    return clip.unit(self.merge(params).features(dino.prepare(images)))

  def embed_fit(self, params, images):
    """The same of pictures that have been resized and cut already, `[R, S, S, 3]`."""
    fit = pictures.normalize(images, dino.MEAN, dino.STD)
    return clip.unit(self.merge(params).features(fit))

  def flops(self) -> int:
    """Of one embedding."""
    return dino.flops(self.config)


class DinoHead(DinoTower):
  """DINOv2 with its linear head."""

  head = True

  def logits(self, params, images):
    """Pictures `[R, H, W, 3]` in [0, 1] -> logits of the classes `[R, C]` float32."""
    return self.merge(params).logits(dino.prepare(images))


class ClipTower(Tower):
  """CLIP's picture tower: the joint space."""

  build = staticmethod(clip.build)

  @property
  def config(self) -> clip.Config:
    return _clip_config(self.place, self.random)

  @property
  def side(self) -> int:
    return self.config.image_size

  shorter = side

  def read(self, source):
    return clip_convert.load(source, dtype=self.dtype, towers='image')[1]

  def embed(self, params, images):
    """As in `DinoTower`."""
    return self.merge(params).embed_image(clip.preprocess(self.config, images))

  def embed_fit(self, params, images):
    """As in `DinoTower`."""
    return self.merge(params).embed_image(pictures.normalize(images, clip.MEAN, clip.STD))

  def flops(self) -> int:
    return clip.flops(self.config, 'image')


def flat(call, images):
  """`call` of `[B, M, H, W, 3]` as `[B M, H, W, 3]`, its result `[B, M, ...]` again."""
  out = call(images.reshape(-1, *images.shape[2:]))
  return out.reshape(*images.shape[:2], *out.shape[1:])


@functools.cache
def _dino_config(place, random, head):
  if not random:
    found = dino_convert.config_of(source_files.open_source(place))
  else:
    found = dino.released(random, 'verifier.random')
    if head and random == 'tiny':
      found = dataclasses.replace(found, classes=10)
  if head and not found.classes:
    raise ConfigError(
      f'verifier.{"random" if random else "model_from"}={random or place!r}: has no linear head; '
      'the released ones end in imagenet1k-1-layer'
    )
  return found if head else dataclasses.replace(found, classes=0)


@functools.cache
def _clip_config(place, random):
  if not random:
    return clip_convert.config_of(source_files.open_source(place), 'image')
  if random not in CLIPS:
    raise ConfigError(f'verifier.random={random!r}: must be one of {", ".join(CLIPS)}')
  return CLIPS[random]


FAMILIES = {'dino': DinoTower, 'clip': ClipTower}


def tower(backbone: str, place: str, random: str, dtype: str, defaults: dict[str, str]) -> Tower:
  """The tower of a verifier's settings; an empty `place` is `defaults[backbone]`.

  Raises:
    ConfigError: an unknown backbone, size or dtype.
  """
  if backbone not in FAMILIES:
    allowed = ', '.join(map(repr, FAMILIES))
    raise ConfigError(f'verifier.backbone={backbone!r}: must be one of {allowed}')
  return FAMILIES[backbone](place or defaults[backbone], random, dtype)
