"""What the verifiers on image encoders share: pictures to unit embeddings, by DINO, CLIP, DreamSim.

Letters: B prompts · M candidates of a prompt · R = B M · H W sides of a picture · S side that the
encoder reads · K references of a prompt · D width of an embedding.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import references
from vtts_jax.errors import ConfigError
from vtts_jax.models.pretrained import Pretrained

PARTS = {'dino': 'encoder', 'clip': 'image'}  # what is loaded of a backbone


class ImageEncoder(Pretrained):
  """A model with `embed_images`, `preprocess` and `picture_sides`: of DINO, CLIP or DreamSim."""

  def embed(self, params, images, fitted: bool = False):
    """Images `[B, M, H, W, 3]` in [0, 1] -> unit embeddings `[B, M, D]` float32; `fitted` ones are
    resized and cut already."""
    model, config = self.bind(params), self.config
    return map_images(
      lambda x: model.embed_images(self.modeling.preprocess(config, x, fitted=fitted)), images
    )

  @property
  def sides(self) -> tuple[int, int]:
    """(S, what the shorter side of a picture is resized to before it is cut)."""
    return self.modeling.picture_sides(self.config)

  @property
  def flops(self) -> int:
    """Of one embedding."""
    return self.modeling.flops(self.config, 'image')


def backbone_encoder(backbone: str, weights: str, dtype: str) -> ImageEncoder:
  """The encoder of a verifier's settings.

  Raises:
    ConfigError: an unknown backbone, size or dtype, no weights.
  """
  if backbone not in PARTS:
    allowed = ', '.join(map(repr, PARTS))
    raise ConfigError(f'verifier.backbone={backbone!r}: must be one of {allowed}')
  return ImageEncoder(backbone, weights, dtype, PARTS[backbone])


def map_images(call, images):
  """`call` of `[B, M, H, W, 3]` as `[B M, H, W, 3]`, its result `[B, M, ...]` again."""
  out = call(images.reshape(-1, *images.shape[2:]))
  return out.reshape(*images.shape[:2], *out.shape[1:])


@dataclasses.dataclass(frozen=True)
class EncoderVerifier(core.Verifier):
  """A verifier on an image encoder; `encoder`, `names` and `score` are the subclass's.

  Attributes:
    weights: checkpoint: file, folder or `owner/name@revision`; 'random:tiny' or 'random:' before a
      released size makes random weights.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  weights: str = ''
  dtype: str = 'float32'

  gives = frozenset({'features', 'gradient'})
  images_read = 1  # for one score

  def __post_init__(self):
    _ = self.encoder  # refuses what is unknown

  @property
  def encoder(self) -> ImageEncoder:
    raise NotImplementedError

  def check(self):
    _ = self.encoder.config

  def load(self):
    return self.encoder.load()

  def shardings(self, mesh):
    return self.encoder.shardings(mesh)

  def embed_images(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, D]`."""
    return self.encoder.embed(params, images)

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=self.images_read * self.encoder.flops)


@dataclasses.dataclass(frozen=True)
class ReferenceVerifier(EncoderVerifier):
  """Likeness to the reference pictures of a prompt: the mean cosine of their embeddings.

  Attributes:
    references: a picture or a folder of pictures for the prompts that name none; a prompt row names
      its own under 'reference' (`data.references`).
    max_references: most references that a prompt brings; all are padded to so many, which is what
      the bill counts.
  """

  references: str = ''
  max_references: int = 1

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.max_references, int) or self.max_references < 1:
      raise ConfigError(f'verifier.max_references={self.max_references!r}: must be an integer >= 1')

  @property
  def _count(self):
    return references.count_references(self.references, self.max_references)

  def check(self):
    super().check()
    _ = self._count

  def tokenize(self, prompts):
    """The pictures, `{'pictures': [B, K, S, S, 3] uint8, 'mask': [B, K]}`."""
    return references.read_references(prompts, self.references, self._count, *self.encoder.sides)

  def encode(self, params, prompt):
    """Pictures `[B, K, S, S, 3]` -> the mean of their unit embeddings `[B, D]`."""
    images = prompt['pictures'].astype(jnp.float32) / 255
    return references.mean_embedding(self.encoder.embed(params, images, True), prompt['mask'])

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    found = self.embed_images(params, observed['image'])
    return {self.names[0]: jnp.einsum('bmd,bd->bm', found, vctx)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost(flops=self._count * self.encoder.flops)
    return super().cost(op)
