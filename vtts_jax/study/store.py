"""A run's directory: a function of its config, append-only, safe to kill at any point.

    RUN/config.json            what was asked for, and what ran it
    RUN/results.pNNNNN.jsonl   one line per (arm, seed, prompt), one file per process
    RUN/timing.pNNNNN.jsonl    measured seconds per batch (kept apart: they differ from run to run)
    RUN/images/                what was found, in a folder of its kind (texts/, videos/ ...)
    RUN/states/                tokens or noise of what was found, see `remake`
    RUN/trace/                 genealogies, see `genealogy`

A result line holds

    arm, seed, id, prompt, tag   which search of which prompt; `tag` is the prompt's category
    found, bad                   whether a score was finite, and how many were not, by name
    searched, scores, stage      what was searched on; scores of the winner and its stages done
    ladder                       whether each point of `curve` is a search of its own (best-of-N)
    curve                        for each budget its cost, `total`, `correct` (0 or 1), `measured`
    samples                      of best-of-N: every sample graded, see `graded_samples`
    image (text ...), state      files of the winner
    grid, trace                  files of the winner at every budget, and its genealogy

The same config gives the same lines, so an interrupted and resumed run ends with those of an
uninterrupted one. Paths go through `etils.epath`. Lines are appended, so a bucket must be mounted
as a file system.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from vtts_jax.core import Best
from vtts_jax.errors import ConfigError
from vtts_jax.media import files

UNHASHED = ('workdir',)  # settings that change no result


def config_hash(config: Mapping) -> str:
  """Ten hex digits of the config, without the settings that change no result."""
  kept = {k: v for k, v in config.items() if k not in UNHASHED}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]


class LineFile:
  """An append-only file of JSON lines; opening it cuts off a half line that a kill has left."""

  def __init__(self, path: epath.Path):
    self.path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    # the next line would be glued to the half one, and both would be lost
    if path.exists():
      data = path.read_bytes()
      whole = data[: data.rfind(b'\n') + 1]
      if len(whole) < len(data):
        files.write_atomic(path, whole)

  def append_lines(self, rows: Iterable[Mapping]) -> None:
    """Appends one line for each row and waits until they are on disk."""
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    with self.path.open('ab') as file:
      file.write(text.encode())
      file.flush()
      # a line says that its prompt is done, so it must outlive the machine, not the process alone;
      # files on a bucket have no number to sync by
      if hasattr(file, 'fileno'):
        os.fsync(file.fileno())


def read_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
  """The whole lines of a file.

  Raises:
    ConfigError: a whole line that is not JSON; the message has its number.
  """
  # a run may be writing while a report is made, so what follows the last newline is left out
  data = path.read_bytes()
  for number, line in enumerate(data[: data.rfind(b'\n') + 1].splitlines(), 1):
    try:
      yield json.loads(line)
    except json.JSONDecodeError as err:
      raise ConfigError(
        f'{path}:{number} is not JSON ({err}); remove the line to redo it'
      ) from None


class Store:
  """One process's view of a run directory. Nothing is written before `open_files`.

  Args:
    workdir: the folder of all runs.
    config: plain nested dictionary; its name and its hash name the directory.
    environment: versions, devices and revision; config.json keeps those of the first session.
    process, processes: the number of this process, and how many there are.

  Attributes:
    root: the directory.
    done: (arm, seed, id) of the lines that are there.
    changed: `{what: (then, now)}`, in what this environment differs from that of the first session.

  Raises:
    ConfigError: the directory holds another config.
  """

  def __init__(self, workdir, config: Mapping, environment: Mapping, process=0, processes=1):
    # the hash is part of the name, so that a changed setting never mixes its results with others
    self.root = epath.Path(workdir) / f'{config["name"]}-{config_hash(config)}'
    self.process, self.processes = process, processes
    # through JSON and back, so that it compares equal to what the file holds (tuples become lists)
    asked = json.loads(json.dumps({k: v for k, v in config.items() if k not in UNHASHED}))
    self._run_info = {'config': asked, 'environment': dict(environment)}
    self.changed: dict[str, tuple] = {}
    if self._config_file.exists():
      found = json.loads(self._config_file.read_text())
      if found['config'] != asked:
        raise ConfigError(
          f'{self.root} holds the results of another config; choose another workdir'
        )
      # other code may give other numbers: the study goes on, and the user is told
      before = found['environment']
      self.changed = {k: (before.get(k), v) for k, v in environment.items() if before.get(k) != v}
    # lines of every process count: the number of processes may have changed since
    self.done = {(row['arm'], row['seed'], row['id']) for row in read_results(self.root)}

  @property
  def _config_file(self) -> epath.Path:
    """Where the directory says what it is."""
    return self.root / 'config.json'

  def open_files(self) -> None:
    """Makes the directory and the line files `results` and `timing` of this process."""
    if self.process == 0 and not self._config_file.exists():
      content = json.dumps(self._run_info, indent=1, sort_keys=True)
      files.write_atomic(self._config_file, content.encode())
    # two processes that append to one file would tear each other's lines
    self.results = LineFile(self.root / f'results.p{self.process:05d}.jsonl')
    self.timing = LineFile(self.root / f'timing.p{self.process:05d}.jsonl')

  def save_output(self, name: str, kind: str, array: np.ndarray) -> str:
    """Writes one output under images/, texts/ ...; returns its path inside the run."""
    path = files.save_output(self.root / f'{kind.rstrip("s")}s' / name, kind, array)
    return str(path.relative_to(self.root))

  def save_state(self, name: str, best: Best, row: int) -> str:
    """Writes state and stage of the best of prompt `row`; returns the path inside the run."""
    state = jax.tree.map(lambda x: x[row], best.state)
    arrays = flatten_state(state) | {'stage': best.stage[row]}
    return self._save_arrays(f'states/{name}.npz', arrays)

  def save_trace(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes the arrays of a genealogy; returns their path inside the run."""
    return self._save_arrays(f'trace/{name}.npz', arrays)

  def _save_arrays(self, path: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes arrays to a path inside the run, whole or not at all; returns the path."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files.write_atomic(self.root / path, buffer.getvalue())
    return path


def flatten_state(state) -> dict[str, np.ndarray]:
  """The leaves of a state by their paths, as in `{'state.tokens': ..}`."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {f'state{jax.tree_util.keystr(path)}': np.asarray(leaf) for path, leaf in leaves}


def read_results(root) -> list[dict[str, Any]]:
  """The result lines of a run, process by process, in the order they were written."""
  paths = sorted(epath.Path(root).glob('results.p*.jsonl'))
  return [row for path in paths for row in read_lines(path)]


def read_timing(root) -> list[dict[str, Any]]:
  """The timing lines of a run, process by process."""
  paths = sorted(epath.Path(root).glob('timing.p*.jsonl'))
  return [row for path in paths for row in read_lines(path)]


def read_run_info(root) -> dict[str, Any]:
  """What was asked for and what ran it: `{'config': .., 'environment': ..}`.

  Raises:
    ConfigError: `root` is no run directory.
  """
  path = epath.Path(root) / 'config.json'
  if not path.exists():
    raise ConfigError(f'{root} is no run directory: it has no config.json')
  return json.loads(path.read_text())
