"""SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (Tschannen et al. 2025, 2502.14786).

SigLIP is a CLIP trained with a sigmoid for each pair. A probe that attends to the patches replaces
the class token, there is no causal mask, and the logit has a bias. A text is read at its last
token, which is padding, so texts have full length. Version 2 is the same network with another
vocabulary; its naflex variant is not ported. Checked against `transformers.SiglipModel`
(tests/parity).

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
from vtts_jax.models.clip.modeling import unit_vectors

EPS = 1e-6
MEAN = STD = (0.5, 0.5, 0.5)
# squeezed to the square, as the released processors do: nothing is cut off
PREPROCESSING = Preprocessing(MEAN, STD, mode='squash')
SECOND = 256000  # words of version 2 (Gemma's), by which it is known


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    image, text: the trunks.
    image_size: S.
    patch: P.
    vocab: V.
    length: tokens of every text, padding included.
    preprocessing: how pictures become S x S.

  Raises:
    ConfigError: a picture smaller than a patch.
  """

  image: vit.Config
  text: vit.Config
  image_size: int = 224
  patch: int = 16
  vocab: int = 32000
  length: int = 64
  preprocessing: Preprocessing = PREPROCESSING

  def __post_init__(self):
    if self.image_size < self.patch:
      raise ConfigError(f'image_size={self.image_size}: must be at least patch={self.patch}')

  @property
  def projection(self) -> int:
    """E: the image trunk's width."""
    return self.image.width

  @property
  def tokens(self) -> int:
    """Number of patches of a picture."""
    return (self.image_size // self.patch) ** 2

  @property
  def lower_cases(self) -> bool:
    """Whether texts must be lower-cased: version 2 was trained so, and its tokenizer is Gemma's,
    which keeps capitals. That of version 1 lowers them itself."""
    return self.vocab == SECOND


def released_preprocessing(vocab: int) -> Preprocessing:
  """Returns the preprocessing of the released models: version 2 resizes bilinearly."""
  return dataclasses.replace(PREPROCESSING, method='bilinear' if vocab == SECOND else 'bicubic')


def _make_trunk(width, layers, heads, hidden):
  return vit.Config(width, layers, heads, hidden, 'gelu_tanh', EPS)


def _released_sizes():
  """Returns every released model by its name on the hub; the second version has 'v2_' before it."""
  base = _make_trunk(width=768, layers=12, heads=12, hidden=3072)
  large = _make_trunk(width=1024, layers=24, heads=16, hidden=4096)
  so400m = _make_trunk(width=1152, layers=27, heads=16, hidden=4304)
  giant = _make_trunk(width=1536, layers=40, heads=16, hidden=6144)
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
    ('v2_', second, {'vocab': SECOND, 'preprocessing': released_preprocessing(SECOND)}),
  ):
    for name, (image, sides) in table.items():
      # the giant has the text tower of so400m
      text, patch = so400m if image is giant else image, int(name[-2:])
      found |= {
        f'{lead}{name}_{side}': Config(image, text, image_size=side, patch=patch, **more)
        for side in sides
      }
  return found


_TINY = _make_trunk(width=16, layers=2, heads=2, hidden=32)
# the names start with siglip, so that a verifier on CLIP or SigLIP can tell the two apart
SIZES = {
  'siglip_tiny': Config(_TINY, _TINY, image_size=32, vocab=256, length=16),
  **{f'siglip_{name}': config for name, config in _released_sizes().items()},
}


class Pool(nnx.Module):
  """`__call__(tokens [R, T, D]) -> [R, D]`: one learned query attends, then a feed-forward."""

  def __init__(self, t: vit.Config, *, rngs):
    self.heads = t.heads
    self.probe = vit.random_table(rngs, t.width)
    self.qkv = nnx.Linear(t.width, 3 * t.width, rngs=rngs)
    self.out = nnx.Linear(t.width, t.width, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)
    self.ffn = vit.FeedForward(t.width, t.hidden, t.act, rngs=rngs)

  def __call__(self, tokens):
    d = tokens.shape[-1]
    kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
    # the query is the same for all pictures: it is projected once, not R times
    query = self.probe[...] @ kernel[:, :d] + bias[:d]  # [D]
    key, value = jnp.split(tokens @ kernel[:, d:] + bias[d:], 2, -1)
    query = jnp.broadcast_to(query, (len(tokens), 1, d))
    x = self.out(vit.multi_head_attention(query, key, value, self.heads))[:, 0]
    return x + self.ffn(self.norm(x))


