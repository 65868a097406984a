"""OWL-ViT and OWLv2: a CLIP whose every patch token is a detection, named by free text.

Minderer et al. 2022 (arXiv 2205.06230) and 2023 (OWLv2, 2306.09683). Each patch token is multiplied
by the class token. From the product one small head predicts a box around the token's own place. A
second head predicts an embedding, which is compared with the text queries under a shift and a scale
that also depend on the token. In OWLv2 a third head says whether there is any object. Checked
against transformers (`OwlViTForObjectDetection`, `Owlv2ForObjectDetection`; tests/parity).

Letters: R images · T = (S / P)^2 patch tokens · S image side · P patch side · D width · Q queries ·
W words of a query · E width of embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import normalize_channels, quantize_pixels, resize_images
from vtts_jax.models import vit

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GREY = 0.5  # OWLv2 pads pictures with it


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    vision, text: the trunks.
    size: S.
    patch: P.
    vocab: number of token ids.
    context: most words of a query.
    embed: E.
    v2: whether this is OWLv2, with its objectness head and its preprocessing.

  Raises:
    ConfigError: an image side that is no multiple of the patch side.
  """

  vision: vit.Config
  text: vit.Config
  size: int
  patch: int
  vocab: int = 49408
  context: int = 16
  embed: int = 512
  v2: bool = False

  def __post_init__(self):
    if self.size % self.patch:
      raise ConfigError(f'size={self.size}: must be a multiple of patch={self.patch}')

  @property
  def grid(self):
    """Patches along a side."""
    return self.size // self.patch


def _make_trunk(width, layers, heads=0):
  return vit.Config(width, layers, heads or width // 64, hidden=4 * width, act='quick_gelu')


_TINY = vit.Config(width=16, layers=1, heads=2, hidden=24, act='quick_gelu')
_TINY = Config(_TINY, _TINY, size=32, patch=8, vocab=64, embed=8)
_BASE = {'vision': _make_trunk(768, layers=12), 'text': _make_trunk(512, layers=12)}
_LARGE = {'vision': _make_trunk(1024, layers=24), 'text': _make_trunk(768, layers=12)}
_LARGE |= {'embed': 768, 'patch': 14}
# owlvit-large's config.json says 16 text heads where CLIP L/14 has 12; see README
_HEADS_16 = {'text': _make_trunk(768, layers=12, heads=16)}
SIZES = {
  'tiny': _TINY,
  'tiny_v2': dataclasses.replace(_TINY, v2=True),
  # google/owlvit-base-patch32 ..., google/owlv2-base-patch16-ensemble ...
  'owlvit_b32': Config(**_BASE, size=768, patch=32),
  'owlvit_b16': Config(**_BASE, size=768, patch=16),
  'owlvit_l14': Config(**_LARGE | _HEADS_16, size=840),
  'owlv2_b16': Config(**_BASE, size=960, patch=16, v2=True),
  'owlv2_l14': Config(**_LARGE, size=1008, v2=True),
}


class Vision(nnx.Module):
  """`__call__(images [R, S, S, 3])`, normalised -> `[R, 1 + T, D]` before the last norm.

  The class token comes first.
  """

  def __init__(self, c: Config, *, rngs):
    self.patch, width = c.patch, c.vision.width
    self.embed = nnx.Linear(3 * c.patch**2, width, use_bias=False, rngs=rngs)
    self.token = vit.random_table(rngs, width)
    self.position = vit.random_table(rngs, 1 + c.grid**2, width)
    self.norm_pre = vit.LayerNorm(width, c.vision.eps)
    self.trunk = vit.Trunk(c.vision, rngs=rngs)
    self.norm = vit.LayerNorm(width, c.vision.eps)

  def embed_patches(self, images):
    """Images `[R, S, S, 3]` -> the trunk's input `[R, 1 + T, D]`."""
    x = self.embed(vit.split_patches(images, self.patch).astype(self.embed.kernel.dtype))
    token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[2]))
    return self.norm_pre(jnp.concatenate([token, x], 1) + self.position[...])

  def __call__(self, images):
    return self.trunk(self.embed_patches(images))


