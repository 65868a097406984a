"""Reference pictures of prompts, for the verifiers that compare pictures: read on the host.

A prompt row names its own pictures under 'reference': a picture, a folder of pictures, or a list of
these (`data/prompts` resolves them relative to its file). A verifier's setting `references`, a
picture or a folder, serves the prompts that name none. The verifier says how the pictures are
resized and cut.

Letters: B prompts · K pictures of a prompt · S side of a picture · D width of an embedding.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.media.files import IMAGE_ENDINGS, read_image


def find_pictures(place, setting: str) -> tuple[str, ...]:
  """Returns the picture `place`, or the pictures in that folder in natural order (1, 2, 10).

  Raises:
    ConfigError: there is neither; the message names `setting`.
  """
  place = os.fspath(place)
  if os.path.isfile(place):
    return (place,)
  inside = os.listdir(place) if place and os.path.isdir(place) else []
  # hidden files are leftovers of editors and file managers
  names = [
    name for name in inside
    if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith('.')
  ]  # fmt: skip
  if not names:
    raise ConfigError(
      f'{setting}: {place!r} is no picture and no folder of pictures '
      f'({", ".join(IMAGE_ENDINGS)})'
    )
  return tuple(os.path.join(place, name) for name in sorted(names, key=_natural_order))


def _natural_order(name):
  # numbers compare as numbers; the pairs keep numbers and words from being compared at all
  parts = re.split(r'(\d+)', name)
  return [(int(part), '') if part.isdecimal() else (-1, part) for part in parts]


def read_references(
  prompts: Sequence[Mapping[str, Any]],
  common: str,
  most: int,
  fit: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
  """Reads the reference pictures of prompt rows.

  Args:
    prompts: B rows.
    common: the picture or folder for prompts that name no reference; '' for none.
    most: K.
    fit: resizes and cuts a picture uint8 `[H, W, 3]` to uint8 `[S, S, 3]`.

  Returns:
    {'pictures': uint8 `[B, K, S, S, 3]`, 'mask': bool `[B, K]`, true where there is a picture}.

  Raises:
    ConfigError: a prompt has no reference or more than K, or a picture cannot be read.
  """
  # named once here, so that an error shows before any picture is decoded
  shared = find_pictures(common, 'verifier.references') if common else ()
  mask, made, places = np.zeros((len(prompts), most), bool), {}, {}
  for row, prompt in enumerate(prompts):
    files = _files_of(prompt, row, shared, most)
    for i, name in enumerate(files):
      # a picture that many prompts share is read once
      if name not in made:
        made[name] = fit(read_image(name))
      places[row, i], mask[row, i] = made[name], True
  shape = np.shape(next(iter(made.values()), np.zeros((1, 1, 3))))
  pictures = np.zeros((*mask.shape, *shape), np.uint8)
  for place, picture in places.items():
    pictures[place] = picture
  return {'pictures': pictures, 'mask': mask}


def _files_of(prompt, row, shared, most):
  own = prompt.get('reference') or ()
  # a single path may stand without a list around it
  own = [own] if isinstance(own, str | os.PathLike) else own
  setting = f'prompts: prompt {row} ({prompt.get("text")!r})'
  files = [file for place in own for file in find_pictures(place, setting)] or shared
  if not files:
    raise ConfigError(
      f"{setting} has no 'reference', and verifier.references is ''; one of the two must name a "
      'picture or a folder of pictures'
    )
  if len(files) > most:
    raise ConfigError(
      f'{setting} has {len(files)} references; verifier.max_references={most} must be at least that'
    )
  return files


def count_references(common: str, most: int) -> int:
  """Returns K: room for the pictures of the setting `references`, and for at least `most`.

  Prompts that bring their own pictures may have up to K of them.
  """
  return max(most, len(find_pictures(common, 'verifier.references')) if common else 0)


def mean_embedding(embeddings, mask):
  """Returns the mean `[B, D]` of the unit embeddings `[B, K, D]` that `mask [B, K]` selects.

  The mean is not normalised: its product with a unit embedding is the mean of the cosines.
  """
  weight = mask.astype(embeddings.dtype)
  return (embeddings * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
