"""GenEval's rules on arrays: whether the objects that a detector found satisfy a prompt's metadata.

Ghosh et al. 2023 (arXiv 2310.11513), section 3. The metadata format and the thresholds are those of
github.com/djghosh13/geneval (MIT); the code is our own. The rules are here and nowhere else: every
function takes numpy or jax arrays and computes with the library they belong to. So
verifiers/geneval.py applies them inside jit, and metrics/geneval.py applies the same lines to lists
of detections on the host. `score_strict` is the benchmark's rule, 1 or 0. `score_partial` is credit
in [0, 1] that the same detections earn clause by clause, so that a search has something to climb.
Checked against the rules in plain Python (tests/geneval_oracle.py).

Letters: B prompts · M pictures · E entries of a prompt's metadata · T detections of the detector ·
K best objects of an entry · C colours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vtts_jax.data.geneval import COLOURS, RELATIONS
from vtts_jax.errors import ConfigError

MOST = 16  # at most so many objects of a class are considered
MARGIN = 0.1  # an offset is shrunk by this share of the two boxes' summed sides
BEYOND = 0.5  # a relation holds if the shrunk offset is more than this share of the offset's length
SIGNS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)  # axes of `RELATIONS`, y downwards
UNLIMITED = 10_000  # `most` of an entry that forbids no number


class Limits(NamedTuple):
  """What a detection must exceed to be an object; the defaults are GenEval's.

  Attributes:
    confidence: the detector's confidence, in every category but 'counting'.
    counting: the same in the category 'counting'.
    overlap: a detection whose intersection over union with a better object of its class reaches
      this is that same object; 1 switches it off.
  """

  confidence: float = 0.3
  counting: float = 0.9
  overlap: float = 1.0


OFFICIAL_LIMITS = Limits()


def confidence_threshold(counting, limits: Limits):
  """Returns the confidence that an object must exceed, in the shape of `counting`.

  `counting` is a bool array: whether a prompt is of the category 'counting'.
  """
  # the array's own library: numpy on the host, jax inside jit; detectors' scores are float32, and
  # one of exactly float32(0.3) does not exceed 0.3
  chosen = counting.__array_namespace__().where(counting, limits.counting, limits.confidence)
  return chosen.astype(np.float32)


# ------------------------------------------------------------------------------ what is asked for


def read_targets(
  rows: Sequence[dict], entries: int = 0, colours: Sequence[str] = COLOURS
) -> tuple[dict[str, np.ndarray], list[list[str]]]:
  """Turns rows of metadata into arrays of what they ask for, and the class of each entry.

  Args:
    rows: B rows with 'include' or 'exclude', and a 'tag'.
    entries: E; 0 for as many as the longest row has.
    colours: names that a colour's index refers to.

  Returns:
    targets: {'least', 'most', 'colour', 'relation', 'other': int32 `[B, E]`, 'counting': bool
      `[B]`}. 'least' objects must be there (0 in an unused entry) and 'most' may be. 'colour' and
      'relation' are indices or -1, and 'other' is the entry to which the relation is.
    names: B lists of E class names.

  Raises:
    ConfigError: a row has more than `entries`, or a colour, relation or count without a rule.
  """
  # a fixed number of entries keeps one compiled program for all batches of prompts
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
  """Returns [(class, {field: value})] of one row; a ban goes to the class's first entry."""
  found = []
  for want in row.get('include', ()):
    entry = {'least': _read_count(want, row)}
    if 'color' in want:
      entry['colour'] = _read_index('color', want['color'], colours, row)
    if 'position' in want:
      relation, other = want['position']
      entry |= {'relation': _read_index('position', relation, RELATIONS, row), 'other': other}
      # GenEval compares with entries already judged
      if not 0 <= other < len(found):
        raise ConfigError(f'metadata of {row.get("text")!r}: position {other} is no entry before')
    found.append((want['class'], entry))
  for ban in row.get('exclude', ()):
    own = next((entry for name, entry in found if name == ban['class']), None)
    if own is None:
      own = {}
      found.append((ban['class'], own))
    # 'exclude' forbids `count` or more, so one less is allowed
    own['most'] = min(own.get('most', UNLIMITED), _read_count(ban, row) - 1)
  return found


def _read_count(want, row):
  if not 1 <= want['count'] <= MOST:
    raise ConfigError(
      f'metadata of {row.get("text")!r}: count={want["count"]}; must be in 1 .. {MOST}'
    )
  return want['count']


