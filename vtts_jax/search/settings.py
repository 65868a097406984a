"""What the algorithms share: checks of settings, token schedules, candidates that start from given
tokens."""

import jax.numpy as jnp

from vtts_jax.core import ConfigError, Cost

SCHEDULES = ('geometric', 'linear', 'fixed')


def integer(name: str, value, low: int, high: int | None = None) -> None:
  """Raises `ConfigError` unless `search.<name>` is an integer in `low .. high`."""
  wanted = f'an integer >= {low}' if high is None else f'an integer in {low} .. {high}'
  if (
    not isinstance(value, int)
    or isinstance(value, bool)
    or value < low
    or (high is not None and value > high)
  ):
    raise ConfigError(f'search.{name}={value!r}: must be {wanted}')


def number(name: str, value, low: float, high: float | None = None) -> None:
  """Raises `ConfigError` unless `search.<name>` is a finite number in `low .. high`."""
  real = isinstance(value, int | float) and not isinstance(value, bool)
  if not real or not low <= value < float('inf') or (high is not None and value > high):
    wanted = f'a number >= {low}' if high is None else f'a number in [{low}, {high}]'
    raise ConfigError(f'search.{name}={value!r}: must be {wanted}')


def numbers(value):
  """A list of integers given as text, '4,8,32', as a tuple; anything else as it is."""
  if isinstance(value, str) and ',' in value and value.replace(',', '').isdigit():
    return tuple(int(v) for v in value.split(','))
  return value


def flag(name: str, value) -> None:
  if not isinstance(value, bool):
    raise ConfigError(f'search.{name}={value!r}: must be True or False')


def one_of(name: str, value, allowed) -> None:
  if value not in allowed:
    raise ConfigError(f'search.{name}={value!r}: must be one of {", ".join(map(repr, allowed))}')


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
  integer('size', size, 2 if schedule == 'geometric' else 1)
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
    integer(name, v, 1)
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
