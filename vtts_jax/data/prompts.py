"""Prompts from a file, or given in the config; with GenEval's metadata where the file has it.

A `.jsonl` file has an object with a `prompt` in each line and keeps whatever else it says (GenEval:
`tag`, `include`, `exclude`; github.com/djghosh13/geneval); any other file has a prompt in each
line; either may be gzipped. GenEval's own 553 prompts are here: `path='geneval'`.
"""

import gzip
import json
import pathlib

import numpy as np

SHIPPED = {
  'geneval': pathlib.Path(__file__).parent / 'assets/geneval/evaluation_metadata.jsonl.gz'
}


def prompts(path='', texts=(), count=0) -> list[dict]:
  """The first `count` (0: all) prompts of the file `path` (or 'geneval'), or of `texts` without it.

  Raises:
    ValueError: both or none of the two, no such file, a line that is no prompt, too few of them.
  """
  if bool(path) == bool(texts):
    raise ValueError(f'path={path!r}, texts={list(texts)}: give one of the two')
  file = SHIPPED.get(path, pathlib.Path(path))
  if path and not file.is_file():
    raise ValueError(f'path={path!r}: no such file; {", ".join(SHIPPED)} is here without one')
  found = _read(file) if path else [{'prompt': text} for text in texts]
  if not 0 <= count <= len(found) or not found:
    raise ValueError(f'count={count}: must be in 0 (all) .. {len(found)}, of {path or "texts"}')
  return found[: count or None]


def _read(path):
  found, packed = [], path.suffix == '.gz'
  objects = pathlib.Path(path.stem if packed else path).suffix == '.jsonl'
  data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
  for number, line in enumerate(data.decode('utf-8').splitlines(), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line) if objects else {'prompt': line.strip()}
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
