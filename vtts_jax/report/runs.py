"""Several run directories read as one.

Arms of one name are one arm if their generator, verifier and search have equal settings, and their
lines are joined. If not, each is called after its run, as in 'beam/w4 @scenes-study'. A line that
two runs hold must say the same in both.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from vtts_jax.errors import ConfigError
from vtts_jax.media.files import OUTPUT_ENDINGS
from vtts_jax.study.arms import PARTS, settings_by_arm
from vtts_jax.study.store import read_results, read_run_info, read_timing

# a line's files have other names in every run, and say nothing that the line does not
PATH_KEYS = ('root', 'grid', 'trace', 'state', *OUTPUT_ENDINGS)


class Runs(NamedTuple):
  """What a report is made of.

  Attributes:
    names: names of the run directories.
    infos: `store.read_run_info` of each.
    rows: result lines of all runs. Lines of one `arm` have equal settings; `root` is the directory
      that a line comes from.
    timing: timing lines of all runs, with the same names of arms.
    settings: `{arm: its generator, verifier and search}`.
  """

  names: list[str]
  infos: list[dict[str, Any]]
  rows: list[dict[str, Any]]
  timing: list[dict[str, Any]]
  settings: dict[str, dict[str, Any]]


def read_runs(roots: Sequence) -> Runs:
  """Reads run directories and joins their lines.

  Raises:
    ConfigError: a directory that is given twice or has no config.json or no results; runs with
      different metrics, or with different prompts under one id; two runs that disagree on a line.
  """
  paths = [epath.Path(root) for root in roots]
  # a directory given twice would seem to have twice the compute
  for i, path in enumerate(paths):
    if path in paths[:i]:
      raise ConfigError(f'{path} is given twice')
  infos = [read_run_info(path) for path in paths]
  metrics = [json.dumps(info['config']['metric']) for info in infos]
  if len(set(metrics)) > 1:
    raise ConfigError(f'metrics {", ".join(metrics)} differ: only runs with one metric merge')
  asked = [part_settings(info['config']) for info in infos]
  renamed = _names_by_run(paths, infos, asked)
  found: dict[tuple, dict] = {}
  prompts: dict[int, dict] = {}
  timing = []
  for path, names in zip(paths, renamed):
    rows = read_results(path)
    if not rows:
      raise ConfigError(f'{path} holds no results yet')
    for row in rows:
      row = {**row, 'arm': names[row['arm']], 'root': path}
      # the report pairs lines by the prompt's id, which must mean the same prompt everywhere
      first = prompts.setdefault(row['id'], row)
      if (first['prompt'], first['tag']) != (row['prompt'], row['tag']):
        raise ConfigError(
          f'prompt {row["id"]} is {first["prompt"]!r} in {first["root"]} and {row["prompt"]!r} in '
          f'{path}: only runs over one prompt set merge'
        )
      key = (row['arm'], row['seed'], row['id'])
      found[key] = _join_lines(found[key], row) if key in found else row
    timing += [{**t, 'arm': names[t['arm']]} for t in read_timing(path)]
  # lines of several processes lie mixed; the page must not depend on how many there were
  order = {name: i for i, name in enumerate(dict.fromkeys(k[0] for k in found))}
  rows = sorted(found.values(), key=lambda r: (order[r['arm']], r['seed'], r['id']))
  rows = align_curves(rows)
  settings = {
    names[arm]: parts for names, arms in zip(renamed, asked) for arm, parts in arms.items()
  }
  return Runs([p.name for p in paths], infos, rows, timing, settings)


def align_curves(rows: list[dict]) -> list[dict]:
  """Lines whose curves have the budgets that all lines of their arm have. Where prompts move on at
  their own pace, one batch finds its first sample some steps before another; all end together."""
  common: dict[str, int] = {}
  for row in rows:
    common[row['arm']] = min(common.get(row['arm'], len(row['curve'])), len(row['curve']))
  return [
    row | {name: row[name][-common[row['arm']] :] for name in ('curve', 'grid') if name in row}
    for row in rows
  ]


def part_settings(config) -> dict[str, dict[str, Any]]:
  """`{arm: its generator, verifier and search}`, as a config asks for them."""
  arms = settings_by_arm(config)
  return {name: {part: own[part] for part in PARTS} for name, own in arms.items()}


def _names_by_run(paths, infos, asked) -> list[dict[str, str]]:
  """For each run, `{arm: what the report calls it}`."""
  # the shortest label that tells the runs apart: the config's name, the directory's, its path
  labels = [info['config']['name'] for info in infos]
  if len(set(labels)) < len(labels):
    labels = [path.name for path in paths]
  if len(set(labels)) < len(labels):
    labels = [str(path) for path in paths]
  out = []
  for label, arms in zip(labels, asked):
    unique = {arm for arm in arms if all(other.get(arm, arms[arm]) == arms[arm] for other in asked)}
    out.append({arm: arm if arm in unique else f'{arm} @{label}' for arm in arms})
  return out


def _join_lines(one, other) -> dict:
  """One of two lines that say the same: the one with graded samples, if only one has them.

  Raises:
    ConfigError: the lines do not say the same.
  """
  ignored = (*PATH_KEYS, 'samples')
  kept = [{k: v for k, v in row.items() if k not in ignored} for row in (one, other)]
  # a run of before samples were graded may be joined with one of after
  both = 'samples' in one and 'samples' in other
  if not _say_the_same(*kept) or (both and not _say_the_same(one['samples'], other['samples'])):
    raise ConfigError(
      f'arm {one["arm"]!r}, seed {one["seed"]}, prompt {one["id"]}: {one["root"]} and '
      f'{other["root"]} hold different results; leave one of the runs out'
    )
  return other if 'samples' in other and 'samples' not in one else one


def _say_the_same(one, other) -> bool:
  """Whether two values are equal; numbers may differ as much as devices round differently."""
  if isinstance(one, dict) and isinstance(other, dict):
    return one.keys() == other.keys() and all(_say_the_same(one[k], other[k]) for k in one)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_say_the_same, one, other))
  if isinstance(one, float) and isinstance(other, int | float):
    return bool(np.isclose(one, other, rtol=1e-4, atol=1e-5))
  return one == other
