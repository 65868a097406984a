"""Two dual encoders that score how well a picture fits a caption (CLIP, Radford et al. 2021,
trained with the sigmoid loss of SigLIP, Zhai et al. 2023).

`a` reads pictures through 12 x 12 windows and pools places by learned spatial filters; `b` has a
convolution pyramid and pools over rows and over columns. Both read captions with a gated MLP over
four words at a time. They share no parameter, seed or row of data.

Each tower has its own detection heads, trained with it. Its embedding is linear in their output:
shapes, colours and products of both at each place, pooled, plus the number of objects. A word sees
at most three words before it. Freer forms memorise the combinations of the training split. Measured
accuracy on held-out pairs (all / relations): MLP read-out over flattened places and words .89 /
.90, with 99.8 % in training; a table of all 40 shape-colour pairs .93 / .73; this form with a
weight decay of .01 and 2,500 steps .96 / .88, with .3 and 4,000 steps .99 / .95 (`b`; `a` .99 /
.99).

Letters: R rows · P = 36 places · K = 6 classes · Q = 13 + `bound` facts of a place · Tt = 12 text
tokens · D = 128 width of embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.scenes import world
from vtts_jax.scenes.models.layers import MLP, RMSNorm, learned_array
from vtts_jax.scenes.models.soft_detector import NOTHING, PLACES, Windows, count_window_flops

TOWERS = ('windows', 'conv')
HEADS = NOTHING + 1 + len(world.COLOURS)
BACK = 3  # words that a word sees before it


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    tower: 'windows' or 'conv'.
    width: channels of a place in the image tower.
    pools: number of weighted sums over places; 'conv' needs 12.
    bound: number of products of shape and colour.
    hidden: width of the captions' MLP.
    dim: width of the embeddings.
    words: width of a word.
  """

  tower: str = 'windows'
  width: int = 80
  pools: int = 12
  bound: int = 32
  hidden: int = 64
  dim: int = 128
  words: int = 32


class ReadOut(nnx.Module):
  """Detections `[R, P, K + 8]` to (embedding `[R, D]`, class and colour log-probabilities).

  `pool [F, P]` are the weights that sum facts over places. The facts of a place are its shape, its
  colour and `bound` products of the two; a product treats unseen pairs like seen ones. The number
  of objects enters as max(number - k, 0).
  """

  def __init__(self, config, *, rngs):
    self.shape = learned_array(rngs, NOTHING, config.bound, scale=1.0)
    self.colour = learned_array(rngs, len(world.COLOURS), config.bound, scale=1.0)
    self.out = nnx.Linear(config.pools * _count_facts(config) + 4, config.dim, rngs=rngs)

  def __call__(self, heads, pool):
    # a place holds one of five shapes or nothing; colours are read apart from shapes
    kind = jax.nn.log_softmax(heads[..., :NOTHING + 1])
    colour = jax.nn.log_softmax(heads[..., NOTHING + 1:])
    shapes = jnp.exp(kind[..., :NOTHING])  # [R, P, 5]
    inks = jnp.exp(colour)
    bound = (shapes @ self.shape[...]) * (inks @ self.colour[...])
    # colours count only where an object is, so they are weighted by its probability
    facts = jnp.concatenate([shapes, inks * shapes.sum(-1, keepdims=True), bound], -1)
    seen = jnp.einsum('fp,rpq->rfq', pool, facts).reshape(len(heads), -1)
    # a piecewise linear code of the count, since the read-out itself is linear
    number = shapes.sum((1, 2))[:, None]
    return self.out(jnp.concatenate([seen, jax.nn.relu(number - jnp.arange(4))], -1)), kind, colour


def _count_facts(config):
  """Q, the number of facts of a place."""
  return NOTHING + len(world.COLOURS) + config.bound


def _count_read_out_flops(c):
  place = c.width * HEADS + (NOTHING + len(world.COLOURS)) * c.bound + c.pools * _count_facts(c)
  return 2 * (PLACES * place + (c.pools * _count_facts(c) + 4) * c.dim)


class WindowTower(nnx.Module):
  """Images `[R, 32, 32, 3]` to the output of `ReadOut`; the pools are learned filters."""

  def __init__(self, config, *, rngs):
    w = config.width
    self.windows = Windows(48, w, rngs=rngs)
    self.norm, self.block = RMSNorm(w), MLP(w, w, w, rngs=rngs)
    self.detect = nnx.Linear(w, HEADS, rngs=rngs)
    self.filters = learned_array(rngs, config.pools, PLACES, scale=0.5)
    self.read = ReadOut(config, rngs=rngs)

  def __call__(self, images):
    x = self.windows(images)  # [P, R, width]
    x = jax.nn.relu(x + self.block(self.norm(x)))
    return self.read(self.detect(x).transpose(1, 0, 2), self.filters[...])

  @staticmethod
  def count_flops(c):
    block = 4 * PLACES * c.width * c.width
    return count_window_flops(48, c.width) + block + _count_read_out_flops(c)


