"""SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (Tschannen et al. 2025, 2502.14786).

CLIP trained with a sigmoid for each pair: no class token but a probe that attends to the patches,
no causal mask, the text read at its last token (which is padding, so texts have full length), a
logit with a bias. Version 2 is the same network with another vocabulary; its naflex variant is not
ported. Checked against `transformers.SiglipModel` (tests/parity).

Letters: R rows · S side of a picture · P of a patch · T tokens · D width · E width of the joint
space · V vocabulary.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess as pictures
from vtts_jax.models import vit
from vtts_jax.models.clip.modeling import random_table, unit

EPS = 1e-6
MEAN = STD = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    image, text: the trunks.
    length: tokens of every text, padding included.
    resample: filter by which pictures are resized.
  """

  image: vit.Config
  text: vit.Config
  image_size: int = 224
  patch: int = 16
  vocab: int = 32000
  length: int = 64
  resample: str = 'bicubic'

  def __post_init__(self):
    if self.image_size < self.patch:
      raise ConfigError(f'image_size={self.image_size}: must be at least patch={self.patch}')
    if self.resample not in pictures.FILTERS:
      allowed = ', '.join(pictures.FILTERS)
      raise ConfigError(f'resample={self.resample!r}: must be one of {allowed}')

  @property
  def projection(self) -> int:
    """E: the image trunk's width."""
    return self.image.width

  @property
  def tokens(self) -> int:
    """Patches of a picture."""
    return (self.image_size // self.patch) ** 2


def _trunk(width, layers, heads, hidden):
  return vit.Config(width, layers, heads, hidden, 'gelu_tanh', EPS)


def _released():
  """Every released model by the name it has on the hub, 'v2_' for the second version."""
  base = _trunk(width=768, layers=12, heads=12, hidden=3072)
  large = _trunk(width=1024, layers=24, heads=16, hidden=4096)
  so400m = _trunk(width=1152, layers=27, heads=16, hidden=4304)
  giant = _trunk(width=1536, layers=40, heads=16, hidden=6144)
  first = {
    'b16': (base, (224, 256, 384, 512)), 'l16': (large, (256, 384)), 'so400m14': (so400m, (384,)),
  }  # fmt: skip
  second = {
    'b32': (base, (256,)), 'b16': (base, (224, 256, 384, 512)), 'l16': (large, (256, 384, 512)),
    'so400m14': (so400m, (224, 384)), 'so400m16': (so400m, (256, 384, 512)),
    'giant16': (giant, (256, 384)),
  }  # fmt: skip
  found = {'so400m14_224': Config(so400m, so400m, image_size=224, patch=14, length=16)}
  found |= {
    f'{name}_i18n': Config(t, t, image_size=256, patch=16, vocab=250000)
    for name, t in (('b16_256', base), ('so400m16_256', so400m))
  }
  for lead, table, more in (
    ('', first, {}),
    ('v2_', second, {'vocab': 256000, 'resample': 'bilinear'}),
  ):
    for name, (image, sides) in table.items():
      text, patch = so400m if image is giant else image, int(name[-2:])
      found |= {
        f'{lead}{name}_{side}': Config(image, text, image_size=side, patch=patch, **more)
        for side in sides
      }
  return found


_TINY = _trunk(width=16, layers=2, heads=2, hidden=32)
SIZES = {  # named so that a verifier on CLIP or SigLIP can tell the two apart
  'siglip_tiny': Config(_TINY, _TINY, image_size=32, vocab=256, length=16),
  **{f'siglip_{name}': config for name, config in _released().items()},
}


class Pool(nnx.Module):
  """`__call__(tokens [R, T, D]) -> [R, D]`: what one learned query finds, and a feed-forward."""

  def __init__(self, t: vit.Config, *, rngs):
    self.heads = t.heads
    self.probe = random_table(rngs, t.width)
    self.qkv = nnx.Linear(t.width, 3 * t.width, rngs=rngs)
    self.out = nnx.Linear(t.width, t.width, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)
    self.ffn = vit.FeedForward(t.width, t.hidden, t.act, rngs=rngs)

  def __call__(self, tokens):
    d = tokens.shape[-1]
    kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
    query = self.probe[...] @ kernel[:, :d] + bias[:d]  # [D], the same for all
    key, value = jnp.split(tokens @ kernel[:, d:] + bias[d:], 2, -1)
    query = jnp.broadcast_to(query, (len(tokens), 1, d))
    x = self.out(vit.attend(query, key, value, self.heads))[:, 0]
    return x + self.ffn(self.norm(x))


class ImageTower(nnx.Module):
  """`__call__(pixels [R, S, S, 3]) -> [R, E]`; pixels as `preprocess` makes them."""

  def __init__(self, c: Config, *, rngs):
    t, self.side = c.image, c.patch
    self.patch = nnx.Linear(3 * c.patch**2, t.width, rngs=rngs)
    self.position = random_table(rngs, c.tokens, t.width)
    self.trunk = vit.Trunk(t, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)
    self.pool = Pool(t, rngs=rngs)

  def embed(self, pixels):
    """What goes into the trunk, `[R, T, D]`."""
    x = vit.patches(pixels, self.side).astype(self.patch.kernel.dtype)
    return self.patch(x) + self.position[...]

  def tokens(self, pixels):
    """What comes out of the trunk, `[R, T, D]`, normed."""
    return self.norm(self.trunk(self.embed(pixels)))

  def __call__(self, pixels):
    return self.pool(self.tokens(pixels))


class TextTower(nnx.Module):
  """`__call__(ids [R, T]) -> [R, E]`; no mask: padding is read, too."""

  def __init__(self, c: Config, *, rngs):
    t = c.text
    self.token = nnx.Embed(c.vocab, t.width, rngs=rngs)
    self.position = random_table(rngs, c.length, t.width)
    self.trunk = vit.Trunk(t, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)
    self.projection = nnx.Linear(t.width, c.projection, rngs=rngs)

  def tokens(self, ids):
    """What comes out of the trunk, `[R, T, D]`, normed."""
    return self.norm(self.trunk(self.token(ids) + self.position[...]))

  def __call__(self, ids):
    return self.projection(self.tokens(ids)[:, -1])


class SigLIP(nnx.Module):
  """The towers `image` and `text`, the temperature and the bias of the logit."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.image, self.text = ImageTower(c, rngs=rngs), TextTower(c, rngs=rngs)
    self.scale = nnx.Param(jnp.full(1, math.log(10.0)))
    self.bias = nnx.Param(jnp.full(1, -10.0))

  def embed_images(self, pixels):
    """`[R, S, S, 3]` -> unit vectors `[R, E]`."""
    return unit(self.image(pixels))

  def embed_texts(self, ids):
    """`[R, T]` -> unit vectors `[R, E]`."""
    return unit(self.text(ids))

  def logits(self, cosine):
    """The logit of the sigmoid."""
    scale, bias = (x[...][0].astype(jnp.float32) for x in (self.scale, self.bias))
    return jnp.exp(scale) * cosine + bias


def build(config: Config, seed=0) -> SigLIP:
  """A random model; under `modules.abstract_module` no memory is used."""
  return SigLIP(config, rngs=nnx.Rngs(seed))


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in [0, 1] -> pixels `[R, S, S, 3]`: proportions are not kept."""
  x = pictures.resize(images, (c.image_size, c.image_size), c.resample)
  return pictures.normalize(x, MEAN, STD)


def flops(c: Config, op: str) -> int:
  """Matmul FLOPs of one row: 'image' (after `preprocess`) or 'text'."""
  if op == 'text':
    return vit.flops(c.text, c.length) + 2 * c.text.width * c.projection
  d, t = c.image.width, c.tokens
  pool = 4 * t * d * d + 4 * t * d + 4 * d * d + 4 * d * c.image.hidden  # keys, values; one query
  return vit.flops(c.image, t) + 2 * t * 3 * c.patch**2 * d + pool
