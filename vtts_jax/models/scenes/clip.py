"""Two dual encoders that score how well a picture fits a caption (CLIP, Radford et al. 2021,
trained with the sigmoid loss of SigLIP, Zhai et al. 2023).

They share a purpose and nothing else: `a` reads pictures through 12 x 12 windows pooled by learned
spatial filters and captions with attention; `b` reads pictures with a convolution pyramid that is
flattened and captions with a gated MLP over seven words at a time. Each image tower carries its
own detection heads, used in training only: without them a tower stays at chance on shapes and
relations. What is seen at a place enters the embedding linearly: with an MLP there `b` learnt the
combinations of the training split by heart (99.8 % of hard negatives there, 89 % held out).

Letters: R rows · P = 36 places · K = 6 classes · Tt = 12 text tokens · D = 128 width of embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.data import scenes as world
from vtts_jax.models.scenes.judge import NOTHING, PLACES, Windows, flops_windows
from vtts_jax.models.scenes.layers import MLP, RMSNorm, table

TOWERS = ('windows', 'conv')
TEXTS = ('attention', 'gated')
HEADS = NOTHING + 1 + len(world.COLOURS)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    tower: 'windows' or 'conv'; text: 'attention' or 'gated'.
    width: of a place in the image tower; keep: its channels that reach the embedding.
    filters: spatial filters of 'windows'. hidden: of 'gated'. dim: of the embeddings.
    words: width of a word.
  """

  tower: str = 'windows'
  text: str = 'attention'
  width: int = 80
  keep: int = 48
  filters: int = 12
  hidden: int = 128
  dim: int = 128
  words: int = 64


class WindowTower(nnx.Module):
  """`[R, 32, 32, 3]` -> (embedding `[R, D]`, detection logits `[R, P, K + 8]`)."""

  def __init__(self, config, *, rngs):
    w = config.width
    self.windows = Windows(48, w, rngs=rngs)
    self.norm, self.block = RMSNorm(w), MLP(w, w, w, rngs=rngs)
    self.detect = nnx.Linear(w, HEADS, rngs=rngs)
    self.keep = nnx.Linear(w, config.keep, rngs=rngs)
    self.filters = table(rngs, config.filters, PLACES, scale=PLACES**-0.5)
    self.out = nnx.Linear(config.filters * config.keep, config.dim, rngs=rngs)

  def __call__(self, images):
    x = self.windows(images)  # [P, R, width]
    x = jax.nn.relu(x + self.block(self.norm(x)))
    y = jnp.tanh(self.keep(x))
    y = jnp.einsum('fp,prc->rfc', self.filters[...], y).reshape(images.shape[0], -1)
    return self.out(y), self.detect(x).transpose(1, 0, 2)

  @staticmethod
  def flops(c):
    w = c.width
    place = 2 * PLACES * (2 * w * w + w * c.keep + c.filters * c.keep)
    return flops_windows(48, w) + place + 2 * c.filters * c.keep * c.dim


class ConvTower(nnx.Module):
  """`[R, 32, 32, 3]` -> (embedding `[R, D]`, detection logits `[R, P, K + 8]`)."""

  def __init__(self, config, *, rngs):
    w = config.width
    conv = lambda i, o, n, s: nnx.Conv(i, o, (n, n), strides=(s, s), padding='SAME', rngs=rngs)
    self.first, self.second, self.third = conv(3, 24, 4, 2), conv(24, 48, 4, 2), conv(48, w, 3, 1)
    self.detect = nnx.Linear(w, HEADS, rngs=rngs)
    self.keep = nnx.Linear(w, config.keep, rngs=rngs)
    self.out = nnx.Linear(PLACES * config.keep, config.dim, rngs=rngs)

  def __call__(self, images):
    x = images
    for layer in (self.first, self.second, self.third):
      x = jax.nn.relu(layer(x))
    x = x[:, 1:7, 1:7].reshape(len(images), PLACES, -1)  # cells whose middle is on the lattice
    return self.out(jnp.tanh(self.keep(x)).reshape(len(images), -1)), self.detect(x)

  @staticmethod
  def flops(c):
    """As compiled: the taps that fall on the padding do not count."""
    first = 2 * 62 * 62 * 3 * 24  # 16 places of 4 taps with stride 2 see 62 of 64
    second = 2 * 30 * 30 * 24 * 48
    third = 2 * 22 * 22 * 48 * c.width
    rest = 2 * PLACES * c.keep * (c.width + c.dim)
    return first + second + third + rest


