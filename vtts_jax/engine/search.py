"""`search`: prompts in, the best picture of each out, and the bill before anything runs.

Prompts are processed in batches of one shape, padded, so that nothing is compiled twice; on a mesh
each device has its own prompts (`shard_map`), and a candidate's keys depend on (seed, prompt id,
candidate id, stage) alone.
Letters: P prompts in all, B in a batch, M candidates of a step, N kept.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vtts_jax.core import Algorithm, Best, Cost, Generator, Verifier
from vtts_jax.engine import drivers
from vtts_jax.engine.drivers import Program
from vtts_jax.engine.step import Job, StepTrace
from vtts_jax.errors import ConfigError


@dataclasses.dataclass
class SearchResult:
  """What a search found, as numpy arrays over P prompts.

  Attributes:
    prompts, ids: P texts and their global ids `[P]`.
    images: `[P, H, W, 3]`, float32 in [0, 1], of the best candidates.
    best: slim states `[P, ...]`, stages done `[P]`, scores `{name: [P]}` and total `[P]`. A prompt
      none of whose candidates had finite scores has total -inf; `failed` lists them.
    steps: one `StepTrace` a step.
    costs: cost per prompt of each step; the last entry also has the final render.
    seconds: 'compile' and 'run', summed over the batches; 'prompts' counts what was run, padding
      included.
  """

  prompts: list[str]
  ids: np.ndarray
  images: np.ndarray
  best: Best
  steps: tuple[StepTrace, ...]
  costs: tuple[Cost, ...]
  seconds: dict[str, float]

  @property
  def failed(self) -> list[int]:
    return [int(i) for i, total in zip(self.ids, self.best.total) if not np.isfinite(total)]

  def spent(self) -> np.ndarray:
    """What each prompt spent up to and with each step, `[P, S, 4]` in the order of `Cost`: steps
    that a prompt did not need are not on its bill; the final render is in the last."""
    steps = np.array([dataclasses.astuple(cost) for cost in self.costs])
    active = np.stack([step.active for step in self.steps], axis=1)
    return np.cumsum(steps * active[..., None], axis=1)

  @property
  def bad(self) -> dict[str, np.ndarray]:
    """`{name: [P]}`: NaN or infinite scores met on the way."""
    return {name: sum(step.bad[name] for step in self.steps) for name in self.steps[0].bad}


def ahead(function: Callable, items: Sequence, ver: Verifier):
  """`function` of each item, in order. With a verifier on the host the next item is begun while one
  waits for its scores; a failure stops what has not begun."""
  if ver.jittable or len(items) < 2:
    yield from map(function, items)
    return
  with ThreadPoolExecutor(2) as pool:
    running = []
    try:
      for item in items:
        running.append(pool.submit(function, item))
        if len(running) == 2:
          yield running.pop(0).result()
      while running:
        yield running.pop(0).result()
    finally:
      for future in running:
        future.cancel()


def bill(algo: Algorithm, gen: Generator, ver: Verifier) -> tuple[Cost, ...]:
  """Cost per prompt of each step, with the final render of the best in the last; sums to the whole
  bill."""
  costs = list(algo.costs(gen, ver))
  costs[-1] = costs[-1] + gen.cost('render')
  return tuple(costs)


def check_budget(cost: Cost, budget: Mapping[str, float] | None) -> None:
  """Raises `ConfigError` with the whole bill where `cost` is above a limit of `budget` (0 or
  absent: no limit)."""
  allowed = cost.asdict()
  for name, limit in (budget or {}).items():
    if name not in allowed:
      raise ConfigError(f'budget.{name}={limit}: no such limit; allowed: {", ".join(allowed)}')
    if limit and allowed[name] > limit:
      lines = ', '.join(f'{k} {v:,.0f}' for k, v in allowed.items())
      raise ConfigError(
        f'budget.{name}={limit:,.0f} per prompt is below what the search spends ({lines}); '
        'raise it or shrink the search'
      )


def search(
  algo: Algorithm,
  gen: Generator,
  ver: Verifier,
  params,
  prompts: Sequence[str],
  key: jax.Array,
  *,
  ids: Sequence[int] | None = None,
  initial=None,
  mesh: Mesh | None = None,
  mode: str = 'fused',
  batch: int = 0,
  render_chunk: int = 0,
  trace: bool = False,
  on_step: Callable | None = None,
  budget: Mapping[str, float] | None = None,
  stop: float = float('inf'),
) -> SearchResult:
  """Searches a picture for each prompt.

  Args:
    algo, gen, ver: what `core.load` returns.
    params: `{'generator': gen.load(), 'verifier': ver.load()}`.
    prompts: P texts.
    key: root key (`jax.random.key(seed)`).
    ids: global prompt ids `[P]`, 0 .. P-1 by default. Results of a prompt depend on its id, not on
      its place.
    initial: tokens `[P, t]` that every candidate starts from; t must equal the algorithm's
      `initial`.
    mesh: prompts are split over its 'data' axis.
    mode: 'fused' (one program) or 'stepped' (a loop over compiled steps; chosen for host
      verifiers).
    batch: prompts run at a time; 0 for all. Rounded up to the mesh and padded.
    render_chunk: candidates per prompt rendered and scored at a time; 0 for all.
    trace: keep every slim state looked at (`StepTrace.shown`) and the best after each step.
    on_step: called with (step, StepTrace) after each step; stepped only.
    budget: limits per prompt, by the names of `Cost`; a search above one is refused before
      anything is compiled.
    stop: a prompt whose best total reaches this needs no further step (verifier-threshold
      stopping, 2512.08985): masked in 'fused', out of the batch in 'stepped'.

  Raises:
    ConfigError: settings that do not fit, before any compile.
  """
  validate(algo, gen, ver, mode, on_step)
  costs = bill(algo, gen, ver)
  check_budget(sum(costs, Cost()), budget)
  if not len(prompts):
    raise ConfigError('prompts: must hold at least one text')
  ids = np.arange(len(prompts)) if ids is None else np.asarray(ids)
  if ids.shape != (len(prompts),) or len(set(ids.tolist())) != len(ids) or ids.min() < 0:
    raise ConfigError(f'ids: must be {len(prompts)} different integers >= 0')
  given = 0 if initial is None else np.shape(initial)[1]
  if given != algo.initial:
    raise ConfigError(f'search.initial={algo.initial}: {given} initial tokens were passed')
  initial = (
    np.zeros((len(prompts), 0), np.int32) if initial is None else np.asarray(initial, np.int32)
  )
  if given and (initial.min() < 0 or initial.max() >= gen.vocab):
    raise ConfigError(f'initial tokens: must be in 0 .. {gen.vocab - 1}')

  devices = mesh.shape['data'] if mesh is not None else 1
  size = -(-(batch or len(prompts)) // devices) * devices
  job = Job(algo, gen, ver, render_chunk, trace, float(stop))
  arrays = tokenize(gen, ver, prompts)
  if mesh is not None:
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    key = jax.device_put(key, jax.sharding.NamedSharding(mesh, PartitionSpec()))
  compiled_before = Program.compile_seconds

  def part(low):
    """One batch, and its seconds without compiling."""
    rows = np.minimum(np.arange(low, low + size), len(prompts) - 1)
    local = jax.tree.map(lambda x: np.asarray(x)[rows], (arrays, ids.astype(np.uint32), initial))
    if mesh is not None:
      local = jax.device_put(local, jax.sharding.NamedSharding(mesh, PartitionSpec('data')))
    start, before = time.perf_counter(), Program.compile_seconds
    if mode == 'fused':
      out = drivers.program(job, 'fused', mesh)(params, local[0], local[1], key, local[2])
    else:
      out = drivers.stepped(job, params, *local[:2], key, local[2], mesh, on_step)
    out = jax.tree.map(np.asarray, out)
    ran = time.perf_counter() - start - (Program.compile_seconds - before)
    return jax.tree.map(lambda x: x[: len(prompts) - low], out), ran

  parts, ran = zip(*ahead(part, range(0, len(prompts), size), ver))
  best, images, traces = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  seconds = {
    'compile': Program.compile_seconds - compiled_before,
    'run': sum(ran),  # of batches that ran side by side, of each
    'prompts': float(len(parts) * size),
  }
  return SearchResult(list(prompts), ids, images, best, traces, costs, seconds)


def tokenize(gen, ver, prompts) -> dict[str, Any]:
  """Prompt arrays for generator and verifier; a text that either cannot read is a `ConfigError`."""
  try:
    return {'generator': gen.tokenize(prompts), 'verifier': ver.tokenize(prompts)}
  except ValueError as err:
    raise ConfigError(str(err)) from None


def validate(algo, gen, ver, mode: str = 'fused', on_step=None) -> None:
  """Raises `ConfigError` where the parts do not fit each other; compiles and loads nothing."""
  gen.check()
  ver.check()
  algo.check(gen)
  if mode not in ('fused', 'stepped'):
    raise ConfigError(f"mode={mode!r}: must be 'fused' or 'stepped'")
  if mode == 'fused' and not ver.jittable:
    raise ConfigError(f"mode='fused': {type(ver).__name__} scores on the host; allowed: 'stepped'")
  if mode == 'fused' and on_step:
    raise ConfigError("on_step: needs mode='stepped'")
  if algo.features and not hasattr(ver, 'features'):
    raise ConfigError(f'search: {type(algo).__name__} needs features of the pictures, which the '
                      f'verifier {type(ver).__name__} lacks')
  if algo.features and not ver.jittable:
    raise ConfigError(f'search: {type(algo).__name__} needs features from a compiled verifier')
  if algo.uses_value and ver.names != (gen.value_of,):
    raise ConfigError(
      f'search: {type(algo).__name__} uses a value head; that of {type(gen).__name__} predicts '
      f'{gen.value_of or "nothing"!r}, the search is on {", ".join(ver.names)}'
    )
  if 'log_prob' in ver.uses and type(gen).log_prob is Generator.log_prob:
    raise ConfigError(
      f'verifier {type(ver).__name__}: needs log-probabilities, which {type(gen).__name__} lacks'
    )
  if 'early' in ver.uses and not gen.keeps_early:
    raise ConfigError(
      f'verifier {type(ver).__name__}: needs an early prediction, which {type(gen).__name__} does '
      'not keep; allowed: a diffusion or flow generator with early_at above 0'
    )
