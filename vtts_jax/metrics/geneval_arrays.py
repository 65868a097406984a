"""GenEval's rules on arrays: do the objects that a detector found satisfy the prompts' metadata?

`strict` is the benchmark's rule, 1 or 0; `partial` is credit in [0, 1] that the same detections
earn clause by clause, so that a search has something to climb. Rules and format: Ghosh et al. 2023
(arXiv 2310.11513), github.com/djghosh13/geneval; checked against metrics/geneval.py, which states
them for one picture.

Letters: B prompts · M pictures · E entries of a prompt's metadata · T detections of the detector ·
K = 16 best objects of an entry.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.data.geneval import COLOURS, RELATIONS
from vtts_jax.errors import ConfigError

MOST = 16  # objects of a class that are looked at
ANY = 10_000  # of an entry that forbids no number
MARGIN = 0.1
SIGNS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)  # of `RELATIONS`, y downwards


def targets(rows: Sequence[dict], entries: int) -> tuple[dict[str, np.ndarray], list[list[str]]]:
  """What the rows of metadata ask for, and the class of each entry.

  Returns:
    `{'least', 'most', 'colour', 'relation', 'other': int32 [B, E], 'counting': bool [B]}`: objects
    that must be there (0 in an entry that is not used), how many may be, index of the colour and
    of the relation or -1, the entry to which it is; and B lists of E names.

  Raises:
    ConfigError: more than `entries`, or a colour, relation or count that there is no rule for.
  """
  empty = {'least': 0, 'most': ANY, 'colour': -1, 'relation': -1, 'other': 0}
  table = {k: np.full((len(rows), entries), v, np.int32) for k, v in empty.items()}
  table['counting'] = np.array([row.get('tag') == 'counting' for row in rows], bool)
  names = []
  for i, row in enumerate(rows):
    found = _entries(row)
    if len(found) > entries:
      raise ConfigError(
        f'verifier.entries={entries}: the metadata of {row.get("prompt")!r} has {len(found)}'
      )
    for j, (_, entry) in enumerate(found):
      for key, value in entry.items():
        table[key][i, j] = value
    names.append([name for name, _ in found] + [found[0][0]] * (entries - len(found)))
  return table, names


def _entries(row):
  """[(class, {field: value})] of one row; what is excluded goes to the class's first entry."""
  found = []
  for want in row['include']:
    entry = {'least': _count(want, row, 1)}
    if 'color' in want:
      entry['colour'] = _index('color', want['color'], COLOURS, row)
    if 'position' in want:
      relation, other = want['position']
      entry |= {'relation': _index('position', relation, RELATIONS, row), 'other': other}
      if not 0 <= other < len(found):
        raise ConfigError(f'metadata of {row.get("prompt")!r}: position {other} is no entry before')
    found.append((want['class'], entry))
  for ban in row.get('exclude', ()):
    own = next((entry for name, entry in found if name == ban['class']), None)
    if own is None:
      own = {}
      found.append((ban['class'], own))
    own['most'] = min(own.get('most', ANY), _count(ban, row, 1) - 1)
  return found


def _count(want, row, low):
  if not low <= want['count'] <= MOST:
    raise ConfigError(
      f'metadata of {row.get("prompt")!r}: count={want["count"]}; must be in {low} .. {MOST}'
    )
  return want['count']


def _index(what, value, allowed, row):
  if value not in allowed:
    raise ConfigError(
      f'metadata of {row.get("prompt")!r}: {what}={value!r}; must be one of {", ".join(allowed)}'
    )
  return allowed.index(value)


# --------------------------------------------------------------------------------- what was found


def best(boxes, scores, overlap: float):
  """The K best objects of each entry, best first: index and score `[..., E, K]`.

  One after the other, so that what overlaps a better object of its class by `overlap` or more
  (intersection over union) is left out; 1 switches that off, as GenEval does.

  Args:
    boxes: `[..., T, 4]`, left, top, right, bottom in pixels; scores: `[..., E, T]`, positive.
  """
  size = lambda box: jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2] + 1, 0), -1)

  def pick(left, _):
    index = left.argmax(-1)  # [..., E]
    score = left.max(-1)
    mine = jnp.take_along_axis(boxes, index[..., None], -2)[..., None, :]  # [..., E, 1, 4]
    all_ = boxes[..., None, :, :]
    low = jnp.maximum(mine[..., :2], all_[..., :2])
    both = size(jnp.concatenate([low, jnp.minimum(mine[..., 2:], all_[..., 2:])], -1))
    gone = jnp.arange(left.shape[-1]) == index[..., None]
    if overlap < 1:
      gone |= both >= overlap * (size(mine) + size(all_) - both)
    return jnp.where(gone, 0.0, left), (index, score)

  _, (index, score) = jax.lax.scan(pick, scores, None, min(MOST, scores.shape[-1]))
  return jnp.moveaxis(index, 0, -1), jnp.moveaxis(score, 0, -1)


