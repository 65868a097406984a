"""Sums over a set of pictures, of which FID and the Inception Score are made; shards add up.

All sums are float64 on the host. A file is an .npz with `mu` and `sigma`, as pytorch-fid writes
them and ADM's reference batches hold them (sigma divides by n - 1, as numpy.cov). Our files also
hold `count`, `probs` (mean class probabilities), `plogp` (mean of sum p log p) and `preprocessing`
(how the network saw the pictures).

Letters: R rows · D features · K classes.
"""

import dataclasses
import zipfile

import numpy as np
from etils import epath

from vtts_jax.errors import ConfigError
from vtts_jax.media import files


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Sums over pictures; `a + b` holds those of both sets.

  Attributes:
    count: number of pictures.
    total: sum of features `[D]`.
    outer: sum of the features' outer products `[D, D]`.
    probs: sum of class probabilities `[K]`.
    plogp: sum of p log p over classes and pictures, which is minus the summed entropy.
  """

  count: int
  total: np.ndarray
  outer: np.ndarray
  probs: np.ndarray
  plogp: float

  @classmethod
  def of_batch(cls, features, logits) -> 'Statistics':
    """Sums features `[R, D]` and logits `[R, K]`; R = 0 gives the neutral element.

    Raises:
      ValueError: a feature or logit is not finite.
    """
    # float64: sums over 50,000 pictures of squares lose digits in float32
    x, z = (np.asarray(a, np.float64) for a in (features, logits))
    if not (np.isfinite(x).all() and np.isfinite(z).all()):
      bad = np.flatnonzero(~(np.isfinite(x).all(1) & np.isfinite(z).all(1)))
      raise ValueError(f'features of picture {bad[0]} ({len(bad)} of {len(x)}) are not finite')
    p, logs = class_probabilities(z)
    return cls(len(x), x.sum(0), x.T @ x, p.sum(0), float((p * logs).sum()))

  def __add__(self, other: 'Statistics') -> 'Statistics':
    if self.total.shape != other.total.shape or self.probs.shape != other.probs.shape:
      raise ValueError(
        f'statistics of {self.total.shape} features, {self.probs.shape} classes do not add to '
        f'{other.total.shape}, {other.probs.shape}'
      )
    # every field is a sum, so sets add field by field
    fields = (f.name for f in dataclasses.fields(self))
    return Statistics(*(getattr(self, f) + getattr(other, f) for f in fields))

  @property
  def mu(self) -> np.ndarray:
    """Mean features `[D]`."""
    return self.total / self.count

  @property
  def sigma(self) -> np.ndarray:
    """Covariance `[D, D]`; `ValueError` with fewer than 2 pictures."""
    if self.count < 2:
      raise ValueError(f'a covariance needs 2 pictures, there are {self.count}')
    # n - 1, as numpy.cov and therefore pytorch-fid
    return (self.outer - np.outer(self.total, self.mu)) / (self.count - 1)

  @property
  def log_is(self) -> float:
    """Logarithm of the Inception Score, with all pictures as one split."""
    p = self.probs / self.count
    return self.plogp / self.count - float(np.sum(p * np.log(np.maximum(p, 1e-300))))

  def write_npz(self, path, preprocessing: str = '') -> None:
    """Writes the .npz, whole or not at all; `check_preprocessing` reads `preprocessing` back."""
    # means and not sums: other programs read `mu` and `sigma` of this file
    arrays = {'preprocessing': np.array(preprocessing)} if preprocessing else {}
    arrays |= {'mu': self.mu, 'sigma': self.sigma, 'count': np.int64(self.count)}
    arrays |= {'probs': self.probs / self.count, 'plogp': np.float64(self.plogp / self.count)}
    with files.atomic_path(path) as temporary, temporary.open('wb') as handle:
      np.savez(handle, **arrays)

  @classmethod
  def read_npz(cls, path) -> 'Statistics':
    """Reads what `write_npz` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ConfigError: the file is of another program, which keeps no count to add to.
    """
    found = read_arrays(path)
    missing = [k for k in ('count', 'probs', 'plogp') if k not in found]
    if missing:
      raise ConfigError(
        f'statistics at {str(path)!r} have no {", ".join(missing)}: only files written by '
        f'python -m vtts_jax.metrics.fid can be added to'
      )
    # back from means to sums, so that more pictures can be added
    n, mu, sigma = int(found['count']), *gaussian_of(path, found)
    outer = sigma * (n - 1) + n * np.outer(mu, mu)
    return cls(n, n * mu, outer, n * found['probs'], float(n * found['plogp']))


def class_probabilities(logits) -> tuple[np.ndarray, np.ndarray]:
  """Returns the probabilities and their logarithms of logits `[R, K]`."""
  # a softmax in float64 that gives both; `initial` lets R = 0 pass
  z = np.asarray(logits, np.float64)
  z = z - z.max(-1, keepdims=True, initial=-np.inf)
  logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
  return np.exp(logs), logs


# ------------------------------------------------------------------------------------------- files


def read_arrays(path) -> dict[str, np.ndarray]:
  """Reads the arrays of an .npz, never a pickle; pictures (`arr_0`) are left in the file.

  Raises:
    FileNotFoundError: there is no such file.
    ConfigError: it is no .npz.
  """
  if not epath.Path(path).is_file():
    raise FileNotFoundError(f'no statistics at {str(path)!r}')
  try:
    with epath.Path(path).open('rb') as handle, np.load(handle) as file:
      # `arr_0` of ADM's batches is gigabytes of pixels
      return {k: file[k] for k in file.files if k != 'arr_0'}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
    raise ConfigError(f'{str(path)!r} is no .npz of arrays: {error!r}') from error


def gaussian_of(path, arrays) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean `[D]` and covariance `[D, D]`, float64, of a statistics file's arrays.

  Any program may have written the file.

  Raises:
    ConfigError: `arrays` has no mean and covariance, or their shapes do not fit.
  """
  if 'mu' not in arrays or 'sigma' not in arrays:
    raise ConfigError(
      f'{str(path)!r} has no mu and sigma; it has: {", ".join(arrays) or "nothing"}'
    )
  mu, sigma = (np.asarray(arrays[k], np.float64) for k in ('mu', 'sigma'))
  if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
    raise ConfigError(f'{str(path)!r}: mu {mu.shape} and sigma {sigma.shape} do not fit')
  return mu, sigma


def check_preprocessing(path, arrays, preprocessing: str) -> None:
  """Raises `ConfigError` if a file says that the network saw its pictures in another way."""
  # files of other programs say nothing, and are trusted
  said = str(arrays.get('preprocessing', preprocessing))
  if said != preprocessing:
    raise ConfigError(
      f'preprocessing={preprocessing!r}: {str(path)!r} was made with {said!r}, and the two do not '
      'mix'
    )


# ---------------------------------------------------------------------------------- Gaussians (FID)


def covariance_root(sigma) -> np.ndarray:
  """Returns the symmetric square root of a covariance.

  Eigenvalues that rounding made negative count as 0.
  """
  values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def mixed_covariance(sigma, other) -> tuple[np.ndarray, np.ndarray]:
  """Returns (A other A `[D, D]`, A), where A is the symmetric root of `sigma`.

  FID needs the trace of (sigma other)^(1/2), which is that of the root of A other A. Both
  eigenproblems are symmetric, so they stay real and stable for fewer pictures than features.
  """
  half = covariance_root(sigma)
  return half @ other @ half, half
