"""The fused driver: a whole search as one compiled program.

On a mesh each group of devices along 'data' has its own prompts (`shard_map`, no communication);
'model' stays automatic, so that weights keep the shardings they were placed with.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vtts_jax import core
from vtts_jax.engine.program import SearchProgram
from vtts_jax.engine.step import advance_search, begin_search, encode_prompts, finish_search

WHOLE, DATA = PartitionSpec(), PartitionSpec('data')


def over_prompts(function, mesh: Mesh | None, in_specs, out_specs=DATA):
  """`function` with its prompts split over the mesh's 'data' axis."""
  if mesh is None:
    return function
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={'data'},
    check_vma=False,
  )


def run_phases(program: SearchProgram, params, contexts, state):
  """All steps: the state after them and the trace of each. A phase of many rows is a scan."""
  traces = []
  for phase in program.algo.plan(program.gen):
    if len(phase.rows) == 1:
      state, trace = advance_search(program, params, contexts, state, phase.shape, phase.rows[0])
      traces.append(trace)
    else:
      rows = tuple(jnp.asarray(column) for column in zip(*phase.rows))

      def step_once(state, row, shape=phase.shape):
        return advance_search(program, params, contexts, state, shape, row)

      state, stacked = jax.lax.scan(step_once, state, rows)
      traces += [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(phase.rows))]
  return state, tuple(traces)


def fused_search(program: SearchProgram, params, prompts, ids, root, initial):
  """(best, outputs of the best, traces) of prompts with global ids `[B]` under the root key."""
  contexts = encode_prompts(program, params, prompts)
  state = begin_search(program, params, contexts, core.prompt_keys(root, ids), initial)
  state, traces = run_phases(program, params, contexts, state)
  return state.best, finish_search(program, params, contexts, state.best), traces


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_fused(program: SearchProgram, mesh: Mesh | None, params, prompts, ids, root, initial):
  """`fused_search` compiled, on a mesh or without."""
  specs = (WHOLE, DATA, DATA, WHOLE, DATA)
  body = over_prompts(functools.partial(fused_search, program), mesh, specs)
  return body(params, prompts, ids, root, initial)
