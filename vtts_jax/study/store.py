"""A run's directory: a function of its config, append-only, safe to kill at any point.

    RUN/config.json            what was asked for, and what ran it
    RUN/results.pNNNNN.jsonl   one line per (arm, seed, prompt), one file per process
    RUN/timing.pNNNNN.jsonl    measured seconds per batch (kept apart: they differ from run to run)
    RUN/images/                what was found, named by its kind (texts/, videos/ ...)
    RUN/states/                tokens or noise of what was found, see `remake`
    RUN/trace/                 genealogies; all files are written before the line that names them

Results are a function of the config alone, so the lines of an interrupted and resumed run equal
those of an uninterrupted one. Paths go through `etils.epath`; lines are appended, so a bucket must
be mounted as a file system.
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


class Lines:
  """An append-only file of JSON lines; a half line left by a kill is cut off when it is opened."""

  def __init__(self, path: epath.Path):
    self.path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
      data = path.read_bytes()
      whole = data[: data.rfind(b'\n') + 1]
      if len(whole) < len(data):
        files.write_atomic(path, whole)

  def append(self, rows: Iterable[Mapping]) -> None:
    """Appends rows and waits until they are on disk."""
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    with self.path.open('ab') as file:
      file.write(text.encode())
      file.flush()
      if hasattr(file, 'fileno'):
        os.fsync(file.fileno())


def read_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
  """Whole lines of a file that may still be written to.

  Raises:
    ConfigError: a whole line that is not JSON, with its number.
  """
  data = path.read_bytes()
  for number, line in enumerate(data[: data.rfind(b'\n') + 1].splitlines(), 1):
    try:
      yield json.loads(line)
    except json.JSONDecodeError as err:
      raise ConfigError(
        f'{path}:{number} is not JSON ({err}); remove the line to redo it'
      ) from None


class Store:
  """One process's view of a run directory. Nothing is written before `begin`.

  Args:
    workdir: where runs live.
    config: plain nested dictionary; decides the directory's name with its hash.
    environment: versions, devices and revision, kept in config.json.
    process, processes: this process and how many there are.

  Attributes:
    root: the directory.
    done: (arm, seed, id) of the lines that are there.
    changed: {what: (then, now)} of an environment that is not that of the first session.

  Raises:
    ConfigError: the directory holds another config.
  """

  def __init__(self, workdir, config: Mapping, environment: Mapping, process=0, processes=1):
    self.root = epath.Path(workdir) / f'{config["name"]}-{config_hash(config)}'
    self.process, self.processes = process, processes
    asked = json.loads(json.dumps({k: v for k, v in config.items() if k not in UNHASHED}))
    self._about = {'config': asked, 'environment': dict(environment)}
    self.changed: dict[str, tuple] = {}
    if self._config_file.exists():
      found = json.loads(self._config_file.read_text())
      if found['config'] != asked:
        raise ConfigError(
          f'{self.root} holds the results of another config; choose another workdir'
        )
      before = found['environment']
      self.changed = {k: (before.get(k), v) for k, v in environment.items() if before.get(k) != v}
    self.done = {(row['arm'], row['seed'], row['id']) for row in read_results(self.root)}

  @property
  def _config_file(self) -> epath.Path:
    return self.root / 'config.json'

  def begin(self) -> None:
    """Makes the directory, so that lines can be appended to `results` and `timing`."""
    if self.process == 0 and not self._config_file.exists():
      content = json.dumps(self._about, indent=1, sort_keys=True)
      files.write_atomic(self._config_file, content.encode())
    self.results = Lines(self.root / f'results.p{self.process:05d}.jsonl')
    self.timing = Lines(self.root / f'timing.p{self.process:05d}.jsonl')

  def save_output(self, name: str, kind: str, array: np.ndarray) -> str:
    """Writes what a candidate shows under images/, texts/ ...; returns the path inside the run."""
    path = files.save_output(self.root / f'{kind.rstrip("s")}s' / name, kind, array)
    return str(path.relative_to(self.root))

  def save_state(self, name: str, best: Best, row: int) -> str:
    """Writes the state of one prompt's best and its stage; returns the path inside the run."""
    state = jax.tree.map(lambda x: x[row], best.state)
    return self._save_arrays(f'states/{name}.npz', flat_state(state) | {'stage': best.stage[row]})

  def save_trace(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
    return self._save_arrays(f'trace/{name}.npz', arrays)

  def _save_arrays(self, path, arrays) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files.write_atomic(self.root / path, buffer.getvalue())
    return path


def flat_state(state) -> dict[str, np.ndarray]:
  """The leaves of a state by their paths, `{'state.tokens': ..}`."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {f'state{jax.tree_util.keystr(path)}': np.asarray(leaf) for path, leaf in leaves}


def read_results(root) -> list[dict[str, Any]]:
  """All results of a run, of every process, in the order (arm, seed, id) of first writing."""
  paths = sorted(epath.Path(root).glob('results.p*.jsonl'))
  return [row for path in paths for row in read_lines(path)]


def read_timing(root) -> list[dict[str, Any]]:
  """All timing lines of a run."""
  paths = sorted(epath.Path(root).glob('timing.p*.jsonl'))
  return [row for path in paths for row in read_lines(path)]


def read_about(root) -> dict[str, Any]:
  """The config of a run and what ran it: `{'config', 'environment'}`.

  Raises:
    ConfigError: it is no run directory.
  """
  path = epath.Path(root) / 'config.json'
  if not path.exists():
    raise ConfigError(f'{root} is no run directory: it has no config.json')
  return json.loads(path.read_text())
