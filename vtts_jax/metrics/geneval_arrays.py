"""GenEval's rules, on arrays: do the objects that a detector found satisfy the prompts' metadata?

Ghosh et al. 2023 (arXiv 2310.11513), section 3, and github.com/djghosh13/geneval (MIT), whose
metadata format and thresholds these are; the code is our own. The rules stand here and nowhere
else: every function takes numpy or jax arrays and computes with the library they belong to, so
metrics/geneval.py applies the same lines to lists of detections on the host that
verifiers/geneval.py applies inside jit. `score_strict` is the benchmark's rule, 1 or 0;
`score_partial` is credit in [0, 1] that the same detections earn clause by clause, so that a search
has something to climb. Checked against the rules in plain Python (tests/geneval_oracle.py).

Letters: B prompts · M pictures · E entries of a prompt's metadata · T detections of the detector ·
K best objects of an entry · C colours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vtts_jax.data.geneval import COLOURS, RELATIONS
from vtts_jax.errors import ConfigError

MOST = 16  # objects of a class that are looked at
MARGIN = 0.1  # share of two boxes' summed sides by which an offset is shrunk
BEYOND = 0.5  # share of the offset's length from which on a relation holds
SIGNS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)  # axes of `RELATIONS`, y downwards
UNLIMITED = 10_000  # `most` of an entry that forbids no number


class Limits(NamedTuple):
  """What a detection must exceed to be an object; the defaults are GenEval's.

  Attributes:
    confidence: of the detector, in every category but 'counting'; `counting`: there.
    overlap: intersection over union with a better object of the class from which on a detection is
      that same object; 1 switches this off.
  """

  confidence: float = 0.3
  counting: float = 0.9
  overlap: float = 1.0


OFFICIAL_LIMITS = Limits()


def confidence_threshold(counting, limits: Limits):
  """Confidence that an object must exceed, for prompts that are (`counting`, bool of any shape) or
  are not of the counting category."""
  return counting.__array_namespace__().where(counting, limits.counting, limits.confidence)


# ------------------------------------------------------------------------------ what is asked for


def read_targets(
  rows: Sequence[dict], entries: int = 0, colours: Sequence[str] = COLOURS
) -> tuple[dict[str, np.ndarray], list[list[str]]]:
  """What rows of metadata ask for, and the class of each entry.

  Args:
    rows: B rows with 'include' or 'exclude', and a 'tag'.
    entries: E, 0 for as many as the longest row has.
    colours: names that a colour's index refers to.

  Returns:
    `{'least', 'most', 'colour', 'relation', 'other': int32 [B, E], 'counting': bool [B]}`: objects
    that must be there (0 in an entry that is not used), how many may be, index of the colour and
    of the relation or -1, the entry to which it is; and B lists of E names.

  Raises:
    ConfigError: more than `entries`, or a colour, relation or count that there is no rule for.
  """
  found = [_read_row(row, colours) for row in rows]
  entries = entries or max(map(len, found), default=0)
  empty = {'least': 0, 'most': UNLIMITED, 'colour': -1, 'relation': -1, 'other': 0}
  table = {k: np.full((len(rows), entries), v, np.int32) for k, v in empty.items()}
  table['counting'] = np.array([row.get('tag') == 'counting' for row in rows], bool)
  names = []
  for i, (row, own) in enumerate(zip(rows, found)):
    if len(own) > entries:
      raise ConfigError(
        f'verifier.entries={entries}: the metadata of {row.get("text")!r} has {len(own)}'
      )
    for j, (_, entry) in enumerate(own):
      for key, value in entry.items():
        table[key][i, j] = value
    # an entry that is not used still needs a class to ask the detector for
    names.append([name for name, _ in own] + [own[0][0]] * (entries - len(own)))
  return table, names


def _read_row(row, colours):
  """[(class, {field: value})] of one row; what is excluded goes to the class's first entry."""
  found = []
  for want in row.get('include', ()):
    entry = {'least': _count(want, row)}
    if 'color' in want:
      entry['colour'] = _index('color', want['color'], colours, row)
    if 'position' in want:
      relation, other = want['position']
      entry |= {'relation': _index('position', relation, RELATIONS, row), 'other': other}
      if not 0 <= other < len(found):
        raise ConfigError(f'metadata of {row.get("text")!r}: position {other} is no entry before')
    found.append((want['class'], entry))
  for ban in row.get('exclude', ()):
    own = next((entry for name, entry in found if name == ban['class']), None)
    if own is None:
      own = {}
      found.append((ban['class'], own))
    own['most'] = min(own.get('most', UNLIMITED), _count(ban, row) - 1)
  return found


def _count(want, row):
  if not 1 <= want['count'] <= MOST:
    raise ConfigError(
      f'metadata of {row.get("text")!r}: count={want["count"]}; must be in 1 .. {MOST}'
    )
  return want['count']


