"""What FID and the Inception Score need of a set of pictures, as sums: those of shards add up, in
any order.

All sums are float64 on the host. A file is an .npz with `mu` and `sigma` as pytorch-fid writes and
ADM's reference batches hold (sigma divides by n - 1, as numpy.cov). Ours also hold `count`, `probs`
(mean class probabilities), `plogp` (mean of sum p log p) and `preprocessing` (how the network saw
the pictures).

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
  """Sums over pictures; `a + b` is of both sets.

  Attributes:
    count: pictures.
    total: of features `[D]`; outer: of their outer products `[D, D]`.
    probs: of class probabilities `[K]`; plogp: of sum p log p, which is minus the entropy.
  """

  count: int
  total: np.ndarray
  outer: np.ndarray
  probs: np.ndarray
  plogp: float

  @classmethod
  def of(cls, features, logits) -> 'Statistics':
    """Of features `[R, D]` and logits `[R, K]`; none (R = 0) is the neutral element.

    Raises:
      ValueError: a feature or logit that is not finite.
    """
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
    fields = (f.name for f in dataclasses.fields(self))
    return Statistics(*(getattr(self, f) + getattr(other, f) for f in fields))

  @property
  def mu(self) -> np.ndarray:
    """Mean features `[D]`."""
    return self.total / self.count

  @property
  def sigma(self) -> np.ndarray:
    """Covariance `[D, D]`, of at least 2 pictures."""
    if self.count < 2:
      raise ValueError(f'a covariance needs 2 pictures, there are {self.count}')
    return (self.outer - np.outer(self.total, self.mu)) / (self.count - 1)

  @property
  def log_is(self) -> float:
    """Logarithm of the Inception Score of all pictures as one split."""
    p = self.probs / self.count
    return self.plogp / self.count - float(np.sum(p * np.log(np.maximum(p, 1e-300))))

  def save(self, path, preprocessing: str = '') -> None:
    """Writes the .npz, whole or not at all; `preprocessing` is for `check_preprocessing`."""
    arrays = {'preprocessing': np.array(preprocessing)} if preprocessing else {}
    arrays |= {'mu': self.mu, 'sigma': self.sigma, 'count': np.int64(self.count)}
    arrays |= {'probs': self.probs / self.count, 'plogp': np.float64(self.plogp / self.count)}
    with files.atomic_path(path) as temporary, temporary.open('wb') as handle:
      np.savez(handle, **arrays)

  @classmethod
  def load(cls, path) -> 'Statistics':
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError, ConfigError: no such file; one of another program, which does not count.
    """
    found = read_arrays(path)
    missing = [k for k in ('count', 'probs', 'plogp') if k not in found]
    if missing:
      raise ConfigError(
        f'statistics at {str(path)!r} have no {", ".join(missing)}: only files written by '
        f'python -m vtts_jax.metrics.fid can be added to'
      )
    n, mu, sigma = int(found['count']), *gaussian_of(path, found)
    outer = sigma * (n - 1) + n * np.outer(mu, mu)
    return cls(n, n * mu, outer, n * found['probs'], float(n * found['plogp']))


def class_probabilities(logits) -> tuple[np.ndarray, np.ndarray]:
  """Probabilities and their logarithms of logits `[R, K]`."""
  z = np.asarray(logits, np.float64)
  z = z - z.max(-1, keepdims=True, initial=-np.inf)
  logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
  return np.exp(logs), logs


# ------------------------------------------------------------------------------------------- files


def read_arrays(path) -> dict[str, np.ndarray]:
  """The arrays of an .npz, never a pickle; those of pictures (`arr_0`) are left in the file.

  Raises:
    FileNotFoundError, ConfigError: no such file, no .npz.
  """
  if not epath.Path(path).is_file():
    raise FileNotFoundError(f'no statistics at {str(path)!r}')
  try:
    with epath.Path(path).open('rb') as handle, np.load(handle) as file:
      return {k: file[k] for k in file.files if k != 'arr_0'}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
    raise ConfigError(f'{str(path)!r} is no .npz of arrays: {error!r}') from error


def gaussian_of(path, arrays) -> tuple[np.ndarray, np.ndarray]:
  """Mean `[D]` and covariance `[D, D]` in float64 of the arrays of a statistics file, whichever
  program wrote it.

  Raises:
    ConfigError: there are none in it, or of shapes that do not fit.
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
  """Raises `ConfigError` where a file says that the network saw its pictures in another way."""
  said = str(arrays.get('preprocessing', preprocessing))
  if said != preprocessing:
    raise ConfigError(
      f'preprocessing={preprocessing!r}: {str(path)!r} was made with {said!r}, and the two do not '
      'mix'
    )


# ---------------------------------------------------------------------------------- Gaussians (FID)


def covariance_root(sigma) -> np.ndarray:
  """The symmetric square root of a covariance; eigenvalues that rounding made negative count as
  0."""
  values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def mixed_covariance(sigma, other) -> tuple[np.ndarray, np.ndarray]:
  """A other A `[D, D]`, and A, the symmetric root of `sigma`.

  The trace of (sigma other)^(1/2), of which FID is made, is that of the root of this matrix: two
  symmetric eigenproblems, real and stable also for sets with fewer pictures than features.
  """
  half = covariance_root(sigma)
  return half @ other @ half, half
