"""How a winner came about: of each step the best candidates, their parents, the winner's ancestors.

Letters: S steps that showed anything, C columns (candidates shown of a step).
"""

import functools

import jax
import numpy as np

from vtts_jax.engine.search import SearchResult

COLUMNS = 8


def tree(result: SearchResult, row: int) -> dict[str, np.ndarray]:
  """The family tree of one prompt, the candidates of each step best first.

  Returns:
    `index [S, C]`, which candidate of its step (-1 for none); `totals [S, C]`; `parent [S, C]`, the
    parent's column in the step before (-1 for none or not shown); `winner [S]`, the column of the
    returned candidate's ancestor (-1 for none); `stage [S, C]`, stages done.
  """
  looks = _looks(result)
  steps = len(looks)
  index, parent = np.full((2, steps, COLUMNS), -1)
  stage = np.zeros((steps, COLUMNS), np.int32)
  totals = np.full((steps, COLUMNS), -np.inf, np.float32)
  slots = {}  # frontier slot -> column of the step before
  for s, step in enumerate(looks):
    kept = list(dict.fromkeys(step.kept[row].tolist()))  # these first: they have children
    others = np.argsort(-step.totals[row], kind='stable').tolist()
    order = (kept + [i for i in others if i not in kept])[:COLUMNS]
    index[s, : len(order)] = order
    totals[s, : len(order)] = step.totals[row][order]
    stage[s, : len(order)] = step.stage[row][order]
    parent[s, : len(order)] = [slots.get(int(p), -1) for p in step.parent[row][order]]
    columns = {candidate: column for column, candidate in enumerate(order)}
    slots = {slot: columns[c] for slot, c in enumerate(step.kept[row].tolist()) if c in columns}
  winner = np.full(steps, -1)
  best = np.isclose(totals, result.best.total[row], rtol=1e-6, atol=1e-6)
  if best.any():
    s, column = np.argwhere(best)[0].tolist()
    while s >= 0 and column >= 0:
      winner[s] = column
      s, column = s - 1, int(parent[s, column])
  return {'index': index, 'totals': totals, 'parent': parent, 'winner': winner, 'stage': stage}


def _looks(result: SearchResult):
  """The steps that showed anything (a tree search by value alone shows its last one only)."""
  return [step for step in result.steps if step.totals.shape[1]]


def pictures(gen, params, result: SearchResult, row: int, found) -> np.ndarray:
  """Pictures of the candidates in a tree: uint8 `[S, C, H, W, 3]`, anything where none is."""
  index = np.maximum(found['index'], 0)
  states = [
    jax.tree.map(lambda x, i=i: x[row : row + 1, i], step.shown)
    for i, step in zip(index, _looks(result))
  ]
  states = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *states)
  stages = found['stage'].reshape(1, -1)
  prompt = gen.tokenize(result.prompts[row : row + 1])
  images = np.asarray(_render(gen, params, prompt, states, stages))[0]
  pixels = np.clip(np.rint(np.nan_to_num(images) * 255), 0, 255).astype(np.uint8)
  return pixels.reshape(*index.shape, *pixels.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def _render(gen, params, prompt, states, stages):
  return gen.render(params, gen.encode(params, prompt), states, stages)