class Text(nnx.Module):
  """`__call__(ids [Q, W])` -> unit embeddings `[Q, E]`, read at the first end token."""

  def __init__(self, c: Config, *, rngs):
    self.embed = nnx.Embed(c.vocab, c.text.width, rngs=rngs)
    self.position = nnx.Param(0.01 * jax.random.normal(rngs.params(), (c.context, c.text.width)))
    self.trunk = vit.Trunk(c.text, rngs=rngs)
    self.norm = vit.LayerNorm(c.text.width, c.text.eps)
    self.project = nnx.Linear(c.text.width, c.embed, use_bias=False, rngs=rngs)

  def hidden_states(self, ids):
    """Ids `[Q, W]` -> the trunk's output `[Q, W, D]`, normed."""
    x = self.embed(ids) + self.position[: ids.shape[1]]
    return self.norm(self.trunk(x, vit.causal_bias(ids.shape[1])))

  def __call__(self, ids):
    # the end token has the largest id, and argmax gives its first place
    x = self.hidden_states(ids)[jnp.arange(len(ids)), ids.argmax(-1)]
    return unit_vectors(self.project(x), 0.0)


class Head(nnx.Module):
  """Three layers with GELU between them, `[..., D]` -> `[..., out]`."""

  def __init__(self, width, out, *, rngs):
    self.first, self.second = (nnx.Linear(width, width, rngs=rngs) for _ in range(2))
    self.last = nnx.Linear(width, out, rngs=rngs)

  def __call__(self, x):
    gelu = vit.ACTIVATIONS['gelu']
    return self.last(gelu(self.second(gelu(self.first(x)))))


class OwlViT(nnx.Module):
  """Call `text` once per prompt, `patch_features` once per picture, then the heads."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    width = c.vision.width
    self.vision, self.text = Vision(c, rngs=rngs), Text(c, rngs=rngs)
    # the norm of patch tokens times class token, not that of the tower
    self.norm = vit.LayerNorm(width, c.vision.eps)
    self.classes = nnx.Linear(width, c.embed, rngs=rngs)
    self.shift, self.scale = (nnx.Linear(width, 1, rngs=rngs) for _ in range(2))
    self.box = Head(width, 4, rngs=rngs)
    self.object = Head(width, 1, rngs=rngs) if c.v2 else None

  def patch_features(self, images):
    """Pictures `[R, S, S, 3]` of `preprocess` -> `[R, T, D]`."""
    # the class token multiplies every patch: it tells each of them about the whole picture
    x = self.vision.norm(self.vision(images))
    return self.norm(x[:, 1:] * x[:, :1])

  def query_logits(self, features, queries):
    """Features `[R, T, D]` and unit queries `[R, Q, E]` -> logits `[R, T, Q]` float32.

    The sigmoid of a logit is the score.
    """
    # queries are normed again with this epsilon, as in the reference
    likeness = jnp.einsum(
      'rte,rqe->rtq', unit_vectors(self.classes(features)), unit_vectors(queries),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    shift, scale = (f(features).astype(jnp.float32) for f in (self.shift, self.scale))
    # elu + 1 keeps the scale positive
    return (likeness + shift) * (jax.nn.elu(scale) + 1)

  def predict_boxes(self, features):
    """Features `[R, T, D]` -> boxes `[R, T, 4]` float32.

    A box is centre x, y, width, height as shares of the side S.
    """
    return jax.nn.sigmoid(self.box(features).astype(jnp.float32) + box_bias(self.config.grid))

  def objectness_logits(self, features):
    """Features `[R, T, D]` -> logits `[R, T]`: whether there is an object of any class (OWLv2)."""
    return self.object(features)[..., 0].astype(jnp.float32)


def unit_vectors(x, eps=1e-6):
  """Returns x / (its length + eps), computed in float32, in the dtype of x."""
  y = x.astype(jnp.float32)
  return (y / (jnp.sqrt((y * y).sum(-1, keepdims=True)) + eps)).astype(x.dtype)


def box_bias(grid: int) -> np.ndarray:
  """Returns logits `[T, 4]` of a box at each token's lower right corner, a patch wide and high."""
  # float32 throughout, as the reference: the last row and column are log(1e-4) after a
  # cancellation, where float64 gives other numbers
  line = np.arange(1, grid + 1, dtype=np.float32) / np.float32(grid)
  x, y = np.meshgrid(line, line)
  one = np.full_like(x, 1 / grid)
  share, tiny = np.stack([x, y, one, one], -1).reshape(-1, 4), np.float32(1e-4)
  return np.log(share + tiny) - np.log1p(tiny - share)


