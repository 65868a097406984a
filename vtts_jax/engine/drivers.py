"""The two drivers of `step.py`'s step, and the programs that they are compiled to.

`fused` is a whole search as one function; `stepped` a loop over compiled steps. On a mesh each
device has its own prompts (`shard_map`).
Letters: B prompts of a batch, M candidates of a step, N kept.
"""

import functools
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vtts_jax import core
from vtts_jax.core import Algorithm, Best, Step
from vtts_jax.engine.step import (
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


# ------------------------------------------------------------------------------ compiled programs


class Program:
  """A function compiled ahead of time for each shape it meets, with the compile time kept apart
  from the rest."""

  made = 0  # programs compiled by this process; tests count them
  compile_seconds = 0.0  # and how long that took
  _lock = threading.Lock()

  def __init__(self, function: Callable):
    self._jit = jax.jit(function)
    self._compiled = {}

  def __call__(self, *args):
    leaves, tree = jax.tree.flatten(args)
    shapes = (tree, tuple((jnp.shape(x), x.dtype) for x in leaves))
    with Program._lock:
      if shapes not in self._compiled:
        start = time.perf_counter()
        self._compiled[shapes] = self._jit.lower(*args).compile()
        Program.compile_seconds += time.perf_counter() - start
        Program.made += 1
    return self._compiled[shapes](*args)


_PROGRAMS = threading.Lock()  # batches may run side by side, and each program is made once


def program(job: Job, name: str, mesh: Mesh | None, static: tuple[int, int] = (0, 1)) -> Program:
  """The compiled form of one of the functions above; `static` is (first, count) of the phase."""
  with _PROGRAMS:
    return _program(job, name, mesh, static)


@functools.lru_cache(maxsize=64)
def _program(job, name, mesh, static):
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
    return program(job, name, mesh, static)(*args)

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
