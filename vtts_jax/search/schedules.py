"""Token schedules: after how many stages a search looks."""

import jax.numpy as jnp

from vtts_jax.core import Cost
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks

SCHEDULES = ('geometric', 'linear', 'fixed')


def cuts(schedule, size: int, steps: int, start: int, end: int) -> tuple[int, ...]:
  """Stages done after each step, from `start` (not included) to at most `end`.

  Args:
    schedule: 'geometric' adds up to 1, size, size ** 2, ...; 'linear' size, 2 * size, ...; 'fixed'
      one stage a step; or the increasing cumulative counts themselves (counted from stage 0, given
      stages included).
    size: base of 'geometric' (at least 2), stages a step of 'linear'.
    steps: at most so many steps; 0 for as many as it takes.
    start: stages given, `end`: stages of a complete sample.

  Raises:
    ConfigError: a list that does not increase or leaves `start + 1 .. end`.
  """
  if not isinstance(schedule, str):
    marks = tuple(schedule)
    if (
      not marks
      or any(not isinstance(m, int) for m in marks)
      or any(b <= a for a, b in zip((start, *marks), marks))
      or marks[-1] > end
    ):
      raise ConfigError(
        f'search.schedule={list(marks)}: must be increasing integers in {start + 1} .. {end}'
      )
    return marks[:steps] if steps else marks
  checks.integer('size', size, 2 if schedule == 'geometric' else 1)
  marks, at = [], 0
  while not marks or (marks[-1] < end and (not steps or len(marks) < steps)):
    at = {'geometric': size ** len(marks), 'linear': at + size, 'fixed': at + 1}[schedule]
    marks.append(min(start + at, end))
  return tuple(marks)


def per_step(name: str, value, steps: int) -> tuple[int, ...]:
  """A setting for each step: an integer stands for all, a list must have one entry a step."""
  values = value if isinstance(value, tuple) else (value,) * steps
  if len(values) != steps:
    raise ConfigError(
      f'search.{name}={list(values)}: must be an integer or a list of {steps}, one a step'
    )
  for v in values:
    checks.integer(name, v, 1)
  return values


def start(gen, params, ctx, keys, initial):
  """Empty candidates for keys `[B, N]`, continued by the initial tokens `[B, t]` where there are
  any."""
  state = gen.init(params, ctx, keys)
  if initial.shape[1]:
    tokens = jnp.broadcast_to(initial[:, None], (*keys.shape, initial.shape[1]))
    state = gen.force(params, ctx, state, tokens)
  return state


def start_cost(gen, initial: int) -> Cost:
  """Cost of `start` for one candidate."""
  return gen.cost('force', 0, initial) if initial else Cost()