# ---------------------------------------------------------------------------------- preprocessing


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in [0, 1] -> `[R, S, S, 3]` as the released processors make them.

  OWL-ViT resizes 8 bit pictures to the square by bicubic, whatever their proportions. OWLv2 pads
  with grey at the bottom and on the right, then blurs and samples linearly in floats (skimage's
  `resize`).
  """
  if not c.v2:
    return normalize_channels(resize_images(images, (c.size, c.size), 'bicubic'), MEAN, STD)
  x = pad_to_square(quantize_pixels(images))
  table = blur_and_sample(x.shape[1], c.size)
  x = jnp.einsum('rhwc,hx->rxwc', x, table, precision='highest')
  x = jnp.einsum('rhwc,wx->rhxc', x, table, precision='highest')
  return normalize_channels(x, MEAN, STD)


def pad_to_square(images):
  """Pads pictures `[..., H, W, 3]` to a square with grey below and on the right."""
  height, width = images.shape[-3:-1]
  side = max(height, width)
  spare = ((0, 0), (0, side - height), (0, side - width), (0, 0))
  return jnp.pad(images, spare, constant_values=GREY)


def box_extent(c: Config, height: int, width: int) -> tuple[int, int]:
  """Returns the (width, height) in pixels that a box's numbers are shares of."""
  # OWLv2's boxes are shares of the padded square
  return (max(height, width),) * 2 if c.v2 else (width, height)


def blur_and_sample(old: int, new: int) -> np.ndarray:
  """Returns the matrix `[old, new]` of one axis of skimage's `resize` with antialiasing.

  Where the picture shrinks, a Gaussian of (old / new - 1) / 2 pixels blurs it. Then it is sampled
  linearly at the middle of each new pixel. Both mirror at the middle of the outermost pixel.
  """
  sigma = max(0.0, (old / new - 1) / 2)
  # scipy cuts its Gaussian at 4 sigma
  reach = int(4 * sigma + 0.5)
  near = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
  blur, taps = np.zeros((old, old)), np.arange(old)[:, None] + np.arange(-reach, reach + 1)
  np.add.at(blur, (mirror_index(taps, old), np.arange(old)[:, None]), near / near.sum())
  at = (np.arange(new) + 0.5) * old / new - 0.5
  low = np.floor(at).astype(int)
  # the blur and the sampling are both linear: one matrix does both
  sample, share = np.zeros((old, new)), at - low
  np.add.at(sample, (mirror_index(low, old), np.arange(new)), 1 - share)
  np.add.at(sample, (mirror_index(low + 1, old), np.arange(new)), share)
  return (blur @ sample).astype(np.float32)


def mirror_index(index, size):
  """Reflects indices into 0 .. size - 1; the outermost ones are not repeated."""
  turn = max(2 * (size - 1), 1)
  index = np.abs(index) % turn
  return np.where(index >= size, turn - index, index)


# ------------------------------------------------------------------------------------------ FLOPs


def count_flops(c: Config, op: str, queries: int = 1) -> int:
  """Matmul FLOPs of 'text' (`queries` texts) or 'image' (one picture against `queries` texts)."""
  if op == 'text':
    return queries * (vit.count_flops(c.text, c.context) + 2 * c.text.width * c.embed)
  tokens, width = c.grid**2, c.vision.width
  heads = width * c.embed + 2 * width + 2 * width**2 + 4 * width + queries * c.embed
  return vit.count_flops(c.vision, 1 + tokens) + 2 * tokens * (3 * c.patch**2 * width + heads)


def build_model(config: Config, seed=0) -> OwlViT:
  """Builds a random detector; inside `modules.abstract_module` it uses no memory."""
  return OwlViT(config, rngs=nnx.Rngs(seed))
