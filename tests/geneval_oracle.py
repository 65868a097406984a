"""GenEval's rules in plain Python, one picture at a time: the tests' oracle for metrics/geneval.

Written from the published code (github.com/djghosh13/geneval, evaluation/evaluate_images.py) and
kept apart from the package: it shares no function and no constant with what it checks.
"""

import math

import numpy as np


def relations(a, b):
  offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
  sides = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
  kept = [math.copysign(max(abs(o) - 0.1 * s, 0), o) for o, s in zip(offset, sides)]
  if max(map(abs, kept)) < 1e-3:
    return set()
  x, y = (k / math.hypot(*offset) for k in kept)
  holds = {'left of': x < -0.5, 'right of': x > 0.5, 'above': y < -0.5, 'below': y > 0.5}
  return {name for name, true in holds.items() if true}


def overlap(a, b):
  size = lambda box: max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
  both = size([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
  union = size(a) + size(b) - both
  return both / union if union else 0


def select(detections, tag, confidence=0.3, counting=0.9, near=1.0):
  """{class: its objects, best first}."""
  chosen = {}
  for d in sorted(detections, key=lambda d: -d['score']):
    group = chosen.setdefault(d['class'], [])
    apart = near >= 1 or all(overlap(d['box'], c['box']) < near for c in group)
    limit = np.float32(counting if tag == 'counting' else confidence)  # as detectors give scores
    if np.float32(d['score']) > limit and apart and len(group) < 16:
      group.append(d)
  return chosen


def correct(row, detections, **limits):
  """Whether a picture is right."""
  found = select(detections, row['tag'], **limits)
  groups = []
  for want in row['include']:
    group = found.get(want['class'], [])[: want['count']]
    if len(group) < want['count']:
      return False
    if 'color' in want and any(d['color'] != want['color'] for d in group):
      return False
    if 'position' in want:
      relation, other = want['position']
      pairs = [(d['box'], o['box']) for d in group for o in groups[other]]
      if not all(relation in relations(*pair) for pair in pairs):
        return False
    groups.append(group)
  return all(len(found.get(ban['class'], [])) < ban['count'] for ban in row.get('exclude', ()))
