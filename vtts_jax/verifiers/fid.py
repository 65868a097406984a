"""FID oracle: by how much a picture would lower the FID of the pictures kept so far.

Ma et al. (2025, arXiv 2501.09732) search ImageNet with the final metric itself: of the candidates,
the one that makes the running FID least. A verifier has no memory, so the pictures kept so far come
as a file of statistics, and between two batches of prompts the caller adds what was kept and takes
the parameters of `update_statistics`. The score `fid_inception_v3` is FID before minus FID after
adding this one picture: exact, not an expansion. An oracle: never report the FID of a search on it
as a finding.

With n pictures kept (mean m, covariance S / (n - 1)), reference (mu, sigma), A its symmetric root,
and d = x - m, the mean moves by d / (n + 1) and the covariance becomes (n - 1) / n of itself plus
d d' / (n + 1). All but the root of FID is then arithmetic. The root's trace is that of C + w w',
C = A cov A (n - 1) / n and w = A d / sqrt(n + 1), a matrix plus one of rank 1. As
sqrt(x) = 1 / pi * integral of x / (x + t) dt / sqrt(t), by the matrix determinant lemma

  tr sqrt(C + w w') - tr sqrt(C) = 1 / (2 pi) * integral of log(1 + w' (C + t)^-1 w) dt / sqrt(t),

which the trapezoid rule in log t gets to 1e-8 with 85 nodes: one product with the eigenvectors of C
and one with a table, for each picture.

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

REACH = 42.0  # natural logarithms by which the nodes go below and above the largest eigenvalue


@dataclasses.dataclass(frozen=True)
class Fid(core.Verifier):
  """The oracle.

  Attributes:
    weights: InceptionV3 of 2015-12-05, as in `models.pretrained` (no repository known has it as
      safetensors; see models/inception/README.md).
    reference_from: statistics of real pictures (`mu`, `sigma`: pytorch-fid, ADM, or ours).
    running_from: statistics of the pictures kept so far, at least 2 and better more than features,
      as `python -m vtts_jax.metrics.fid --save` or `Statistics.save` write them. Random weights
      need neither file: without them they take random statistics.
    dtype: of the weights, 'float32' or 'bfloat16'; the statistics are float32.
    preprocessing: how the network sees a picture: 'pytorch_fid' or, for references of ADM,
      'tensorflow'.
  """

  weights: str = ''
  reference_from: str = ''
  running_from: str = ''
  dtype: str = 'float32'
  preprocessing: str = 'pytorch_fid'

  gives = frozenset({'gradient'})

  def __post_init__(self):
    inception.check_preprocessing(self.preprocessing)
    if not self.inception.is_random and not (self.reference_from and self.running_from):
      raise ConfigError(
        f'verifier.reference_from={self.reference_from!r}, running_from={self.running_from!r}: '
        f'both must name a file of statistics'
      )

  @property
  def inception(self) -> Pretrained:
    """The network."""
    return inception.open_inception(self.weights, self.dtype)

  @property
  def names(self):
    return ('fid_inception_v3',)

  def check(self):
    _ = self.inception.config

  def load(self):
    params = {'inception': self.inception.load()}
    if not self.reference_from or not self.running_from:
      width = params['inception']['fc']['kernel'].shape[0]
      real, kept = np.random.default_rng(0).gamma(1.0, size=(2, 64, width))
      real, kept = (stats.Statistics.of(x, x[:, :2]) for x in (real, kept))
      return params | {'statistics': tabulate_fid(kept, real.mu, real.sigma)}
    stats.check_preprocessing(
      self.running_from, stats.read_arrays(self.running_from), self.preprocessing
    )
    return self.update_statistics(params, stats.Statistics.load(self.running_from))

  def update_statistics(self, params, kept: stats.Statistics):
    """Parameters for other pictures kept: `kept + Statistics.of(features, logits)` of new ones."""
    reference = _read_reference(self.reference_from, self.preprocessing)
    return params | {'statistics': tabulate_fid(kept, *reference)}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = observed['image']
    rows = images.reshape(-1, *images.shape[2:])
    features, _ = inception.features_and_logits(
      self.inception, params['inception'], rows, self.preprocessing
    )
    fall = fid_reduction(params['statistics'], features)
    return {self.names[0]: fall.reshape(images.shape[:2])}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    config = self.inception.config
    return core.Cost(verify=1, flops=modeling.flops(config) + _reduction_flops(config))


@functools.cache
def _read_reference(path, preprocessing):
  arrays = stats.read_arrays(path)
  stats.check_preprocessing(path, arrays, preprocessing)
  return stats.gaussian_of(path, arrays)


def tabulate_fid(kept: stats.Statistics, mu, sigma) -> dict:
  """What `fid_reduction` needs of the pictures kept and the reference `mu [D]`, `sigma [D, D]`;
  computed in float64, returned in float32.

  Raises:
    ConfigError: fewer than 2 pictures kept, other numbers of features.
  """
  if kept.count < 2:
    raise ConfigError(f'running_from: {kept.count} pictures kept; at least 2 are needed')
  if kept.mu.shape != mu.shape:
    raise ConfigError(
      f'running_from has {len(kept.mu)} features, reference_from has {len(mu)}: must be the same'
    )
  n, spread = kept.count, kept.sigma
  mixed, half = stats.mixed_covariance(sigma, spread)
  values, vectors = np.linalg.eigh(mixed)
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
  """FID now minus FID with each of features `[R, D]` added, `[R]`."""
  dot = functools.partial(jnp.matmul, precision='highest')
  d = features - tables['mean']
  w = dot(d, tables['turn'])
  root = dot(jnp.log1p(dot(w * w, tables['inverse'])), tables['share'])
  change = dot(d, tables['offset']) + tables['stretch'] * (d * d).sum(-1) + tables['fixed']
  return 2 * root - change


@functools.cache
def _reduction_flops(config):
  """Of the two products of `fid_reduction` for one picture."""
  _, params = modules.abstract_module(lambda: modeling.build(config))
  width = params['fc']['kernel'].shape[0]
  return 2 * width * (width + int(2 * REACH) + 1)
