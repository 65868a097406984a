"""The stepped driver: the same search as a Python loop over compiled steps.

For models that fill the device, host verifiers, live progress, checkpoints and prompts that stop
early. The state is donated from step to step, so that there is one copy of the caches.
Letters: B prompts of a batch, M candidates of a step.
"""

import functools
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.core import Algorithm, SearchState
from vtts_jax.engine import step
from vtts_jax.engine.fused import DATA, WHOLE, over_prompts
from vtts_jax.engine.program import Observed, SearchProgram, StepTrace

# A state keeps one number for the whole batch, the steps done.
STATE = SearchState(step=WHOLE, frontier=DATA, best=DATA, rows=DATA)

# Batches may run side by side (host verifiers); each program must be compiled once all the same.
_DISPATCH = threading.Lock()


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_batch(program: SearchProgram, mesh, params, prompts):
  body = over_prompts(functools.partial(step.encode_prompts, program), mesh, (WHOLE, DATA))
  return body(params, prompts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin_batch(program: SearchProgram, mesh, params, contexts, ids, root, initial):
  def begin(params, contexts, ids, root, initial):
    keys = core.prompt_keys(root, ids)
    return step.begin_search(program, params, contexts, keys, initial)

  specs = (WHOLE, DATA, DATA, WHOLE, DATA)
  return over_prompts(begin, mesh, specs, STATE)(params, contexts, ids, root, initial)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,))
def advance_batch(program: SearchProgram, mesh, shape, fixed, params, contexts, state, row):
  """One step; `fixed` is the row of a phase that has one, and `row` that of the others."""

  def advance(params, contexts, state, row):
    return step.advance_search(program, params, contexts, state, shape, fixed or row)

  body = over_prompts(advance, mesh, (WHOLE, DATA, STATE, WHOLE), (STATE, DATA))
  return body(params, contexts, state, row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def propose_batch(program: SearchProgram, mesh, shape, fixed, params, contexts, state, row):
  """The candidates of a step and what a host verifier needs to see of them."""

  def propose(params, contexts, state, row):
    cands, evals = step.propose(program, params, contexts, state, shape, fixed or row)
    seen = step.observe_and_score(program, params, contexts, cands, shape)
    return cands._replace(stage=step.stages_of(cands)), seen, evals

  body = over_prompts(propose, mesh, (WHOLE, DATA, STATE, WHOLE))
  return body(params, contexts, state, row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,))
def conclude_batch(
  program: SearchProgram, mesh, shape, fixed, params, contexts, state, cands, seen, evals, row
):
  """The rest of the step, once the host has scored."""

  def conclude(params, contexts, state, cands, seen, evals, row):
    return step.update_state(
      program, params, contexts, state, cands, seen, shape, fixed or row, evals
    )

  specs = (WHOLE, DATA, STATE, DATA, DATA, DATA, WHOLE)
  body = over_prompts(conclude, mesh, specs, (STATE, DATA))
  return body(params, contexts, state, cands, seen, evals, row)


