"""Scores pictures that exist already: `vtts score`, and `vtts serve` for other processes.

Prompts are encoded once each, pictures of one size go through one compiled program in batches. A
picture that cannot be read costs itself only: the others are scored, its row says what was wrong,
and the exit code is 1.
"""

import ast
import base64
import binascii
import io
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from PIL import Image, UnidentifiedImageError

from vtts_jax import components, core
from vtts_jax.data import prompts as prompt_files
from vtts_jax.engine import sharding
from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess as images

ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


class Row(NamedTuple):
  """A picture to be scored."""

  image: str
  prompt: str


def options(argv: Sequence[str], flags: Mapping[str, str], where: str):
  """`--verifier=NAME --verifier.KEY=VALUE ...` and the other flags of a command.

  Args:
    argv: arguments; those without a dash are returned as they are.
    flags: the command's own flags and their defaults.
    where: the command's name, for messages.

  Returns:
    The verifier, {flag: text}, the other arguments.

  Raises:
    ConfigError: an unknown flag, no verifier, a setting that the verifier refuses.
  """
  found, settings, rest, name = dict(flags), {}, [], ''
  for arg in argv:
    flag, _, value = arg.removeprefix('--').partition('=')
    if not arg.startswith('--'):
      rest.append(arg)
    elif flag == 'verifier':
      name = value
    elif flag.startswith('verifier.'):
      settings[flag.removeprefix('verifier.')] = _value(value)
    elif flag in flags:
      found[flag] = value
    else:
      allowed = ', '.join(f'--{f}=' for f in ('verifier', 'verifier.KEY', *flags))
      raise ConfigError(f'unknown flag --{flag}; allowed for vtts {where}: {allowed}')
  if not name:
    known = ', '.join(n for n in components.components() if n.startswith('verifiers.'))
    raise ConfigError(f'--verifier=NAME is missing; allowed: {known}, or a module of yours')
  verifier = components.load(name, **settings)
  if not isinstance(verifier, core.Verifier):
    raise ConfigError(f'--verifier={name}: must be a verifier')
  if verifier.uses != frozenset({'images'}):
    raise ConfigError(
      f'--verifier={name}: needs {", ".join(sorted(verifier.uses))} of a generator; must score '
      'pictures alone'
    )
  verifier.check()
  return verifier, found, rest


