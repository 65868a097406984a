"""GenEval on lists of detections: whether each picture is right, why not, the benchmark's numbers.

Ghosh et al., GenEval (2023, arXiv 2310.11513), and github.com/djghosh13/geneval (MIT). A detector
and a colour classifier run before. Here a detection is {'class': str, 'box': [x0, y0, x1, y1] in
pixels, y downwards}, with the detector's 'score' (`select_detections`), and with a 'color' unless a
callable tells colours. The rules themselves are in metrics/geneval_arrays.py; this file packs lists
into arrays for them and puts their findings into words.

The published detector is Mask2Former with a Swin-S. CLIP ViT-L/14 tells the colours; it sees the
box, with everything outside the detector's mask painted #999 (verifiers/parts/colours.py). Numbers
of other models are no GenEval scores, and `benchmark_label` says so.

Letters: R pictures.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from vtts_jax.data.geneval import RELATIONS
from vtts_jax.metrics.geneval_arrays import (
  OFFICIAL_LIMITS,
  Clauses,
  Limits,
  check_clauses,
  confidence_threshold,
  read_targets,
  relations_hold,
  select_best,
)

# the models of the published protocol; an accuracy by any others is not GenEval's
OFFICIAL = ('mask2former_swin_s', 'clip_l14')


def relations_between(a, b) -> set[str]:
  """Returns the relations in which box `a` stands to box `b`."""
  holds = relations_hold(np.array(a, float), np.array(b, float))
  return {name for name, true in zip(RELATIONS, holds) if true}


def select_detections(detections, tag: str, limits: Limits = OFFICIAL_LIMITS) -> list[dict]:
  """Returns the detections that count as objects, best first.

  A detection counts if it is above the confidence (which is another one for the tag 'counting'), is
  among the best 16 of its class and does not lie on top of a better one.
  """
  threshold = confidence_threshold(np.array(tag == 'counting'), limits)
  kept = []
  # each class on its own: a cup on a table suppresses nothing
  exceeds = lambda d: np.float32(d['score']) > threshold
  for group in _by_class(filter(exceeds, detections)).values():
    boxes = np.array([d['box'] for d in group], float)
    scores = np.array([d['score'] for d in group], float)
    index, score = select_best(boxes[None], scores[None], limits.overlap)
    # a score of 0 marks what was left out
    kept += [group[i] for i, s in zip(index[0], score[0]) if s > 0]
  return sorted(kept, key=lambda d: -d['score'])


def _by_class(detections):
  groups = {}
  for detection in detections:
    groups.setdefault(detection['class'], []).append(detection)
  return groups


def evaluate_detections(metadata, detections, tell_colours: Callable | None = None):
  """Judges one picture by its detections.

  `include` asks for at least `count` objects of a class; the best `count` of them must all have the
  colour that is asked for, and all stand in the relation that is asked for to all objects of an
  earlier entry. `exclude` forbids `count` or more of a class.

  Args:
    metadata: one row of GenEval's metadata.
    detections: of one picture, best first.
    tell_colours: `tell_colours(class, detections) -> names`. It is called only where a colour is
      asked for and there are enough objects; None reads each detection's own 'color'.

  Returns:
    (correct: bool, reason: str, empty if correct).

  Raises:
    ConfigError: there is no rule for the metadata.
  """
  # the rules know colours by their index, so those that are asked for are the vocabulary here
  asked = sorted({want['color'] for want in metadata.get('include', ()) if 'color' in want})
  targets, (names,) = read_targets([metadata], colours=asked)
  (least,), (colour,) = targets['least'].tolist(), targets['colour'].tolist()
  by_class = _by_class(detections)
  groups = [by_class.get(name, []) for name in names]

  # entries have different numbers of objects: arrays are as wide as the largest
  shape = len(names), max(1, *least)
  boxes, coloured, told = np.zeros((*shape, 4)), np.zeros(shape, bool), {}
  for e, (name, group) in enumerate(zip(names, groups)):
    best = group[: least[e]]
    if best:
      boxes[e, : len(best)] = [d['box'] for d in best]
    # telling colours may run a model, so it is asked only where the colours decide
    if colour[e] >= 0 and len(best) == least[e]:
      told[e] = list(tell_colours(name, best)) if tell_colours else [d['color'] for d in best]
      coloured[e, : least[e]] = [hue == asked[colour[e]] for hue in told[e]]

  counts = np.array([len(group) for group in groups])
  # the rules work on batches: this is one of one prompt and one picture
  found = (array[None, None] for array in (boxes, counts, coloured))
  clauses = Clauses(*(clause[0, 0] for clause in check_clauses(targets, *found)))
  reasons = _name_failures(metadata, names, targets['most'][0], counts, clauses, told)
  return bool(clauses.all_hold().all()), '; '.join(reasons)


def _name_failures(metadata, names, most, counts, clauses, told):
  """Yields what is wrong, in words.

  Each entry in 'include' has only its first fault named; classes with too many objects follow.
  """
  # a relation to objects that are wrong themselves is reported as such
  right = clauses.all_hold()
  for e, want in enumerate(metadata.get('include', ())):
    name, count = want['class'], want['count']
    if not clauses.enough[e]:
      yield f'expected {count} {name}, found {counts[e]}'
    elif not clauses.coloured[e]:
      yield f'expected {want["color"]} {name}, found {", ".join(told[e])}'
    elif 'position' in want:
      relation, other = want['position']
      if not right[other]:
        yield f'nothing for {name} to be {relation}'
      elif not clauses.related[e]:
        yield f'{name} is not {relation} {names[other]}'
  for e in np.flatnonzero(~clauses.allowed):
    yield f'expected fewer than {most[e] + 1} {names[e]}, found {counts[e]}'


# ---------------------------------------------------------------------------------- the benchmark


def summarize_by_tag(tags: Sequence[str], correct: Sequence[bool]) -> dict:
  """Averages graded pictures.

  Returns:
    {'overall': the unweighted mean of the categories, which is GenEval's headline number, 'images':
    the mean over pictures, 'by_tag': {tag: mean}}.
  """
  by_tag = {}
  for tag, ok in zip(tags, correct):
    by_tag.setdefault(tag, []).append(float(ok))
  means = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
  images = sum(map(sum, by_tag.values())) / max(1, sum(map(len, by_tag.values())))
  return {'overall': sum(means.values()) / max(1, len(means)), 'images': images, 'by_tag': means}


def benchmark_label(scoring_models: Sequence[str], searched: Sequence[str] = ()) -> str:
  """Names an accuracy by GenEval's rules: it is 'geneval' for the published models alone.

  Args:
    scoring_models: names of the detector and the colour classifier, ('owlvit_b32', 'clip_l14').
    searched: names of the models that chose the pictures (`scoring_models_of` a verifier). If one
      of them is among `scoring_models`, the accuracy is an oracle's.
  """
  if tuple(scoring_models) == OFFICIAL:
    name, notes = 'geneval', []
  else:
    name, notes = f'geneval_{"_".join(scoring_models)}', ['not official']
  notes += ['oracle'] if set(scoring_models) & set(searched) else []
  return f'{name} ({", ".join(notes)})' if notes else name


def scoring_models_of(verifier) -> set[str]:
  """Returns the names of the models that decide a verifier's GenEval-like scores.

  An ensemble has those of the members that it searches on.
  """
  # a member of weight 0 is measured only, so it does not choose pictures
  found = set(getattr(verifier, 'scoring_models', ()))
  members = dict(getattr(verifier, 'members', ()))
  weights = dict(verifier.weights) if members else {}
  searched = (member for name, member in members.items() if weights.get(name, 1))
  return found.union(*map(scoring_models_of, searched))


def report_benchmark(
  metadata: Sequence[dict],
  detections: Sequence[Sequence[dict]],
  scoring_models: Sequence[str],
  tell_colours: Callable | None = None,
  searched: Sequence[str] = (),
  limits: Limits = OFFICIAL_LIMITS,
) -> dict:
  """Computes the benchmark's numbers for R pictures.

  Args:
    metadata: R rows of `evaluation_metadata.jsonl`; pictures of one prompt have the same row.
    detections: R lists of everything the detector found, in pixels and with scores.
    scoring_models, searched: as in `benchmark_label`.
    tell_colours: `tell_colours(picture, class, detections) -> names`, or None as in
      `evaluate_detections`.

  Returns:
    {'name', 'correct': R bools, 'reasons': R strings, 'overall', 'images', 'by_tag' as in
    `summarize_by_tag`, 'prompts': share of the prompts with a correct picture}.

  Raises:
    ValueError: there are more or fewer rows of metadata than pictures.
  """
  if len(metadata) != len(detections):
    raise ValueError(f'{len(metadata)} metadata entries but {len(detections)} images')
  graded = []
  # a colour classifier needs the picture that the detections are of
  for i, (row, found) in enumerate(zip(metadata, detections)):
    tell = tell_colours and functools.partial(tell_colours, i)
    graded.append(evaluate_detections(row, select_detections(found, row['tag'], limits), tell))
  correct = [ok for ok, _ in graded]
  any_correct = {}
  for row, ok in zip(metadata, correct):
    any_correct[row['text']] = any_correct.get(row['text'], False) or ok
  return {
    'name': benchmark_label(scoring_models, searched),
    'correct': correct,
    'reasons': [reason for _, reason in graded],
    **summarize_by_tag([row['tag'] for row in metadata], correct),
    'prompts': sum(any_correct.values()) / max(1, len(any_correct)),
  }
