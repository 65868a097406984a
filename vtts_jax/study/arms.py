"""What a study runs, built and checked before anything is compiled: prompts, metric and arms.

An arm is one generator, one verifier and one search: the config with some of its settings replaced.
The verifiers of `config.measure` score what each arm finds. No search sees their scores.

The settings of a config are

    name, workdir                     the run directory is WORKDIR/NAME-HASH, see `store`
    prompts                           a prompt set: its `name` and its settings
    generator, verifier, search       components: their `name` and their settings
    measure                           `{name: verifier}`, what scores the outputs that were found
    metric                            what grades them, see `grading`
    arms                              `{name: settings that differ}`; `{}` for the config as it is
    seeds                             every arm runs over all prompts once for each
    batch, render_chunk, mode, stop   see `engine.search.prepare_search`
    budget                            limits per prompt by the names of `core.Cost`, 0 for none
    mesh                              `{'model': devices that share one copy of the weights}`
    traces                            how many prompts have genealogies and outputs at every budget
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
  """One arm of a study.

  Attributes:
    name: what its result lines are called.
    gen, ver, algo: its generator, verifier and search.
    measured: `((name, verifier), ...)`, the verifiers that measure what the search finds.
    cost: its bill per prompt.
    mode, batch, render_chunk, stop: settings of `engine.search.prepare_search`.
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
  def output_name(self) -> str:
    """Name of the generator's first output, which is graded and saved."""
    return next(iter(self.gen.outputs))

  @property
  def output_kind(self) -> str:
    """Kind of the generator's first output, one of `core.KINDS`."""
    return self.gen.outputs[self.output_name].kind

  @property
  def holds_all_budgets(self) -> bool:
    """Whether one run of its search holds every smaller budget, see `holds_all_budgets`."""
    return holds_all_budgets(self.algo)

  @property
  def measured_in_search(self) -> Ensemble | None:
    """The measuring verifiers that are compiled into the search, or None."""
    return _join_verifiers(m for m in self.measured if self._is_in_search(m[1]))

  @property
  def measured_after(self) -> Ensemble | None:
    """The measuring verifiers that score the collected outputs after the search, or None."""
    return _join_verifiers(m for m in self.measured if not self._is_in_search(m[1]))

  def _is_in_search(self, ver: Verifier) -> bool:
    """Whether a measuring verifier is compiled into the search."""
    if not ver.jittable:
      return False
    # other searches measure only the best of each step, and only the first output is collected
    if not self.holds_all_budgets or not ver.needs <= {self.output_name}:
      return True
    # in the search all N samples would be measured; afterwards only the best of each budget are
    embedder = next((v for _, v in self.measured if v.jittable and 'features' in v.gives), None)
    # one verifier must embed all N samples for the selection rules, so it stays in the search
    return ver == embedder


def _join_verifiers(members) -> Ensemble | None:
  """One verifier of several `(name, verifier)`, or None of none."""
  members = tuple(members)
  return Ensemble(members) if members else None


class Study(NamedTuple):
  """A study whose parts are built and checked.

  Attributes:
    config: the settings, a plain nested dictionary.
    prompts: rows of the prompt set, each with its global 'id'.
    metric: what grades the outputs, see `grading`.
    arms: all arms, in the order of the config.
    mesh: the devices of this process; None where there is one.
  """

  config: Mapping[str, Any]
  prompts: list[dict[str, Any]]
  metric: Any
  arms: list[Arm]
  mesh: Mesh | None = None