def _index(what, value, allowed, row):
  if value not in allowed:
    raise ConfigError(
      f'metadata of {row.get("text")!r}: {what}={value!r}; must be one of {", ".join(allowed)}'
    )
  return allowed.index(value)


# ---------------------------------------------------------------------------------- boxes, objects


def box_overlap(a, b):
  """Intersection over union `[...]` of boxes `[..., 4]` whose corners are pixels that belong to
  them."""
  xp = a.__array_namespace__()
  low, high = xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:])
  area = lambda low, high: xp.prod(xp.maximum(high - low + 1, 0), axis=-1)
  both = area(low, high)
  return both / (area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both)


def select_best(boxes, scores, overlap: float):
  """The K best objects of each class, best first: index and score `[..., E, K]`.

  They are taken one after the other. What overlaps a taken object by `overlap` or more is then left
  out, before the 16 are full: a detector that puts many boxes on one object still finds the next.
  (The published code, which does not suppress by default, cuts off at 16 first.)

  Args:
    boxes: left, top, right, bottom in pixels, `[..., E, T, 4]`; or `[..., 1, T, 4]` for all
      classes.
    scores: `[..., E, T]`, positive.
  """
  xp = scores.__array_namespace__()

  def take_best(left, _):
    index, score = left.argmax(-1), left.max(-1)  # [..., E]
    gone = xp.arange(left.shape[-1]) == index[..., None]
    if overlap < 1:
      taken = xp.take_along_axis(boxes, index[..., None, None], -2)  # [..., E, 1, 4]
      gone = gone | (box_overlap(taken, boxes) >= overlap)
    return xp.where(gone, 0.0, left), (index, score)

  # The same step in a loop: compiled once by jax, run by Python on the host.
  steps = min(MOST, scores.shape[-1])
  if xp is np:
    taken = []
    for _ in range(steps):
      scores, pair = take_best(scores, None)
      taken.append(pair)
    index, score = (np.stack(part) for part in zip(*taken))
  else:
    _, (index, score) = jax.lax.scan(take_best, scores, None, steps)
  return xp.moveaxis(index, 0, -1), xp.moveaxis(score, 0, -1)


def relation_shares(a, b):
  """How far box `a` lies to the right of and below box `b`: `[..., 4]` twice -> `[..., 2]`.

  The offset of the centres, each axis shrunk by 0.1 of the two boxes' summed sides, as a share of
  the offset's length: -1 .. 1.
  """
  xp = a.__array_namespace__()
  offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
  sides = abs(a[..., 2:] - a[..., :2]) + abs(b[..., 2:] - b[..., :2])
  kept = xp.sign(offset) * xp.maximum(abs(offset) - MARGIN * sides, 0)
  share = kept / xp.maximum(xp.sqrt((offset**2).sum(-1, keepdims=True)), 1e-6)
  return xp.where(abs(kept).max(-1, keepdims=True) < 1e-3, 0.0, share)


def relations_hold(a, b):
  """In which of the four `RELATIONS` box `a` stands to box `b`: `[..., 4]` twice -> bool
  `[..., 4]`."""
  return (relation_shares(a, b)[..., None, :] * SIGNS).sum(-1) > BEYOND


# ------------------------------------------------------------------------------------- the clauses


class Clauses(NamedTuple):
  """Which clauses of the metadata hold, bool `[B, M, E]`; a clause that is not asked for does.

  Attributes:
    enough: as many objects as asked for, or more.
    allowed: no more than may be there.
    coloured: all objects asked for have the colour.
    related: all of them stand in the relation to all of the entry it is to.
  """

  enough: Any
  allowed: Any
  coloured: Any
  related: Any

  def all(self):
    """Which entries are right in every point `[B, M, E]`."""
    return self.enough & self.allowed & self.coloured & self.related


def check_clauses(targets, boxes, counts, coloured) -> Clauses:
  """Which clauses the objects found satisfy.

  Args:
    targets: of `read_targets`.
    boxes: `[B, M, E, K, 4]`, best objects first; K is at least what any entry asks for.
    counts: objects of each entry's class `[B, M, E]`.
    coloured: which of the K have the colour of their entry `[B, M, E, K]`.
  """
  wanted = _per_picture(targets)
  inside, pairs = _objects_asked_for(targets, boxes.shape[3])
  holds = _relation_strength(targets, boxes) > BEYOND
  return Clauses(
    enough=counts >= wanted['least'],
    allowed=counts <= wanted['most'],
    coloured=(wanted['colour'] < 0) | (coloured | ~inside).all(-1),
    related=(wanted['relation'] < 0) | (holds | ~pairs).all((-2, -1)),
  )


def _per_picture(targets):
  """Targets `[B, 1, E]`."""
  return {name: value[:, None] for name, value in targets.items()}


