"""Prompt rows from a file, or given in the config.

A row is a mapping with a `text`. A `.jsonl` file has one row per line and may say more: `label` (a
class), `reference` and `image` (files, relative to the prompts file), `include`, `exclude` and
`tag` (GenEval's metadata; github.com/djghosh13/geneval), or anything else. GenEval's own key
`prompt` is read as `text`. A row's own `id` is kept as `file_id`, because random keys are made from
the run's ids. Any other file has one text per line. Both may be gzipped. GenEval's 553 prompts are
shipped as `path='geneval'`.
"""

import gzip
import json
import os
import pathlib

import numpy as np

from vtts_jax.errors import ConfigError

# prompts that need no path, so that a config runs on any machine
SHIPPED = {
  'geneval': pathlib.Path(__file__).parent / 'assets/geneval/evaluation_metadata.jsonl.gz'
}
FILES = ('reference', 'image')  # keys whose values are paths


def prompts(path='', texts=(), count=0) -> list[dict]:
  """Returns prompt rows from a file, or from texts.

  Args:
    path: a file, or 'geneval'.
    texts: prompts given in the config, where there is no `path`.
    count: how many of the first rows are returned; 0 for all.

  Raises:
    ConfigError: both or neither of `path` and `texts` are given, there is no such file, a line is
      no prompt, or there are fewer than `count`.
  """
  if bool(path) == bool(texts):
    raise ConfigError(f'path={path!r}, texts={list(texts)}: give one of the two')
  # texts become rows as well: what follows knows one form only
  rows = _read_rows(SHIPPED.get(path, path)) if path else [{'text': text} for text in texts]
  if not 0 <= count <= len(rows) or not rows:
    raise ConfigError(f'count={count}: must be in 0 (all) .. {len(rows)}, of {path or "texts"}')
  return rows[: count or None]


def read_lines(path) -> list[str]:
  """Reads the lines of a UTF-8 text file; a byte order mark is skipped, `.gz` is unpacked.

  Raises:
    ConfigError: there is no such file, or it has another encoding.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f'path={str(path)!r}: no such file')
  data = path.read_bytes()
  data = gzip.decompress(data) if path.suffix == '.gz' else data
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    # editors of Windows save UTF-16 under the name "Unicode"
    wide = data[:2] in (b'\xff\xfe', b'\xfe\xff')
    found = 'is UTF-16' if wide else f'is not UTF-8 (byte {error.start})'
    raise ConfigError(f'path={str(path)!r}: {found}; save it as UTF-8') from None
  # `splitlines` would also split a prompt at U+2028 and other separators inside it
  lines = text.replace('\r\n', '\n').split('\n')
  return lines if lines[-1] else lines[:-1]


def _read_rows(path):
  path, rows = pathlib.Path(path), []
  # the ending before '.gz' counts
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
  # 'prompt' is GenEval's name; an id of the file's own must not replace the run's
  if 'text' not in row:
    row['text'] = row.pop('prompt')
  if 'id' in row:
    row['file_id'] = row.pop('id')
  # relative to the prompts file, so that a folder of prompts and pictures can be moved
  for key in FILES:
    if isinstance(row.get(key), str):
      row[key] = os.path.join(folder, row[key])
    elif isinstance(row.get(key), list):
      row[key] = [os.path.join(folder, name) for name in row[key]]
  return row


def grade(images, prompts):
  """Grades no picture as right: the metric of prompts for which there is no detector."""
  del prompts
  return np.zeros(len(images), bool)
