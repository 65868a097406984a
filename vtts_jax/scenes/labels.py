"""Labels for contrastive training: which captions are true of a scene, and hard negatives.

The labels follow GenEval's rules (metrics/geneval_arrays.py), applied to the true objects of a
scene; no picture is read.

Letters: R scenes · J captions · O object slots.
"""

import numpy as np

from vtts_jax.metrics import geneval_arrays
from vtts_jax.scenes import world

ASPECTS = ('shape', 'colour', 'count', 'relation', 'swap')


def true_captions(captions, scenes):
  """Whether caption j is true of scene i, `[R, J]` bool."""
  # one number, colour and box per class suffice: no scene has a class in two colours, and relations
  # concern scenes with one object of each class
  rows = len(scenes.count)
  number = np.zeros((rows, 5), int)
  colour = np.full((rows, 5), -1)
  box = np.zeros((rows, 5, 4))
  row, slot = np.nonzero(np.arange(world.SLOTS) < scenes.count[:, None])
  shape = scenes.shape[row, slot]
  np.add.at(number, (row, shape), 1)
  colour[row, shape] = scenes.colour[row, slot]
  box[row, shape] = world.object_boxes(scenes)[0][row, slot]
  c = captions
  has_a, has_b = number[:, c.a] > 0, number[:, c.b] > 0
  tinted = (colour[:, c.a] == c.colour_a), (colour[:, c.b] == c.colour_b)
  related = geneval_arrays.relations_hold(box[:, c.a], box[:, c.b])  # [R, J, 4]
  related = related[:, np.arange(len(c.a)), c.relation]
  return np.select([c.tag == t for t in range(6)], [
    has_a, has_a & has_b, number[:, c.a] == c.count, has_a & tinted[0], has_a & has_b & related,
    has_a & has_b & tinted[0] & tinted[1]])


_ASPECTS_OF = np.array([  # [tag, aspect]: which aspects a caption of that category can get wrong
  [1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0],
  [1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], bool)


def wrong_captions(scenes, seed, index, split='train'):
  """Captions that are false of their scene in exactly one aspect.

  A wrong caption is a sentence of the grammar. With `split='train'` it contains no held-out
  combination; 'held' allows any. The wrong count of a single object is `two circles`. The result
  depends on (seed, `index [R]`, scenes) only.

  Returns:
    (`Captions` of R rows, `[R]` index into ASPECTS).
  """
  world.check_choice('split', split, world.SPLITS)
  index, old = np.asarray(index), scenes.captions
  new, aspect = np.stack(old), np.zeros(len(index), np.int64)
  todo, attempt = np.arange(len(index)), 0
  # rows whose candidate is not a valid caption are drawn again
  while len(todo):
    c, lanes = old.take_rows(todo), 5000 + 16 * attempt
    draw = lambda lane, n: world.draw_integers(seed, index[todo], lanes + lane, n)  # noqa: B023
    can = _ASPECTS_OF[c.tag]
    # a uniform choice among the aspects that this category has
    what = np.argmax(np.cumsum(can, 1) > draw(0, can.sum(1))[:, None], 1)
    second = (draw(1, 2) == 1) & np.isin(c.tag, (1, 4, 5))  # which of two objects
    # adding 1 .. n - 1 modulo n always changes the value
    other = (np.where(second, c.b, c.a) + 1 + draw(2, 4)) % 5
    hue = (np.where(second, c.colour_b, c.colour_a) + 1 + draw(3, 7)) % 8
    is_ = [what == k for k in range(5)]
    a, b = np.where(is_[0] & ~second, other, c.a), np.where(is_[0] & second, other, c.b)
    x, y = np.where(is_[1] & ~second, hue, c.colour_a), np.where(is_[1] & second, hue, c.colour_b)
    x, y = np.where(is_[4], y, x), np.where(is_[4], x, y)
    n = np.where(c.tag == 0, 2, 2 + (c.count - 2 + 1 + draw(4, 2)) % 3)
    n = np.where(is_[2], n, c.count)
    # the wrong count of a single object turns it into a counting caption
    tag = np.where(is_[2], 2, c.tag)
    r = np.where(is_[3], (c.relation + 1 + draw(5, 3)) % 4, c.relation)
    cand = world.Captions(tag, c.prefix, a, b, x, y, n, r)
    good = ~(np.isin(c.tag, (1, 4, 5)) & (a == b)) & ~((c.tag == 5) & (x == y))
    if split == 'train':
      # a combination that only occurs in wrong captions would give them away
      good &= world.caption_splits(cand) == 0
    new[:, todo], aspect[todo] = np.stack(cand), what
    todo, attempt = todo[~good], attempt + 1
  return world.Captions(*new), aspect
