"""Reference pictures of prompts, for the verifiers that compare pictures: read on the host.

A place is a picture or a folder of pictures, the same for every prompt, or a `.jsonl` of one line
`{"prompt": ..., "reference": ...}` a prompt, where the reference is a picture, a folder of
pictures, or a list of these, relative to the file. Pictures are made as the verifier's pipeline
makes them, by PIL itself.

Letters: B prompts · K pictures of the prompt that has most · S side of a picture.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vtts_jax.errors import ConfigError

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')


def read(texts: Sequence[str], place: str, side: int, shorter: int = 0) -> dict[str, np.ndarray]:
  """`pictures [B, K, S, S, 3]` uint8 and `mask [B, K]`, true where there is one.

  Args:
    side: S. The shorter side of a picture is resized to `shorter` and the middle S x S cut out;
      with `shorter=0` it is resized to S x S.

  Raises:
    ConfigError: a place or a picture that cannot be read, a prompt without a reference.
  """
  common, of_prompt = index(place)
  files = [common or of_prompt.get(text) for text in texts]
  lost = [text for text, found in zip(texts, files) if not found]
  if lost:
    raise ConfigError(
      f'verifier.references={place!r}: no line for {len(lost)} of {len(texts)} prompts; the first '
      f'is {lost[0]!r}'
    )
  shape = (len(texts), most(place), side, side, 3)
  pictures, mask = np.zeros(shape, np.uint8), np.zeros(shape[:2], bool)
  for row, names in enumerate(files):
    for i, name in enumerate(names):
      pictures[row, i], mask[row, i] = _picture(name, side, shorter), True
  return {'pictures': pictures, 'mask': mask}


def most(place: str) -> int:
  """K."""
  common, of_prompt = index(place)
  return max(map(len, [common, *of_prompt.values()]))


def mean(unit, mask):
  """Unit embeddings `[B, K, D]` of `mask [B, K]` -> their mean `[B, D]`; its product with a unit
  embedding is the mean of the cosines."""
  weight = mask.astype(unit.dtype)
  return (unit * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)


def index(place: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
  """(files for every prompt, {prompt: files}); one of the two is empty.

  Raises:
    ConfigError: nothing there, or a line that is not of the form.
  """
  if not place.endswith('.jsonl'):
    return _files(place, place), {}
  found = {}
  if not os.path.isfile(place):
    raise ConfigError(f'verifier.references={place!r}: no such file')
  lines = pathlib.Path(place).read_text(encoding='utf-8').splitlines()
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      prompt, names = row['prompt'], row['reference']
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(
        f'verifier.references={place!r}: line {number} must be {{"prompt": ..., "reference": ...}} '
        f'({error!r})'
      ) from error
    names = [names] if isinstance(names, str) else names
    at = lambda name: os.path.join(os.path.dirname(place), name)
    found[prompt] = tuple(file for name in names for file in _files(at(name), place))
  if not any(found.values()):
    raise ConfigError(f'verifier.references={place!r}: has no line with a reference')
  return (), found


def _files(name, place):
  if os.path.isfile(name):
    return (name,)
  inside = sorted(os.listdir(name)) if name and os.path.isdir(name) else []
  found = tuple(os.path.join(name, f) for f in inside if f.lower().endswith(SUFFIXES))
  if not found:
    raise ConfigError(
      f'verifier.references={place!r}: {name!r} is no picture and no folder of pictures '
      f'({", ".join(SUFFIXES)}); needed are one of these or a .jsonl of prompts and references'
    )
  return found


def _picture(name, side, shorter):
  from PIL import Image

  try:
    with Image.open(name) as file:
      picture = file.convert('RGB')
  except (OSError, ValueError) as error:
    raise ConfigError(f'verifier.references: {name!r} cannot be read: {error}') from error
  width, height = picture.size
  if not shorter:
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
  short = min(width, height)
  size = (shorter * width // short, shorter * height // short)
  left, top = (round((n - side) / 2) for n in size)
  small = picture.resize(size, Image.Resampling.BICUBIC)
  return np.asarray(small.crop((left, top, left + side, top + side)))
