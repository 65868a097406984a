"""What a study runs, built and checked before anything is compiled: prompts, metric and arms.

An arm is the base config with some of its settings replaced: a generator, a verifier and a search.
Each arm is measured by the verifiers of `config.measure`, which no search sees.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vtts_jax import components
from vtts_jax.core import Algorithm, Cost, Generator, Verifier
from vtts_jax.engine import search as engine
from vtts_jax.engine import sharding
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.study import grading
from vtts_jax.verifiers.ensemble import Ensemble

PARTS = ('generator', 'verifier', 'search')


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm.

  Attributes:
    name: what its lines are called.
    gen, ver, algo: its parts.
    measured: `((name, verifier), ...)`, the verifiers that measure what it finds.
    cost: its bill per prompt.
    mode, batch, render_chunk, stop: of `engine.search.prepare_search`.
  """

  name: str
  gen: Generator
  ver: Verifier
  algo: Algorithm
  measured: tuple[tuple[str, Verifier], ...]
  cost: Cost
  mode: str = 'fused'
  batch: int = 0
  render_chunk: int = 0
  stop: float = float('inf')

  @property
  def output(self) -> str:
    """Name of the generator's first output, which is graded and saved."""
    return next(iter(self.gen.outputs))

  @property
  def kind(self) -> str:
    """The kind of that output."""
    return self.gen.outputs[self.output].kind

  @property
  def holds_all_budgets(self) -> bool:
    return holds_all_budgets(self.algo)

  @property
  def measured_in_search(self) -> Ensemble | None:
    """The measuring verifiers that are compiled into the search."""
    return _ensemble_of(m for m in self.measured if self._is_in_search(m[1]))

  @property
  def measured_after(self) -> Ensemble | None:
    """The measuring verifiers that score the collected outputs."""
    return _ensemble_of(m for m in self.measured if not self._is_in_search(m[1]))

  def _is_in_search(self, ver: Verifier) -> bool:
    if not ver.jittable:
      return False
    if not self.holds_all_budgets or not ver.needs <= {self.output}:
      return True
    # In a search of best-of-N all N samples are measured. What reads the picture alone is cheaper
    # afterwards, of the few that are best at some budget; but for one that embeds all of them.
    embedder = next((v for _, v in self.measured if v.jittable and 'features' in v.gives), None)
    return ver == embedder


def _ensemble_of(members) -> Ensemble | None:
  members = tuple(members)
  return Ensemble(members, mode='minmax') if members else None


class Study(NamedTuple):
  """A study, built.

  Attributes:
    config: plain nested dictionary.
    prompts: rows of the prompt set, each with its global 'id'; read once.
    metric: what grades, see `grading`.
    arms: all arms.
    mesh: this process's devices, None for a single one.
  """

  config: Mapping[str, Any]
  prompts: list[dict[str, Any]]
  metric: Any
  arms: list[Arm]
  mesh: Mesh | None = None


def build_study(config: Mapping[str, Any]) -> Study:
  """Builds and checks everything; compiles nothing and loads no weights.

  `config.mesh.model`, where there is one, is the number of devices that share a copy of the
  weights.

  Raises:
    ConfigError: an unknown component or setting, an impossible value, parts that do not fit, or a
      search whose bill is above `config.budget`; the message starts with the arm.
  """
  mesh = None
  if 'mesh' in config or len(jax.local_devices()) > 1:
    mesh = sharding.make_mesh(config.get('mesh', {}).get('model', 1))
  prompts = read_prompts(config['prompts'])
  metric = grading.build_metric(config['metric'], mesh)
  metric.read_prompts(prompts)
  arms = []
  for name, settings in settings_by_arm(config).items():
    try:
      arms.append(_build_arm(name, settings))
      metric.check_output(arms[-1].output)
    except ConfigError as err:
      raise ConfigError(f'arm {name}: {err}' if config['arms'] else str(err)) from None
  return Study(config, prompts, metric, arms, mesh)


def _build_arm(name: str, settings: Mapping[str, Any]) -> Arm:
  gen, ver, algo = (build_part(settings[part], part) for part in PARTS)
  measured = tuple(
    (key, build_part(own, f'measure.{key}')) for key, own in settings['measure'].items()
  )
  stop = settings.get('stop')
  for field in ('batch', 'render_chunk'):
    if settings[field] < 0:
      raise ConfigError(f'{field}={settings[field]}: must be >= 0')
  arm = Arm(
    name, gen, ver, algo, measured, Cost(), settings['mode'], settings['batch'],
    settings['render_chunk'], float('inf') if stop is None else float(stop),
  )  # fmt: skip
  engine.validate(algo, gen, ver, arm.mode, arm.measured_in_search)
  after = arm.measured_after
  if after is not None:
    after.check()
    # it scores what was collected, which is the first output alone
    unseen = sorted(after.needs - {arm.output})
    if unseen:
      raise ConfigError(
        f'measure: {", ".join(after.names)} on the host needs {", ".join(unseen)}; must read '
        f'{arm.output} alone'
      )
  cost = sum(engine.bill(algo, gen, ver), Cost())
  engine.check_budget(cost, settings['budget'])
  return dataclasses.replace(arm, cost=cost)


def settings_by_arm(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """All settings of each arm; without arms the config itself is one, 'main'."""
  arms = config['arms'] or {'main': {}}
  return {name: override_settings(config, changes) for name, changes in arms.items()}


def override_settings(base: Mapping, changes: Mapping) -> dict:
  """`base` with nested `changes`; a changed `name` of a component replaces all of its settings."""
  out = dict(base)
  for key, value in changes.items():
    if key not in base:
      raise ConfigError(f'arms: unknown setting {key!r}; allowed: {", ".join(base)}')
    if not isinstance(value, Mapping) or (key in PARTS and 'name' in value):
      out[key] = value
    else:
      out[key] = {**base[key], **value}
  return out


def build_part(settings: Mapping, part: str):
  """A component from its settings, `name` among them; errors start with `part`."""
  settings = dict(settings)
  if 'name' not in settings:
    allowed = ', '.join(components.list_components())
    raise ConfigError(f'{part}.name: missing; allowed: {allowed}')
  name = settings.pop('name')
  try:
    return components.load(name, **settings)
  except ConfigError as err:
    raise ConfigError(f'{part}: {err}') from None


def read_prompts(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The rows of a prompt set, each with its global 'id'."""
  settings = dict(settings)
  name = settings.pop('name')
  try:
    rows = components.find_module(name, 'prompts').prompts(**settings)
  except (TypeError, ValueError) as err:
    raise ConfigError(f'prompts: {err}') from None
  return [{'id': i, **row} for i, row in enumerate(rows)]


def searched_name(ver: Verifier, measured: Sequence[tuple[str, Verifier]]) -> str:
  """What is searched on, joined by '+', by the names that it has among the measured verifiers."""
  parts = [ver]
  if isinstance(ver, Ensemble):
    parts = [member for name, member in ver.members if dict(ver.weights)[name]]
  known = {member: name for name, member in measured}
  return '+'.join(known.get(part, part.names[0]) for part in parts)


def holds_all_budgets(algo: Algorithm) -> bool:
  """Whether one run holds every smaller budget as its prefix: best-of-N in a single step."""
  return isinstance(algo, BestOfN) and algo.samples_per_step == algo.n
