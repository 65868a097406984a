"""The verifier's detector: a residual MLP applied at each lattice point where an object may be.

No object is larger than 10 pixels, so the 12 x 12 window around a lattice point contains all of it;
one matrix product reads the window. The perceptual detector is a convolution pyramid instead; the
two models share no weights, data or code. `satisfaction_log_prob` turns the soft detections into
the probability that GenEval's rules hold.

Letters: R rows (images) · P = 36 places, row by row · K = 6 classes (5 shapes, then nothing).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.metrics import geneval_arrays
from vtts_jax.scenes import world
from vtts_jax.scenes.models.layers import MLP, RMSNorm

PLACES = len(world.LATTICE) ** 2
NOTHING = len(world.SHAPES)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes: channels of a 4 x 4 cell, width and number of the residual blocks."""

  cell: int = 48
  width: int = 96
  blocks: int = 2


class Windows(nnx.Module):
  """Images `[R, 32, 32, 3]` to `[P, R, width]`: 4 x 4 pixel cells, then 3 x 3 cells per place."""

  def __init__(self, cell, width, *, rngs):
    self.cells = nnx.Linear(48, cell, rngs=rngs)
    self.window = nnx.Linear(9 * cell, width, rngs=rngs)

  def __call__(self, images):
    r, n = images.shape[0], world.SIZE // 4
    x = (2 * images - 1).reshape(r, n, 4, n, 4, 3).transpose(1, 3, 0, 2, 4, 5)
    x = jax.nn.relu(self.cells(x.reshape(n, n, r, 48)))
    # place (r, c) is the middle of cells (r, c) .. (r + 2, c + 2)
    x = jnp.concatenate([x[i:i + 6, j:j + 6] for i in range(3) for j in range(3)], -1)
    return self.window(x.reshape(PLACES, r, -1))


def count_window_flops(cell, width):
  """FLOPs of `Windows` for one image; a multiply-add is 2."""
  return 2 * 64 * 48 * cell + 2 * PLACES * 9 * cell * width


class SoftDetector(nnx.Module):
  """Images `[R, 32, 32, 3]` to log-probabilities of classes `[R, P, K]` and colours `[R, P, 8]`."""

  def __init__(self, config, *, rngs):
    w = config.width
    self.windows = Windows(config.cell, w, rngs=rngs)
    self.norms = nnx.List([RMSNorm(w) for _ in range(config.blocks)])
    self.blocks = nnx.List([MLP(w, w, w, rngs=rngs) for _ in range(config.blocks)])
    self.head = nnx.Linear(w, NOTHING + 1 + len(world.COLOURS), rngs=rngs)

  def __call__(self, images):
    x = self.windows(images)
    for norm, block in zip(self.norms, self.blocks):
      x = x + block(norm(x))
    # places lead inside the network for plain matrix products; rows lead outside
    x = self.head(jax.nn.relu(x)).transpose(1, 0, 2)
    split = NOTHING + 1
    return jax.nn.log_softmax(x[..., :split]), jax.nn.log_softmax(x[..., split:])


def build_model(config, seed=0):
  """A `SoftDetector` with random parameters."""
  return SoftDetector(config, rngs=nnx.Rngs(seed))


def count_flops(config):
  """FLOPs of one image: matrix products only, a multiply-add is 2."""
  w = config.width
  heads = NOTHING + 1 + len(world.COLOURS)
  return count_window_flops(config.cell, w) + 2 * PLACES * (config.blocks * 2 * w * w + w * heads)


def place_targets(scenes):
  """True values per place, numpy int32: class `[R, P]` (5: nothing), colour `[R, P]` (0 if so)."""
  row, slot = np.nonzero(np.arange(world.SLOTS) < scenes.count[:, None])
  kind = np.full((len(scenes.count), PLACES), NOTHING, np.int32)
  colour = np.zeros_like(kind)
  kind[row, scenes.place[row, slot]] = scenes.shape[row, slot]
  colour[row, scenes.place[row, slot]] = scenes.colour[row, slot]
  return kind, colour


def detection_loss(kind, colour, truth):
  """Cross-entropies per object: class at objects, class at empty places, colour at objects.

  Args:
    kind, colour: log-probabilities `[R, P, K]` and `[R, P, 8]`.
    truth: from `place_targets`.

  Returns:
    (sum, {name: scalar}).
  """
  # one-hot products instead of gathers keep the loss fast on every device
  there = (truth[0] != NOTHING).astype(jnp.float32)
  pick = lambda log, index: (log * jax.nn.one_hot(index, log.shape[-1])).sum(-1)
  objects = jnp.maximum(there.sum(), 1)
  terms = {
    'object': -(pick(kind, truth[0]) * there).sum() / objects,
    # also over the number of objects: empty places are many and easy
    'empty': -(pick(kind, truth[0]) * (1 - there)).sum() / objects,
    'colour': -(pick(colour, truth[1]) * there).sum() / objects,
  }
  return sum(terms.values()), terms


# ----------------------------------------------------------------------------- captions as targets

FIELDS = ('tag', 'a', 'b', 'colour_a', 'colour_b', 'count', 'relation')