class ConvTower(nnx.Module):
  """Images `[R, 32, 32, 3]` to the output of `ReadOut`; the pools are 6 rows and 6 columns."""

  def __init__(self, config, *, rngs):
    w = config.width
    conv = lambda i, o, n, s: nnx.Conv(i, o, (n, n), strides=(s, s), padding='SAME', rngs=rngs)
    self.first, self.second, self.third = conv(3, 24, 4, 2), conv(24, 48, 4, 2), conv(48, w, 3, 1)
    self.detect = nnx.Linear(w, HEADS, rngs=rngs)
    self.read = ReadOut(config, rngs=rngs)

  def __call__(self, images):
    x = images
    for layer in (self.first, self.second, self.third):
      x = jax.nn.relu(layer(x))
    # the middles of these cells are the lattice points
    x = x[:, 1:7, 1:7].reshape(len(images), PLACES, -1)
    n = len(world.LATTICE)
    # rows and columns suffice for relations: an object left of another is in an earlier column
    line, one = jnp.eye(n), jnp.ones((1, n))
    return self.read(self.detect(x), jnp.concatenate([jnp.kron(line, one), jnp.kron(one, line)]))

  @staticmethod
  def count_flops(c):
    """FLOPs of one image; taps that fall on the padding do not count, as in XLA."""
    first = 2 * 62 * 62 * 3 * 24  # 16 places of 4 taps with stride 2 see 62 of 64
    second = 2 * 30 * 30 * 24 * 48
    return first + second + 2 * 22 * 22 * 48 * c.width + _count_read_out_flops(c)


class Words(nnx.Module):
  """Ids `[R, Tt]` to `[R, D]`: a gated MLP on each word with the 3 before it, averaged."""

  def __init__(self, config, *, rngs):
    self.embed = learned_array(rngs, len(world.VOCABULARY), config.words, scale=0.3)
    self.up = nnx.Linear((1 + BACK) * config.words, 2 * config.hidden, rngs=rngs)
    self.out = nnx.Linear(config.hidden, config.dim, rngs=rngs)

  def __call__(self, ids):
    x = jnp.pad(self.embed[...][ids], ((0, 0), (BACK, 0), (0, 0)))
    x = jnp.concatenate([x[:, i:i + world.TEXT_LENGTH] for i in range(1 + BACK)], -1)
    # the gate lets a word change what its neighbours mean, as in `left of`
    up, gate = jnp.split(self.up(x), 2, -1)
    return self.out((up * jnp.tanh(gate)).mean(1))

  @staticmethod
  def count_flops(c):
    return 2 * (world.TEXT_LENGTH * (1 + BACK) * c.words * 2 * c.hidden + c.hidden * c.dim)


_TOWER = {'windows': WindowTower, 'conv': ConvTower}


class Clip(nnx.Module):
  """`embed_images` and `embed_texts` give unit embeddings, `pair_logits` compares them."""

  def __init__(self, config, *, rngs):
    self.tower = _TOWER[config.tower](config, rngs=rngs)
    self.words = Words(config, rngs=rngs)
    # SigLIP's start: a negative bias, because most pairs of a batch do not match
    self.scale = nnx.Param(jnp.full((), 2.3))  # log of 10, as in SigLIP
    self.bias = nnx.Param(jnp.full((), -2.0))

  def embed_images(self, images):
    """Images `[R, 32, 32, 3]` to unit embeddings `[R, D]`."""
    return _unit_vectors(self.tower(images)[0])

  def embed_and_detect(self, images):
    """(embedding `[R, D]`, class log-probabilities `[R, P, K]`, colour's `[R, P, 8]`)."""
    x, kind, colour = self.tower(images)
    return _unit_vectors(x), kind, colour

  def embed_texts(self, ids):
    """Word ids `[R, Tt]` int32 to unit embeddings `[R, D]`."""
    return _unit_vectors(self.words(ids))

  def pair_logits(self, images, texts):
    """Logits `[...]` of embeddings with broadcastable shapes `[..., D]`."""
    return jnp.exp(self.scale[...]) * (images * texts).sum(-1) + self.bias[...]

  def all_pair_logits(self, images, texts):
    """Logits `[R, J]` of all pairs of embeddings `[R, D]` and `[J, D]`."""
    return jnp.exp(self.scale[...]) * images @ texts.T + self.bias[...]


def _unit_vectors(x):
  # the small term keeps the gradient finite at 0
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-8)


def build_model(config, seed=0):
  """A `Clip` with random parameters.

  Raises:
    ConfigError: an unknown tower.
  """
  if config.tower not in TOWERS:
    raise ConfigError(f'tower={config.tower!r}: allowed are {", ".join(TOWERS)}')
  return Clip(config, rngs=nnx.Rngs(seed))


def count_flops(config, op):
  """FLOPs of one 'image' or one 'text', matrix products only, a multiply-add counted as 2."""
  return (_TOWER[config.tower] if op == 'image' else Words).count_flops(config)