def _objects_asked_for(targets, k):
  """Which of the K objects each entry is about `[B, 1, E, K]`, the best `least` ones, and which
  pairs of them with objects of the entry that it relates to `[B, 1, E, K, K]`."""
  xp = targets['least'].__array_namespace__()
  inside = xp.arange(k) < targets['least'][:, None, :, None]
  return inside, inside[..., :, None] & _of_other(inside, targets)[..., None, :]


def _of_other(x, targets):
  """`x [B, M, E, ...]` of the entry that each entry relates to."""
  xp = x.__array_namespace__()
  index = targets['other'].reshape(len(x), 1, -1, *[1] * (x.ndim - 3))
  return xp.take_along_axis(x, xp.broadcast_to(index, (*x.shape[:2], *index.shape[2:])), 2)


def _relation_strength(targets, boxes):
  """How far each object lies in its entry's relation to each of the other entry's, -1 .. 1:
  `[B, M, E, K, K]`; any number where no relation is asked for."""
  xp = boxes.__array_namespace__()
  shares = relation_shares(boxes[..., :, None, :], _of_other(boxes, targets)[..., None, :, :])
  axis = xp.asarray(SIGNS)[xp.maximum(targets['relation'], 0)]  # [B, E, 2]
  return (shares * axis[:, None, :, None, None]).sum(-1)


# -------------------------------------------------------------------------------------- the scores


def _pad_objects(x):
  """`[B, M, E, k, ...]` to K = 16 objects, where the detector has fewer."""
  spare = [(0, 0)] * x.ndim
  spare[3] = 0, MOST - x.shape[3]
  return x.__array_namespace__().pad(x, spare)


def score_strict(targets, boxes, scores, hues, limits: Limits):
  """1 where GenEval's rules hold, else 0, `[B, M]` float32.

  Args:
    targets: of `read_targets`.
    boxes, scores: `[B, M, E, K, 4]`, `[B, M, E, K]` of the best objects (`select_best`).
    hues: log-probabilities of the colours `[B, M, E, K, C]`; fewer than K where no entry with a
      colour asks for more.
  """
  boxes, scores, hues = map(_pad_objects, (boxes, scores, hues))
  threshold = confidence_threshold(targets['counting'], limits)[:, None, None, None]
  counts = (scores > threshold).sum(-1)
  coloured = hues.argmax(-1) == targets['colour'][:, None, :, None]
  right = check_clauses(targets, boxes, counts, coloured).all()
  return right.all(-1).astype(np.float32)


def score_partial(targets, boxes, scores, hues, limits: Limits):
  """Credit in [0, 1], `[B, M]` float32: the mean over all that the prompt asks for; arguments as in
  `score_strict`.

  A confidence counts as q, its odds divided by the threshold's plus its own: a half at the
  threshold. An entry of n objects earns, for being there, the mean q of the n best, times 1 - (the
  summed q of those that are too many) / n; for its colour, the mean of q times the colour's
  probability; for its relation, the mean over pairs of q q' times (the projected offset + 0.5,
  within [0, 1]), which is q q' where the relation holds.
  """
  xp = boxes.__array_namespace__()
  boxes, scores, hues = map(_pad_objects, (boxes, scores, hues))
  wanted = _per_picture(targets)
  odds = lambda p: p / xp.maximum(1 - p, 1e-6)
  threshold = confidence_threshold(targets['counting'], limits)[:, None, None, None]
  q = odds(scores) / (odds(scores) + odds(threshold))
  inside, pairs = _objects_asked_for(targets, MOST)
  need = xp.maximum(wanted['least'], 1)
  mean = lambda x: (x * inside).sum(-1) / need  # over the objects asked for

  # there: enough of them, and not too many
  surplus = (q * (xp.arange(MOST) >= wanted['most'][..., None])).sum(-1)
  there = xp.where(wanted['least'] > 0, mean(q), 1.0) * xp.maximum(1 - surplus / need, 0)
  # of the colour
  hue = wanted['colour'][..., None] == xp.arange(hues.shape[-1])  # [B, 1, E, C]
  coloured = mean(q * (xp.exp(hues) * hue[..., None, :]).sum(-1))
  # in the relation
  lies = xp.clip(_relation_strength(targets, boxes) + 1 - BEYOND, 0, 1)
  lies = lies * q[..., :, None] * _of_other(q, targets)[..., None, :]
  related = (lies * pairs).sum((-2, -1)) / xp.maximum(pairs.sum((-2, -1)), 1)

  asked = (
    (wanted['least'] > 0) | (wanted['most'] < UNLIMITED),
    wanted['colour'] >= 0,
    wanted['relation'] >= 0,
  )
  earned = sum(xp.where(a, x, 0.0).sum(-1) for a, x in zip(asked, (there, coloured, related)))
  return (earned / sum(a.sum(-1) for a in asked)).astype(np.float32)
