"""GenEval's rules: is a prompt's metadata satisfied by a list of detections?

Ghosh et al., GenEval (2023), section 3 and github.com/djghosh13/geneval (MIT), whose metadata
format and conventions these are; the code is our own. A detector and a colour classifier come
before: here a detection is {'class': str, 'box': [x0, y0, x1, y1] in pixels, y downwards}, with a
'score' as the detector gives it (`select`), and a 'color' unless a callable tells colours.

The published detector is Mask2Former with a Swin-S, the colours are told by CLIP ViT-L/14 on the
box, its surroundings painted #999 by the detector's mask (verifiers/colours.py). A score by any
other is no GenEval score: `column` names it so.
"""

import math

OFFICIAL = ('mask2former_swin_s', 'clip_l14')
CONFIDENCE, COUNTING = 0.3, 0.9  # that a detection must exceed, and in the counting category
MOST = 16  # detections of a class
OVERLAP = 1.0  # intersection over union from which on the worse of two is dropped; 1: never
MARGIN = 0.1  # share of the summed box sides by which an offset must exceed nothing
RELATIONS = ('left of', 'right of', 'above', 'below')


def relations(a, b):
  """The set of relations in which box `a` stands to box `b`.

  Each axis of the centre offset is shrunk by 0.1 of the two boxes' summed sides, then divided by
  the length of the offset; a relation holds where that exceeds 0.5.
  """
  offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
  sides = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
  kept = [math.copysign(max(abs(o) - MARGIN * s, 0), o) for o, s in zip(offset, sides)]
  if max(map(abs, kept)) < 1e-3:
    return set()
  x, y = (k / math.hypot(*offset) for k in kept)
  holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
  return {name for name, true in zip(RELATIONS, holds) if true}