def _value(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def number(found: Mapping[str, str], flag: str, low: int) -> int:
  """A flag's value as an integer of at least `low`; `ConfigError` otherwise."""
  try:
    value = int(found[flag])
  except ValueError:
    value = low - 1
  if value < low:
    raise ConfigError(f'--{flag}={found[flag]}: must be an integer >= {low}')
  return value


# ----------------------------------------------------------------------------- pictures and prompts


def rows(place: str, prompts: str, needed: bool = True) -> list[Row]:
  """What to score.

  Args:
    place: a folder of pictures, taken by name, or a `.jsonl` of objects with an `image` (relative
      to the file) and, unless `prompts` is given, a `prompt`.
    prompts: '' or a file of prompts (`data.prompts`), one for each picture in order, or one for
      all; anything else is itself the prompt of all.
    needed: whether a picture must have one.

  Raises:
    ConfigError: no picture, no prompt, or not as many prompts as pictures.
  """
  path = pathlib.Path(place)
  if path.is_dir():
    found = [(str(p), None) for p in sorted(path.iterdir()) if p.suffix.lower() in ENDINGS]
  elif path.suffix == '.jsonl' and path.is_file():
    found = list(_entries(path))
  else:
    raise ConfigError(
      f'{place}: must be a folder of pictures, or a .jsonl file that names them'
    )
  if not found:
    raise ConfigError(f'{place}: holds no picture; endings read are {", ".join(ENDINGS)}')
  texts = [prompt for _, prompt in found]
  if prompts:
    known = [prompts]
    if pathlib.Path(prompts).is_file():
      try:
        known = [entry['prompt'] for entry in prompt_files.prompts(path=prompts)]
      except ValueError as error:
        raise ConfigError(f'--prompts: {error}') from None
    if len(known) not in (1, len(found)):
      raise ConfigError(
        f'--prompts={prompts}: holds {len(known)} prompts; must be 1, or {len(found)} as there are '
        'pictures'
      )
    texts = known * len(found) if len(known) == 1 else known
  missing = [image for (image, _), text in zip(found, texts) if not text]
  if missing and needed:
    raise ConfigError(f'{missing[0]}: has no prompt; give --prompts=FILE or --prompts=TEXT')
  return [Row(image, text or '') for (image, _), text in zip(found, texts)]


def _entries(path) -> Iterator[tuple[str, str | None]]:
  for line, text in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    if not text.strip():
      continue
    try:
      entry = json.loads(text)
      yield str(path.parent / entry['image']), entry.get('prompt')
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ConfigError(
        f"{path}, line {line}: an object with an 'image' is wanted ({error!r})"
      ) from None


def read(source) -> np.ndarray:
  """A picture file (path or open file) as `[H, W, 3]` float32 in [0, 1]; transparency is laid on
  white.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    with Image.open(source) as picture:
      picture.load()
      if picture.mode in ('RGBA', 'LA', 'P', 'PA'):
        over = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', over.size, 'white'), over)
      pixels = np.asarray(picture.convert('RGB'))
  except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f'cannot be read as a picture: {error}') from None
  return pixels.astype(np.float32) / 255


# --------------------------------------------------------------------------------------- the scorer


class Scorer:
  """A verifier with its weights, for pictures with a prompt each; one thread at a time.

  Where there are several devices, each has its share of a batch that is large enough.
  """

  MOST = 4096  # prompts kept

  def __init__(self, verifier: core.Verifier):
    self.verifier, self.params = verifier, verifier.load()
    compiled = jax.jit if verifier.jittable else lambda f: f
    call = lambda params, vctx, x: verifier.score(params, vctx, x[:, None])
    self._devices = len(jax.local_devices()) if verifier.jittable else 1
    if self._devices > 1:
      data, whole = PartitionSpec('data'), PartitionSpec()
      self._shared = jax.jit(
        jax.shard_map(
          call,
          mesh=sharding.make_mesh(),
          in_specs=(whole, data, data),
          out_specs=data,
          check_vma=False,
        )
      )
    self._encode = compiled(verifier.encode)
    self._score = compiled(call)
    self._known: dict[str, Any] = {}

  def prepare(self, texts: Sequence[str]) -> None:
    """Encodes prompts that were not seen yet, in batches of 1, 2, 4 .. 64.

    Raises:
      ConfigError: a prompt that the verifier cannot read.
    """
    if len(self._known) > self.MOST:
      self._known.clear()
    new = list(dict.fromkeys(t for t in texts if t not in self._known))
    try:
      whole = self.verifier.tokenize(new) if new else {}
    except ValueError as error:
      raise ConfigError(str(error)) from None
    for low in range(0, len(new), 64):
      part = range(low, min(low + 64, len(new)))
      index = np.minimum(np.arange(low, low + _power(len(part))), len(new) - 1)
      arrays = jax.tree.map(lambda x, index=index: np.asarray(x)[index], whole)
      vctx = jax.tree.map(np.asarray, self._encode(self.params, arrays))
      for i, at in enumerate(part):
        self._known[new[at]] = jax.tree.map(lambda x, i=i: x[i], vctx)

  def __call__(self, pictures: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Pictures `[R, H, W, 3]` of one size with their prompts to `{name: [R]}`; padded to a power of
    two, so that few shapes are compiled."""
    images.check(pictures)
    if any(text not in self._known for text in texts):
      self.prepare(texts)
    index = np.minimum(np.arange(_power(len(texts))), len(texts) - 1)
    vctx = jax.tree.map(lambda *x: np.stack(x), *(self._known[texts[i]] for i in index))
    shared = self._devices > 1 and len(index) % self._devices == 0
    out = (self._shared if shared else self._score)(self.params, vctx, pictures[index])
    return {name: np.asarray(value)[: len(texts), 0] for name, value in out.items()}


def _power(count: int) -> int:
  return 1 << (count - 1).bit_length()


def score(verifier: core.Verifier, todo: Sequence[Row], batch: int = 32) -> list[dict]:
  """A row `{'image', 'prompt', 'scores': {name: number or None}}` for each picture, or with `error`
  in place of scores for one that cannot be read; None is a score that was not finite."""
  scorer = Scorer(verifier)
  scorer.prepare([row.prompt for row in todo])
  found: list[dict] = [row._asdict() for row in todo]
  waiting: dict[tuple, list] = {}

  def flush(shape):
    index, pictures = zip(*waiting.pop(shape))
    scores = scorer(np.stack(pictures), [todo[i].prompt for i in index])
    for at, i in enumerate(index):
      values = {name: float(value[at]) for name, value in scores.items()}
      found[i]['scores'] = {n: v if np.isfinite(v) else None for n, v in values.items()}

  for i, row in enumerate(todo):
    try:
      picture = read(row.image)
    except ValueError as error:
      found[i]['error'] = str(error)
      continue
    waiting.setdefault(picture.shape, []).append((i, picture))
    if len(waiting[picture.shape]) == batch:
      flush(picture.shape)
  for shape in list(waiting):
    flush(shape)
  return found


def write(path: str, found: Sequence[Mapping]) -> None:
  """One JSON object a line, through a temporary file and a rename."""
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile('w', dir=target.parent, delete=False, encoding='utf-8') as file:
    file.writelines(json.dumps(row) + '\n' for row in found)
  os.chmod(file.name, 0o644)
  os.replace(file.name, target)


def reads_prompts(verifier: core.Verifier) -> bool:
  """Whether a score depends on the prompt."""
  try:
    return bool(jax.tree.leaves(verifier.tokenize(['a'])))
  except ValueError:  # it reads them, and this is none of them
    return True


# ------------------------------------------------------------------------------------- the commands


def command_score(argv: Sequence[str]) -> int:
  """`vtts score`; the exit code is 1 if a picture could not be read."""
  verifier, found, rest = options(argv, {'prompts': '', 'out': '', 'batch': '32'}, 'score')
  if len(rest) != 1:
    raise ConfigError(f'give one folder or .jsonl of pictures, got {rest}')
  todo = rows(rest[0], found['prompts'], needed=reads_prompts(verifier))
  scored = score(verifier, todo, number(found, 'batch', 1))
  if found['out']:
    write(found['out'], scored)
  _table(verifier, scored)
  for row in scored:
    if 'error' in row:
      print(f'{row["image"]}: {row["error"]}')
  return int(any('error' in row for row in scored))


def _table(verifier, scored):
  from rich.console import Console
  from rich.table import Table

  table = Table('score', 'pictures', 'mean', 'std', 'min', 'median', 'max', 'best', box=None)
  for name in verifier.names:
    values = [(r['scores'][name], r['image']) for r in scored if 'scores' in r]
    values = [(v, image) for v, image in values if v is not None]
    if values:
      x = np.array([v for v, _ in values])
      numbers = (x.mean(), x.std(), x.min(), np.median(x), x.max())
      best = os.path.basename(max(values)[1])
      table.add_row(name, str(len(x)), *(f'{n:.4g}' for n in numbers), best)
    else:
      table.add_row(name, '0')
  Console(width=120).print(table)


def command_serve(argv: Sequence[str]) -> int:
  """`vtts serve`: what `verifiers.host` asks, for a verifier in a process of its own."""
  from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

  verifier, found, rest = options(argv, {'host': '127.0.0.1', 'port': '8500'}, 'serve')
  if rest:
    raise ConfigError(f'unknown argument {rest[0]!r}')
  scorer, lock = Scorer(verifier), threading.Lock()
  name = verifier.names[0]

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      try:
        body = json.loads(self.rfile.read(int(self.headers.get('Content-Length', 0))))
        with lock:
          scores = _answer(scorer, name, body['prompts'], body['images'])
        status, answer = 200, {'scores': scores}
      except (ValueError, KeyError, TypeError, binascii.Error) as error:
        status, answer = 400, {'error': str(error)}
      data = json.dumps(answer).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      pass

  server = ThreadingHTTPServer((found['host'], number(found, 'port', 0)), Handler)
  print(f'{name} at http://{found["host"]}:{server.server_port}', flush=True)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    return 0
  finally:
    server.server_close()


def _answer(scorer, name, texts, encoded) -> list[float | None]:
  """Scores of base64 pictures, which are scored size by size."""
  pictures = [read(io.BytesIO(base64.b64decode(e, validate=True))) for e in encoded]
  if len(pictures) != len(texts):
    raise ValueError(f'{len(texts)} prompts and {len(pictures)} images; must be as many')
  scores: list[float | None] = [None] * len(texts)
  for shape in dict.fromkeys(p.shape for p in pictures):
    index = [i for i, p in enumerate(pictures) if p.shape == shape]
    values = scorer(np.stack([pictures[i] for i in index]), [texts[i] for i in index])[name]
    for i, value in zip(index, values):
      scores[i] = float(value) if np.isfinite(value) else None
  return scores
