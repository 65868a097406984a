"""Score pictures that exist already.

A picture that cannot be read does not stop the others: its row says what is wrong with it, and the
exit code is 1.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vtts_jax.cli import arguments
from vtts_jax.data import prompts, references
from vtts_jax.errors import ConfigError

FLAGS = ('--prompts', '--prompt', '--out', '--batch')


class ScoreRow(NamedTuple):
  """The path of a picture to be scored, and its prompt row, which is `{}` for none."""

  image: str
  prompt: Mapping


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the verifier, the pictures, their prompts and where the scores go."""
  arguments.add_verifier_flag(parser)
  parser.add_argument(
    'images',
    nargs='*',
    metavar='IMAGES',
    help='a folder of pictures, taken by name in natural order (1, 2, 10; no subfolders), or a '
    '.jsonl of objects with an "image" (relative to the file) and, without --prompts, a "prompt"',
  )
  parser.add_argument(
    '--prompts',
    default='',
    metavar='FILE',
    help='a file of prompts, one for each picture in order or one for all',
  )
  parser.add_argument('--prompt', default='', metavar='TEXT', help='the prompt of all pictures')
  parser.add_argument('--out', default='', metavar='FILE', help='.jsonl of one row a picture')
  parser.add_argument(
    '--batch', type=arguments.integer_at_least(1), default=32, help='pictures at a time'
  )


def run_command(args: argparse.Namespace, rest: list[str]) -> int:
  """Scores the pictures and prints a table; the exit code is 1 if one could not be read."""
  from vtts_jax.media import files

  # settings and prompts are checked before any weights are read, which may take minutes
  verifier = arguments.build_verifier(args.verifier, rest, 'score', FLAGS)
  if len(args.images) != 1:
    raise ConfigError(f'give one folder or .jsonl of pictures, got {args.images}')
  rows = find_rows(
    args.images[0], args.prompts, args.prompt, needs_prompt=reads_prompts(verifier)
  )
  scored = score_rows(verifier, rows, args.batch)
  # one row for each picture, scored or not, so that rows can be counted against the folder
  if args.out:
    lines = ''.join(json.dumps(row) + '\n' for row in scored)
    files.write_atomic(args.out, lines.encode())
  _print_table(verifier, scored)
  for row in scored:
    if 'error' in row:
      print(row['error'])
  return int(any('error' in row for row in scored))


# ----------------------------------------------------------------------------- pictures and prompts


def find_rows(
  source: str, prompts_file: str = '', prompt: str = '', *, needs_prompt: bool = True
) -> list[ScoreRow]:
  """The pictures to score, each with its prompt row.

  Args:
    source: a folder of pictures, or a .jsonl file that names them.
    prompts_file: a file of prompts; '' for those of the .jsonl, or `prompt`.
    prompt: the prompt of all pictures; '' for none.
    needs_prompt: whether every picture must have a prompt.

  Raises:
    ConfigError: no picture, a picture without a prompt that needs one, or more or fewer prompts
      than pictures.
  """
  path = pathlib.Path(source)
  if path.is_dir():
    found = [(image, {}) for image in references.find_pictures(path, 'IMAGES')]
  elif path.suffix == '.jsonl' and path.is_file():
    found = list(_listed_pictures(path))
  else:
    raise ConfigError(
      f'{source}: must be a folder of pictures, or a .jsonl file that names them'
    )
  if not found:
    raise ConfigError(f'{source}: holds no picture')
  images, rows = zip(*found)
  if prompts_file and prompt:
    raise ConfigError(f'--prompts={prompts_file}, --prompt={prompt}: give one of the two')
  if prompts_file:
    rows = _read_prompts(prompts_file, len(images))
  elif prompt:
    rows = [{'text': prompt}] * len(images)
  missing = [image for image, row in zip(images, rows) if not row.get('text')]
  if missing and needs_prompt:
    raise ConfigError(f'{missing[0]}: has no prompt; give --prompts=FILE or --prompt=TEXT')
  return [ScoreRow(image, row) for image, row in zip(images, rows)]


