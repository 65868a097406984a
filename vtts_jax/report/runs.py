"""Several run directories read as one: arms joined by their seeds, or told apart.

Arms of one name are one arm where generator, verifier and search have equal settings; else each is
called after its run ('beam/w4 @scenes-study'). A line that two runs hold must say the same in both.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from vtts_jax.errors import ConfigError
from vtts_jax.media.files import OUTPUT_ENDINGS
from vtts_jax.study.arms import PARTS, settings_by_arm
from vtts_jax.study.store import read_about, read_results, read_timing

# where a line's files are: no part of what it says
PLACES = ('root', 'grid', 'trace', 'state', *OUTPUT_ENDINGS)


class Runs(NamedTuple):
  """What a report is made of.

  Attributes:
    names: of the runs' directories.
    about: each run's config.json.
    rows: result lines; `arm` is unique by settings, `root` is the run's directory.
    timing: timing lines, arms named alike.
    settings: arm to its generator, verifier and search.
  """

  names: list[str]
  about: list[dict[str, Any]]
  rows: list[dict[str, Any]]
  timing: list[dict[str, Any]]
  settings: dict[str, dict[str, Any]]


def read_runs(roots: Sequence) -> Runs:
  """Reads and joins run directories.

  Raises:
    ConfigError: a directory given twice, without config.json or without results; runs with
      different metrics or with different prompts under one id; two runs that disagree on a line.
  """
  paths = [epath.Path(root) for root in roots]
  for i, path in enumerate(paths):
    if path in paths[:i]:
      raise ConfigError(f'{path} is given twice')
  about = [read_about(path) for path in paths]
  metrics = [json.dumps(a['config']['metric']) for a in about]
  if len(set(metrics)) > 1:
    raise ConfigError(f'metrics {", ".join(metrics)} differ: only runs with one metric merge')
  asked = [part_settings(a['config']) for a in about]
  renamed = _names_by_run(paths, about, asked)
  found: dict[tuple, dict] = {}
  prompts: dict[int, dict] = {}
  timing = []
  for path, names in zip(paths, renamed):
    rows = read_results(path)
    if not rows:
      raise ConfigError(f'{path} holds no results yet')
    for row in rows:
      row = {**row, 'arm': names[row['arm']], 'root': path}
      first = prompts.setdefault(row['id'], row)
      if (first['prompt'], first['tag']) != (row['prompt'], row['tag']):
        raise ConfigError(
          f'prompt {row["id"]} is {first["prompt"]!r} in {first["root"]} and {row["prompt"]!r} in '
          f'{path}: only runs over one prompt set merge'
        )
      key = (row['arm'], row['seed'], row['id'])
      found[key] = _join_lines(found[key], row) if key in found else row
    timing += [{**t, 'arm': names[t['arm']]} for t in read_timing(path)]
  order = {name: i for i, name in enumerate(dict.fromkeys(k[0] for k in found))}
  rows = sorted(found.values(), key=lambda r: (order[r['arm']], r['seed'], r['id']))
  settings = {
    names[arm]: parts for names, arms in zip(renamed, asked) for arm, parts in arms.items()
  }
  return Runs([p.name for p in paths], about, rows, timing, settings)


def part_settings(config) -> dict[str, dict[str, Any]]:
  """Arm to its generator, verifier and search, as the config asks for them."""
  arms = settings_by_arm(config)
  return {name: {part: own[part] for part in PARTS} for name, own in arms.items()}


def _names_by_run(paths, about, asked) -> list[dict[str, str]]:
  """For each run, arm to what it is called here."""
  labels = [a['config']['name'] for a in about]
  if len(set(labels)) < len(labels):
    labels = [path.name for path in paths]
  if len(set(labels)) < len(labels):
    labels = [str(path) for path in paths]
  out = []
  for label, arms in zip(labels, asked):
    same = lambda arm, arms=arms: all(a[arm] == arms[arm] for a in asked if arm in a)
    out.append({arm: arm if same(arm) else f'{arm} @{label}' for arm in arms})
  return out


def _join_lines(one, other) -> dict:
  """One of two lines that say the same; where only one has graded samples, that one."""
  said = [{k: v for k, v in row.items() if k not in (*PLACES, 'samples')} for row in (one, other)]
  both = 'samples' in one and 'samples' in other
  if not _say_the_same(*said) or (both and not _say_the_same(one['samples'], other['samples'])):
    raise ConfigError(
      f'arm {one["arm"]!r}, seed {one["seed"]}, prompt {one["id"]}: {one["root"]} and '
      f'{other["root"]} hold different results; leave one of the runs out'
    )
  return other if 'samples' in other and 'samples' not in one else one


def _say_the_same(one, other) -> bool:
  """Equal, numbers up to what another device rounds differently."""
  if isinstance(one, dict) and isinstance(other, dict):
    return one.keys() == other.keys() and all(_say_the_same(one[k], other[k]) for k in one)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_say_the_same, one, other))
  if isinstance(one, float) and isinstance(other, int | float):
    return bool(np.isclose(one, other, rtol=1e-4, atol=1e-5))
  return one == other
