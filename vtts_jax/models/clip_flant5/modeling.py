"""CLIP-FlanT5 (Lin et al. 2024, arXiv 2404.01291): LLaVA-1.5 (2310.03744) on FLAN-T5.

The patches of CLIP's second last block go through an MLP and stand among the words that T5's
encoder reads. The decoder says how likely an answer is. Checked against the classes of transformers
put together as in the published code (linzhiqiu/t2v_metrics before 3.1, tests/parity).

Letters: R rows · S side of a picture · P patches · C width of CLIP · B, F words before and after
the picture · W = B + P + F · A tokens of an answer · D width of T5.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.media.preprocess import normalize_channels, resize_images
from vtts_jax.models import vit
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.t5 import decoder as t5_decoder
from vtts_jax.models.t5 import modeling as t5

# the colour of the bands that make a picture square: CLIP's mean in 8 bits, cut off as published
PAD = tuple(int(255 * m) / 255 for m in clip.MEAN)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    vision: CLIP's image tower as far as it is read: without its last block and projection.
    encoder, decoder: the two halves of T5.
    words: number of ids that the tokenizer knows. T5's table has a few more; the published code
      cuts their logits off before the softmax.
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
  # T5 reads the second last block, so the last one is not built
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
  """`__call__(pixels [R, S, S, 3])` -> patches `[R, P, C]` as they leave the last block."""

  def __init__(self, c: clip.Config, *, rngs):
    super().__init__(c, rngs=rngs)
    # the patches are read before both
    del self.norm_post, self.projection

  def __call__(self, pixels):
    # without the class token
    return self.hidden_states(pixels)[:, 1:]


class Projector(nnx.Module):
  """The MLP from CLIP's width to T5's, `[R, P, C] -> [R, P, D]`."""

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
    """Pixels `[R, S, S, 3]` of `preprocess` -> embeddings `[R, P, D]` for T5."""
    return self.projector(self.image(pixels))

  def encode_question(self, before, image, after, mask):
    """Encodes a question about a picture.

    Args:
      before: embedded words before the picture `[R, B, D]`.
      image: the picture's embeddings `[R, P, D]`.
      after: embedded words after it `[R, F, D]`.
      mask: `[R, F]`, nonzero where a word after the picture is real.

    Returns:
      The encoder's states `[R, W, D]` and their mask `[R, W]`.
    """
    x = jnp.concatenate([before, image, after], 1)
    # words before the picture and patches are never padding
    real = jnp.ones((len(x), before.shape[1] + image.shape[1]), bool)
    mask = jnp.concatenate([real, mask.astype(bool)], 1)
    bias = self.encoder.position_bias(x.shape[1], mask)
    # not `self.encoder(...)`, which embeds ids: a picture has none
    for block in self.encoder.blocks:
      x = block(x, bias)
    return self.encoder.norm(x), mask

  def answer_log_probs(self, states, mask, answer):
    """Returns the log-probability of each token of `answer [R, A]`, `[R, A]` float32."""
    x = self.encoder.embed(t5_decoder.shift_right(answer))
    # cut before the softmax, else rows without a word would take probability
    logits = self.decoder(x, states, mask)[..., : self.config.words]
    return jnp.take_along_axis(jax.nn.log_softmax(logits, -1), answer[..., None], -1)[..., 0]

  def answer_likelihood(self, before, image, after, mask, answer):
    """Returns the published score `[R]`; arguments as in `encode_question`, and `answer [R, A]`.

    It is exp of the mean log-probability of the answer's tokens with its end: for "Yes" this is the
    root of P(Yes) P(end | Yes).
    """
    states, mask = self.encode_question(before, image, after, mask)
    return jnp.exp(self.answer_log_probs(states, mask, answer).mean(-1))


def build_model(config: Config, seed=0) -> ClipFlanT5:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return ClipFlanT5(config, rngs=nnx.Rngs(seed))


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in [0, 1] -> pixels `[R, S, S, 3]`.

  Bands of CLIP's mean colour make pictures square; then they are resized and normalised.
  """
  size = c.vision.image_size
  x = resize_images(pad_to_square(images), (size, size), 'bicubic')
  return normalize_channels(x, clip.MEAN, clip.STD)


def pad_to_square(images):
  """Pads pictures to a square: `[R, H, W, 3] -> [R, max(H, W), max(H, W), 3]`.

  The picture lies in the middle, rounded to the top and the left.
  """
  rows, height, width, _ = images.shape
  side = max(height, width)
  # integer division as the published code: an odd rest goes to the bottom or the right
  canvas = jnp.broadcast_to(jnp.array(PAD, images.dtype), (rows, side, side, 3))
  corner = (0, (side - height) // 2, (side - width) // 2, 0)
  return jax.lax.dynamic_update_slice(canvas, images, corner)


def count_flops(c: Config, before: int, after: int, answer: int) -> int:
  """Matmul FLOPs of one picture (after `preprocess`).

  `before` and `after` are the words around the picture, `answer` is the number of its tokens.
  """
  v, width = c.vision, c.encoder.d_model
  tower = vit.count_flops(v.image, v.tokens) + 6 * v.patch**2 * c.patches * v.image.width
  mlp = 2 * c.patches * width * (v.image.width + width)
  words = before + c.patches + after
  text = t5.count_flops(c.encoder, words) + t5_decoder.count_flops(c.decoder, answer, words)
  return tower + mlp + text
