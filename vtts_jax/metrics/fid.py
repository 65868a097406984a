"""FID, Inception Score, precision and recall: `python -m vtts_jax.metrics.fid PICTURES REFERENCE`

PICTURES is a folder, an .npz of pictures (`arr_0`) or a file of statistics. REFERENCE is the same:
a reference batch of ADM, the statistics of pytorch-fid, or what `--save` of an earlier call wrote.
The command prints a table, and as its last line everything as JSON. FID is of Heusel et al. (2017,
arXiv 1706.08500), the Inception Score of Salimans et al. (2016, 1606.03498), precision and recall
of Kynkaanniemi et al. (2019, 1904.06991), computed on Inception's features as in ADM's evaluator.

Pictures are read as everywhere (transparency on white, 16 bits scaled to 8) but for their EXIF
orientation, which turns none: so does pytorch-fid.

A FID depends on the number of pictures (fewer pictures give a higher FID), on how the network sees
them (`--preprocessing`) and on the weights. Numbers that differ in any of these do not compare. All
sums are float64 on the host.

Letters: N, M pictures · D features · K classes.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.metrics import inception
from vtts_jax.metrics import statistics as stats
from vtts_jax.models.inception import modeling

SHUFFLE = 2020  # seed of the order of pictures, of the Inception Score's splits


def frechet_distance(a, b) -> float:
  """Returns the Frechet distance of two Gaussians `(mu [D], sigma [D, D])`.

  On the features of InceptionV3 this is the FID.

  Raises:
    ValueError: the two have different numbers of features.
  """
  (mean, sigma), (other, tau) = ([np.asarray(x, np.float64) for x in pair] for pair in (a, b))
  if mean.shape != other.shape:
    raise ValueError(f'{mean.shape} features against {other.shape}')
  # rounding leaves tiny negative eigenvalues where there are fewer pictures than features
  values = np.linalg.eigvalsh(stats.mixed_covariance(sigma, tau)[0])
  mixed = np.sqrt(np.maximum(values, 0)).sum()
  return float(np.sum((mean - other) ** 2) + np.trace(sigma) + np.trace(tau) - 2 * mixed)


def inception_score(logits, splits: int = 10) -> tuple[float, float]:
  """Returns the Inception Score's mean and standard deviation over splits of logits `[N, K]`.

  The score of a split is exp(mean KL(p(y|x) || p(y))), with p(y) over the split. Pictures are
  shuffled before they are cut into splits, with torch-fidelity's own seed: files are often in the
  order of classes, and a split of few classes has a low score. The published protocol is 10 splits
  of 50,000 pictures.

  Raises:
    ConfigError: `splits` is not in 1 .. N.
  """
  n = len(logits)
  if not 1 <= splits <= n:
    raise ConfigError(f'splits={splits}: must be 1 .. {n}, the number of pictures')
  order = np.random.RandomState(SHUFFLE).permutation(n)
  p, logs = stats.class_probabilities(np.asarray(logits)[order])
  scores = []
  for i in range(splits):
    part = slice(i * n // splits, (i + 1) * n // splits)
    # the floor guards the logarithm; a class of no probability adds 0 times a number
    marginal = np.log(np.maximum(p[part].mean(0), 1e-300))
    scores.append(np.exp((p[part] * (logs[part] - marginal)).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, made, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
  """Returns precision and recall of features `made [N, D]` against `real [M, D]`.

  A set's manifold is the union of balls around its members; each ball reaches to the member's k-th
  nearest neighbour. Precision is the share of `made` inside the manifold of `real`, and recall is
  the share of `real` inside the manifold of `made`.

  Args:
    chunk: rows whose distances are computed at a time.

  Raises:
    ConfigError: a set has no more than k members.
  """
  if min(len(real), len(made)) <= k:
    raise ConfigError(f'k={k}: must be below {min(len(real), len(made))}, the smaller set')
  # distances near the origin lose fewer digits of float32
  centre = np.mean(real, 0)
  real, made = (np.asarray(x - centre, np.float32) for x in (real, made))
  precision = _share_inside(made, real, _neighbour_reach(real, k, chunk), chunk)
  return precision, _share_inside(real, made, _neighbour_reach(made, k, chunk), chunk)


def _squared_distances(a, b):
  """Returns the squared distances `[N, M]` between the rows of both."""
  lengths = (a * a).sum(1)[:, None] + (b * b).sum(1)
  return np.maximum(lengths - 2 * a @ b.T, 0)


def _neighbour_reach(x, k, chunk):
  """Returns the squared distance of every row to its k-th neighbour."""
  # rank 0 is the row itself, so rank k is the k-th neighbour
  rows = (x[i : i + chunk] for i in range(0, len(x), chunk))
  return np.concatenate([np.partition(_squared_distances(r, x), k, axis=1)[:, k] for r in rows])


def _share_inside(x, centres, reach, chunk):
  """Returns the share of rows that lie in any ball around the centres."""
  rows = (x[i : i + chunk] for i in range(0, len(x), chunk))
  inside = [(_squared_distances(r, centres) <= reach).any(1) for r in rows]
  return float(np.concatenate(inside).mean())


# ----------------------------------------------------------------------------------------- command


def measure_set(place, network: Callable, preprocessing: str, batch: int = 32) -> dict:
  """Measures a set of pictures, or reads its statistics.

  Args:
    place: folder, .npz of pictures, or file of statistics.
    network: function without arguments that returns what `inception.compiled_network` does; it is
      called only where pictures must be read.
    preprocessing: how the network sees pictures.
    batch: pictures at a time.

  Returns:
    {'mu', 'sigma', 'count' (None if a file does not say)}. Where there are pictures it also has
    'features', 'logits' and their `Statistics` as 'sums'.

  Raises:
    FileNotFoundError, ConfigError: as `inception.read_pictures` and `statistics.gaussian_of`.
  """
  known = {}
  # a file may hold statistics, pictures, or both, as ADM's reference batches do
  if os.path.isfile(place):
    found = stats.read_arrays(place)
    if 'mu' in found:
      stats.check_preprocessing(place, found, preprocessing)
      mu, sigma = stats.gaussian_of(place, found)
      count = int(found['count']) if 'count' in found else None
      known = {'mu': mu, 'sigma': sigma, 'count': count}
      if 'probs' in found:
        known['log_is'] = stats.Statistics.read_npz(place).log_is
      if not _holds_pictures(place):
        return known
  features, logits = inception.extract_features(inception.read_pictures(place), network(), batch)
  sums = stats.Statistics.of_batch(features, logits)
  # statistics in the file win: they may be of more pictures than the file holds
  if not known:
    if sums.count < 2:
      raise ConfigError(f'{str(place)!r} has 1 picture; at least 2 are needed')
    known = {'mu': sums.mu, 'sigma': sums.sigma, 'count': sums.count}
  return known | {'features': features, 'logits': logits, 'sums': sums}


def _holds_pictures(path):
  with open(path, 'rb') as handle, np.load(handle) as file:
    return 'arr_0' in file.files


def compare_sets(made: dict, real: dict, splits: int = 10, k: int = 3) -> dict:
  """Compares two results of `measure_set`.

  Returns:
    {'fid', 'inception_score', 'inception_score_std', 'splits', 'precision', 'recall', 'k', 'count',
    'reference_count', 'features'}; a number is None if a set has no pictures to measure it on.
  """
  out = {'fid': frechet_distance((made['mu'], made['sigma']), (real['mu'], real['sigma']))}
  score, spread = None, None
  if 'logits' in made:
    # small sets cannot be cut into as many splits
    splits = min(splits, len(made['logits']))
    score, spread = inception_score(made['logits'], splits)
  elif 'log_is' in made:
    # sums know no order, so they give one split over all pictures
    score, splits = float(np.exp(made['log_is'])), 1
  out |= {'inception_score': score, 'inception_score_std': spread, 'splits': splits}
  pair = None, None
  if 'features' in made and 'features' in real:
    pair = precision_recall(real['features'], made['features'], k)
  out |= {'precision': pair[0], 'recall': pair[1], 'k': k}
  counts = {'count': made['count'], 'reference_count': real['count']}
  return out | counts | {'features': len(made['mu'])}


def print_comparison(found: dict) -> None:
  """Prints the table, then the JSON line."""
  from rich.console import Console
  from rich.table import Table

  def format_number(name):
    return '-' if found[name] is None else f'{found[name]:.4f}'

  table = Table('metric', 'value', 'of')
  spread = found['inception_score_std']
  few = min(found[name] or np.inf for name in ('count', 'reference_count'))
  features = found['features']
  if few <= features:
    print(
      f'warning: {few} pictures are too few for a covariance of {features} features (more than '
      f'{features} are needed): this FID compares only with others of as many pictures',
      file=sys.stderr,
    )
  counts = f'{found["count"] or "?"} against {found["reference_count"] or "?"} pictures'
  table.add_row('FID', format_number('fid'), counts)
  more = '' if spread is None else f' +- {spread:.4f}'
  score = format_number('inception_score') + more
  table.add_row('Inception Score', score, f'{found["splits"]} splits')
  for name in ('precision', 'recall'):
    table.add_row(name, format_number(name), f'k = {found["k"]}')
  Console().print(table)
  print(json.dumps(found))


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns 1 and prints the message if the input is at fault."""
  parse = argparse.ArgumentParser('python -m vtts_jax.metrics.fid', description=__doc__)
  parse.add_argument('pictures', help='folder, .npz of pictures, or .npz of statistics')
  parse.add_argument('reference', help='the same')
  sizes = ', '.join(f'random:{name}' for name in modeling.SIZES)
  parse.add_argument(
    '--weights', default='', help=f'InceptionV3 of 2015-12-05, safetensors (or {sizes})'
  )
  parse.add_argument(
    '--preprocessing', default='pytorch_fid', help=', '.join(modeling.PREPROCESSINGS)
  )
  parse.add_argument('--batch', type=int, default=32, help='pictures at a time')
  parse.add_argument('--splits', type=int, default=10, help='of the Inception Score')
  parse.add_argument('--k', type=int, default=3, help='neighbours, of precision and recall')
  parse.add_argument('--save', default='', help='where to write the statistics of PICTURES')
  flags = parse.parse_args(argv)

  # loaded once, and not at all if both sides are statistics
  @functools.cache
  def load_network():
    return inception.compiled_network(flags.weights, flags.preprocessing)

  # what a user can mend is a message, not a traceback
  try:
    inception.check_preprocessing(flags.preprocessing, '--preprocessing')
    made, real = (
      measure_set(place, load_network, flags.preprocessing, flags.batch)
      for place in (flags.pictures, flags.reference)
    )
    # before the comparison is computed, which takes long
    if flags.save and 'sums' not in made:
      raise ConfigError(f'save={flags.save!r}: {flags.pictures!r} holds no pictures')
    found = compare_sets(made, real, flags.splits, flags.k)
    if flags.save:
      made['sums'].write_npz(flags.save, flags.preprocessing)
  except (ConfigError, FileNotFoundError) as error:
    print(error, file=sys.stderr)
    return 1
  print_comparison(found | {'preprocessing': flags.preprocessing, 'weights': flags.weights})
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
