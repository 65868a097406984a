"""Pictures through InceptionV3: features and logits, inside jit for verifiers and of files for FID.

Letters: N pictures · R rows · H W sides · D features · K classes.
"""

import functools
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.media import files
from vtts_jax.models.inception import modeling
from vtts_jax.models.pretrained import Pretrained


def open_inception(
  weights: str, dtype: str = 'float32', setting: str = 'verifier.weights'
) -> Pretrained:
  """Returns the InceptionV3 of 2015-12-05; weights as in `models.pretrained`.

  Raises:
    ConfigError: no weights are named, and as `Pretrained`.
  """
  if not weights:
    raise ConfigError(
      f"{setting}='': must name the weights of 2015-12-05 as safetensors; they are published as a "
      'pickle only, vtts_jax/models/inception/README.md converts them in two lines'
    )
  return Pretrained('inception', weights, dtype, setting=setting)


def check_preprocessing(preprocessing: str, setting: str = 'verifier.preprocessing') -> None:
  """Raises `ConfigError` unless this is a preprocessing of the network."""
  if preprocessing not in modeling.PREPROCESSINGS:
    raise ConfigError(
      f'{setting}={preprocessing!r}: must be one of {", ".join(modeling.PREPROCESSINGS)}'
    )


def features_and_logits(inception: Pretrained, params, images, preprocessing: str):
  """Images `[R, H, W, 3]` in [0, 1] -> (features `[R, D]`, logits `[R, K]`) float32, inside jit."""
  model = inception.bind(params)
  features = model(modeling.preprocess(inception.config, images, preprocessing))
  return features, model.class_logits(features)


# ------------------------------------------------------------------------------------------- files


def compiled_network(weights: str, preprocessing: str = 'pytorch_fid') -> Callable:
  """Returns a function of 8 bit pictures `[R, H, W, 3]` -> (features `[R, D]`, logits `[R, K]`).

  Errors are those of `open_inception`.
  """
  inception = open_inception(weights, setting='--weights')
  params = inception.load()

  @jax.jit
  def run_network(params, batch):
    images = batch.astype(jnp.float32) / 255
    return features_and_logits(inception, params, images, preprocessing)

  return functools.partial(run_network, params)


def read_pictures(place) -> Iterator[np.ndarray]:
  """Yields the 8 bit pictures `[H, W, 3]` of a folder or of an .npz.

  A folder is read with its subfolders, in the order of names; names that begin with a dot are no
  pictures. Pictures are read as everywhere but for the EXIF orientation, which turns none. An .npz
  has `arr_0 [N, H, W, 3]`, the layout of ADM's sample and reference batches.

  Raises:
    FileNotFoundError: there is no such place.
    ConfigError: there are no pictures in it, or one cannot be read.
  """
  if os.path.isdir(place):
    # sorted, because splits of the Inception Score depend on the order
    paths = sorted(
      os.path.join(folder, name)
      for folder, _, names in os.walk(place)
      for name in names
      if name.lower().endswith(files.IMAGE_ENDINGS) and not name.startswith('.')
    )
    if not paths:
      raise ConfigError(f'{str(place)!r} has no pictures ({", ".join(files.IMAGE_ENDINGS)})')
    # as pytorch-fid, which does not turn pictures by their EXIF orientation
    yield from (files.read_image(path, upright=False) for path in paths)
    return
  if not os.path.isfile(place):
    raise FileNotFoundError(f'no pictures at {str(place)!r}')
  try:
    # numpy would leave the file open if it is no archive
    with open(place, 'rb') as handle, np.load(handle) as file:
      batch = file['arr_0']
  except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ConfigError(f'{str(place)!r} is no .npz with arr_0: {error!r}') from error
  # floats in [0, 1] would be read as black pictures
  if batch.ndim != 4 or batch.shape[-1] != 3 or batch.dtype != np.uint8:
    raise ConfigError(
      f'{str(place)!r}: arr_0 is {batch.dtype} {batch.shape}, not uint8 [N, H, W, 3]'
    )
  yield from batch


def extract_features(
  pictures: Iterable[np.ndarray], network: Callable, batch: int = 32
) -> tuple[np.ndarray, np.ndarray]:
  """Returns features `[N, D]` and logits `[N, K]` of pictures of any sizes, `batch` at a time."""
  found, waiting = {}, {}

  def run_rows(rows):
    # the last picture fills the batch up, so that each size compiles once
    given = [picture for _, picture in rows]
    out = network(np.stack(given + given[-1:] * (batch - len(given))))
    found.update(zip((place for place, _ in rows), zip(*(np.asarray(x) for x in out))))
    rows.clear()

  # a batch has one shape, so pictures wait for others of their size
  for place, picture in enumerate(pictures):
    rows = waiting.setdefault(np.shape(picture), [])
    rows.append((place, picture))
    if len(rows) == batch:
      run_rows(rows)
  for rows in filter(None, waiting.values()):
    run_rows(rows)
  if not found:
    raise ConfigError('no pictures')
  return tuple(np.stack(part) for part in zip(*(found[place] for place in range(len(found)))))
