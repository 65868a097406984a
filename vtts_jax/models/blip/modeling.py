"""BLIP (Li et al. 2022, arXiv 2201.12086) as ImageReward (Xu et al., 2304.05977) and CycleReward
(Bahng et al., 2506.02095) score with it.

A ViT reads the picture, and a BERT with cross-attention to the picture's tokens reads the text.
Five linear layers turn the first token into a reward: ImageReward's have no activations and their
result is standardised; CycleReward's have GELUs between them and their result is the reward. A
text layer is self-attention, cross-attention and feed-forward, all post-norm. The self-attention of
layer 0 has not seen the picture yet, so `encode_text` runs it once per prompt. Of the last layer
only the first token is read, so only that token goes through it. The layers between are therefore
stored in pairs: cross-attention and feed-forward of layer i with self-attention of layer i + 1.
Checked against transformers' `BlipForImageTextRetrieval` (tests/parity) and the golden files
`cyclereward*.npz`.

Letters: R rows · S side · P patch side · T image tokens · C image width · W text tokens · D width ·
L text layers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models import vit
from vtts_jax.models.stacked import scan_blocks, stack_blocks

# mean and deviation of the raw rewards, from ImageReward.py
MEAN, STD = 0.16717362830052426, 1.0333394966054072

_LARGE = vit.Config(width=1024, layers=24, heads=16, hidden=4096, eps=1e-6)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    vision: the picture's trunk.
    size: S.
    patch: P.
    vocab, positions: rows of the two embedding tables.
    width, layers, heads, hidden, eps: the text's trunk.
    length: W, padding included; longer texts are cut.
    head: widths after each of the head's layers.
    head_act: activation between the head's layers, '' or one of `vit.ACTIVATIONS`.
    mean, std: of the raw rewards, by which a reward is standardised.

  Raises:
    ConfigError: a width that is no multiple of the heads, fewer than 2 layers.
  """

  vision: vit.Config = _LARGE
  size: int = 224
  patch: int = 16
  vocab: int = 30524
  positions: int = 512
  width: int = 768
  layers: int = 12
  heads: int = 12
  hidden: int = 3072
  eps: float = 1e-12
  length: int = 35
  head: tuple[int, ...] = (1024, 128, 64, 16, 1)
  head_act: str = ''
  mean: float = MEAN
  std: float = STD

  def __post_init__(self):
    if self.width % self.heads:
      raise ConfigError(f'width={self.width}: must be a multiple of heads={self.heads}')
    if self.layers < 2:
      raise ConfigError(f'layers={self.layers}: at least 2')
    if self.head_act not in ('', *vit.ACTIVATIONS):
      allowed = ', '.join(map(repr, ('', *vit.ACTIVATIONS)))
      raise ConfigError(f'head_act={self.head_act!r}: must be one of {allowed}')

  @property
  def patches(self):
    return (self.size // self.patch) ** 2


# what CycleReward has and ImageReward has not
CYCLE = {'length': 128, 'head_act': 'gelu', 'mean': 0.0, 'std': 1.0}
_TINY = Config(
  vision=vit.Config(width=16, layers=2, heads=2, hidden=32, eps=1e-6), size=32, patch=16,
  vocab=64, positions=12, width=16, layers=3, heads=2, hidden=32, length=12,
  head=(16, 8, 8, 4, 1),
)  # fmt: skip
SIZES = {
  'tiny': _TINY,
  'tiny_cycle': dataclasses.replace(_TINY, **CYCLE | {'length': 12}),
  'image_reward': Config(),
  'cycle_reward': Config(**CYCLE),
}


class SelfAttention(nnx.Module):
  """Post-norm self-attention: norm(x + attention(x))."""

  def __init__(self, c, *, rngs):
    self.heads = c.heads
    self.qkv = nnx.Linear(c.width, 3 * c.width, rngs=rngs)
    self.out = nnx.Linear(c.width, c.width, rngs=rngs)
    self.norm = vit.LayerNorm(c.width, c.eps)

  def __call__(self, x, bias):  # [R, W, D], [R, 1, 1, W]
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    return self.norm(x + self.out(vit.multi_head_attention(q, k, v, self.heads, bias)))


class CrossAttention(nnx.Module):
  """Post-norm attention to the picture: norm(x + attention(x, image))."""

  def __init__(self, c, *, rngs):
    self.heads = c.heads
    self.q, self.out = (nnx.Linear(c.width, c.width, rngs=rngs) for _ in range(2))
    self.kv = nnx.Linear(c.vision.width, 2 * c.width, rngs=rngs)
    self.norm = vit.LayerNorm(c.width, c.eps)

  def __call__(self, x, image):  # [R, W, D], [R, T, C]
    # the picture is as wide as its tower, not as the text
    k, v = jnp.split(self.kv(image), 2, -1)
    return self.norm(x + self.out(vit.multi_head_attention(self.q(x), k, v, self.heads)))


class Fusion(nnx.Module):
  """The second half of a layer: cross-attention, then feed-forward."""

  def __init__(self, c, *, rngs):
    self.cross = CrossAttention(c, rngs=rngs)
    self.ffn = vit.FeedForward(c.width, c.hidden, 'gelu', rngs=rngs)
    self.norm = vit.LayerNorm(c.width, c.eps)

  def __call__(self, x, image):
    x = self.cross(x, image)
    return self.norm(x + self.ffn(x))


class Pair(nnx.Module):
  """The second half of a layer and the first half of the next."""

  def __init__(self, c, *, rngs):
    self.fusion = Fusion(c, rngs=rngs)
    self.attn = SelfAttention(c, rngs=rngs)

  def __call__(self, x, image, bias):
    """Returns the layer's output, and that output after the next layer's self-attention."""
    done = self.fusion(x, image)
    return done, self.attn(done, bias)


class Vision(nnx.Module):
  """`__call__(images [R, S, S, 3], normalised)` -> `[R, T, C]`, the class token first."""

  def __init__(self, c: Config, *, rngs):
    self.side = c.patch
    self.embed = nnx.Linear(3 * c.patch**2, c.vision.width, rngs=rngs)
    self.token = vit.random_table(rngs, c.vision.width)
    self.positions = vit.random_table(rngs, c.patches + 1, c.vision.width)
    self.trunk = vit.Trunk(c.vision, rngs=rngs)
    self.norm = vit.LayerNorm(c.vision.width, c.vision.eps)

  def embed_patches(self, images):
    """Images `[R, S, S, 3]` -> the trunk's input `[R, T, C]`."""
    # the dtype of the weights: pixels come as float32
    x = self.embed(vit.split_patches(images.astype(self.token.dtype), self.side))
    first = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
    return jnp.concatenate([first, x], 1) + self.positions[...]

  def __call__(self, images):
    return self.norm(self.trunk(self.embed_patches(images)))


class BLIP(nnx.Module):
  """`encode_text` once per prompt, then `fuse_image` and `predict_reward` for each picture."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.vision = Vision(c, rngs=rngs)
    self.words = nnx.Embed(c.vocab, c.width, rngs=rngs)
    self.positions = nnx.Embed(c.positions, c.width, rngs=rngs)
    self.norm = vit.LayerNorm(c.width, c.eps)
    self.first = SelfAttention(c, rngs=rngs)
    # pairs are alike, so that they can be scanned; the first and the last half stay apart
    self.pairs = stack_blocks(lambda rngs: Pair(c, rngs=rngs), c.layers - 1, rngs)
    self.last = Fusion(c, rngs=rngs)
    widths = (c.width, *c.head)
    self.head = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:])])

  def embed_tokens(self, ids):
    """Ids `[R, W]` -> the first layer's input `[R, W, D]`."""
    return self.norm(self.words(ids) + self.positions.embedding[: ids.shape[1]])

  def encode_text(self, ids, mask):
    """Ids and mask `[R, W]` -> `[R, W, D]`: everything that depends on the prompt alone."""
    # layer 0's self-attention; the rest of the layer needs the picture
    return self.first(self.embed_tokens(ids), _padding_bias(mask))

  def fuse_image(self, text, mask, image):
    """Lets texts see pictures.

    Args:
      text: `[R, W, D]` of `encode_text`.
      mask: `[R, W]`, nonzero where a token is real.
      image: tokens of the pictures `[R, T, C]`.

    Returns:
      The first token after the last layer `[R, D]`, and the output of every earlier layer
      `[L - 1, R, W, D]`.
    """
    x, states = self.fuse_words(text, mask, image)
    # the head reads the first token only
    return self.last(x[:, :1], image)[:, 0], states

  def fuse_words(self, text, mask, image):
    """As `fuse_image`, up to the self-attention of the last layer: `[R, W, D]`, and the states."""
    bias = _padding_bias(mask)

    def run_pair(pair, x, _):
      done, x = pair(x, image, bias)
      return x, done

    return scan_blocks(self.pairs, run_pair, text)

  def predict_reward(self, first):
    """First tokens `[R, D]` -> rewards `[R]` float32.

    Over the pictures that people rated for ImageReward, its rewards are about standard normal.
    """
    # float32 as the published code: five layers without activations amplify rounding
    c, x = self.config, first.astype(jnp.float32)
    for i, layer in enumerate(self.head):
      x = vit.ACTIVATIONS[c.head_act](x) if i and c.head_act else x
      x = layer(x)
    return (x[:, 0] - c.mean) / c.std


def _padding_bias(mask):
  # padding is no key; its own outputs are computed and never read
  return jnp.where(mask[:, None, None, :].astype(bool), 0.0, -jnp.inf)


def build_model(config: Config, seed=0) -> BLIP:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return BLIP(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, part: str) -> int:
  """Matmul FLOPs: 'text' is `encode_text` for one prompt, 'image' the rest for one picture."""
  w, d, t = c.length, c.width, c.patches + 1
  attn = w * (8 * d * d + 4 * w * d)
  if part == 'text':
    return attn

  def fusion(w):
    return 4 * w * d * (d + t + c.hidden) + 4 * t * c.vision.width * d

  widths = (d, *c.head)
  head = sum(2 * a * b for a, b in zip(widths, widths[1:]))
  tower = 6 * c.patches * c.patch**2 * c.vision.width + vit.count_flops(c.vision, t)
  # of the last layer only the first token is computed
  return tower + (c.layers - 1) * (fusion(w) + attn) + fusion(1) + head
