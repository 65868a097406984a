"""Sweeps: an arm for each algorithm, verifier and budget, named so that budgets make one curve.

    build_grid({'best-of-n': vary_setting('search.best_of_n', 'n', (64,)),
                'beam': vary_setting('search.beam', 'width', (2, 4), branch=8)},
               {'clip_a': {...}, 'clip_b': {...}})
    -> 'best-of-n clip_a', 'beam/w2 clip_a', 'beam/w4 clip_a', 'best-of-n clip_b', ...

The config of the study gives seeds and prompts. Every arm resumes by itself, see `execute`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vtts_jax.errors import ConfigError
from vtts_jax.study.arms import build_part, holds_all_budgets


class Sweep(NamedTuple):
  """One search at several budgets.

  Attributes:
    component: name of the search.
    setting: the setting that is its budget; it may lie inside another, as in 'inner.width'.
    values: of that setting.
    fixed: its other settings.
  """

  component: str
  setting: str
  values: tuple
  fixed: Mapping[str, Any]


def vary_setting(component: str, setting: str, values: Sequence, **fixed) -> Sweep:
  """One search at several budgets, as `vary_setting('search.beam', 'width', (1, 2), branch=8)`.

  Args:
    component, setting, values, fixed: see `Sweep`.

  Raises:
    ConfigError: no values, or a setting that is given twice.
  """
  if not len(values) or len(set(values)) != len(values):
    raise ConfigError(f'{component}.{setting}={values}: must be one or more different values')
  if setting in fixed:
    raise ConfigError(f'{component}.{setting}: is swept over, so it cannot be fixed as well')
  return Sweep(component, setting, tuple(values), fixed)


def build_grid(
  algorithms: Mapping[str, Sweep], verifiers: Mapping[str, Mapping] | None = None
) -> dict[str, dict]:
  """Arms for `config.arms`: every search at every budget, on every verifier.

  An arm is called 'beam/w4', after the search, the first letter of the setting and its value; the
  name of the verifier follows where there are several. Best-of-N in one step holds its smaller
  budgets, so it is one arm, at the largest, and is called after the search alone.

  Args:
    algorithms: `{name: sweep}`.
    verifiers: `{name: settings}`; None for the verifier of the config.

  Raises:
    ConfigError: a name with a '/', an unknown component or an impossible setting.
  """
  arms = {}
  for label, verifier in (verifiers or {'': None}).items():
    for name, sweep in algorithms.items():
      # the report takes what stands before a '/' for the name of the curve
      if '/' in name or '/' in label:
        raise ConfigError(f"sweep: {name!r}, {label!r}: names must not hold '/'")
      for arm, settings in _arms_of_sweep(name, sweep).items():
        arm = f'{arm} {label}' if verifiers and len(verifiers) > 1 else arm
        arms[arm] = {'search': settings} | ({'verifier': dict(verifier)} if verifier else {})
  return arms


def _arms_of_sweep(name: str, sweep: Sweep) -> dict[str, dict]:
  """`{arm: settings of its search}` of one sweep."""
  base = {'name': sweep.component, **sweep.fixed}
  made = [_set_at_path(base, sweep.setting, value) for value in sweep.values]
  # to run the smaller ones as well would pay twice for the same samples
  if all(holds_all_budgets(build_part(settings, 'search')) for settings in made):
    largest = max(range(len(made)), key=lambda i: sweep.values[i])
    return {name: made[largest]}
  letter = sweep.setting.split('.')[-1][0]
  return {f'{name}/{letter}{value}': own for value, own in zip(sweep.values, made)}


def _set_at_path(settings: Mapping, path: str, value) -> dict:
  """`settings` with `value` at a dotted path."""
  first, _, rest = path.partition('.')
  return {**settings, first: _set_at_path(settings.get(first, {}), rest, value) if rest else value}
