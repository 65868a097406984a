"""GenEval's rules: is a prompt's metadata satisfied by a list of detections?

Ghosh et al., GenEval (2023), section 3 and github.com/djghosh13/geneval (MIT), whose metadata
format and conventions these are; the code is our own. A detector and a colour classifier come
before: here a detection is {'class': str, 'color': str, 'box': [x0, y0, x1, y1]}, y downwards, best
first.
"""

import math

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


def evaluate(metadata, detections):
  """Judges one image.

  `include` asks for at least `count` objects of a class (the best `count` are looked at), all of
  the asked colour, and all in the asked relation to all objects of an earlier entry; `exclude`
  forbids `count` or more of a class. Returns (correct: bool, reason: str, empty when correct).
  """
  found, groups, reasons = {}, [], []
  for d in detections:
    found.setdefault(d['class'], []).append(d)
  for want in metadata['include']:
    name, count = want['class'], want['count']
    group = found.get(name, [])[:count]
    reason = ''
    if len(group) < count:
      reason = f'expected {count} {name}, found {len(group)}'
    elif 'color' in want and any(d['color'] != want['color'] for d in group):
      reason = f'expected {want["color"]} {name}, found {", ".join(d["color"] for d in group)}'
    elif 'position' in want:
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
