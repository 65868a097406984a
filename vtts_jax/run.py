"""The drivers: `step.py` run fused (one XLA program) or stepped (a Python loop over the same step).

Prompts are processed in batches of one shape, padded, so that nothing is compiled twice; on a mesh
each device has its own prompts (`shard_map`), and a candidate's keys depend on (seed, prompt id,
candidate id, stage) alone.
Letters: P prompts in all, B in a batch, M candidates of a step, N kept.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vtts_jax import core
from vtts_jax.core import Algorithm, Best, ConfigError, Cost, Generator, Step, Verifier
from vtts_jax.step import (
  Job,
  StepTrace,
  advance,
  begin,
  encode,
  finish,
  in_chunks,
  resting,
  settle,
  show,
  staged,
)


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


def fused(job: Job, params, prompts, ids, root, initial):
  """A whole search as one function of arrays: (best, images, traces)."""
  ctx, vctx = encode(job, params, prompts)
  state = begin(job, params, ctx, core.prompt_keys(root, ids), initial)
  traces = []
  for first, count in job.algo.phases(job.gen):
    if count == 1:
      state, trace = advance(job, params, ctx, vctx, state, Step(first, first))
      traces.append(trace)
    else:
      body = lambda s, i, first=first: advance(job, params, ctx, vctx, s, Step(i, first))
      state, stacked = jax.lax.scan(body, state, jnp.arange(first, first + count))
      traces += [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
  return state.best, finish(job, params, ctx, state.best), tuple(traces)


# ---------------------------------------------------------------------------------- compiled
# programs


class Program:
  """A function compiled ahead of time for each shape it meets, with the compile time kept apart
  from the rest."""

  made = 0  # programs compiled by this process; tests count them
  compile_seconds = 0.0  # and how long that took

  def __init__(self, function: Callable):
    self._jit = jax.jit(function)
    self._compiled = {}

  def __call__(self, *args):
    leaves, tree = jax.tree.flatten(args)
    shapes = (tree, tuple((jnp.shape(x), x.dtype) for x in leaves))
    if shapes not in self._compiled:
      start = time.perf_counter()
      self._compiled[shapes] = self._jit.lower(*args).compile()
      Program.compile_seconds += time.perf_counter() - start
      Program.made += 1
    return self._compiled[shapes](*args)


@functools.lru_cache(maxsize=64)
def _program(job: Job, name: str, mesh: Mesh | None, static: tuple[int, int] = (0, 1)) -> Program:
  """The compiled form of one of the functions above; `static` is (first, count) of the phase."""
  data, whole = PartitionSpec('data'), PartitionSpec()
  step = lambda i: Step(static[0] if static[1] == 1 else i, static[0])

  def propose(params, ctx, state, i):
    cands = job.algo.ask(job.gen, params['generator'], ctx, state, step(i))
    out = in_chunks(
      job,
      lambda shown: show(job, params, ctx, shown, step(i)),
      staged(cands),
    )
    return cands._replace(stage=staged(cands)[1]), out

  def conclude(params, ctx, state, cands, scores, i):
    return settle(job, params, ctx, state, cands, scores, step(i))

  function, specs = {
    'fused': (functools.partial(fused, job), (whole, data, data, whole, data)),
    'encode': (functools.partial(encode, job), (whole, data)),
    'begin': (
      lambda p, c, i, r, t: begin(job, p, c, core.prompt_keys(r, i), t),
      (whole, data, data, whole, data),
    ),
    'advance': (
      lambda p, c, v, s, i: advance(job, p, c, v, s, step(i)),
      (whole, data, data, data, whole),
    ),
    'propose': (propose, (whole, data, data, whole)),
    'conclude': (conclude, (whole, data, data, data, data, whole)),
    'resting': (functools.partial(resting, job), (data,)),
    'finish': (functools.partial(finish, job), (whole, data, data)),
  }[name]
  if mesh is not None:
    function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=data, check_vma=False)
  return Program(function)


def stepped(job: Job, params, prompts, ids, root, initial, mesh=None, on_step=None):
  """The same search as a Python loop: for host verifiers, live progress, and models that fill the
  device. Prompts that need no further step leave the batch, which shrinks by halves (not on a
  mesh); when none is left the loop ends."""

  def call(name, *args, static=(0, 1)):
    return _program(job, name, mesh, static)(*args)

  ctx, vctx = call('encode', params, prompts)
  state = call('begin', params, ctx, ids, root, initial)
  may_stop = type(job.algo).done is not Algorithm.done or job.stop < float('inf')
  whole, rows, best = ctx, np.arange(len(ids)), jax.tree.map(np.array, state.best)
  traces = []
  for first, count in job.algo.phases(job.gen):
    for i in range(first, first + count):
      if may_stop:
        best = _put(best, state.best, rows)
        need = np.flatnonzero(~np.asarray(call('resting', state)))
        size = _bucket(len(need), len(rows)) if mesh is None else len(rows)
        if size < len(rows) and len(need):
          keep = np.resize(need, size)  # a row that is there twice is computed twice, no more
          ctx, vctx, state = _rows((ctx, vctx, state), keep)
          rows = rows[keep]
      index, static = np.int32(i), (first, count)
      if may_stop and not len(need):
        trace = _blank(job, params, ctx, state, static)
      elif job.ver.jittable:
        state, trace = call('advance', params, ctx, vctx, state, index, static=static)
      else:
        cands, (images, told) = call('propose', params, ctx, state, index, static=static)
        scores = job.ver.score(params['verifier'], vctx, images, **told)
        scores = {name: np.asarray(value, np.float32) for name, value in scores.items()}
        state, trace = call('conclude', params, ctx, state, cands, scores, index, static=static)
      if len(rows) < len(ids):
        trace = _spread(trace, rows, best)
      traces.append(trace)
      if on_step:
        on_step(i, trace)
  best = _put(best, state.best, rows) if len(rows) < len(ids) else state.best
  return best, call('finish', params, whole, best), tuple(traces)


def _bucket(need: int, size: int) -> int:
  """The smallest of size, size / 2, size / 4, ... (rounded up) that holds `need` rows."""
  while size > 1 and -(-size // 2) >= need:
    size = -(-size // 2)
  return size


def _rows(tree, keep):
  return jax.tree.map(lambda x: x[keep], tree)


def _put(whole, part, rows):
  """`whole` with `part` at `rows`; numpy leaves."""

  def one(a, b):
    a = np.array(a)
    a[rows] = np.asarray(b)
    return a

  return jax.tree.map(one, whole, part)


def _spread(trace: StepTrace, rows, best: Best) -> StepTrace:
  """The trace of the batch of which `trace` holds `rows`; the others rested."""
  size = len(best.total)
  zeros = jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), trace._replace(best=()))
  rest = zeros._replace(
    totals=np.full_like(zeros.totals, -np.inf), parent=np.full_like(zeros.parent, -1)
  )
  seen = best if trace.best.state != () else best._replace(state=())
  return _put(rest._replace(best=seen), trace, rows)


def _blank(job, params, ctx, state, static) -> StepTrace:
  """The trace of a step that no prompt needed."""
  step = Step(static[0], static[0])

  def unlooked(params, ctx, state):  # no verifier, which may be a host's
    cands = job.algo.ask(job.gen, params['generator'], ctx, state, step)
    scores = dict.fromkeys(job.ver.names, jnp.zeros(cands.parent.shape))
    features = jnp.zeros((*cands.parent.shape, 1)) if job.algo.features else ()
    return settle(job, params, ctx, state, cands._replace(features=features), scores, step)[1]

  shapes = jax.eval_shape(unlooked, params, ctx, state)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes._replace(best=()))
  best = state.best if job.trace else state.best._replace(state=())
  return zeros._replace(
    totals=np.full_like(zeros.totals, -np.inf), parent=np.full_like(zeros.parent, -1), best=best
  )


# ---------------------------------------------------------------------------------------------
# search


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
  parts, ran, compiled_before = [], 0.0, Program.compile_seconds
  for low in range(0, len(prompts), size):
    rows = np.minimum(np.arange(low, low + size), len(prompts) - 1)
    local = jax.tree.map(
      lambda x, rows=rows: np.asarray(x)[rows], (arrays, ids.astype(np.uint32), initial)
    )
    if mesh is not None:
      local = jax.device_put(local, jax.sharding.NamedSharding(mesh, PartitionSpec('data')))
    start, before = time.perf_counter(), Program.compile_seconds
    if mode == 'fused':
      out = _program(job, 'fused', mesh)(params, local[0], local[1], key, local[2])
    else:
      out = stepped(job, params, *local[:2], key, local[2], mesh, on_step)
    out = jax.tree.map(np.asarray, out)
    ran += time.perf_counter() - start - (Program.compile_seconds - before)
    count = min(size, len(prompts) - low)
    parts.append(jax.tree.map(lambda x, count=count: x[:count], out))
  best, images, traces = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  seconds = {
    'compile': Program.compile_seconds - compiled_before,
    'run': ran,
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
