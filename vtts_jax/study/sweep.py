"""Sweeps: the arms of algorithm x verifier x budget, named so that a family is read as one curve.

    grid({'best-of-n': over('search.best_of_n', 'n', (16, 64)),
          'beam': over('search.beam', 'width', (2, 4), branch=8)},
         {'clip_a': {...}, 'clip_b': {...}})
    -> 'best-of-n clip_a', 'beam/w2 clip_a', 'beam/w4 clip_a', 'best-of-n clip_b', ...

Seeds, prompts and processes are the study's: each arm resumes by itself, see `study.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vtts_jax.errors import ConfigError
from vtts_jax.study import execute as study


class Sweep(NamedTuple):
  """A component, the setting that is its budget with its rising values, and its other settings."""

  component: str
  setting: str
  values: tuple
  fixed: Mapping[str, Any]


def over(component: str, setting: str, values: Sequence, **fixed) -> Sweep:
  """One algorithm at several budgets: `over('search.beam', 'width', (1, 2, 4, 8), branch=8)`. The
  setting may lie inside another: 'inner.width'.

  Raises:
    ConfigError: no values, or a setting that is given twice.
  """
  if not len(values) or len(set(values)) != len(values):
    raise ConfigError(f'{component}.{setting}={values}: must be one or more different values')
  if setting in fixed:
    raise ConfigError(f'{component}.{setting}: is swept over, so it cannot be fixed as well')
  return Sweep(component, setting, tuple(values), fixed)


def grid(
  algorithms: Mapping[str, Sweep], verifiers: Mapping[str, Mapping] | None = None
) -> dict[str, dict]:
  """Arms for `config.arms`: every algorithm at every budget, searched on with every verifier.

  An algorithm that holds its smaller budgets as prefixes (best-of-N) is one arm, at the largest.
  Names are 'beam/w4' (first letter and value of the setting), with the verifier's behind it where
  there are several.

  Raises:
    ConfigError: a name with a '/', an unknown component or an impossible setting.
  """
  arms = {}
  for label, verifier in (verifiers or {'': None}).items():
    for name, sweep in algorithms.items():
      if '/' in name or '/' in label:
        raise ConfigError(f"sweep: {name!r}, {label!r}: names must not hold '/'")
      made = [
        _with({'name': sweep.component, **sweep.fixed}, sweep.setting, v) for v in sweep.values
      ]
      letter = sweep.setting.split('.')[-1][0]
      names = [f'{name}/{letter}{value}' for value in sweep.values]
      ladders = [study.is_ladder(study.build(settings, 'search')) for settings in made]
      if all(ladders):
        most = max(range(len(made)), key=lambda i: sweep.values[i])
        made, names = [made[most]], [name]
      for settings, arm in zip(made, names):
        arm = f'{arm} {label}' if verifiers and len(verifiers) > 1 else arm
        arms[arm] = {'search': settings} | ({'verifier': dict(verifier)} if verifier else {})
  return arms


def _with(settings: Mapping, path: str, value) -> dict:
  """`settings` with `value` at a dotted path."""
  first, _, rest = path.partition('.')
  return {**settings, first: _with(settings.get(first, {}), rest, value) if rest else value}
