"""Genealogies: the leading candidates of each step, their parents and the winner's ancestors.

The search collects which candidates lead and what they show (`collect='leaders'`);
`report.plots.plot_genealogy` draws them.

Letters: S steps that observed a candidate, C columns (candidates drawn of a step).
"""

import numpy as np

from vtts_jax.engine.result import SearchResult
from vtts_jax.engine.step import COLUMNS
from vtts_jax.media import files


def trace_ancestry(result: SearchResult, row: int) -> dict[str, np.ndarray]:
  """The genealogy of prompt `row`: in each step the candidates that were kept, then the best.

  Returns:
    A mapping of arrays:
      `index [S, C]`   number of the candidate in its step, -1 for none
      `totals [S, C]`  totals, -inf for none
      `parent [S, C]`  the parent's column, -1 for none or one not drawn
      `parent_step [S, C]`  and its step: the one before, or an earlier one of a parent that stayed
      `winner [S]`     column of the returned candidate or its ancestor, -1 for none
      `stage [S, C]`   stages done
  """
  steps = _observed_steps(result)
  index, parent, parent_step = np.full((3, len(steps), COLUMNS), -1)
  stage = np.zeros((len(steps), COLUMNS), np.int32)
  totals = np.full((len(steps), COLUMNS), -np.inf, np.float32)
  # a parent is named by its slot in the frontier, and drawn where it was a candidate: in the step
  # before, or in an earlier one if it has stayed in the frontier since
  places: dict[int, tuple[int, int]] = {}
  for s, step in enumerate(steps):
    order = step.leaders['index'][row].tolist()
    index[s, : len(order)] = order
    totals[s, : len(order)] = step.totals[row][order]
    stage[s, : len(order)] = step.stage[row][order]
    parents = [places.get(p, (-1, -1)) for p in step.parent[row][order].tolist()]
    parent_step[s, : len(order)], parent[s, : len(order)] = zip(*parents)
    columns = {candidate: column for column, candidate in enumerate(order)}
    kept = dict(enumerate(step.kept[row].tolist()))
    stayed = {slot: places[slot] for slot, c in kept.items() if c < 0 and slot in places}
    places = stayed | {slot: (s, columns[c]) for slot, c in kept.items() if c in columns}

  # the winner is the first column with the best total; from there back through the parents
  winner = np.full(len(steps), -1)
  best = np.isclose(totals, result.best.total[row], rtol=1e-6, atol=1e-6)
  if best.any():
    s, column = np.argwhere(best)[0].tolist()
    while s >= 0 and column >= 0:
      winner[s] = column
      s, column = int(parent_step[s, column]), int(parent[s, column])
  return {
    'index': index, 'totals': totals, 'parent': parent, 'parent_step': parent_step,
    'winner': winner, 'stage': stage,
  }  # fmt: skip


def leader_outputs(result: SearchResult, row: int) -> dict[str, np.ndarray]:
  """What the candidates of a genealogy show.

  Returns:
    `images [S, C, H, W, 3]` uint8 where they are pictures, else `texts [S, C]`, a few words for
    each. Columns without a candidate hold zeros or a description of zeros.
  """
  name, output = next(iter(result.kinds.items()))
  padded = []
  for step in _observed_steps(result):
    # a step with few candidates leads with fewer than C; arrays in a file need one shape
    own = step.leaders['outputs'][name][row]
    padded.append(np.concatenate([own, np.zeros((COLUMNS - len(own), *own.shape[1:]), own.dtype)]))
  if output.kind == 'image':
    return {'images': np.stack(padded)}
  words = [[files.describe_output(output.kind, one) for one in own] for own in padded]
  return {'texts': np.array(words)}


def _observed_steps(result: SearchResult):
  """The steps that observed a candidate; a tree search by value alone has one, the last."""
  return [step for step in result.steps if step.totals.shape[1]]