def parse_captions(texts):
  """Captions of the grammar to targets: numpy int32 `[R, 7]`, the columns of `FIELDS`.

  Raises:
    ConfigError: a text that is not a sentence of the grammar of scenes/world.py.
  """
  rows = []
  for text in texts:
    words = text.lower().replace('.', '').replace(',', '').split()
    row = _parse_caption(words[3:]) if ' '.join(words[:3]) in world.PREFIXES else None
    if row is None:
      raise ConfigError(
        f'prompt {text!r} is not a sentence of the scene world; it must read like '
        "'a photo of a red circle and a blue ring', 'a photo of three squares' or "
        "'a photo of a cross left of a ring'")
    rows.append(row)
  return np.array(rows, np.int32).reshape(-1, len(FIELDS))


def _parse_caption(words):
  """The row of `FIELDS` for the words after the prefix; None if they are not in the grammar."""
  if len(words) == 2 and words[0] in world.NUMBERS and words[1] in world.PLURALS:
    return 2, world.PLURALS.index(words[1]), 0, 0, 0, world.NUMBERS.index(words[0]) + 1, 0
  one, rest = _parse_thing(words)
  if one is None:
    return None
  colour, a = one
  if not rest:
    return (0, a, 0, 0, 0, 1, 0) if colour is None else (3, a, 0, colour, 0, 1, 0)
  # two things joined by `and` or a relation; both have a colour or neither, and relations have none
  for join in ('and', *world.RELATIONS):
    n = len(join.split())
    if ' '.join(rest[:n]) == join:
      other, end = _parse_thing(rest[n:])
      if other is None or end or (colour is None) != (other[0] is None):
        return None
      if join != 'and':
        r = world.RELATIONS.index(join)
        return None if colour is not None else (4, a, other[1], 0, 0, 1, r)
      return (1, a, other[1], 0, 0, 1, 0) if colour is None else (5, a, other[1], colour,
                                                                   other[0], 1, 0)
  return None


def _parse_thing(words):
  """`a red circle ...` to ((colour or None, shape), remaining words); (None, words) otherwise."""
  if len(words) >= 2 and words[0] in ('a', 'an'):
    if words[1] in world.SHAPES:
      return (None, world.SHAPES.index(words[1])), words[2:]
    if len(words) >= 3 and words[1] in world.COLOURS and words[2] in world.SHAPES:
      return (world.COLOURS.index(words[1]), world.SHAPES.index(words[2])), words[3:]
  return None, words


def _place_relations():
  """`[4, P, P]` float32: whether an object at p is in the relation to one at q, by GenEval's rule
  for boxes of the mean size."""
  y, x = (np.array(world.LATTICE)[i] for i in np.divmod(np.arange(PLACES), len(world.LATTICE)))
  centre, radius = np.stack([x, y], -1).astype(float), np.mean(world.RADII)
  box = np.concatenate([centre - radius, centre + radius], -1)  # [P, 4]
  holds = geneval_arrays.relations_hold(box[:, None], box[None])  # [P, P, 4]
  return np.moveaxis(holds, -1, 0).astype(np.float32)


def satisfaction_log_prob(kind, colour, targets):
  """Log-probability `[B, M]`, in [-30, 0], that the detections satisfy GenEval's rules.

  The probability of an object is that of its most likely place; of a relation, that of the most
  likely pair of places in this relation; of a number n, that the n most likely places hold an
  object and the others none.

  Args:
    kind, colour: log-probabilities of `SoftDetector`, `[B, M, P, K]` and `[B, M, P, 8]`.
    targets: `[B, 7]` of `parse_captions`.
  """
  tag, a, b, colour_a, colour_b, count, relation = (targets[:, i] for i in range(7))

  def select_class(log_probs, index):  # [B, M, P, K], [B] -> [B, M, P]
    # one-hot products instead of gathers, which TPUs run slowly
    return jnp.sum(log_probs * jax.nn.one_hot(index, log_probs.shape[-1])[:, None, None], -1)

  at_a, at_b = select_class(kind, a), select_class(kind, b)
  ink_a, ink_b = select_class(colour, colour_a), select_class(colour, colour_b)
  coloured = jnp.isin(tag, jnp.array([3, 5]))[:, None, None]
  first = jnp.max(at_a + coloured * ink_a, -1)
  second = jnp.max(at_b + coloured * ink_b, -1)
  rule = jnp.tensordot(jax.nn.one_hot(relation, 4), _place_relations(), 1)[:, None]  # [B, 1, P, P]
  # below the final clip, so a pair of places outside the relation never wins
  pair = jnp.where(rule > 0.5, at_a[..., :, None] + at_b[..., None, :], -60.0).max((-2, -1))
  ranked = -jnp.sort(-at_a, -1)  # [B, M, P], likeliest first
  # bounded, because log(1 - p) is -inf at p = 1
  absent = jnp.log1p(-jnp.exp(jnp.minimum(ranked, -1e-6)))
  inside = jnp.arange(PLACES) < count[:, None, None]
  number = jnp.where(inside, ranked, absent).sum(-1)
  tag = tag[:, None]
  # all six categories are computed and one is selected: the tag is traced
  out = jnp.where(tag == 2, number, jnp.where(tag == 4, pair, first))
  out = out + jnp.where((tag == 1) | (tag == 5), second, 0.0)
  return jnp.clip(out, -30.0, 0.0)