class AttentionText(nnx.Module):
  """Ids `[R, Tt]` -> `[R, D]`: attention, a gated MLP per word, mean over the words."""

  def __init__(self, config, *, rngs):
    w = config.words
    self.embed = table(rngs, len(world.VOCABULARY), w, scale=0.3)
    self.place = table(rngs, world.TEXT_LENGTH, w, scale=0.3)
    self.norm, self.after = RMSNorm(w), RMSNorm(w)
    self.qkv = nnx.Linear(w, 3 * w, rngs=rngs)
    self.join = nnx.Linear(w, w, rngs=rngs)
    self.up = nnx.Linear(w, 4 * w, rngs=rngs)
    self.out = nnx.Linear(2 * w, config.dim, rngs=rngs)

  def __call__(self, ids, seen=None):
    said = (ids != world.PAD).astype(jnp.float32)  # [R, Tt]
    x = self.embed[...][ids] + self.place[...]
    q, k, v = (y.reshape(*y.shape[:-1], 4, -1) for y in jnp.split(self.qkv(self.norm(x)), 3, -1))
    near = jnp.einsum('rqhc,rkhc->rhqk', q, k) * q.shape[-1] ** -0.5
    open_ = said[:, None, None] > 0
    open_ = open_ if seen is None else open_ & seen[:, None]
    near = jax.nn.softmax(jnp.where(open_, near, -1e9), -1)
    x = x + self.join(jnp.einsum('rhqk,rkhc->rqhc', near, v).reshape(x.shape))
    up, gate = jnp.split(self.up(self.after(x)), 2, -1)
    x = (up * jnp.tanh(gate) * said[..., None]).sum(1) / jnp.maximum(said.sum(1), 1)[:, None]
    return self.out(x)

  @staticmethod
  def flops(c):
    w, t = c.words, world.TEXT_LENGTH
    return 2 * t * (3 * w * w + 2 * t * w + w * w + 4 * w * w) + 2 * 2 * w * c.dim


class GatedText(nnx.Module):
  """Ids `[R, Tt]` -> `[R, D]`: a gated MLP over each word and its 3 neighbours a side, summed."""

  def __init__(self, config, *, rngs):
    self.embed = table(rngs, len(world.VOCABULARY), config.words, scale=0.3)
    self.up = nnx.Linear(7 * config.words, 2 * config.hidden, rngs=rngs)
    self.out = nnx.Linear(config.hidden, config.dim, rngs=rngs)

  def __call__(self, ids, seen=None):
    t = world.TEXT_LENGTH
    x = jnp.pad(self.embed[...][ids], ((0, 0), (3, 3), (0, 0)))
    x = [x[:, i:i + t] for i in range(7)]
    if seen is not None:
      seen = jnp.pad(seen, ((0, 0), (0, 0), (3, 3)))
      x = [y * seen[:, jnp.arange(t), jnp.arange(t) + i, None] for i, y in enumerate(x)]
    x = jnp.concatenate(x, -1)
    up, gate = jnp.split(self.up(x), 2, -1)
    return self.out((up * jnp.tanh(gate)).mean(1))

  @staticmethod
  def flops(c):
    return 2 * (world.TEXT_LENGTH * 7 * c.words * 2 * c.hidden + c.hidden * c.dim)


_TOWER = {'windows': WindowTower, 'conv': ConvTower}
_TEXT = {'attention': AttentionText, 'gated': GatedText}


class Clip(nnx.Module):
  """`image` and `text` give unit embeddings, `logits` compares them."""

  def __init__(self, config, *, rngs):
    self.tower = _TOWER[config.tower](config, rngs=rngs)
    self.words = _TEXT[config.text](config, rngs=rngs)
    self.scale = nnx.Param(jnp.full((), 2.3))  # log of 10, as in SigLIP
    self.bias = nnx.Param(jnp.full((), -2.0))

  def image(self, images):
    """`[R, 32, 32, 3]` -> `[R, D]`."""
    return _unit(self.tower(images)[0])

  def detections(self, images):
    """(embedding `[R, D]`, class log-probabilities `[R, P, K]`, colour's `[R, P, 8]`)."""
    x, heads = self.tower(images)
    split = NOTHING + 1
    return (_unit(x), jax.nn.log_softmax(heads[..., :split]),
            jax.nn.log_softmax(heads[..., split:]))

  def text(self, ids, seen=None):
    """`[R, Tt]` int32 -> `[R, D]`; `seen [R, Tt, Tt]` says which words a word may look at."""
    return _unit(self.words(ids, seen))

  def logits(self, images, texts):
    """Embeddings of broadcastable shapes `[..., D]` -> `[...]`."""
    return jnp.exp(self.scale[...]) * (images * texts).sum(-1) + self.bias[...]

  def table(self, images, texts):
    """All pairs: `[R, D]`, `[J, D]` -> `[R, J]`."""
    return jnp.exp(self.scale[...]) * images @ texts.T + self.bias[...]


def _unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-8)


def build(config, seed=0):
  """A `Clip` with random parameters.

  Raises:
    ValueError: an unknown tower or text encoder.
  """
  for name, allowed in (('tower', TOWERS), ('text', TEXTS)):
    if getattr(config, name) not in allowed:
      raise ValueError(f'{name}={getattr(config, name)!r}: allowed are {", ".join(allowed)}')
  return Clip(config, rngs=nnx.Rngs(seed))


def flops(config, op):
  """FLOPs of one 'image' or one 'text', matrix products only, a multiply-add counted as 2."""
  return (_TOWER[config.tower] if op == 'image' else _TEXT[config.text]).flops(config)
