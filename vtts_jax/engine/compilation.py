"""What JAX compiled in this process and how long that took, by JAX's own monitoring events."""

import collections
import functools

import jax

EVENTS = (  # tracing (outermost only), lowering, XLA; a program from the cache on disk counts too
  '/jax/core/compile/jaxpr_trace_duration',
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',
)


class CompileLog:
  """What was compiled since the process began to watch.

  Attributes:
    seconds: spent on tracing, lowering and compiling.
    programs: how often each function was compiled, by its name.
  """

  def __init__(self):
    self.seconds = 0.0
    self.programs: collections.Counter[str] = collections.Counter()

  def record(self, event: str, duration: float, **context) -> None:
    if event in EVENTS:
      self.seconds += duration
    if event == EVENTS[-1]:
      self.programs[str(context.get('fun_name', '')).removeprefix('jit_')] += 1


@functools.cache
def compile_log() -> CompileLog:
  """The log of this process; the first call begins to watch."""
  log = CompileLog()
  jax.monitoring.register_event_duration_secs_listener(log.record)
  return log