def build_study(config: Mapping[str, Any]) -> Study:
  """Builds and checks everything; compiles nothing and loads no weights.

  Args:
    config: the settings of all arms. `config.mesh.model`, where it is given, is the number of
      devices that share one copy of the weights.

  Raises:
    ConfigError: an unknown component or setting, an impossible value, parts that do not fit each
      other, or a search whose bill is above `config.budget`; the message starts with the arm.
  """
  _check_seeds(config['seeds'])
  mesh = None
  if 'mesh' in config or len(jax.local_devices()) > 1:
    mesh = sharding.make_mesh(config.get('mesh', {}).get('model', 1))
  prompts = read_prompts(config['prompts'])
  # the metric reads all prompts now, so that one it cannot read ends the run before it begins
  metric = grading.build_metric(config['metric'], mesh)
  metric.read_prompts(prompts)
  arms = []
  for name, settings in settings_by_arm(config).items():
    try:
      arms.append(_build_arm(name, settings))
      metric.check_output(arms[-1].output_name)
    except ConfigError as err:
      # a config without arms has one, 'main', which its author has never named
      raise ConfigError(f'arm {name}: {err}' if config['arms'] else str(err)) from None
  return Study(config, prompts, metric, arms, mesh)


def _check_seeds(seeds) -> None:
  """Raises `ConfigError` unless all are different and none wraps around to another one."""
  whole = all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**32 for s in seeds)
  if not seeds or not whole or len(set(seeds)) != len(seeds):
    raise ConfigError(f'seeds={list(seeds)}: must be different integers in 0 .. 2**32 - 1')


def _build_arm(name: str, settings: Mapping[str, Any]) -> Arm:
  """An arm whose parts fit each other and whose bill is within the budget."""
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
  # the engine has checked what it compiles; what measures afterwards is checked here
  after = arm.measured_after
  if after is not None:
    after.check()
    # it scores what was collected, which is the first output alone
    unseen = sorted(after.needs - {arm.output_name})
    if unseen:
      raise ConfigError(
        f'measure: {", ".join(after.names)} on the host needs {", ".join(unseen)}; must read '
        f'{arm.output_name} alone'
      )
  cost = sum(engine.bill(algo, gen, ver), Cost())
  engine.check_budget(cost, settings['budget'])
  return dataclasses.replace(arm, cost=cost)


def settings_by_arm(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """All settings of each arm; a config without arms is itself one arm, 'main'."""
  arms = config['arms'] or {'main': {}}
  return {name: override_settings(config, changes) for name, changes in arms.items()}


def override_settings(base: Mapping, changes: Mapping) -> dict:
  """`base` with `changes`; a component with another `name` loses the settings of the old one.

  Raises:
    ConfigError: a setting that `base` does not have.
  """
  out = dict(base)
  for key, value in changes.items():
    if key not in base:
      raise ConfigError(f'arms: unknown setting {key!r}; allowed: {", ".join(base)}')
    # the settings of one component mean nothing to another, so they are not merged
    if not isinstance(value, Mapping) or (key in PARTS and 'name' in value):
      out[key] = value
    else:
      out[key] = {**base[key], **value}
  return out


def build_part(settings: Mapping, part: str):
  """Builds a component from its settings, `name` among them.

  Raises:
    ConfigError: no name, or settings that the component refuses; the message starts with `part`.
  """
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
  """The rows of a prompt set, each with its global 'id'.

  Raises:
    ConfigError: no such prompt set, or settings that it refuses.
  """
  settings = dict(settings)
  name = settings.pop('name')
  try:
    rows = components.find_module(name, 'prompts').prompts(**settings)
  except (TypeError, ValueError) as err:
    raise ConfigError(f'prompts: {err}') from None
  # keys are made of the id, so it is the place in the whole set and not in a batch
  return [{'id': i, **row} for i, row in enumerate(rows)]


def searched_name(ver: Verifier, measured: Sequence[tuple[str, Verifier]]) -> str:
  """Names of the verifiers that are searched on, joined by '+', as `config.measure` calls them."""
  parts = [ver]
  if isinstance(ver, Ensemble):
    # a member of weight 0 comes along to be measured and decides nothing
    parts = [member for name, member in ver.members if dict(ver.weights)[name]]
  known = {member: name for name, member in measured}
  return '+'.join(known.get(part, part.names[0]) for part in parts)


def holds_all_budgets(algo: Algorithm) -> bool:
  """Whether one run holds every smaller budget as its prefix: best-of-N in a single step."""
  return isinstance(algo, BestOfN) and algo.samples_per_step == algo.n