def along(boxes, others, relation):
  """How far `boxes [..., K, 4]` lie in the `relation [...]` to `others [..., K, 4]`: `[..., K, K]`.

  The offset of the centres, each axis shrunk by 0.1 of the two boxes' summed sides, as a share of
  the offset's length, projected on the relation's axis: -1 .. 1, GenEval's rule holds above 0.5.
  """
  a, b = boxes[..., :, None, :], others[..., None, :, :]
  offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
  sides = jnp.abs(a[..., 2:] - a[..., :2]) + jnp.abs(b[..., 2:] - b[..., :2])
  kept = jnp.sign(offset) * jnp.maximum(jnp.abs(offset) - MARGIN * sides, 0)
  share = kept / jnp.maximum(jnp.sqrt((offset**2).sum(-1, keepdims=True)), 1e-6)
  share = jnp.where(jnp.abs(kept).max(-1, keepdims=True) < 1e-3, 0.0, share)
  return (share * jnp.asarray(SIGNS)[relation][..., None, None, :]).sum(-1)


def _inside(targets):
  """Which of the K objects are asked for, `[B, 1, E, K]`, and of the entry it relates to."""
  inside = jnp.arange(MOST) < targets['least'][:, None, :, None]
  return inside, _other(inside, targets)


def _other(x, targets):
  """`x [B, M, E, ...]` of the entry that each entry relates to."""
  index = targets['other'].reshape(len(x), 1, -1, *[1] * (x.ndim - 3))
  return jnp.take_along_axis(x, jnp.broadcast_to(index, (*x.shape[:2], *index.shape[2:])), 2)


def _padded(x, axis):
  """To K objects along an axis, where the detector has fewer."""
  spare = [(0, 0)] * x.ndim
  spare[axis] = 0, MOST - x.shape[axis]
  return jnp.pad(x, spare)


def strict(targets, boxes, scores, hues, threshold):
  """1 where GenEval's rules hold, else 0, `[B, M]` float32.

  Args:
    targets: of `targets`; boxes `[B, M, E, K, 4]`, scores `[B, M, E, K]`: of `best`.
    hues: log-probabilities of the ten colours `[B, M, E, K, 10]`, best objects first; fewer than K
      where no entry with a colour asks for more.
    threshold: confidence `[B]` that an object must exceed.
  """
  boxes, scores, hues = (_padded(x, 3) for x in (boxes, scores, hues))
  wanted = {k: v[:, None] for k, v in targets.items()}  # [B, 1, E]
  count = (scores > threshold[:, None, None, None]).sum(-1)
  inside, inside_other = _inside(targets)
  right = (count >= wanted['least']) & (count <= wanted['most'])
  shown = hues.argmax(-1) == wanted['colour'][..., None]
  right &= (wanted['colour'] < 0) | (shown | ~inside).all(-1)
  relation = along(boxes, _other(boxes, targets), jnp.maximum(wanted['relation'], 0)) > 0.5
  pairs = inside[..., :, None] & inside_other[..., None, :]
  right &= (wanted['relation'] < 0) | (relation | ~pairs).all((-2, -1))
  return right.all(-1).astype(jnp.float32)


def partial(targets, boxes, scores, hues, threshold):
  """Credit in [0, 1], `[B, M]` float32: the mean over all that the prompt asks for; arguments as in
  `strict`.

  A confidence counts as q, its odds divided by the threshold's: a half at the threshold. An entry
  of n objects earns, for being there, the mean q of the n best, times 1 - (the summed q of those
  that are too many) / n; for its colour, the mean of q times the colour's probability; for its
  relation, the mean over pairs of q q' times (the projected offset + 0.5, within [0, 1]).
  """
  boxes, scores, hues = (_padded(x, 3) for x in (boxes, scores, hues))
  wanted = {k: v[:, None] for k, v in targets.items()}
  odds = lambda p: p / jnp.maximum(1 - p, 1e-6)
  q = odds(scores) / (odds(scores) + odds(threshold)[:, None, None, None])
  inside, inside_other = _inside(targets)
  need = jnp.maximum(wanted['least'], 1)
  mean = lambda x: (x * inside).sum(-1) / need
  surplus = (q * (jnp.arange(MOST) >= wanted['most'][..., None])).sum(-1)
  there = jnp.where(wanted['least'] > 0, mean(q), 1.0) * jnp.maximum(1 - surplus / need, 0)
  hue = jax.nn.one_hot(wanted['colour'], len(COLOURS))[..., None, :]
  coloured = mean(q * (jnp.exp(hues) * hue).sum(-1))
  along_ = along(boxes, _other(boxes, targets), jnp.maximum(wanted['relation'], 0))
  lies = jnp.clip(along_ + 0.5, 0, 1) * q[..., :, None] * _other(q, targets)[..., None, :]
  pairs = inside[..., :, None] & inside_other[..., None, :]
  related = (lies * pairs).sum((-2, -1)) / jnp.maximum(pairs.sum((-2, -1)), 1)
  asked = (
    (wanted['least'] > 0) | (wanted['most'] < ANY),
    wanted['colour'] >= 0,
    wanted['relation'] >= 0,
  )
  earned = sum(jnp.where(a, x, 0.0).sum(-1) for a, x in zip(asked, (there, coloured, related)))
  return (earned / sum(a.sum(-1) for a in asked)).astype(jnp.float32)
