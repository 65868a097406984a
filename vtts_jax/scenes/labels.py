"""Which captions are true of which scenes, from the scenes themselves (no picture is read).

GenEval's rules (metrics/geneval_arrays.py) on the true objects, over all pairs at once: labels for
contrastive training.
Letters: R scenes · J captions.
"""

import numpy as np

from vtts_jax.metrics import geneval_arrays
from vtts_jax.scenes import world


def true_captions(captions, scenes):
  """`[R, J]` bool: caption j is true of scene i. Classes of a scene have one colour each."""
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
