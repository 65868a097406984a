"""Which of N samples to return: selection rules beside the best score.

    best      the largest total (best-of-N)
    weighted  weighted best-of-N: totals are summed over equal answers (Snell et al., 2408.03314,
              appendix on weighted aggregation; Li et al., 2206.02336)
    medoid    majority vote without a verifier (self-consistency, Wang et al., 2203.11171)

No two pictures are equal, so 'equal answers' becomes a kernel in feature space: a candidate's
weighted score is `sum_j w_j k(f_i, f_j)` with `w` the softmax of the totals in standard deviations
and `k(f, g) = exp(-|f - g|^2 / h)`; h is the median squared distance divided by log N (Liu & Wang,
1608.04471, section 5), at which the other samples together weigh as much as the candidate itself.
Where features are a few distinct points far apart this is the sum over equal answers, and the
medoid is the most frequent one. Tested against both and against brute force. Host side, numpy.

Letters: N samples of one prompt, D features.
"""

import numpy as np

RULES = ('best', 'weighted', 'medoid')


def squared_distances(features: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances `[N, N]` of features `[N, D]`."""
  features = np.asarray(features, np.float64)
  square = (features**2).sum(1)
  found = np.maximum(square[:, None] + square - 2 * features @ features.T, 0)
  np.fill_diagonal(found, 0)
  return found


def pick_best(totals: np.ndarray) -> int:
  """Index of the largest of `totals [N]`; -1 where none is finite."""
  return int(np.argmax(totals)) if np.isfinite(totals).any() else -1


def pick_weighted(totals: np.ndarray, apart: np.ndarray, bandwidth: float | None = None) -> int:
  """Index of the largest kernel-weighted sum of totals.

  Args:
    totals: `[N]`; samples that are not finite are out.
    apart: squared distances `[N, N]`.
    bandwidth: h > 0, in squared distance; None for the median rule.

  Returns:
    An index, the better total's among ties; -1 where no total is finite.
  """
  valid = np.flatnonzero(np.isfinite(totals))
  if not len(valid):
    return -1
  own, near = totals[valid].astype(np.float64), apart[np.ix_(valid, valid)]
  z = (own - own.mean()) / (own.std() or 1.0)
  if bandwidth is None:
    pairs = near[np.triu_indices(len(valid), 1)]
    bandwidth = np.median(pairs) / np.log(len(valid)) if len(pairs) else 1.0
  kernel = np.exp(-near / bandwidth) if bandwidth > 0 else (near == 0).astype(float)
  return int(valid[_first(kernel @ np.exp(z - z.max()), own)])


def pick_medoid(valid: np.ndarray, apart: np.ndarray) -> int:
  """Index of the sample with the least mean distance to the others, the first among ties.

  Args:
    valid: `[N]` bool, which samples count.
    apart: squared distances `[N, N]`; the mean is over their roots.
  """
  own = np.flatnonzero(valid)
  if not len(own):
    return -1
  mean = np.sqrt(apart[np.ix_(own, own)]).mean(1)
  return int(own[_first(-mean, -np.arange(len(own), dtype=float))])


def _first(values, tiebreak) -> int:
  """The largest value; among those equal to rounding, the largest tiebreak."""
  close = np.flatnonzero(values >= values.max() - 1e-9 * max(abs(values).max(), 1e-30))
  return int(close[np.argmax(tiebreak[close])])


def pick_samples(totals: list[np.ndarray], features: np.ndarray | None) -> dict[str, list[int]]:
  """What each rule returns of the first n samples, for rising n.

  Args:
    totals: one `[n]` for each prefix (totals may be relative to the candidates at hand).
    features: `[N, D]`, N the largest n; None where there are none: then only 'best' is given.

  Returns:
    `{rule: [index, ...]}`, one for each prefix; -1 where no sample is valid.
  """
  picks = {'best': [pick_best(t) for t in totals]}
  if features is not None:
    # a sample whose features are not finite is out of the two rules that need them
    valid = np.isfinite(features).all(1)
    apart = squared_distances(np.where(valid[:, None], features, 0))
    picks |= {'weighted': [], 'medoid': []}
    for own in totals:
      n = len(own)
      own = np.where(valid[:n], own, -np.inf)
      picks['weighted'].append(pick_weighted(own, apart[:n, :n]))
      picks['medoid'].append(pick_medoid(np.isfinite(own), apart[:n, :n]))
  return picks
