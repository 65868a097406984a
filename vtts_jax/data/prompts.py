"""Prompts from a file, or given in the config; with GenEval's metadata where the file has it.

A `.jsonl` file has an object with a `prompt` in each line and keeps whatever else it says (GenEval:
`tag`, `include`, `exclude`; github.com/djghosh13/geneval); any other file has a prompt in each
line.
"""

import json
import pathlib

import numpy as np


def prompts(path='', texts=(), count=0) -> list[dict]:
  """The first `count` (0: all) prompts of the file `path`, or of `texts` without one.

  Raises:
    ValueError: both or none of the two, no such file, a line that is no prompt, too few of them.
  """
  if bool(path) == bool(texts):
    raise ValueError(f'path={path!r}, texts={list(texts)}: give one of the two')
  if path and not pathlib.Path(path).is_file():
    raise ValueError(f'path={path!r}: no such file')
  found = _read(pathlib.Path(path)) if path else [{'prompt': text} for text in texts]
  if not 0 <= count <= len(found) or not found:
    raise ValueError(f'count={count}: must be in 0 (all) .. {len(found)}, of {path or "texts"}')
  return found[: count or None]


def _read(path):
  found = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line) if path.suffix == '.jsonl' else {'prompt': line.strip()}
    except json.JSONDecodeError as error:
      raise ValueError(f'path={str(path)!r}, line {number}: {error}') from None
    if not isinstance(entry, dict) or not isinstance(entry.get('prompt'), str):
      raise ValueError(f"path={str(path)!r}, line {number}: an object with a 'prompt' is wanted")
    found.append(entry)
  return found


def score(images, metadata):
  """As a `metric` this grades nothing, for prompts without a detector: no picture is right."""
  del metadata
  return np.zeros(len(images), bool)
