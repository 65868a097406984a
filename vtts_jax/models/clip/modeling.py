"""CLIP (Radford et al. 2021, arXiv 2103.00020; OpenCLIP: Cherti et al. 2022, 2212.07143).

A vision transformer and a causal text transformer have embeddings that point the same way where
picture and text agree. Either tower also stands alone. Checked against `transformers.CLIPModel` and
`open_clip.model.CLIP` (tests/parity).

Letters: R rows · S side of a picture · P side of a patch · T tokens · D width · E width of the
joint space · V vocabulary.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import Preprocessing, normalize_channels
from vtts_jax.models import vit

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# that of OpenAI's CLIP and open_clip: shorter side to S by the bicubic filter, torchvision's crop
PREPROCESSING = Preprocessing(MEAN, STD)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    image, text: the trunks; None for a tower that is left out.
    projection: E; 0 for a text tower without a projection (that of FLUX and Stable Diffusion 1).
    image_size: S.
    patch: P.
    vocab: V.
    length: most tokens that a text may have.
    eos: id of the end of text, where the text is read. None reads at the first highest id, which is
      the end of text in CLIP's vocabulary.
    preprocessing: how pictures become S x S.

  Raises:
    ConfigError: a picture smaller than a patch.
  """

  image: vit.Config | None
  text: vit.Config | None
  projection: int
  image_size: int = 224
  patch: int = 16
  vocab: int = 49408
  length: int = 77
  eos: int | None = None
  preprocessing: Preprocessing = PREPROCESSING

  def __post_init__(self):
    if self.image_size < self.patch:
      raise ConfigError(f'image_size={self.image_size}: must be at least patch={self.patch}')

  @property
  def tokens(self) -> int:
    """Tokens of a picture, with the class token."""
    return (self.image_size // self.patch) ** 2 + 1


def _make_trunk(width, layers, heads, hidden=0, act='quick_gelu'):
  return vit.Config(width, layers, heads, hidden or 4 * width, act)


# trunks of the released models, by their letter
_TINY = _make_trunk(width=16, layers=2, heads=2, hidden=32)
_IMAGE_B = _make_trunk(width=768, layers=12, heads=12)
_TEXT_B = _make_trunk(width=512, layers=12, heads=8)
_IMAGE_L = _make_trunk(width=1024, layers=24, heads=16)
_TEXT_L = _make_trunk(width=768, layers=12, heads=12)
SIZES = {
  'tiny': Config(_TINY, _TINY, projection=12, image_size=32, vocab=256, length=16),
  # OpenAI's
  'b32': Config(_IMAGE_B, _TEXT_B, projection=512, patch=32),
  'b16': Config(_IMAGE_B, _TEXT_B, projection=512, patch=16),
  'l14': Config(_IMAGE_L, _TEXT_L, projection=768, patch=14),
  'l14_336': Config(_IMAGE_L, _TEXT_L, projection=768, patch=14, image_size=336),
  # OpenCLIP's
  'h14': Config(
    _make_trunk(width=1280, layers=32, heads=16, act='gelu'),
    _make_trunk(width=1024, layers=24, heads=16, act='gelu'), projection=1024, patch=14,
  ),
  'bigg14': Config(
    _make_trunk(width=1664, layers=48, heads=16, hidden=8192, act='gelu'),
    _make_trunk(width=1280, layers=32, heads=20, act='gelu'), projection=1280, patch=14,
  ),
}  # fmt: skip
PARTS = ('image', 'text')


def part_of(c: Config, part: str) -> Config:
  """Returns the config of one tower with its projection."""
  return dataclasses.replace(c, **{'text' if part == 'image' else 'image': None})


class ImageTower(nnx.Module):
  """`__call__(pixels [R, S, S, 3]) -> [R, E]`; pixels as `preprocess` makes them."""

  def __init__(self, c: Config, *, rngs):
    t, self.side = c.image, c.patch
    self.patch = nnx.Linear(3 * c.patch**2, t.width, use_bias=False, rngs=rngs)
    self.cls = vit.random_table(rngs, t.width)
    self.position = vit.random_table(rngs, c.tokens, t.width)
    self.norm_pre, self.norm_post = (vit.LayerNorm(t.width, t.eps) for _ in range(2))
    self.trunk = vit.Trunk(t, rngs=rngs)
    # no bias in any projection, nor in the patches
    self.projection = nnx.Linear(t.width, c.projection, use_bias=False, rngs=rngs)

  def embed_patches(self, pixels):
    """Pixels `[R, S, S, 3]` -> the trunk's input `[R, T, D]`, the class token first."""
    # pixels are float32: they are rounded to the weights' dtype only here
    x = self.patch(vit.split_patches(pixels, self.side).astype(self.patch.kernel.dtype))
    cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[2]))
    return self.norm_pre(jnp.concatenate([cls, x], 1) + self.position[...])

  def hidden_states(self, pixels):
    """Pixels `[R, S, S, 3]` -> the trunk's output `[R, T, D]`."""
    return self.trunk(self.embed_patches(pixels))

  def pool_tokens(self, tokens):
    """Takes the class token: `[R, T, D] -> [R, D]`."""
    return self.norm_post(tokens[:, 0])

  def __call__(self, pixels):
    return self.projection(self.pool_tokens(self.hidden_states(pixels)))