@functools.partial(jax.jit, static_argnums=(0, 1))
def resting_batch(program: SearchProgram, mesh, state):
  body = over_prompts(functools.partial(step.resting_prompts, program), mesh, (STATE,))
  return body(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def finish_batch(program: SearchProgram, mesh, params, contexts, best):
  body = over_prompts(functools.partial(step.finish_search, program), mesh, (WHOLE, DATA, DATA))
  return body(params, contexts, best)


def _call(function, *args):
  """Dispatches a compiled function; compiles it once although threads may ask at the same time."""
  with _DISPATCH, warnings.catch_warnings():
    # caches whose shapes change from step to step cannot be written in place
    warnings.filterwarnings('ignore', message='Some donated buffers were not usable')
    return function(*args)


def run_stepped(
  program: SearchProgram, params, prompts, ids, root, initial, mesh=None, on_step=None, saved=None
):
  """The search of one batch: (best, outputs of the best, traces), numpy leaves but the outputs.

  Prompts that need no further step leave the batch, which shrinks by halves (not on a mesh); when
  none is left the loop ends.

  Args:
    on_step: called with (number of the step, `StepTrace`) after each.
    saved: an `engine.checkpoint.SearchCheckpoint` to go on from and to save to, or None.
  """
  # `contexts` shrinks with the batch, `whole` is for the final observation
  contexts = whole = _call(encode_batch, program, mesh, params, prompts)
  state = _call(begin_batch, program, mesh, params, contexts, ids, root, initial)
  state = _distinct_buffers(state._replace(rows=np.arange(len(ids), dtype=np.int32)))
  best, traces = jax.tree.map(np.array, state.best), []
  if saved is not None:
    found = saved.restore(program, params, contexts, state)
    if found is not None:
      state, best, traces = found
      contexts = _take_rows(whole, np.asarray(state.rows))
  may_stop = (
    type(program.algo).finished_prompts is not Algorithm.finished_prompts
    or program.stop < float('inf')
  )
  for number, (shape, fixed, row) in enumerate(_numbered_steps(program)):
    if number < len(traces):  # done before the search was cut off
      continue
    need = None  # which rows need this step; None where all do
    if may_stop:
      state, contexts, best, need = _drop_resting(program, mesh, state, contexts, best)
    args = (program, mesh, shape, fixed, params, contexts)
    if need is not None and not len(need):
      trace = _blank_trace(args, state, row)
    elif program.ver.jittable:
      state, trace = _call(advance_batch, *args, state, row)
    else:
      cands, seen, evals = _call(propose_batch, *args, state, row)
      scores = _score_on_host(program, params, contexts, seen)
      seen = step.with_host_scores(program, seen, scores)
      state, trace = _call(conclude_batch, *args, state, cands, seen, evals, row)
    # copied before the state that it may share memory with is donated to the next step
    trace = jax.tree.map(np.array, trace)
    rows = np.asarray(state.rows)
    if len(rows) < len(ids):  # a trace always has all prompts of the batch
      trace = _spread_trace(trace, rows, best)
    traces.append(trace)
    if saved is not None:
      saved.save(number + 1, state, best, traces)
    if on_step:
      on_step(number, trace)
  best = _put_rows(best, state.best, np.asarray(state.rows))
  return best, _call(finish_batch, program, mesh, params, whole, best), tuple(traces)


def _numbered_steps(program):
  """(shape, the row of a phase that has one or (), the row to feed) of every step."""
  for phase in program.algo.plan(program.gen):
    for row in phase.rows:
      if len(phase.rows) == 1:
        yield phase.shape, row, ()
      else:
        yield phase.shape, (), tuple(_as_array(x) for x in row)


def _as_array(number):
  return np.asarray(number, np.float32 if isinstance(number, float) else None)


def _distinct_buffers(tree):
  """The same tree, in which no array stands twice: a donated state may hold each buffer once."""
  seen = set()

  def one(leaf):
    if id(leaf) in seen:
      return jnp.copy(leaf)
    seen.add(id(leaf))
    return leaf

  return jax.tree.map(one, tree)


def _score_on_host(program, params, contexts, seen: Observed):
  observed = {name: seen.outputs[name] for name in program.ver.needs}
  scores = program.ver.score(params['verifier'], contexts.verifier, observed)
  return {name: np.asarray(value, np.float32) for name, value in scores.items()}


# ------------------------------------------------------------------------- prompts that are at rest


def _drop_resting(program, mesh, state, contexts, best):
  """The batch without the prompts that need no further step, as far as it can be halved; the best
  of the whole batch, and the rows that need the step."""
  rows = np.asarray(state.rows)
  best = _put_rows(best, state.best, rows)
  need = np.flatnonzero(~np.asarray(_call(resting_batch, program, mesh, state)))
  size = _halved(len(need), len(rows)) if mesh is None else len(rows)
  if size < len(rows) and len(need):
    keep = np.resize(need, size)  # a row that is there twice is computed twice, no more
    contexts = _take_rows(contexts, keep)
    state = SearchState(state.step, *_take_rows(tuple(state[1:]), keep))
  return state, contexts, best, need


def _halved(need: int, size: int) -> int:
  """The smallest of size, size / 2, size / 4, ... (rounded up) that holds `need` rows."""
  while size > 1 and -(-size // 2) >= need:
    size = -(-size // 2)
  return size


def _take_rows(tree, keep):
  return jax.tree.map(lambda x: x[keep], tree)


def _put_rows(whole, part, rows):
  """`whole` with `part` at `rows`; numpy leaves."""

  def one(a, b):
    a = np.array(a)
    a[rows] = np.asarray(b)
    return a

  return jax.tree.map(one, whole, part)


def _resting_trace(zeros: StepTrace, best) -> StepTrace:
  """A trace of zeros that says that no prompt was active."""
  return zeros._replace(
    totals=np.full_like(zeros.totals, -np.inf),
    parent=np.full_like(zeros.parent, -1),
    best=best if zeros.best.state != () else best._replace(state=(), shown=()),
  )


def _spread_trace(trace: StepTrace, rows, best) -> StepTrace:
  """The trace of the batch of which `trace` holds `rows`; the others were at rest."""
  size = len(best.total)
  zeros = jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), trace)
  return _put_rows(_resting_trace(zeros, best), trace, rows)


def _blank_trace(args, state, row) -> StepTrace:
  """The trace of a step that no prompt needed; nothing is computed."""
  program, _, shape, fixed, params, contexts = args

  def silent(params, contexts, state, row):
    return step.silent_step(program, params, contexts, state, shape, fixed or row)[1]

  shapes = jax.eval_shape(silent, params, contexts, state, row)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  return _resting_trace(zeros, jax.tree.map(np.array, state.best))
