"""A run's directory: a function of its config, append-only, safe to kill at any point.

    RUN/config.json            what was asked for, and what ran it
    RUN/results.pNNNNN.jsonl   one line per (arm, seed, prompt), one file per process
    RUN/timing.pNNNNN.jsonl    measured seconds per batch (kept apart: they differ from run to run)
    RUN/images/, RUN/trace/    written before the line that names them

Results are a function of the config alone, so the lines of an interrupted and resumed run equal
those of an uninterrupted one. Paths go through `etils.epath`; lines are appended, so a bucket must
be mounted as a file system.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vtts_jax.errors import ConfigError

UNHASHED = ('workdir',)  # settings that change no result


def config_hash(config: Mapping) -> str:
  """Ten hex digits of the config, without the settings that change no result."""
  kept = {k: v for k, v in config.items() if k not in UNHASHED}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]


def write_atomic(path: epath.Path, data: bytes) -> None:
  """Writes to a temporary name and renames, so that no reader ever sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex[:8]}'
  temporary.write_bytes(data)
  temporary.replace(path)


class Lines:
  """An append-only file of JSON lines; a half line left by a kill is cut off when it is opened."""

  def __init__(self, path: epath.Path):
    self.path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
      data = path.read_bytes()
      whole = data[: data.rfind(b'\n') + 1]
      if len(whole) < len(data):
        write_atomic(path, whole)

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
  """One process's view of a run directory.

  Args:
    workdir: where runs live.
    config: plain nested dictionary; decides the directory's name with its hash.
    environment: versions, devices and revision, kept in config.json.
    process, processes: this process and how many there are.

  Raises:
    ConfigError: the directory holds another config.
  """

  def __init__(self, workdir, config: Mapping, environment: Mapping, process=0, processes=1):
    self.root = epath.Path(workdir) / f'{config["name"]}-{config_hash(config)}'
    self.process, self.processes = process, processes
    file = self.root / 'config.json'
    asked = json.loads(json.dumps({k: v for k, v in config.items() if k not in UNHASHED}))
    if file.exists():
      found = json.loads(file.read_text())
      if found['config'] != asked:
        raise ConfigError(
          f'{self.root} holds the results of another config; choose another workdir'
        )
      self.changed = {
        k: (found['environment'].get(k), v)
        for k, v in environment.items()
        if found['environment'].get(k) != v
      }
    else:
      self.changed = {}
      if process == 0:
        content = {'config': asked, 'environment': dict(environment)}
        write_atomic(file, json.dumps(content, indent=1, sort_keys=True).encode())
    self.results = Lines(self.root / f'results.p{process:05d}.jsonl')
    self.timing = Lines(self.root / f'timing.p{process:05d}.jsonl')
    self.done = {(row['arm'], row['seed'], row['id']) for row in read_results(self.root)}

  def save_image(self, name: str, image: np.ndarray) -> str:
    """Writes `[H, W, 3]` in [0, 1] as lossless WebP under images/; returns the path inside the
    run."""
    buffer = io.BytesIO()
    pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, 'webp', lossless=True, method=0)
    path = f'images/{name}.webp'
    write_atomic(self.root / path, buffer.getvalue())
    return path

  def save_trace(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path = f'trace/{name}.npz'
    write_atomic(self.root / path, buffer.getvalue())
    return path


def read_results(root) -> list[dict[str, Any]]:
  """All results of a run, of every process, in the order (arm, seed, id) of first writing."""
  files = sorted(epath.Path(root).glob('results.p*.jsonl'))
  return [row for file in files for row in read_lines(file)]


def read_timing(root) -> list[dict[str, Any]]:
  files = sorted(epath.Path(root).glob('timing.p*.jsonl'))
  return [row for file in files for row in read_lines(file)]