def _read_prompts(path: str, pictures: int) -> list[Mapping]:
  """A prompt row for each of so many pictures, from a file of one for each or one for all.

  Raises:
    ConfigError: a file that cannot be read, or more or fewer prompts than pictures.
  """
  try:
    rows = prompts.prompts(path=path)
  except ConfigError as error:
    raise ConfigError(f'--prompts: {error} (--prompt=TEXT gives the prompt itself)') from None
  if len(rows) not in (1, pictures):
    raise ConfigError(
      f'--prompts={path}: holds {len(rows)} prompts; must be 1, or {pictures} as there are pictures'
    )
  return rows * pictures if len(rows) == 1 else rows


def _listed_pictures(path) -> Iterator[tuple[str, Mapping]]:
  """Pictures and prompt rows of a .jsonl file; all of a line but 'image' belongs to its prompt.

  Raises:
    ConfigError: a line that is no object with an 'image'; the message has its number.
  """
  for line, text in enumerate(prompts.read_lines(path), 1):
    if not text.strip():
      continue
    try:
      entry = dict(json.loads(text))
      image = str(path.parent / entry.pop('image'))
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(
        f"{path}, line {line}: an object with an 'image' is wanted ({error!r})"
      ) from None
    # GenEval's files and ours say 'prompt' for what a prompt row calls 'text'
    if 'prompt' in entry:
      entry['text'] = entry.pop('prompt')
    yield image, entry


def reads_prompts(verifier) -> bool:
  """Whether the scores of a verifier depend on the prompt."""
  import jax

  # a verifier that makes no arrays of a prompt cannot depend on it
  try:
    return bool(jax.tree.leaves(verifier.tokenize([{'text': 'a'}])))
  # it does read prompts, of which this is none
  except ValueError:
    return True


# ----------------------------------------------------------------------------------------- scoring


def score_rows(verifier, rows: Sequence[ScoreRow], batch: int = 32) -> list[dict]:
  """Scores pictures; at most `batch` pictures of one size are scored at a time.

  Returns:
    `{'image', 'prompt', 'scores': {name: number}}` for each picture. A score that is not finite is
    None. A picture that cannot be read has 'error' in place of 'scores'.
  """
  from vtts_jax.media import files

  scorer = arguments.build_scorer(verifier)
  scorer.tokenize_prompts([row.prompt for row in rows])
  found: list[dict] = [{'image': r.image, 'prompt': r.prompt.get('text', '')} for r in rows]
  # one program is compiled for each size, so pictures wait until a batch of their size is full
  waiting: dict[tuple, list] = {}  # size -> [(place, picture)]

  def score_waiting(size):
    """Scores the pictures that wait, and fills in their rows."""
    places, pictures = zip(*waiting.pop(size))
    scores = scorer({'image': np.stack(pictures)}, [rows[i].prompt for i in places])
    for at, place in enumerate(places):
      values = {name: float(value[at]) for name, value in scores.items()}
      found[place]['scores'] = {n: v if np.isfinite(v) else None for n, v in values.items()}

  for place, row in enumerate(rows):
    try:
      picture = files.read_image(row.image)
    except ConfigError as error:
      found[place]['error'] = str(error)
      continue
    waiting.setdefault(picture.shape, []).append((place, picture))
    if len(waiting[picture.shape]) == batch:
      score_waiting(picture.shape)
  # the last batch of each size is not full
  for size in list(waiting):
    score_waiting(size)
  return found


def _print_table(verifier, scored) -> None:
  """Prints how each score is distributed, and which picture has the highest."""
  from rich.console import Console
  from rich.table import Table

  table = Table('score', 'pictures', 'mean', 'std', 'min', 'median', 'max', 'best', box=None)
  for name in verifier.names:
    values = [(r['scores'][name], r['image']) for r in scored if 'scores' in r]
    # a score that is not finite is left out, or the mean would not be finite either
    values = [(v, image) for v, image in values if v is not None]
    if values:
      x = np.array([v for v, _ in values])
      numbers = (x.mean(), x.std(), x.min(), np.median(x), x.max())
      best = os.path.basename(max(values)[1])
      table.add_row(name, str(len(x)), *(f'{n:.4g}' for n in numbers), best)
    else:
      table.add_row(name, '0')
  Console(width=120).print(table)
