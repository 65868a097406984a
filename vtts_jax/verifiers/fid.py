"""FID oracle: how much a picture would lower the FID of the pictures kept so far.

Ma et al. (2025, arXiv 2501.09732) search ImageNet with the final metric itself: they keep the
candidate that gives the lowest running FID. A verifier has no memory. So it reads the statistics of
the pictures kept so far from a file; between two batches of prompts the caller adds the new
pictures and continues with the parameters of `update_statistics`. The score `fid_inception_v3` is
FID before minus FID after adding this one picture, computed exactly. It is an oracle: never report
the FID of a search that used it as a result.

Let n pictures be kept, with mean m and covariance cov, let the reference be (mu, sigma), A the
symmetric root of sigma, and d = x - m. Adding x moves the mean by d / (n + 1) and turns the
covariance into (n - 1) / n cov + d d' / (n + 1). This gives all terms of FID but the trace of the
root, tr sqrt(C + w w') with C = A cov A (n - 1) / n and w = A d / sqrt(n + 1): a matrix plus a
rank-1 update. Since
sqrt(x) = 1 / pi * integral of x / (x + t) dt / sqrt(t), by the matrix determinant lemma

  tr sqrt(C + w w') - tr sqrt(C) = 1 / (2 pi) * integral of log(1 + w' (C + t)^-1 w) dt / sqrt(t),

and the trapezoid rule in log t computes this to 1e-8 with 85 nodes. A picture costs one product
with the eigenvectors of C and one with a table.

Letters: B prompts · M candidates · R rows · D features · J nodes.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import inception
from vtts_jax.metrics import statistics as stats
from vtts_jax.models import modules
from vtts_jax.models.inception import modeling
from vtts_jax.models.pretrained import Pretrained

REACH = 42.0  # nodes span e^-42 .. e^42 times the largest eigenvalue, one per factor e


@dataclasses.dataclass(frozen=True)
class Fid(core.Verifier):
  """FID as a verifier; see the head of the file.

  Attributes:
    weights: InceptionV3 of 2015-12-05, as in `models.pretrained`. No known repository has it as
      safetensors; models/inception/README.md shows how to convert it.
    reference_from: file with statistics of real pictures (`mu`, `sigma`: pytorch-fid, ADM, ours).
    running_from: file with statistics of the pictures kept so far, written by
      `python -m vtts_jax.metrics.fid --save` or `Statistics.write_npz`. It needs at least 2
      pictures, better more than there are features. With random weights both files may be left
      out; random statistics take their place.
    dtype: dtype of the weights, 'float32' or 'bfloat16'; statistics are always float32.
    preprocessing: how pictures are resized for the network: 'pytorch_fid', or 'tensorflow' for the
      references of ADM.
  """

  weights: str = ''
  reference_from: str = ''
  running_from: str = ''
  dtype: str = 'float32'
  preprocessing: str = 'pytorch_fid'

  gives = frozenset({'gradient'})

  def __post_init__(self):
    inception.check_preprocessing(self.preprocessing)
    # random weights serve tests and benchmarks, which need no statistics
    if not self.model_part.is_random and not (self.reference_from and self.running_from):
      raise ConfigError(
        f'verifier.reference_from={self.reference_from!r}, running_from={self.running_from!r}: '
        f'both must name a file of statistics'
      )

  @property
  def model_part(self) -> Pretrained:
    """The network."""
    return inception.open_inception(self.weights, self.dtype)

  @property
  def names(self):
    return ('fid_inception_v3',)

  def check(self):
    _ = self.model_part.config

  def load(self):
    params = {'inception': self.model_part.load()}
    if not self.reference_from or not self.running_from:
      width = params['inception']['fc']['kernel'].shape[0]
      # any positive features do: this branch serves tests and benchmarks
      real, kept = np.random.default_rng(0).gamma(1.0, size=(2, 64, width))
      real, kept = (stats.Statistics.of_batch(x, x[:, :2]) for x in (real, kept))
      return params | {'statistics': tabulate_fid(kept, real.mu, real.sigma)}
    stats.check_preprocessing(
      self.running_from, stats.read_arrays(self.running_from), self.preprocessing
    )
    return self.update_statistics(params, stats.Statistics.read_npz(self.running_from))

  def update_statistics(self, params, kept: stats.Statistics):
    """Parameters for the pictures `kept`; `kept + Statistics.of_batch(..)` adds new ones."""
    reference = _read_reference(self.reference_from, self.preprocessing)
    return params | {'statistics': tabulate_fid(kept, *reference)}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = observed['image']
    rows = images.reshape(-1, *images.shape[2:])
    features, _ = inception.features_and_logits(
      self.model_part, params['inception'], rows, self.preprocessing
    )
    fall = fid_reduction(params['statistics'], features)
    return {self.names[0]: fall.reshape(images.shape[:2])}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    config = self.model_part.config
    return core.Cost(verify=1, flops=modeling.count_flops(config) + _reduction_flops(config))


@functools.cache
def _read_reference(path, preprocessing):
  arrays = stats.read_arrays(path)
  stats.check_preprocessing(path, arrays, preprocessing)
  return stats.gaussian_of(path, arrays)


def tabulate_fid(kept: stats.Statistics, mu, sigma) -> dict:
  """Tables for `fid_reduction`, from the pictures kept and the reference `mu [D]`, `sigma [D, D]`;
  computed in float64, returned as float32.

  Raises:
    ConfigError: fewer than 2 pictures kept, or different numbers of features.
  """
  if kept.count < 2:
    raise ConfigError(f'running_from: {kept.count} pictures kept; at least 2 are needed')
  if kept.mu.shape != mu.shape:
    raise ConfigError(
      f'running_from has {len(kept.mu)} features, reference_from has {len(mu)}: must be the same'
    )
  # tr sqrt(cov sigma) = tr sqrt(A cov A), and A cov A is symmetric
  n, spread = kept.count, kept.sigma
  mixed, half = stats.mixed_covariance(sigma, spread)
  values, vectors = np.linalg.eigh(mixed)
  # the covariance has no negative eigenvalues; rounding does
  values = np.maximum(values, 0)
  # eigenvalues of C, and nodes t around the largest of `mixed`
  shrunk, top = values * (n - 1) / n, max(values.max(), 1e-30)
  nodes = np.exp(np.log(top) + np.arange(-REACH, REACH + 1))
  # what the shrinking of the covariance alone does to its trace and to the root
  fixed = -np.trace(spread) / n - 2 * (np.sqrt((n - 1) / n) - 1) * np.sqrt(values).sum()
  tables = {
    'mean': kept.mu,
    'offset': 2 * (kept.mu - mu) / (n + 1),
    'stretch': 1 / (n + 1) ** 2 + 1 / (n + 1),
    'fixed': fixed,
    'turn': half @ vectors / np.sqrt(n + 1),  # d -> w in the eigenvectors of C, [D, D]
    'inverse': 1 / (shrunk[:, None] + nodes),  # of C + t, [D, J]
    'share': np.sqrt(nodes) / (2 * np.pi),  # of each node in the integral, [J]
  }
  return {k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}


def fid_reduction(tables, features):
  """FID now minus FID after adding one row of features `[R, D]`; returns `[R]`."""
  # the result is a small difference of large terms, so products are not rounded to bfloat16
  dot = functools.partial(jnp.matmul, precision='highest')
  d = features - tables['mean']
  w = dot(d, tables['turn'])
  root = dot(jnp.log1p(dot(w * w, tables['inverse'])), tables['share'])
  change = dot(d, tables['offset']) + tables['stretch'] * (d * d).sum(-1) + tables['fixed']
  return 2 * root - change


@functools.cache
def _reduction_flops(config):
  """FLOPs of the two products in `fid_reduction`, for one picture."""
  _, params = modules.abstract_module(lambda: modeling.build_model(config))
  width = params['fc']['kernel'].shape[0]
  return 2 * width * (width + int(2 * REACH) + 1)
