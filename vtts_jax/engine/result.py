"""What a search found."""

import dataclasses
import html
from typing import Any

import numpy as np

from vtts_jax.core import Best, Cost, Output
from vtts_jax.engine.program import StepTrace
from vtts_jax.errors import ConfigError
from vtts_jax.media import files


@dataclasses.dataclass
class SearchResult:
  """What a search found, as numpy arrays over P prompts.

  Attributes:
    prompts, ids: P prompt rows and their global ids `[P]`.
    outputs: `{name: [P, ...]}`, the generator's first output of the best candidates.
    best: states `[P, ...]`, stages done `[P]`, scores `{name: [P]}` and total `[P]`. A prompt none
      of whose candidates had finite scores has total -inf; `failed` lists them.
    steps: one `StepTrace` a step.
    costs: cost per prompt of each step; the last entry also has the final observation.
    seconds: 'compile' and 'run', summed over the batches; 'prompts' counts what was run, padding
      included.
    kinds: the generator's outputs, by name.
  """

  prompts: list[dict[str, Any]]
  ids: np.ndarray
  outputs: dict[str, np.ndarray]
  best: Best
  steps: tuple[StepTrace, ...]
  costs: tuple[Cost, ...]
  seconds: dict[str, float]
  kinds: dict[str, Output]

  @property
  def images(self) -> np.ndarray:
    """`[P, H, W, 3]`, float32 in [0, 1]; for generators of images."""
    if 'image' not in self.outputs:
      raise ConfigError(f'images: the generator shows {", ".join(self.outputs)}')
    return self.outputs['image']

  @property
  def failed(self) -> list[int]:
    """Ids of the prompts for which nothing was found."""
    return [int(i) for i, total in zip(self.ids, self.best.total) if not np.isfinite(total)]

  @property
  def bad(self) -> dict[str, np.ndarray]:
    """`{name: [P]}`: NaN or infinite scores met on the way."""
    return {name: sum(step.bad[name] for step in self.steps) for name in self.steps[0].bad}

  @property
  def measured_evals(self) -> np.ndarray:
    """Network evaluations that were needed `[P]`; below the bill where candidates finish early."""
    if all(np.ndim(step.evals) for step in self.steps):
      return sum(step.evals for step in self.steps)
    return self.spent()[:, -1, 0]  # the bill is exact

  def spent(self) -> np.ndarray:
    """What each prompt spent up to and with each step, `[P, S, 4]` in the order of `Cost`: steps
    that a prompt did not need are not on its bill; the final observation is in the last."""
    steps = np.array([dataclasses.astuple(cost) for cost in self.costs])
    active = np.stack([step.active for step in self.steps], axis=1)
    return np.cumsum(steps * active[..., None], axis=1)

  def save(self, path: str, row: int = 0):
    """Writes the best of prompt `row` to a file whose ending fits its kind; returns the path."""
    name = next(iter(self.outputs))
    return files.save_output(path, self.kinds[name].kind, self.outputs[name][row])

  def lineage(self, row: int = 0) -> list[dict[str, Any]]:
    """How the winner of prompt `row` came about, the last step first.

    Returns:
      `[{'step', 'candidate', 'stage', 'total'}, ...]` of the best and its ancestors.
    """
    found = [
      (number, int(np.argmax(np.where(step.final[row], step.totals[row], -np.inf))))
      for number, step in enumerate(self.steps)
      if step.totals.shape[1] and step.final[row].any()
    ]
    if not found:
      return []
    step, candidate = max(found, key=lambda at: self.steps[at[0]].totals[row][at[1]])
    line = []
    while step >= 0 and candidate >= 0:
      trace = self.steps[step]
      line.append({
        'step': step,
        'candidate': candidate,
        'stage': int(trace.stage[row][candidate]),
        'total': float(trace.totals[row][candidate]),
      })
      step, candidate = self._find_kept(row, step - 1, int(trace.parent[row][candidate]))
    return line

  def _find_kept(self, row: int, step: int, slot: int) -> tuple[int, int]:
    """The step and the candidate that the frontier holds at `slot` after `step`: of that step, or
    of the one before it since which the slot has stayed as it was; -1 for none."""
    while slot >= 0 and step >= 0:
      kept = self.steps[step].kept[row]
      if slot >= len(kept):
        break
      if kept[slot] >= 0:
        return step, int(kept[slot])
      step -= 1
    return -1, -1

  def _repr_html_(self) -> str:
    """The best of the first prompts with their scores, for notebooks."""
    name = next(iter(self.outputs))
    kind = self.kinds[name].kind
    cells = []
    for row, prompt in enumerate(self.prompts[:16]):
      text = html.escape(str(prompt.get('text', prompt.get('label', ''))))
      if kind == 'image':
        source = files.data_uri(files.encode_png(self.outputs[name][row]), 'image/png')
        shown = f'<img src="{source}" style="width:100%">'
      else:
        shown = html.escape(files.describe_output(kind, self.outputs[name][row]))
      cells.append(
        f'<figure style="display:inline-block;margin:8px;width:180px">{shown}'
        f'<figcaption>{text}<br><b>{self.best.total[row]:.4g}</b></figcaption></figure>'
      )
    return ''.join(cells)
