"""`search`: prompts in, the best candidate of each out, and the bill before anything runs.

Prompts are processed in batches of one shape, padded, so that nothing is compiled twice; on a mesh
each group of devices along 'data' has its own prompts, and a candidate's keys depend on (seed,
prompt id, candidate id, stage) alone.
Letters: P prompts in all, B in a batch, M candidates of a step, N kept.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vtts_jax import core
from vtts_jax.core import Algorithm, Cost, Generator, Verifier
from vtts_jax.engine import fused, stepped
from vtts_jax.engine.checkpoint import SearchCheckpoint
from vtts_jax.engine.compilation import compile_log
from vtts_jax.engine.program import COLLECT, SearchProgram
from vtts_jax.engine.result import SearchResult
from vtts_jax.errors import ConfigError

INFINITY = float('inf')


def search(
  algo: Algorithm,
  gen: Generator,
  ver: Verifier,
  prompts: Sequence[str | core.Prompt],
  *,
  seed: int | jax.Array = 0,
  budget: Mapping[str, float] | None = None,
  **options,
) -> SearchResult:
  """Searches the best candidate for each prompt.

  Args:
    algo, gen, ver: what `load` returns.
    prompts: P texts, or mappings with 'text', 'label', 'reference' ...
    seed: an integer, or a key (`jax.random.key(seed)`).
    budget: limits per prompt, by the names of `Cost`; a search above one is refused before
      anything is compiled.
    options: see `prepare_search`.

  Raises:
    ConfigError: settings that do not fit, before any compile.
  """
  return prepare_search(algo, gen, ver, prompts, budget=budget, **options).run(seed=seed)


@dataclasses.dataclass(frozen=True)
class PreparedSearch:
  """A search whose parts are checked, whose prompts are tokenized and whose weights are placed.

  Attributes:
    program: what is compiled.
    prompts, ids: P prompt rows and their global ids `[P]`.
    arrays: tokenized prompts, `[P, ...]`.
    params: `{'generator': .., 'verifier': .., 'measure': ..}`, placed.
    initial: given tokens `[P, t]`.
    costs: the bill of each step.
    mesh, mode, batch: see `prepare_search`; `batch` is rounded up to the mesh.
  """

  program: SearchProgram
  prompts: list[dict]
  ids: np.ndarray
  arrays: Any
  params: Any
  initial: np.ndarray
  costs: tuple[Cost, ...]
  mesh: Mesh | None
  mode: str
  batch: int
  on_step: Callable | None = None
  checkpoint: Any = None
  every: int = 0

  def run(self, rows: Sequence[int] | None = None, seed: int | jax.Array = 0) -> SearchResult:
    """Searches the prompts at `rows` (all by default) in batches."""
    rows = np.arange(len(self.prompts)) if rows is None else np.asarray(rows)
    root = _root_key(seed)
    log = compile_log()
    compiled = log.seconds

    def one_batch(low):
      """One batch, and its seconds without compiling."""
      mine = rows[low : low + self.batch]
      # compilation is measured by JAX itself and taken off the clock
      start, before = time.perf_counter(), log.seconds
      out = jax.tree.map(np.asarray, self._run_batch(mine, root))
      ran = time.perf_counter() - start - (log.seconds - before)
      return jax.tree.map(lambda x: x[: len(mine)], out), ran

    batches = range(0, len(rows), self.batch)
    parts, ran = zip(*overlapped(one_batch, batches, self.program.ver))
    best, outputs, traces = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    seconds = {
      'compile': log.seconds - compiled,
      'run': sum(ran),  # of batches that ran side by side, of each
      'prompts': float(len(parts) * self.batch),
    }
    prompts = [self.prompts[i] for i in rows]
    kinds = dict(self.program.gen.outputs)
    return SearchResult(prompts, self.ids[rows], outputs, best, traces, self.costs, seconds, kinds)

  def _run_batch(self, rows, root):
    """(best, outputs, traces) of the prompts at `rows`, padded with the last of them."""
    # one shape for all batches: the last one is filled up with its last prompt
    padded = rows[np.minimum(np.arange(self.batch), len(rows) - 1)]
    local = (self.arrays, self.ids.astype(np.uint32), self.initial)
    arrays, ids, initial = jax.tree.map(lambda x: np.asarray(x)[padded], local)
    if self.mesh is not None:
      by_prompt = NamedSharding(self.mesh, PartitionSpec('data'))
      arrays, ids, initial = jax.device_put((arrays, ids, initial), by_prompt)
      root = jax.device_put(root, NamedSharding(self.mesh, PartitionSpec()))
    if self.mode == 'fused':
      return fused.run_fused(self.program, self.mesh, self.params, arrays, ids, root, initial)
    saved = None
    if self.checkpoint is not None:
      first, last = int(self.ids[rows[0]]), int(self.ids[rows[-1]])
      seed = '_'.join(f'{number:x}' for number in np.asarray(jax.random.key_data(root)).ravel())
      folder = epath.Path(self.checkpoint) / f'seed_{seed}_prompts_{first:06d}_{last:06d}'
      saved = SearchCheckpoint(folder, self.every, len(rows))
    return stepped.run_stepped(
      self.program, self.params, arrays, ids, root, initial, self.mesh, self.on_step, saved
    )


def prepare_search(
  algo: Algorithm,
  gen: Generator,
  ver: Verifier,
  prompts: Sequence[str | core.Prompt],
  *,
  params: Mapping[str, Any] | None = None,
  measure: Verifier | None = None,
  ids: Sequence[int] | None = None,
  initial=None,
  mesh: Mesh | None = None,
  mode: str = 'fused',
  batch: int = 0,
  render_chunk: int = 0,
  stop: float = INFINITY,
  collect: Sequence[str] = ('scores',),
  checkpoint=None,
  every: int = 1,
  on_step: Callable | None = None,
  budget: Mapping[str, float] | None = None,
) -> PreparedSearch:
  """Checks everything, tokenizes the prompts once and places the weights once.

  Args:
    params: `{'generator': .., 'verifier': .., 'measure': ..}`; what is missing is loaded, once for
      each component, and kept.
    measure: a verifier that scores what was decoded anyway, see `collect`; no search sees it.
    ids: global prompt ids `[P]`; a prompt's own 'id' or 0 .. P - 1 by default. Results depend on a
      prompt's id, not on its place.
    initial: tokens `[P, t]` that every candidate starts from; t must equal the algorithm's
      `initial`.
    mesh: prompts are split over its 'data' axis, weights over 'model'.
    mode: 'fused' (one program) or 'stepped' (a loop over compiled steps; host verifiers need it).
    batch: prompts run at a time; 0 for all. Rounded up to the mesh and padded.
    render_chunk: candidates of a prompt observed and scored at a time; 0 for all.
    stop: a prompt whose best total reaches this needs no further step (verifier-threshold
      stopping, 2512.08985): masked in 'fused', out of the batch in 'stepped'.
    collect: what is kept of each step, see `engine.program.SearchProgram`.
    checkpoint: a folder to which the search is saved after every `every` steps, and from which the
      same search goes on; stepped only.
    on_step: called with (number of the step, `StepTrace`) after each; stepped only.
    budget: see `search`.

  Raises:
    ConfigError: settings that do not fit, before any compile.
  """
  validate(algo, gen, ver, mode, measure)
  for name, given in (('on_step', on_step), ('checkpoint', checkpoint)):
    if mode == 'fused' and given is not None:
      raise ConfigError(f"{name}: needs mode='stepped'")
  for name, value, least in (
    ('every', every, 1), ('batch', batch, 0), ('render_chunk', render_chunk, 0),
  ):  # fmt: skip
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
      raise ConfigError(f'{name}={value!r}: must be an integer >= {least}')
  if not isinstance(stop, int | float) or not stop > -INFINITY:
    raise ConfigError(f'stop={stop!r}: must be a number above -inf')
  unknown = [name for name in collect if name not in COLLECT]
  if unknown:
    raise ConfigError(f'collect={list(collect)}: {unknown[0]!r} is none of {", ".join(COLLECT)}')
  costs = bill(algo, gen, ver)
  check_budget(sum(costs, Cost()), budget)
  prompts = core.as_prompts(prompts)
  if not prompts:
    raise ConfigError('prompts: must hold at least one')
  ids = _check_ids(prompts, ids)
  initial = _check_initial(algo, gen, initial, len(prompts))

  parts = {'generator': gen, 'verifier': ver}
  if measure is not None:
    parts['measure'] = measure
  arrays = tokenize_prompts(parts, prompts)
  # every device along 'data' must have as many prompts as the others
  devices = mesh.shape['data'] if mesh is not None else 1
  size = -(-(batch or len(prompts)) // devices) * devices
  program = SearchProgram(
    algo, gen, ver, measure, render_chunk, float(stop), frozenset(collect) | {'scores'}
  )
  given = params or {}
  placed = {
    name: place_parameters(part, given[name], mesh) if name in given
    else load_parameters(part, mesh)
    for name, part in parts.items()
  }  # fmt: skip
  return PreparedSearch(
    program, prompts, ids, arrays, placed, initial, costs, mesh, mode, size, on_step, checkpoint,
    every,
  )  # fmt: skip


# ------------------------------------------------------------------------------ prompts and weights


def _root_key(seed: int | jax.Array) -> jax.Array:
  """The key that all others come from."""
  if isinstance(seed, jax.Array) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key):
    return seed
  # a larger number would wrap around, and two seeds would give the same candidates
  whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
  if not whole or not 0 <= seed < 2**32:
    raise ConfigError(f'seed={seed!r}: must be an integer in 0 .. 2**32 - 1, or a key')
  return jax.random.key(seed)


def _check_ids(prompts, ids) -> np.ndarray:
  if ids is None:
    ids = [prompt.get('id', place) for place, prompt in enumerate(prompts)]
  whole = all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in ids)
  if not whole or len(ids) != len(prompts) or len(set(ids)) != len(ids) or min(ids) < 0:
    raise ConfigError(f'ids: must be {len(prompts)} different integers >= 0')
  return np.asarray(ids)


def _check_initial(algo, gen, initial, prompts: int) -> np.ndarray:
  given = 0 if initial is None else np.shape(initial)[1]
  if given != algo.initial:
    raise ConfigError(f'search.initial={algo.initial}: {given} initial tokens were passed')
  if not given:
    return np.zeros((prompts, 0), np.int32)
  initial = np.asarray(initial, np.int32)
  if initial.min() < 0 or initial.max() >= gen.vocab:
    raise ConfigError(f'initial tokens: must be in 0 .. {gen.vocab - 1}')
  return initial


def tokenize_prompts(parts: Mapping[str, Generator | Verifier], prompts) -> dict[str, Any]:
  """Prompt arrays of each part, by its name.

  Raises:
    ConfigError: a prompt that a part cannot read.
  """
  try:
    return {name: part.tokenize(prompts) for name, part in parts.items()}
  except ValueError as err:
    raise ConfigError(str(err)) from None


@functools.lru_cache(maxsize=32)
def load_parameters(part: Generator | Verifier, mesh: Mesh | None = None) -> Any:
  """The weights of a component, loaded once and placed."""
  return place_parameters(part, part.load(), mesh)


def place_parameters(part: Generator | Verifier, params, mesh: Mesh | None = None) -> Any:
  """Weights on the devices: as `part.shardings` says on a mesh, else on the first one."""
  where = part.shardings(mesh) if mesh is not None else None
  return jax.device_put(params, where)


def overlapped(function: Callable, items: Sequence, ver: Verifier):
  """`function` of each item, in order. With a host verifier two items are in flight, so that one is
  generated while the other is scored; an error cancels the rest."""
  if ver.jittable or len(items) < 2:
    yield from map(function, items)
    return
  with ThreadPoolExecutor(2) as pool:
    running = []
    try:  # two in flight are enough: one is generated while the other is scored
      for item in items:
        running.append(pool.submit(function, item))
        if len(running) == 2:
          yield running.pop(0).result()
      while running:
        yield running.pop(0).result()
    finally:
      for future in running:
        future.cancel()


# ---------------------------------------------------------------------------------- bill and checks


def bill(algo: Algorithm, gen: Generator, ver: Verifier) -> tuple[Cost, ...]:
  """Cost per prompt of each step, with the final observation of the best in the last; sums to the
  whole bill."""
  costs = list(core.step_costs(algo, gen, ver))
  costs[-1] = costs[-1] + core.observe_cost(gen, [next(iter(gen.outputs))])
  return tuple(costs)


def check_budget(cost: Cost, budget: Mapping[str, float] | None) -> None:
  """Raises `ConfigError` with the whole bill where `cost` is above a limit of `budget` (0 or
  absent: no limit)."""
  allowed = cost.asdict()
  for name, limit in (budget or {}).items():
    if name not in allowed:
      raise ConfigError(f'budget.{name}={limit}: no such limit; allowed: {", ".join(allowed)}')
    if not isinstance(limit, int | float) or not 0 <= limit < INFINITY:
      raise ConfigError(f'budget.{name}={limit!r}: must be a number >= 0 (0: no limit)')
    if limit and allowed[name] > limit:
      lines = ', '.join(f'{k} {v:,.0f}' for k, v in allowed.items())
      raise ConfigError(
        f'budget.{name}={limit:,.0f} per prompt is below what the search spends ({lines}); '
        'raise it or shrink the search'
      )


def validate(
  algo: Algorithm, gen: Generator, ver: Verifier, mode: str = 'fused',
  measure: Verifier | None = None,
) -> None:  # fmt: skip
  """Raises `ConfigError` where the parts do not fit each other; compiles and loads nothing."""
  gen.check()
  ver.check()
  check_capabilities(algo, gen, ver)
  algo.check(gen)
  check_outputs(gen, ver)
  if mode not in ('fused', 'stepped'):
    raise ConfigError(f"mode={mode!r}: must be 'fused' or 'stepped'")
  if mode == 'fused' and not ver.jittable:
    raise ConfigError(f"mode='fused': {type(ver).__name__} scores on the host; allowed: 'stepped'")
  if measure is not None:
    measure.check()
    check_outputs(gen, measure)
    if not measure.jittable:
      raise ConfigError(f'measure: {type(measure).__name__} scores on the host; must be compiled')


def check_capabilities(algo: Algorithm, gen: Generator, ver: Verifier) -> None:
  """The one place that compares what an algorithm needs with what its parts offer."""
  ragged = {'ragged_stages'} if gen.uniform_stages else set()
  missing = sorted(algo.needs - gen.offers - ver.gives - ragged)
  if missing:
    raise ConfigError(
      f'search: {type(algo).__name__} needs {", ".join(missing)}; {type(gen).__name__} offers '
      f'{", ".join(sorted(gen.offers | ragged))}, {type(ver).__name__} gives '
      f'{", ".join(sorted(ver.gives)) or "nothing"}'
    )
  if 'value' in algo.needs and ver.names != (gen.value_of,):
    raise ConfigError(
      f'search: {type(algo).__name__} uses a value head; that of {type(gen).__name__} predicts '
      f'{gen.value_of!r}, the search is on {", ".join(ver.names)}'
    )


def check_outputs(gen: Generator, ver: Verifier) -> None:
  """Raises `ConfigError` where the verifier reads what the generator does not show."""
  missing = sorted(ver.needs - set(gen.outputs))
  if missing:
    raise ConfigError(
      f'verifier {type(ver).__name__}: needs {", ".join(missing)}, which {type(gen).__name__} does '
      f'not show; it shows {", ".join(gen.outputs)}'
    )