def _read_index(what, value, allowed, row):
  if value not in allowed:
    raise ConfigError(
      f'metadata of {row.get("text")!r}: {what}={value!r}; must be one of {", ".join(allowed)}'
    )
  return allowed.index(value)


# ---------------------------------------------------------------------------------- boxes, objects


def box_overlap(a, b):
  """Returns the intersection over union `[...]` of boxes `[..., 4]`."""
  xp = a.__array_namespace__()

  def box_area(low, high):
    # + 1, because GenEval's corners are pixels that belong to the box
    return xp.prod(xp.maximum(high - low + 1, 0), axis=-1)

  low, high = xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:])
  both = box_area(low, high)
  union = box_area(a[..., :2], a[..., 2:]) + box_area(b[..., :2], b[..., 2:]) - both
  # boxes of no area, as detectors with inverted corners give them, overlap nothing
  return both / xp.where(union > 0, union, 1)


def select_best(boxes, scores, overlap: float):
  """Selects the K best objects of each class, best first: index and score `[..., E, K]`.

  Objects are taken one after the other, and detections that overlap a taken object by `overlap` or
  more are left out. This happens before 16 are counted, so a detector that puts many boxes on one
  object still finds the next. (The published code does not suppress by default, and cuts off at 16
  first.)

  Args:
    boxes: left, top, right, bottom in pixels, `[..., E, T, 4]`; `[..., 1, T, 4]` serves all
      classes.
    scores: `[..., E, T]`, positive. A returned score of 0 marks a place that no object fills.
    overlap: of `Limits`.
  """
  xp = scores.__array_namespace__()

  # K steps over all detections instead of a sort: K is 16 at most and T may be thousands
  def take_best(left, _):
    index, score = left.argmax(-1), left.max(-1)  # [..., E]
    gone = xp.arange(left.shape[-1]) == index[..., None]
    if overlap < 1:
      taken = xp.take_along_axis(boxes, index[..., None, None], -2)  # [..., E, 1, 4]
      gone = gone | (box_overlap(taken, boxes) >= overlap)
    return xp.where(gone, 0.0, left), (index, score)

  # the same step in a loop: jax compiles it once, Python runs it on the host
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
  """Returns how far box `a` lies to the right of and below box `b`, each in -1 .. 1.

  This is the offset of the centres, with each axis shrunk by 0.1 of the two boxes' summed sides, as
  a share of the offset's length: `[..., 4]` twice -> `[..., 2]`.
  """
  xp = a.__array_namespace__()
  offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
  sides = abs(a[..., 2:] - a[..., :2]) + abs(b[..., 2:] - b[..., :2])
  kept = xp.sign(offset) * xp.maximum(abs(offset) - MARGIN * sides, 0)
  # where nothing is left of the offset the share is exactly 0, also for equal centres
  share = kept / xp.maximum(xp.sqrt((offset**2).sum(-1, keepdims=True)), 1e-6)
  return xp.where(abs(kept).max(-1, keepdims=True) < 1e-3, 0.0, share)


def relations_hold(a, b):
  """Returns in which of the four `RELATIONS` box `a` stands to box `b`.

  `[..., 4]` twice -> bool `[..., 4]`.
  """
  return (relation_shares(a, b)[..., None, :] * SIGNS).sum(-1) > BEYOND


# ------------------------------------------------------------------------------------- the clauses


class Clauses(NamedTuple):
  """Which clauses of the metadata hold, bool `[B, M, E]`; a clause that is not asked for holds.

  Attributes:
    enough: there are as many objects as asked for, or more.
    allowed: there are no more objects than may be there.
    coloured: all objects asked for have the colour.
    related: all of them stand in the relation to all objects of the other entry.
  """

  enough: Any
  allowed: Any
  coloured: Any
  related: Any

  def all_hold(self):
    """Returns which entries are right in every point, `[B, M, E]`."""
    return self.enough & self.allowed & self.coloured & self.related


def check_clauses(targets, boxes, counts, coloured) -> Clauses:
  """Checks which clauses the objects found satisfy.

  Args:
    targets: of `read_targets`.
    boxes: `[B, M, E, K, 4]`, best objects first; K is at least what any entry asks for.
    counts: `[B, M, E]`, how many objects of each entry's class there are.
    coloured: `[B, M, E, K]`, which of the K objects have the colour of their entry.
  """
  # where nothing is asked for, targets are such that the comparison holds
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
  """Returns the targets as `[B, 1, E]`, to compare with pictures `[B, M, E]`."""
  return {name: value[:, None] for name, value in targets.items()}


