"""FID oracle: by how much a picture would lower the FID of the pictures kept so far.

Ma et al. (2025, arXiv 2501.09732) search ImageNet with the final metric itself: of the candidates,
the one that makes the running FID least. A verifier has no memory, so the pictures kept so far come
as a file of statistics, and between two batches of prompts the caller adds what was kept and takes
`updated` parameters. The score `fid_inception_v3` is FID before minus FID after adding this one
picture: exact, not an expansion. An oracle: never report the FID of a search on it as a finding.

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
from vtts_jax.components import build_dataclass
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import statistics as stats
from vtts_jax.models import modules
from vtts_jax.models.inception import convert, modeling

DTYPES = ('float32', 'bfloat16')
REACH = 42.0  # natural logarithms by which the nodes go below and above the largest eigenvalue


@dataclasses.dataclass(frozen=True)
class Fid(core.Verifier):
  """The oracle.

  Attributes:
    model_from: InceptionV3 of 2015-12-05: a safetensors file, a folder or a repository
      `owner/name@revision` of the hub (none of those known has it; see models/inception/README.md).
    reference_from: statistics of real pictures (`mu`, `sigma`: pytorch-fid, ADM, or ours).
    running_from: statistics of the pictures kept so far, at least 2 and better more than features,
      as `python -m vtts_jax.metrics.fid --save` or `Statistics.save` write them.
    random: '' loads; 'tiny' or a released size makes random weights, and random statistics unless
      both files are named.
    dtype: of the weights, 'float32' or 'bfloat16'; the statistics are float32.
    look: how the network sees a picture: 'pytorch_fid' or, for references of ADM, 'tensorflow'.
  """

  model_from: str = ''
  reference_from: str = ''
  running_from: str = ''
  random: str = ''
  dtype: str = 'float32'
  look: str = 'pytorch_fid'

  def __post_init__(self):
    check_settings(self)
    if not self.random and not (self.reference_from and self.running_from):
      raise ConfigError(
        f'verifier.reference_from={self.reference_from!r}, running_from={self.running_from!r}: '
        f'both must name a file of statistics'
      )

  @property
  def names(self):
    return ('fid_inception_v3',)

  @property
  def config(self) -> modeling.Config:
    return convert.config_at(self.model_from, self.random)

  def load(self):
    model = convert.params_at(self.model_from, self.random, self.dtype)
    if not self.reference_from or not self.running_from:
      draw = np.random.default_rng(0).gamma(1.0, size=(2, 64, model['fc']['kernel'].shape[0]))
      real, kept = (stats.Statistics.of(x, x[:, :2]) for x in draw)
      return {'model': model, 'oracle': oracle(kept, real.mu, real.sigma)}
    stats.check_look(self.running_from, stats.read(self.running_from), self.look)
    return self.updated({'model': model}, stats.Statistics.load(self.running_from))

  def updated(self, params, kept: stats.Statistics):
    """Parameters for other pictures kept: `kept + Statistics.of(features, logits)` of new ones."""
    return params | {'oracle': oracle(kept, *_reference(self.reference_from, self.look))}

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    features = see(self, params['model'], images)[1]
    return {self.names[0]: fall(params['oracle'], features).reshape(images.shape[:2])}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=modeling.flops(self.config) + _flops(self.config))

  def check(self):
    _ = self.config


def check_settings(ver) -> None:
  """Raises `ConfigError` on a random, dtype or look that there is none of."""
  if ver.random and ver.random not in modeling.SIZES:
    raise ConfigError(
      f"verifier.random={ver.random!r}: must be '' or one of {', '.join(modeling.SIZES)}"
    )
  for name, allowed in (('dtype', DTYPES), ('look', modeling.LOOKS)):
    if getattr(ver, name) not in allowed:
      raise ConfigError(
        f'verifier.{name}={getattr(ver, name)!r}: must be one of {", ".join(allowed)}'
      )


def see(ver, params, images):
  """The network and the features `[B M, D]` of images `[B, M, H, W, 3]`."""
  model = modules.merge(convert.graph(ver.config), params)
  rows = images.reshape(-1, *images.shape[2:])
  return model, model(modeling.prepare(rows, ver.config.side, ver.look))


@functools.cache
def _reference(place, look):
  found = stats.read(place)
  stats.check_look(place, found, look)
  return stats.gaussian(place, found)


def oracle(kept: stats.Statistics, mu, sigma) -> dict:
  """What `fall` needs of the pictures kept and the reference `mu [D]`, `sigma [D, D]`; float64 in
  here, float32 what comes out.

  Raises:
    ConfigError: fewer than 2 pictures kept, other numbers of features.
  """
  if kept.count < 2:
    raise ConfigError(f'running_from: {kept.count} pictures kept; at least 2 are needed')
  if kept.mu.shape != mu.shape:
    raise ConfigError(
      f'running_from has {len(kept.mu)} features, reference_from has {len(mu)}: must be the same'
    )
  n, spread, half = kept.count, kept.sigma, stats.root(sigma)
  values, vectors = np.linalg.eigh(half @ spread @ half)
  values = np.maximum(values, 0)
  shrunk, top = values * (n - 1) / n, max(values.max(), 1e-30)
  nodes = np.exp(np.log(top) + np.arange(-REACH, REACH + 1))
  fixed = -np.trace(spread) / n - 2 * (np.sqrt((n - 1) / n) - 1) * np.sqrt(values).sum()
  found = {
    'mean': kept.mu,
    'offset': 2 * (kept.mu - mu) / (n + 1),
    'stretch': 1 / (n + 1) ** 2 + 1 / (n + 1),
    'fixed': fixed,
    'turn': half @ vectors / np.sqrt(n + 1),  # [D, D]
    'table': 1 / (shrunk[:, None] + nodes),  # [D, J]
    'share': np.sqrt(nodes) / (2 * np.pi),
  }
  return {k: jnp.asarray(v, jnp.float32) for k, v in found.items()}


def fall(oracle, features):
  """FID now minus FID with each of features `[R, D]` added, `[R]`."""
  dot = functools.partial(jnp.matmul, precision='highest')
  d = features - oracle['mean']
  w = dot(d, oracle['turn'])
  root = dot(jnp.log1p(dot(w * w, oracle['table'])), oracle['share'])
  change = dot(d, oracle['offset']) + oracle['stretch'] * (d * d).sum(-1) + oracle['fixed']
  return 2 * root - change


@functools.cache
def _flops(config):
  """Of the two products of `fall` for one picture."""
  width = modules.abstract(lambda: modeling.build(config))[1]['fc']['kernel'].shape[0]
  return 2 * width * (width + int(2 * REACH) + 1)


def build(**given):
  return build_dataclass(Fid, **given)