class PatchTower(nnx.Module):
  """The image tower without its pool, which Janus reads; pixels as `preprocess` makes them."""

  def __init__(self, t: vit.Config, patch: int, tokens: int, *, rngs):
    self.side = patch
    self.patch = nnx.Linear(3 * patch**2, t.width, rngs=rngs)
    self.position = vit.random_table(rngs, tokens, t.width)
    self.trunk = vit.Trunk(t, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)

  def embed_patches(self, pixels):
    """Pixels `[R, S, S, 3]` -> the trunk's input `[R, T, D]`."""
    # no class token, so a position belongs to each patch and to nothing else
    x = vit.split_patches(pixels, self.side).astype(self.patch.kernel.dtype)
    return self.patch(x) + self.position[...]

  def hidden_states(self, pixels):
    """Pixels `[R, S, S, 3]` -> the trunk's output `[R, T, D]`, normed."""
    return self.norm(self.trunk(self.embed_patches(pixels)))


class ImageTower(PatchTower):
  """`__call__(pixels [R, S, S, 3]) -> [R, E]`."""

  def __init__(self, c: Config, *, rngs):
    super().__init__(c.image, c.patch, c.tokens, rngs=rngs)
    self.pool = Pool(c.image, rngs=rngs)

  def __call__(self, pixels):
    return self.pool(self.hidden_states(pixels))


class TextTower(nnx.Module):
  """`__call__(ids [R, T]) -> [R, E]`; no mask: padding is read, too."""

  def __init__(self, c: Config, *, rngs):
    t = c.text
    self.token = nnx.Embed(c.vocab, t.width, rngs=rngs)
    self.position = vit.random_table(rngs, c.length, t.width)
    self.trunk = vit.Trunk(t, rngs=rngs)
    self.norm = vit.LayerNorm(t.width, t.eps)
    self.projection = nnx.Linear(t.width, c.projection, rngs=rngs)

  def hidden_states(self, ids):
    """Ids `[R, T]` -> the trunk's output `[R, T, D]`, normed."""
    return self.norm(self.trunk(self.token(ids) + self.position[...]))

  def __call__(self, ids):
    # the last token is padding in most texts: it was trained to sum the text up
    return self.projection(self.hidden_states(ids)[:, -1])


class SigLIP(nnx.Module):
  """The towers `image` and `text`, with the temperature and the bias of the logit."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.image, self.text = ImageTower(c, rngs=rngs), TextTower(c, rngs=rngs)
    # the paper's initial values, in arrays of one number as the checkpoint has them
    self.scale = nnx.Param(jnp.full(1, math.log(10.0)))
    self.bias = nnx.Param(jnp.full(1, -10.0))

  def embed_images(self, pixels):
    """`[R, S, S, 3]` -> unit vectors `[R, E]`."""
    return unit_vectors(self.image(pixels))

  def embed_texts(self, ids):
    """`[R, T]` -> unit vectors `[R, E]`."""
    return unit_vectors(self.text(ids))

  def pair_logits(self, cosine):
    """Cosines of any shape -> the logits of the sigmoid."""
    scale, bias = (x[...][0].astype(jnp.float32) for x in (self.scale, self.bias))
    return jnp.exp(scale) * cosine + bias


def build_model(config: Config, seed=0) -> SigLIP:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return SigLIP(config, rngs=nnx.Rngs(seed))


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in [0, 1] -> pixels `[R, S, S, 3]`, by `c.preprocessing`."""
  how = c.preprocessing
  return normalize_channels(how.fit_images(images, c.image_size), how.mean, how.std)


def count_flops(c: Config, op: str) -> int:
  """Matmul FLOPs of one row: 'image' (after `preprocess`) or 'text'."""
  if op == 'text':
    return vit.count_flops(c.text, c.length) + 2 * c.text.width * c.projection
  d, t = c.image.width, c.tokens
  # keys and values of all tokens, one query, and the feed-forward of its result
  pool = 4 * t * d * d + 4 * t * d + 4 * d * d + 4 * d * c.image.hidden
  return vit.count_flops(c.image, t) + 2 * t * 3 * c.patch**2 * d + pool