class TextTower(nnx.Module):
  """`__call__(ids [R, T]) -> [R, E]`; padding needs no mask, as no token sees a later one."""

  def __init__(self, c: Config, *, rngs):
    t, self.eos = c.text, c.eos
    self.token = nnx.Embed(c.vocab, t.width, rngs=rngs)
    self.position = vit.random_table(rngs, c.length, t.width)
    self.trunk = vit.Trunk(t, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)
    linear = lambda: nnx.Linear(t.width, c.projection, use_bias=False, rngs=rngs)
    self.projection = linear() if c.projection else None

  def embed_tokens(self, ids):
    """Ids `[R, T]` -> the trunk's input `[R, T, D]`."""
    return self.token(ids) + self.position[...][: ids.shape[1]]

  def hidden_states(self, ids):
    """Ids `[R, T]` -> the trunk's output `[R, T, D]`, normed."""
    return self.norm(self.trunk(self.embed_tokens(ids), vit.causal_bias(ids.shape[1])))

  def pool_tokens(self, tokens, ids):
    """Takes the token at the end of the text: `[R, T, D] -> [R, D]`."""
    # argmax gives the first of equal values, so the first end of text where it also pads
    end = jnp.argmax(ids if self.eos is None else ids == self.eos, -1)
    return tokens[jnp.arange(len(ids)), end]

  def penultimate_states(self, ids):
    """What SD3 and SDXL read: ids `[R, T]` -> the input of the last block `[R, T, D]`, which is not
    normed, and the projected text `[R, E]`, None without a projection."""
    x = self.embed_tokens(ids)
    states = self.trunk.layer_states(x, vit.causal_bias(ids.shape[1]))
    before = states[-2] if len(states) > 1 else x
    # XL's CLIP L has none
    if self.projection is None:
      return before, None
    return before, self.projection(self.pool_tokens(self.norm(states[-1]), ids))

  def __call__(self, ids):
    return self.projection(self.pool_tokens(self.hidden_states(ids), ids))


def unit_vectors(x):
  """Scales vectors `[..., D]` to length one, float32."""
  # scores are differences of cosines near each other, so bfloat16 ends here
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CLIP(nnx.Module):
  """The towers `image` and `text`, with the temperature if both are there."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.image = ImageTower(c, rngs=rngs) if c.image else None
    self.text = TextTower(c, rngs=rngs) if c.text else None
    # one tower alone compares nothing, so it has no temperature
    self.scale = nnx.Param(jnp.array(math.log(1 / 0.07))) if c.image and c.text else None

  def embed_images(self, pixels):
    """`[R, S, S, 3]` -> unit vectors `[R, E]`."""
    return unit_vectors(self.image(pixels))

  def embed_texts(self, ids):
    """`[R, T]` -> unit vectors `[R, E]`."""
    return unit_vectors(self.text(ids))

  def pair_logits(self, cosine):
    """Cosines of any shape -> the logits of the contrastive softmax."""
    return jnp.exp(self.scale[...].astype(jnp.float32)) * cosine


def build_model(config: Config, seed=0) -> CLIP:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return CLIP(config, rngs=nnx.Rngs(seed))


def fitting_of(c: Config) -> tuple[Preprocessing, int]:
  """Returns how pictures are resized and cut, and the side S of the square that is left."""
  return c.preprocessing, c.image_size


def preprocess(c: Config, images, fitted: bool = False):
  """Pictures `[R, H, W, 3]` in [0, 1] -> pixels `[R, S, S, 3]`, by `c.preprocessing`.

  In the released models the shorter side is resized to S, the middle is cut out, and channels are
  normalised. Pictures that are `fitted` are S x S already.
  """
  how = c.preprocessing
  if not fitted:
    images = how.fit_images(images, c.image_size)
  return normalize_channels(images, how.mean, how.std)


def count_flops(c: Config, op: str) -> int:
  """Matmul FLOPs of one row: 'image' (after `preprocess`) or 'text' (at full length)."""
  if op == 'text':
    return vit.count_flops(c.text, c.length) + 2 * c.text.width * c.projection
  # patches come in, the class token alone goes out
  ends = 3 * c.patch**2 * (c.tokens - 1) + c.projection
  return vit.count_flops(c.image, c.tokens) + 2 * c.image.width * ends
