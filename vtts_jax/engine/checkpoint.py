"""Checkpoints of a search: its state after a step, its best and its traces, kept with Orbax.

A search that was cut off goes on to the same result, on any number of devices: contexts are encoded
again, everything else is in the `SearchState`. The structure of what was saved is not in the file;
it is that of the steps done so far, which are traced without being run.
Letters: P prompts of a batch, B rows of the batch, padding among them.
"""

import dataclasses

import jax
import numpy as np
from etils import epath

from vtts_jax import core
from vtts_jax.engine import step
from vtts_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SearchCheckpoint:
  """Where one batch is saved.

  Attributes:
    folder: of this search and batch; steps are kept in `folder/step_00003`, the last one only.
    every: steps from one save to the next.
    prompts: P; rows from there on are padding.
  """

  folder: epath.Path
  every: int
  prompts: int

  def save(self, done: int, state, best, traces) -> None:
    """Saves what stands after `done` steps, if it is time to."""
    if done % self.every:
      return
    import orbax.checkpoint as ocp

    leaves = jax.tree.leaves(jax.tree.map(_plain_numbers, (state, best, traces)))
    # Orbax takes no array without an element; the shapes say where they were
    named = {f'{i:05d}': leaf for i, leaf in enumerate(leaves) if leaf.size}
    # the new save is whole before the old ones go
    before = self._steps()
    with ocp.StandardCheckpointer() as keeper:
      keeper.save(self.folder / f'step_{done:05d}', named)
    for number in before:
      (self.folder / f'step_{number:05d}').rmtree()

  def _steps(self) -> list[int]:
    """Steps that are saved, in order; Orbax renames a folder once it is whole."""
    found = self.folder.glob('step_*') if self.folder.exists() else ()
    return sorted(int(p.name[5:]) for p in found if p.name[5:].isdigit())

  def restore(self, program, params, contexts, state):
    """(state, best, traces) of the last save, for a batch of the size of `state`; None without one.

    Raises:
      ConfigError: a save that does not have the structure of this search.
    """
    steps = self._steps()
    if not steps:
      return None
    import orbax.checkpoint as ocp

    place = self.folder / f'step_{steps[-1]:05d}'
    with ocp.StandardCheckpointer() as keeper:
      named = keeper.restore(place)
    shapes = _shapes_after(program, params, contexts, state, steps[-1])
    wanted, structure = jax.tree.flatten(shapes)
    full = {f'{i:05d}': shape for i, shape in enumerate(wanted) if shape.size}
    if full.keys() != named.keys():
      raise ConfigError(
        f'checkpoint={place}: holds {len(named)} arrays, this search has {len(full)}; it is of '
        'another search: choose another folder'
      )
    leaves = [
      _typed_leaf(named[key], shape) if (key := f'{i:05d}') in full else _empty_leaf(shape)
      for i, shape in enumerate(wanted)
    ]
    saved, best, traces = jax.tree.unflatten(structure, leaves)
    return self._fit_rows(saved, best, list(traces), len(state.rows))

  def _fit_rows(self, saved, best, traces, size: int):
    """The same for a batch of `size` rows: devices of another number pad to another one."""
    # rows of `best` and `traces` are prompts, the last one repeated
    prompt = np.minimum(np.arange(size), self.prompts - 1)
    best, traces = jax.tree.map(lambda x: x[prompt], (best, traces))
    rows = np.asarray(saved.rows)
    if len(rows) == size and rows.max(initial=0) < size:
      return saved, best, traces
    # a row whose prompt is at rest, and gone from the batch, computes another one's a second time
    place = {int(row): i for i, row in reversed(list(enumerate(rows)))}
    keep = np.array([place.get(int(p), 0) for p in prompt])
    moved = jax.tree.map(lambda x: x[keep], (saved.frontier, saved.best, rows))
    moved = moved[:2] + (np.minimum(moved[2], size - 1),)
    return saved._replace(frontier=moved[0], best=moved[1], rows=moved[2]), best, traces


def _plain_numbers(leaf):
  """A key as its numbers; anything else as it is."""
  if jax.dtypes.issubdtype(getattr(leaf, 'dtype', np.int32), jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def _typed_leaf(numbers, shape):
  """What was saved, as the kind of `shape`: a key from its numbers."""
  numbers = np.asarray(numbers)
  if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(numbers, impl=shape.dtype._impl)
  return numbers


def _empty_leaf(shape):
  """An array without an element, of the kind of `shape`."""
  if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
    return _typed_leaf(np.zeros((*shape.shape, *shape.dtype._impl.key_shape), np.uint32), shape)
  return np.zeros(shape.shape, shape.dtype)


def _shapes_after(program, params, contexts, state, count: int):
  """(state, best, traces) after `count` steps as shapes; nothing is computed."""

  def run(params, contexts, state):
    best, traces = state.best, []
    for shape, row in core.steps_of(program.algo, program.gen)[:count]:
      state, trace = step.silent_step(program, params, contexts, state, shape, row)
      traces.append(trace)
    return state, best, tuple(traces)

  return jax.eval_shape(run, params, contexts, state)
