"""Timing of calls side by side."""

import time

import jax


def fastest(calls, repeats):
  """Least seconds of each call, taken in turn so that a busy machine slows them alike."""
  seconds = [float('inf')] * len(calls)
  for call in calls:
    jax.block_until_ready(call())  # compiles
  for _ in range(repeats):
    for i, call in enumerate(calls):
      begin = time.perf_counter()
      jax.block_until_ready(call())
      seconds[i] = min(seconds[i], time.perf_counter() - begin)
  return seconds