def _objects_asked_for(targets, k):
  """Returns the objects that each entry is about, and the pairs that its relation is about.

  The objects `[B, 1, E, K]` are the best `least` ones. The pairs `[B, 1, E, K, K]` join them with
  the objects of the other entry.
  """
  xp = targets['least'].__array_namespace__()
  inside = xp.arange(k) < targets['least'][:, None, :, None]
  return inside, inside[..., :, None] & _of_other(inside, targets)[..., None, :]


def _of_other(x, targets):
  """Returns `x [B, M, E, ...]` of the entry to which each entry relates."""
  xp = x.__array_namespace__()
  index = targets['other'].reshape(len(x), 1, -1, *[1] * (x.ndim - 3))
  return xp.take_along_axis(x, xp.broadcast_to(index, (*x.shape[:2], *index.shape[2:])), 2)


def _relation_strength(targets, boxes):
  """Returns how far each object lies in its entry's relation to each object of the other entry.

  The result is `[B, M, E, K, K]` in -1 .. 1; it means nothing where no relation is asked for.
  """
  xp = boxes.__array_namespace__()
  shares = relation_shares(boxes[..., :, None, :], _of_other(boxes, targets)[..., None, :, :])
  # -1 stands for no relation, and would index the last one
  axis = xp.asarray(SIGNS)[xp.maximum(targets['relation'], 0)]  # [B, E, 2]
  return (shares * axis[:, None, :, None, None]).sum(-1)


# -------------------------------------------------------------------------------------- the scores


def _pad_objects(x):
  """Pads `[B, M, E, k, ...]` to K = 16 objects, where the detector has fewer."""
  spare = [(0, 0)] * x.ndim
  spare[3] = 0, MOST - x.shape[3]
  return x.__array_namespace__().pad(x, spare)


def score_strict(targets, boxes, scores, hues, limits: Limits):
  """Scores pictures 1 where GenEval's rules hold and 0 elsewhere, `[B, M]` float32.

  Args:
    targets: of `read_targets`.
    boxes: `[B, M, E, K, 4]` of the best objects (`select_best`).
    scores: `[B, M, E, K]`, their confidences.
    hues: `[B, M, E, K, C]`, log-probabilities of their colours; fewer than K objects suffice if no
      entry with a colour asks for more.
    limits: of the detector.
  """
  boxes, scores, hues = map(_pad_objects, (boxes, scores, hues))
  threshold = confidence_threshold(targets['counting'], limits)[:, None, None, None]
  counts = (scores > threshold).sum(-1)
  coloured = hues.argmax(-1) == targets['colour'][:, None, :, None]
  right = check_clauses(targets, boxes, counts, coloured).all_hold()
  return right.all(-1).astype(np.float32)


def score_partial(targets, boxes, scores, hues, limits: Limits):
  """Scores pictures with credit in [0, 1], `[B, M]` float32; arguments as in `score_strict`.

  The credit is the mean over everything that the prompt asks for. A confidence counts as q, its
  odds divided by the sum of its own and the threshold's odds: a half at the threshold. An entry of
  n objects can earn three things:

  - for being there, the mean q of the n best, times 1 - (the summed q of surplus objects) / n;
  - for its colour, the mean of q times the colour's probability;
  - for its relation, the mean over pairs of q q' times (the projected offset + 0.5, clipped to
    [0, 1]), which is q q' where the relation holds.
  """
  xp = boxes.__array_namespace__()
  boxes, scores, hues = map(_pad_objects, (boxes, scores, hues))
  wanted = _per_picture(targets)
  threshold = confidence_threshold(targets['counting'], limits)[:, None, None, None]
  odds, least_odds = (p / xp.maximum(1 - p, 1e-6) for p in (scores, threshold))
  q = odds / (odds + least_odds)
  inside, pairs = _objects_asked_for(targets, MOST)
  # 1 where an entry asks for nothing, which earns nothing either
  need = xp.maximum(wanted['least'], 1)

  def mean_asked(x):
    """The mean over the objects that are asked for."""
    return (x * inside).sum(-1) / need

  # there: enough of them, and not too many
  surplus = (q * (xp.arange(MOST) >= wanted['most'][..., None])).sum(-1)
  there = xp.where(wanted['least'] > 0, mean_asked(q), 1.0) * xp.maximum(1 - surplus / need, 0)
  # of the colour
  hue = wanted['colour'][..., None] == xp.arange(hues.shape[-1])  # [B, 1, E, C]
  coloured = mean_asked(q * (xp.exp(hues) * hue[..., None, :]).sum(-1))
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
