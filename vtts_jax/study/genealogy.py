"""How a winner came about: of each step the leading candidates, their parents, the winner's
ancestors.

The candidates drawn and what they showed are collected by the search (`collect='leaders'`).

Letters: S steps that showed anything, C columns (candidates drawn of a step).
"""

import numpy as np

from vtts_jax.engine.result import SearchResult
from vtts_jax.engine.step import COLUMNS
from vtts_jax.media import files


def family_tree(result: SearchResult, row: int) -> dict[str, np.ndarray]:
  """The family tree of one prompt: of each step those that were kept first, then the best.

  Returns:
    `index [S, C]`, which candidate of its step (-1 for none); `totals [S, C]`; `parent [S, C]`, the
    parent's column in the step before (-1 for none or not drawn); `winner [S]`, the column of the
    returned candidate's ancestor (-1 for none); `stage [S, C]`, stages done.
  """
  steps = _steps_shown(result)
  index, parent = np.full((2, len(steps), COLUMNS), -1)
  stage = np.zeros((len(steps), COLUMNS), np.int32)
  totals = np.full((len(steps), COLUMNS), -np.inf, np.float32)
  columns_of_slots: dict[int, int] = {}  # frontier slot -> column of the step before
  for s, step in enumerate(steps):
    order = step.leaders['index'][row].tolist()
    index[s, : len(order)] = order
    totals[s, : len(order)] = step.totals[row][order]
    stage[s, : len(order)] = step.stage[row][order]
    parents = step.parent[row][order].tolist()
    parent[s, : len(order)] = [columns_of_slots.get(p, -1) for p in parents]
    columns = {candidate: column for column, candidate in enumerate(order)}
    kept = enumerate(step.kept[row].tolist())
    columns_of_slots = {slot: columns[c] for slot, c in kept if c in columns}

  # from the column with the best total back through its parents
  winner = np.full(len(steps), -1)
  best = np.isclose(totals, result.best.total[row], rtol=1e-6, atol=1e-6)
  if best.any():
    s, column = np.argwhere(best)[0].tolist()
    while s >= 0 and column >= 0:
      winner[s] = column
      s, column = s - 1, int(parent[s, column])
  return {'index': index, 'totals': totals, 'parent': parent, 'winner': winner, 'stage': stage}


def leader_outputs(result: SearchResult, row: int) -> dict[str, np.ndarray]:
  """What the candidates of a tree showed: `images [S, C, H, W, 3]` uint8 where they are pictures,
  else `texts [S, C]`, a few words each; anything where there is no candidate."""
  name, output = next(iter(result.kinds.items()))
  shown = []
  for step in _steps_shown(result):
    own = step.leaders['outputs'][name][row]
    shown.append(np.concatenate([own, np.zeros((COLUMNS - len(own), *own.shape[1:]), own.dtype)]))
  if output.kind == 'image':
    return {'images': np.stack(shown)}
  words = [[files.describe_output(output.kind, one) for one in own] for own in shown]
  return {'texts': np.array(words)}


def _steps_shown(result: SearchResult):
  """The steps that showed anything (a tree search by value alone shows its last one only)."""
  return [step for step in result.steps if step.totals.shape[1]]