def overlap(a, b):
  """Intersection over union of two boxes whose corners are pixels that belong to them."""
  size = lambda box: max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
  both = size([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
  return both / (size(a) + size(b) - both)


def select(detections, tag, limits=(CONFIDENCE, COUNTING, OVERLAP), most=MOST):
  """The detections that GenEval looks at, best first: of each class those with a score above the
  confidence (another one for the tag 'counting'), of these the best `most`, of these all that do
  not overlap a better one by `limits[2]` or more."""
  confidence, counting, near = limits
  floor = counting if tag == 'counting' else confidence
  kept = {}
  for d in sorted(detections, key=lambda d: -d['score']):
    if d['score'] > floor:
      kept.setdefault(d['class'], []).append(d)
  out = []
  for group in kept.values():
    chosen = []
    for d in group[:most]:
      if near >= 1 or all(overlap(d['box'], c['box']) < near for c in chosen):
        chosen.append(d)
    out += chosen
  return sorted(out, key=lambda d: -d['score'])


def evaluate(metadata, detections, colours=None):
  """Judges one image by its detections, best first.

  `include` asks for at least `count` objects of a class (the best `count` are looked at), all of
  the asked colour, and all in the asked relation to all objects of an earlier entry; `exclude`
  forbids `count` or more of a class. `colours(class, detections) -> names` tells the colours of
  the detections looked at, where a colour is asked for; without it each says its own 'color'.
  Returns (correct: bool, reason: str, empty when correct).
  """
  colours = colours or (lambda name, group: [d['color'] for d in group])
  found, groups, reasons = {}, [], []
  for d in detections:
    found.setdefault(d['class'], []).append(d)
  for want in metadata['include']:
    name, count = want['class'], want['count']
    group = found.get(name, [])[:count]
    reason = ''
    if len(group) < count:
      reason = f'expected {count} {name}, found {len(group)}'
    elif 'color' in want:
      shown = colours(name, group)
      if any(colour != want['color'] for colour in shown):
        reason = f'expected {want["color"]} {name}, found {", ".join(shown)}'
    if not reason and 'position' in want:
      relation, index = want['position']
      if relation not in RELATIONS:
        raise ValueError(f'position={relation!r}: allowed are {", ".join(RELATIONS)}')
      target = groups[index]
      if target is None:
        reason = f'nothing for {name} to be {relation}'
      elif not all(relation in relations(d['box'], t['box']) for d in group for t in target):
        reason = f'{name} is not {relation} {target[0]["class"]}'
    if reason:
      reasons.append(reason)
    groups.append(None if reason else group)
  for ban in metadata.get('exclude', ()):
    number = len(found.get(ban['class'], []))
    if number >= ban['count']:
      reasons.append(f'expected fewer than {ban["count"]} {ban["class"]}, found {number}')
  return not reasons, '; '.join(reasons)


def summarize(tags, correct):
  """{'overall': unweighted mean of the categories, 'images': mean, 'by_tag': {tag: mean}}."""
  by_tag = {}
  for tag, ok in zip(tags, correct):
    by_tag.setdefault(tag, []).append(float(ok))
  means = {tag: sum(v) / len(v) for tag, v in by_tag.items()}
  images = sum(map(sum, by_tag.values())) / max(1, sum(map(len, by_tag.values())))
  return {'overall': sum(means.values()) / max(1, len(means)), 'images': images, 'by_tag': means}


def overall(correct, tags):
  """GenEval's headline number: (unweighted mean of the categories, {tag: mean})."""
  got = summarize(tags, correct)
  return got['overall'], got['by_tag']


# ---------------------------------------------------------------------------------- the benchmark


def column(judges, searched=()):
  """What a score is called: 'geneval' for the published models alone.

  Args:
    judges: names of the detector and of who tells colours, ('owlvit_b32', 'clip_l14').
    searched: names of those that the pictures were chosen by (`judges_of` a verifier); with one of
      them as judge the score is an oracle's.
  """
  if tuple(judges) == OFFICIAL:
    name, notes = 'geneval', []
  else:
    name, notes = f'geneval_{"_".join(judges)}', ['not official']
  notes += ['oracle'] if set(judges) & set(searched) else []
  return f'{name} ({", ".join(notes)})' if notes else name


def judges_of(verifier):
  """Names of the models that decide a verifier's GenEval-like scores, those of the members that an
  ensemble searches on among them."""
  weights = dict(getattr(verifier, 'weights', ()))
  members = dict(getattr(verifier, 'members', ()))
  found = set(getattr(verifier, 'judges', ()))
  return found.union(*(judges_of(m) for name, m in members.items() if weights.get(name, 1)))


def report(metadata, detections, judges, colours=None, searched=(), **limits):
  """The benchmark's numbers for R images.

  Args:
    metadata: R rows of `evaluation_metadata.jsonl`, of images of one prompt the same.
    detections: R lists of whatever the detector found, in pixels and with scores.
    judges, searched: as in `column`.
    colours: `colours(image, class, detections) -> names`, or None as in `evaluate`.
    limits: as in `select`.

  Returns:
    {'name', 'correct': R bools, 'reasons': R strings, 'overall', 'images', 'by_tag' as in
    `summarize`, 'prompts': share of the prompts with a correct image}.
  """
  if len(metadata) != len(detections):
    raise ValueError(f'{len(metadata)} metadata entries but {len(detections)} images')
  found = []
  for i, (row, seen) in enumerate(zip(metadata, detections)):
    tell = None if colours is None else lambda name, group, i=i: colours(i, name, group)
    found.append(evaluate(row, select(seen, row['tag'], **limits), tell))
  correct = [ok for ok, _ in found]
  any_ = {}
  for row, ok in zip(metadata, correct):
    any_[row['prompt']] = any_.get(row['prompt'], False) or ok
  return {
    'name': column(judges, searched), 'correct': correct, 'reasons': [why for _, why in found],
    **summarize([row['tag'] for row in metadata], correct),
    'prompts': sum(any_.values()) / max(1, len(any_)),
  }  # fmt: skip
