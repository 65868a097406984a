"""Picture towers by name: pictures to unit embeddings, for the verifiers that compare pictures.

Letters: R pictures · H W their sides · S side that the tower reads · D width of an embedding.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from vtts_jax import core, weights
from vtts_jax import images as pictures
from vtts_jax.models.dino import convert as dino_convert
from vtts_jax.models.dino import modeling as dino

DTYPES = ('float32', 'bfloat16')


def check_dtype(dtype: str) -> None:
  """Raises `ConfigError` unless it is one of `DTYPES`."""
  if dtype not in DTYPES:
    raise core.ConfigError(f'verifier.dtype={dtype!r}: must be one of {", ".join(DTYPES)}')


def short_name(place: str) -> str:
  """What a checkpoint is called in a score's name: its own name, without owner and revision."""
  name = place.partition('@')[0].rstrip('/').rpartition('/')[2].removesuffix('.safetensors')
  return re.sub(r'\W', '_', name)


@dataclasses.dataclass(frozen=True)
class DinoTower:
  """DINO or DINOv2: the class token.

  Attributes:
    place: checkpoint: file, folder or `owner/name@revision`.
    random: or the size of a random one ('tiny' or a released name); '' loads.
    dtype: of the parameters.
    head: whether a linear head is loaded with it.
  """

  place: str
  random: str = ''
  dtype: str = 'float32'
  head: bool = False

  side, shorter = dino.SIDE, dino.RESIZED

  def __post_init__(self):
    check_dtype(self.dtype)
    if self.random:
      _dino_config(self.place, self.random, self.head)

  @property
  def name(self) -> str:
    return self.random or short_name(self.place)

  @property
  def config(self) -> dino.Config:
    return _dino_config(self.place, self.random, self.head)

  def load(self):
    """The parameters."""
    if self.random:
      params = jax.jit(lambda: weights.split(dino.build(self.config))[1])()
      return jax.tree.map(lambda x: x.astype(self.dtype), params)
    source = weights.open_source(self.place)
    return dino_convert.load(source, dtype=self.dtype, config=self.config)[1]

  def merge(self, params) -> dino.Dino:
    return weights.merge(_graph(dino.build, self.config), params)

  def embed(self, params, images):
    """Pictures `[R, H, W, 3]` in [0, 1] -> unit embeddings `[R, D]` float32."""
    return unit(self.merge(params).features(dino.prepare(images)))

  def embed_fit(self, params, images):
    """The same of pictures that have been resized and cut already, `[R, S, S, 3]`."""
    fit = pictures.normalize(images, dino.MEAN, dino.STD)
    return unit(self.merge(params).features(fit))

  def flops(self) -> int:
    return dino.flops(self.config)


def unit(x):
  """`[..., D]` of length 1."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def flat(call, images):
  """`call` of `[B, M, H, W, 3]` as `[B M, H, W, 3]`, its result `[B, M, ...]` again."""
  out = call(images.reshape(-1, *images.shape[2:]))
  return out.reshape(*images.shape[:2], *out.shape[1:])


@functools.cache
def _dino_config(place, random, head):
  if not random:
    found = dino_convert.config_of(weights.open_source(place))
  else:
    found = dino.released(random, 'verifier.random')
    if head and random == 'tiny':
      found = dataclasses.replace(found, classes=10)
  if head and not found.classes:
    raise core.ConfigError(
      f'verifier.{"random" if random else "model_from"}={random or place!r}: has no linear head; '
      'the released ones end in imagenet1k-1-layer'
    )
  return found if head else dataclasses.replace(found, classes=0)


@functools.cache
def _graph(build, config):
  return weights.abstract(lambda: build(config))[0]


FAMILIES = {'dino': DinoTower}


def tower(backbone: str, place: str, random: str, dtype: str, defaults: dict[str, str]):
  """The tower of a verifier's settings; an empty `place` is `defaults[backbone]`.

  Raises:
    ConfigError: an unknown backbone, size or dtype.
  """
  if backbone not in FAMILIES:
    allowed = ', '.join(map(repr, FAMILIES))
    raise core.ConfigError(f'verifier.backbone={backbone!r}: must be one of {allowed}')
  return FAMILIES[backbone](place or defaults[backbone], random, dtype)
