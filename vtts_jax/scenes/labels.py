"""Which captions are true of which scenes, from the scenes themselves (no picture is read).

GenEval's rules on the true objects, vectorised over all pairs; labels for contrastive training.
Letters: R scenes · J captions.
"""

import numpy as np

from vtts_jax.scenes import world as world


def holds(captions, scenes):
  """`[R, J]` bool: caption j is true of scene i. Classes of a scene have one colour each."""
  rows = len(scenes.count)
  number = np.zeros((rows, 5), int)
  colour = np.full((rows, 5), -1)
  box = np.zeros((rows, 5, 4))
  row, slot = np.nonzero(np.arange(world.SLOTS) < scenes.count[:, None])
  shape = scenes.shape[row, slot]
  np.add.at(number, (row, shape), 1)
  colour[row, shape] = scenes.colour[row, slot]
  box[row, shape] = world.boxes(scenes)[0][row, slot]
  c = captions
  has_a, has_b = number[:, c.a] > 0, number[:, c.b] > 0
  tinted = (colour[:, c.a] == c.colour_a), (colour[:, c.b] == c.colour_b)
  related = _relations(box[:, c.a], box[:, c.b])[..., c.relation, np.arange(len(c.a))]
  return np.select([c.tag == t for t in range(6)], [
    has_a, has_a & has_b, number[:, c.a] == c.count, has_a & tinted[0], has_a & has_b & related,
    has_a & has_b & tinted[0] & tinted[1]])


def _relations(a, b):
  """Boxes `[R, J, 4]` each -> `[R, 4, J]`, GenEval's rule (see metrics/geneval.py)."""
  offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
  sides = a[..., 2:] - a[..., :2] + b[..., 2:] - b[..., :2]
  kept = np.sign(offset) * np.maximum(abs(offset) - 0.1 * sides, 0)
  x, y = np.moveaxis(kept / np.maximum(np.linalg.norm(offset, axis=-1), 1e-6)[..., None], -1, 0)
  return np.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], 1)
