"""CLIP-FlanT5 (Lin et al. 2024, arXiv 2404.01291): LLaVA-1.5 (2310.03744) on FLAN-T5.

What CLIP's second last block makes of the patches, through an MLP, stands among the words that T5's
encoder reads; the decoder says how likely an answer is. Checked against the classes of transformers
put together as in the published code (linzhiqiu/t2v_metrics before 3.1, tests/parity).

Letters: R rows · S side of a picture · P patches · B, F words before and after the picture · W = B
+ P + F · A tokens of an answer · D width of T5 · V words of the tokenizer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.media import preprocess as pictures
from vtts_jax.models import vit
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.t5 import decoder as t5_decoder
from vtts_jax.models.t5 import modeling as t5

PAD = tuple(int(255 * m) / 255 for m in clip.MEAN)  # what makes a picture square


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    vision: of CLIP's image tower as far as it is read: one block less than it has, no projection.
    encoder, decoder: of the two halves of T5.
    words: ids that the tokenizer knows. T5's table has a few more, of which nothing is ever said:
      the published code cuts them off before the softmax.
  """

  vision: clip.Config
  encoder: t5.Config
  decoder: t5.Config
  words: int = 32100

  @property
  def patches(self) -> int:
    """P."""
    return self.vision.tokens - 1


def _with_clip(text):
  tower = clip.SIZES['l14_336']
  trunk = dataclasses.replace(tower.image, layers=tower.image.layers - 1)
  vision = dataclasses.replace(tower, image=trunk, text=None, projection=1)
  return Config(vision=vision, encoder=text, decoder=text)


_TRUNK = vit.Config(width=16, layers=1, heads=2, hidden=24, act='quick_gelu')
_TEXT = t5.Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=3)
SIZES = {
  'tiny': Config(
    vision=clip.Config(image=_TRUNK, text=None, projection=1, image_size=16, patch=4),
    encoder=_TEXT, decoder=_TEXT, words=60,
  ),
  'clip_flant5_xl': _with_clip(t5.SIZES['flan_t5_xl']),
  'clip_flant5_xxl': _with_clip(t5.SIZES['t5_v1_1_xxl']),
}  # fmt: skip


class Patches(clip.ImageTower):
  """`__call__(pixels [R, S, S, 3])`: patches as they leave the last block, `[R, P, C]`."""

  def __init__(self, c: clip.Config, *, rngs):
    super().__init__(c, rngs=rngs)
    del self.norm_post, self.projection

  def __call__(self, pixels):
    return self.tokens(pixels)[:, 1:]


class Projector(nnx.Module):
  """`[R, P, C] -> [R, P, D]`."""

  def __init__(self, inner, outer, *, rngs):
    self.up, self.down = nnx.Linear(inner, outer, rngs=rngs), nnx.Linear(outer, outer, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.gelu(self.up(x), approximate=False))


class ClipFlanT5(nnx.Module):
  """Pictures and words in, the likelihood of an answer out."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.image = Patches(c.vision, rngs=rngs)
    self.projector = Projector(c.vision.image.width, c.encoder.d_model, rngs=rngs)
    self.encoder = t5.T5Encoder(c.encoder, rngs=rngs)
    self.decoder = t5_decoder.T5Decoder(c.decoder, rngs=rngs)

  def embed_images(self, pixels):
    """`[R, S, S, 3]` as `preprocess` makes them -> what T5 reads of them, `[R, P, D]`."""
    return self.projector(self.image(pixels))

  def read(self, before, image, after, mask):
    """Embedded words `[R, B, D]`, a picture, words `[R, F, D]`, of which `mask [R, F]` are real ->
    the encoder's states `[R, W, D]` and their mask `[R, W]`."""
    x = jnp.concatenate([before, image, after], 1)
    real = jnp.ones((len(x), before.shape[1] + image.shape[1]), bool)
    mask = jnp.concatenate([real, mask.astype(bool)], 1)
    bias = self.encoder.bias(x.shape[1], mask)
    for block in self.encoder.blocks:
      x = block(x, bias)
    return self.encoder.norm(x), mask

  def log_probs(self, states, mask, answer):
    """Log-probability of each token of `answer [R, A]` after those before it, `[R, A]` float32."""
    x = self.encoder.embed(t5_decoder.shifted(answer))
    logits = self.decoder(x, states, mask)[..., : self.config.words]
    return jnp.take_along_axis(jax.nn.log_softmax(logits, -1), answer[..., None], -1)[..., 0]

  def likelihood(self, before, image, after, mask, answer):
    """The published score `[R]`: exp of the mean log-probability of the answer's tokens, its end
    among them (for "Yes", the root of P(Yes) P(end | Yes))."""
    states, mask = self.read(before, image, after, mask)
    return jnp.exp(self.log_probs(states, mask, answer).mean(-1))


def build(config: Config, seed=0) -> ClipFlanT5:
  """A random model; under `modules.abstract_module` no memory is used."""
  return ClipFlanT5(config, rngs=nnx.Rngs(seed))


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in [0, 1] -> pixels `[R, S, S, 3]`: made square by bands of CLIP's mean
  colour, resized, normalised."""
  size = c.vision.image_size
  x = pictures.resize(square(images), (size, size), 'bicubic')
  return pictures.normalize(x, clip.MEAN, clip.STD)


def square(images):
  """`[R, H, W, 3] -> [R, max(H, W), max(H, W), 3]`, the picture in the middle, rounded to the
  top and left."""
  rows, height, width, _ = images.shape
  side = max(height, width)
  canvas = jnp.broadcast_to(jnp.array(PAD, images.dtype), (rows, side, side, 3))
  corner = (0, (side - height) // 2, (side - width) // 2, 0)
  return jax.lax.dynamic_update_slice(canvas, images, corner)


def flops(c: Config, before: int, after: int, answer: int) -> int:
  """Matmul FLOPs of one picture (after `preprocess`) with so many words and answer tokens."""
  v, width = c.vision, c.encoder.d_model
  tower = vit.flops(v.image, v.tokens) + 6 * v.patch**2 * c.patches * v.image.width
  mlp = 2 * c.patches * width * (v.image.width + width)
  words = before + c.patches + after
  text = t5.flops(c.encoder, words) + t5_decoder.flops(c.decoder, answer, words)
  return tower + mlp + text
