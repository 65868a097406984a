"""Checks of an algorithm's settings: each raises one `ConfigError` that names the setting."""

import dataclasses
from collections.abc import Mapping

from vtts_jax.errors import ConfigError


def check_integer(name: str, value, low: int, high: int | None = None) -> None:
  """Raises `ConfigError` unless `search.<name>` is an integer in `low .. high`."""
  wanted = f'an integer >= {low}' if high is None else f'an integer in {low} .. {high}'
  if (
    not isinstance(value, int)
    or isinstance(value, bool)
    or value < low
    or (high is not None and value > high)
  ):
    raise ConfigError(f'search.{name}={value!r}: must be {wanted}')


def check_number(name: str, value, low: float, high: float | None = None) -> None:
  """Raises `ConfigError` unless `search.<name>` is a finite number in `low .. high`."""
  real = isinstance(value, int | float) and not isinstance(value, bool)
  if not real or not low <= value < float('inf') or (high is not None and value > high):
    wanted = f'a number >= {low}' if high is None else f'a number in [{low}, {high}]'
    raise ConfigError(f'search.{name}={value!r}: must be {wanted}')


def parse_integers(value):
  """A list of integers given as text, '4,8,32', as a tuple; anything else as it is."""
  if isinstance(value, str) and ',' in value and value.replace(',', '').isdigit():
    return tuple(int(v) for v in value.split(','))
  return value


def check_flag(name: str, value) -> None:
  """Raises `ConfigError` unless `search.<name>` is True or False."""
  if not isinstance(value, bool):
    raise ConfigError(f'search.{name}={value!r}: must be True or False')


def check_choice(name: str, value, allowed) -> None:
  """Raises `ConfigError` unless `search.<name>` is one of `allowed`."""
  if value not in allowed:
    raise ConfigError(f'search.{name}={value!r}: must be one of {", ".join(map(repr, allowed))}')


def build_preset(kind: type, presets: Mapping[str, Mapping], preset: str, settings: Mapping):
  """An algorithm of class `kind` from settings that replace those of a named preset ('': none).

  Raises:
    ConfigError: an unknown preset or setting, or a value that the algorithm refuses.
  """
  if preset:
    check_choice('preset', preset, presets)
    settings = {**presets[preset], **settings}
  known = [field.name for field in dataclasses.fields(kind)]
  for name, value in settings.items():
    if name not in known:
      where = kind.__module__.removeprefix('vtts_jax.')
      raise ConfigError(
        f'{where}: unknown setting {name}={value!r}; allowed: preset, {", ".join(known)}'
      )
  # a setting must be hashable, and a config's lists are not
  frozen = lambda value: tuple(value) if isinstance(value, list) else value
  return kind(**{name: frozen(value) for name, value in settings.items()})
