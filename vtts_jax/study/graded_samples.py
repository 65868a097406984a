"""Best-of-N's samples, one by one: which are right, and what each selection rule would hand out.

The N samples are rendered once more, `render_chunk` of a prompt at a time, graded by the metric and
embedded by the first measured verifier that has `features(params, images)`. Pass@1 of a prompt (its
difficulty) and every rule at every smaller budget are read off these.

Letters: P prompts, N samples, D features.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from vtts_jax import core
from vtts_jax.study import selection as rules


class Graded(NamedTuple):
  """Samples of a batch: right ones `[P, N]` bool, features `[P, N, D]` or None, and whose."""

  correct: np.ndarray
  features: np.ndarray | None
  space: str


def embedder(measure) -> tuple[str, core.Verifier | None]:
  """The first member of a measured ensemble with `features`, and its name; ('', None) for none."""
  found = ((name, member) for name, member in measure.members if hasattr(member, 'features'))
  return next(found, ('', None))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(gen, ver, params, prompts, states, stages):
  """Pictures `[P, n, H, W, 3]` of slim states and their features `[P, n, D]` (or None)."""
  ctx = gen.encode(params['generator'], prompts['generator'])
  images = gen.render(params['generator'], ctx, states, stages)
  return images, ver.features(params['features'], images) if ver else None


def grade(arm, params, prompts, states, valid, entries, metric) -> Graded:
  """Renders, grades and embeds all samples.

  Args:
    arm: `study.Arm`.
    params: `{'generator': .., 'measure': {name: ..}}`.
    prompts: `{'generator': arrays [P', ...]}`, padded: P' >= P.
    states: slim states `[P', N, ...]`, padded alike.
    valid: `[P, N]` bool; samples that are not valid are never right.
    entries: P prompt entries, for the metric.
    metric: a module with `score(images, entries)`.
  """
  space, ver = embedder(arm.measure)
  held = {'generator': params['generator'], 'features': params['measure'][space] if ver else {}}
  count, samples = valid.shape
  chunk = min(arm.render_chunk or samples, samples)
  correct, features = np.zeros(valid.shape, bool), []
  for low in range(0, samples, chunk):
    index = np.minimum(np.arange(low, low + chunk), samples - 1)  # one shape: compiled once
    piece = jax.tree.map(lambda x, i=index: x[:, i], states)
    stages = np.full((len(jax.tree.leaves(piece)[0]), chunk), arm.gen.num_stages, np.int32)
    images, found = _look(arm.gen, ver, held, prompts, piece, stages)
    high = min(low + chunk, samples)
    images = np.asarray(images)[:count, : high - low]
    images = np.where(np.isfinite(images), images, 0).reshape(-1, *images.shape[2:])
    repeated = [e for e in entries for _ in range(high - low)]
    correct[:, low:high] = metric.score(images, repeated).reshape(count, -1)
    if ver:
      features.append(np.asarray(found)[:count, : high - low])
  return Graded(correct & valid, np.concatenate(features, axis=1) if ver else None, space)


def record(graded: Graded, prefixes: list[np.ndarray], row: int) -> dict:
  """What a result line keeps of one prompt's samples.

  Args:
    graded: of the batch.
    prefixes: totals `[P, n]` of the first n samples, for each n; -inf where not valid.
    row: which prompt.

  Returns:
    `correct` N times 0 or 1; `totals` N numbers or None; `sizes` the prefixes n; `space` whose
    features; `picks` for each rule the sample handed out of each prefix, -1 for none.
  """
  totals = [t[row] for t in prefixes]
  features = None if graded.features is None else graded.features[row]
  return {
    'correct': graded.correct[row].astype(int).tolist(),
    'totals': [float(t) if np.isfinite(t) else None for t in totals[-1]],
    'sizes': [len(t) for t in totals],
    'space': graded.space,
    'picks': rules.picks(totals, features),
  }
