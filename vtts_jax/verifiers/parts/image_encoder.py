"""The base of verifiers on image encoders: unit embeddings of pictures by DINO, CLIP, DreamSim.

Letters: B prompts · M candidates of a prompt · R = B M · H W sides of a picture · S side that the
encoder reads · K references of a prompt · D width of an embedding.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import references
from vtts_jax.errors import ConfigError
from vtts_jax.models.pretrained import Pretrained

PARTS = {'dino': 'encoder', 'clip': 'image'}  # the part of each backbone that is loaded


class ImageEncoder(Pretrained):
  """A DINO, CLIP or DreamSim; its module has `embed_images`, `preprocess`, `fitting_of`."""

  def embed_images(self, params, images, fitted: bool = False):
    """Images `[B, M, H, W, 3]` in [0, 1] to unit embeddings `[B, M, D]` float32; `fitted` images
    are already resized and cropped."""
    model, config = self.bind(params), self.config

    def embed_rows(rows):
      return model.embed_images(self.modeling.preprocess(config, rows, fitted=fitted))

    return map_images(embed_rows, images)

  def fit_picture(self, picture):
    """A picture uint8 `[H, W, 3]` resized and cut on the host, uint8 `[S, S, 3]`."""
    how, side = self.modeling.fitting_of(self.config)
    return how.fit_picture(picture, side)

  @property
  def embedding_flops(self) -> int:
    """FLOPs of one embedding."""
    return self.modeling.count_flops(self.config, 'image')


def backbone_encoder(backbone: str, weights: str, dtype: str) -> ImageEncoder:
  """The encoder of a verifier's settings.

  Raises:
    ConfigError: an unknown backbone, size or dtype, or no weights.
  """
  # checked here, since only these two families have a part that embeds pictures
  if backbone not in PARTS:
    allowed = ', '.join(map(repr, PARTS))
    raise ConfigError(f'verifier.backbone={backbone!r}: must be one of {allowed}')
  return ImageEncoder(backbone, weights, dtype, PARTS[backbone])


def map_images(call, images):
  """Applies `call` to images `[B, M, H, W, 3]` as rows `[B M, H, W, 3]`; returns `[B, M, ...]`."""
  # networks know rows only; prompts and candidates are one batch to them
  out = call(images.reshape(-1, *images.shape[2:]))
  return out.reshape(*images.shape[:2], *out.shape[1:])


@dataclasses.dataclass(frozen=True)
class EncoderVerifier(core.Verifier):
  """A verifier on an image encoder; a subclass defines `model_part`, `names` and `score`.

  Attributes:
    weights: a file, a folder or a repository `owner/name@revision`; 'random:SIZE' makes random
      weights of size 'tiny' or of a released size.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  weights: str = ''
  dtype: str = 'float32'

  gives = frozenset({'features', 'gradient'})
  images_read = 1  # embeddings that one score needs

  def __post_init__(self):
    _ = self.model_part  # raises on unknown settings

  @property
  def model_part(self) -> ImageEncoder:
    """The encoder of the settings."""
    raise NotImplementedError

  def check(self):
    _ = self.model_part.config

  def load(self):
    return self.model_part.load()

  def shardings(self, mesh):
    return self.model_part.shardings(mesh)

  def embed_images(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, D]`."""
    return self.model_part.embed_images(params, images)

  def cost(self, op):
    # no prompt is encoded: these verifiers compare pictures
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=self.images_read * self.model_part.embedding_flops)


@dataclasses.dataclass(frozen=True)
class ReferenceVerifier(EncoderVerifier):
  """Similarity to the reference pictures of a prompt: the mean cosine of their embeddings.

  Attributes:
    references: a picture or a folder of pictures, for prompts without their own; a prompt row names
      its own under 'reference' (`data.references`).
    max_references: largest number of references of a prompt. Every prompt is padded to it, and the
      bill counts it.
  """

  references: str = ''
  max_references: int = 1

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.max_references, int) or self.max_references < 1:
      raise ConfigError(f'verifier.max_references={self.max_references!r}: must be an integer >= 1')

  @property
  def _reference_count(self):
    return references.count_references(self.references, self.max_references)

  def check(self):
    super().check()
    _ = self._reference_count  # raises if the folder cannot be read

  def tokenize(self, prompts):
    """The reference pictures, `{'pictures': [B, K, S, S, 3] uint8, 'mask': [B, K]}`."""
    # resized on the host, so that pictures of any size fit one array
    fit, count = self.model_part.fit_picture, self._reference_count
    return references.read_references(prompts, self.references, count, fit)

  def encode(self, params, prompt):
    """Pictures `[B, K, S, S, 3]` to the mean of their unit embeddings `[B, D]`."""
    images = prompt['pictures'].astype(jnp.float32) / 255
    embeddings = self.model_part.embed_images(params, images, fitted=True)
    return references.mean_embedding(embeddings, prompt['mask'])

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    # the mean cosine over references equals the product with the mean embedding
    found = self.embed_images(params, observed['image'])
    return {self.names[0]: jnp.einsum('bmd,bd->bm', found, vctx)}

  def cost(self, op):
    if op == 'encode':
      # references are embedded once per prompt, padding included
      return core.Cost(flops=self._reference_count * self.model_part.embedding_flops)
    return super().cost(op)
