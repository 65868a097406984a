"""Pictures through InceptionV3: files in, features and logits out, for `metrics.fid`.

Letters: N pictures · H W sides · D features · K classes.
"""

import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.inception import convert, modeling

ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def pictures(place) -> Iterator[np.ndarray]:
  """8 bit pictures `[H, W, 3]` of a folder (with the folders in it, by name) or of an .npz of
  `arr_0 [N, H, W, 3]`, the layout of ADM's sample and reference batches.

  Raises:
    FileNotFoundError, ConfigError: no such place, no pictures in it, one that cannot be read.
  """
  if os.path.isdir(place):
    names = sorted(
      os.path.join(folder, name)
      for folder, _, files in os.walk(place)
      for name in files
      if name.lower().endswith(ENDINGS)
    )
    if not names:
      raise ConfigError(f'{str(place)!r} has no pictures ({", ".join(ENDINGS)})')
    yield from map(_picture, names)
    return
  if not os.path.isfile(place):
    raise FileNotFoundError(f'no pictures at {str(place)!r}')
  try:
    with open(place, 'rb') as handle, np.load(handle) as file:
      batch = file['arr_0']
  except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ConfigError(f'{str(place)!r} is no .npz with arr_0: {error!r}') from error
  if batch.ndim != 4 or batch.shape[-1] != 3 or batch.dtype != np.uint8:
    raise ConfigError(
      f'{str(place)!r}: arr_0 is {batch.dtype} {batch.shape}, not uint8 [N, H, W, 3]'
    )
  yield from batch


def _picture(path):
  from PIL import Image

  try:
    with Image.open(path) as image:
      return np.asarray(image.convert('RGB'))
  except OSError as error:
    raise ConfigError(f'{path!r} cannot be read as a picture: {error}') from error


def network(model_from: str = '', random: str = '', look: str = 'pytorch_fid'):
  """Pictures `[R, H, W, 3]`, 8 bit, to (features `[R, D]`, logits `[R, K]`), compiled; settings as
  in `verifiers.fid`.

  Raises:
    ConfigError: an unknown look, no weights.
  """
  if look not in modeling.LOOKS:
    raise ConfigError(f'look={look!r}: must be one of {", ".join(modeling.LOOKS)}')
  config, params = convert.config_at(model_from, random), convert.params_at(model_from, random)

  @jax.jit
  def run(params, batch):
    model = modules.merge(convert.graph(config), params)
    seen = modeling.prepare(batch.astype(jnp.float32) / 255, config.side, look)
    features = model(seen)
    return features, model.logits(features)

  return lambda batch: run(params, batch)


def extract(shown: Iterable[np.ndarray], run, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """Features `[N, D]` and logits `[N, K]` of pictures of any sizes, `batch` of a size at a time."""
  found = []
  for _, group in itertools.groupby(shown, key=np.shape):
    while chunk := list(itertools.islice(group, batch)):
      rows = np.stack(
        chunk + [chunk[-1]] * (batch - len(chunk))
      )  # one compiled shape for each size
      found.append([np.asarray(x)[: len(chunk)] for x in run(rows)])
  if not found:
    raise ConfigError('no pictures')
  return tuple(np.concatenate(part) for part in zip(*found))
