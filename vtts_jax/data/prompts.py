"""Prompt rows from a file, or given in the config.

A row is a mapping with a `text`. A `.jsonl` file has one in each line and keeps whatever else it
says: `label` (a class), `reference` and `image` (files, relative to the prompts file), `include`,
`exclude` and `tag` (GenEval's metadata; github.com/djghosh13/geneval), ...; GenEval's own key
`prompt` is read as `text`. A row's own `id` is kept as `file_id`: keys are made from the run's. Any
other file has a text in each line; either may be gzipped. GenEval's 553 prompts are here:
`path='geneval'`.
"""

import gzip
import json
import os
import pathlib

import numpy as np

from vtts_jax.errors import ConfigError

SHIPPED = {
  'geneval': pathlib.Path(__file__).parent / 'assets/geneval/evaluation_metadata.jsonl.gz'
}
FILES = ('reference', 'image')  # keys whose values are paths


def prompts(path='', texts=(), count=0) -> list[dict]:
  """The first `count` (0: all) rows of the file `path` (or 'geneval'), or of `texts` without it.

  Raises:
    ConfigError: both or none of the two, no such file, a line that is no prompt, too few of them.
  """
  if bool(path) == bool(texts):
    raise ConfigError(f'path={path!r}, texts={list(texts)}: give one of the two')
  rows = _read_rows(SHIPPED.get(path, path)) if path else [{'text': text} for text in texts]
  if not 0 <= count <= len(rows) or not rows:
    raise ConfigError(f'count={count}: must be in 0 (all) .. {len(rows)}, of {path or "texts"}')
  return rows[: count or None]


def read_lines(path) -> list[str]:
  """The lines of a UTF-8 text file, which end at \\n or \\r\\n only; a byte order mark is skipped,
  and `.gz` unpacked.

  Raises:
    ConfigError: no such file, or another encoding.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f'path={str(path)!r}: no such file')
  data = path.read_bytes()
  data = gzip.decompress(data) if path.suffix == '.gz' else data
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    wide = data[:2] in (b'\xff\xfe', b'\xfe\xff')
    found = 'is UTF-16' if wide else f'is not UTF-8 (byte {error.start})'
    raise ConfigError(f'path={str(path)!r}: {found}; save it as UTF-8') from None
  lines = text.replace('\r\n', '\n').split('\n')
  return lines if lines[-1] else lines[:-1]


def _read_rows(path):
  path, rows = pathlib.Path(path), []
  is_jsonl = pathlib.Path(path.stem if path.suffix == '.gz' else path).suffix == '.jsonl'
  if not path.is_file():
    raise ConfigError(
      f'path={str(path)!r}: no such file; {", ".join(SHIPPED)} is here without one'
    )
  for number, line in enumerate(read_lines(path), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line) if is_jsonl else {'text': line.strip()}
    except json.JSONDecodeError as error:
      raise ConfigError(f'path={str(path)!r}, line {number}: {error}') from None
    if not isinstance(row, dict) or not isinstance(row.get('text', row.get('prompt')), str):
      raise ConfigError(f"path={str(path)!r}, line {number}: must be an object with a 'text'")
    rows.append(_as_row(row, path.parent))
  return rows


def _as_row(row, folder):
  row = dict(row)
  if 'text' not in row:
    row['text'] = row.pop('prompt')
  if 'id' in row:
    row['file_id'] = row.pop('id')
  for key in FILES:
    if isinstance(row.get(key), str):
      row[key] = os.path.join(folder, row[key])
    elif isinstance(row.get(key), list):
      row[key] = [os.path.join(folder, name) for name in row[key]]
  return row


def grade(images, prompts):
  """As a metric this grades nothing, for prompts without a detector: no picture is right."""
  del prompts
  return np.zeros(len(images), bool)
