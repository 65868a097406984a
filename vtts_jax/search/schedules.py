"""Schedules: after how many stages a search observes and chooses, and steps as phases."""

from vtts_jax.core import Cost, Generator, Phase
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks

SCHEDULES = ('geometric', 'linear', 'fixed')


def schedule_cuts(schedule, size: int, steps: int, start: int, end: int) -> tuple[int, ...]:
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
  checks.check_integer('size', size, 2 if schedule == 'geometric' else 1)
  # the last mark is cut at the end, so that every stage belongs to a step
  marks, at = [], 0
  while not marks or (marks[-1] < end and (not steps or len(marks) < steps)):
    at = {'geometric': size ** len(marks), 'linear': at + size, 'fixed': at + 1}[schedule]
    marks.append(min(start + at, end))
  return tuple(marks)


def setting_per_step(name: str, value, steps: int) -> tuple[int, ...]:
  """A setting for each step: an integer stands for all, a list must have one entry a step."""
  values = value if isinstance(value, tuple) else (value,) * steps
  if len(values) != steps:
    raise ConfigError(
      f'search.{name}={list(values)}: must be an integer or a list of {steps}, one a step'
    )
  for v in values:
    checks.check_integer(name, v, 1)
  return values


def group_steps(gen: Generator, steps, keeps_size) -> tuple[Phase, ...]:
  """Steps as phases: neighbours of one shape are one program.

  Args:
    gen: where its stages are not uniform, every step is a phase of its own, whose numbers are
      static.
    steps: (shape, row) of each step.
    keeps_size: says of a shape whether the frontier is as large after the step as before.
  """
  phases = []
  for shape, row in steps:
    if phases and phases[-1].shape == shape and keeps_size(shape) and gen.uniform_stages:
      phases[-1] = Phase(shape, (*phases[-1].rows, row))
    else:
      phases.append(Phase(shape, (row,)))
  return tuple(phases)


def given_cost(gen: Generator, initial: int) -> Cost:
  """Cost of one candidate that starts from `initial` given tokens."""
  return gen.cost('extend_with_tokens', 0, initial) if initial else Cost()
