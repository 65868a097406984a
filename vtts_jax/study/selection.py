"""Selection rules: which of N samples to return, by its score or by its neighbours.

    best      the largest total (best-of-N)
    weighted  weighted best-of-N: totals are summed over equal answers (Snell et al., 2408.03314,
              appendix on weighted aggregation; Li et al., 2206.02336)
    medoid    majority vote without a verifier (self-consistency, Wang et al., 2203.11171)

No two pictures are equal, so a kernel in feature space stands for 'equal answers'. The weighted
score of a sample is `sum_j w_j k(f_i, f_j)`, where `w` is the softmax of the totals in standard
deviations and `k(f, g) = exp(-|f - g|^2 / h)`. The bandwidth h is the median squared distance over
log N (Liu & Wang, 1608.04471, section 5): with it the other samples together weigh as much as the
sample itself. Where features are a few distinct points far apart, the weighted score is the sum
over equal answers and the medoid is the most frequent answer. Tested against both and against brute
force. Runs on the host, in numpy.

Letters: N samples of one prompt, D features.
"""

import numpy as np

SELECTION_RULES = ('best', 'weighted', 'medoid')


def squared_distances(features: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances `[N, N]` of features `[N, D]`."""
  features = np.asarray(features, np.float64)
  square = (features**2).sum(1)
  # rounding may leave a distance of near-equal samples below 0, of which there is no root
  found = np.maximum(square[:, None] + square - 2 * features @ features.T, 0)
  np.fill_diagonal(found, 0)
  return found


def pick_best(totals: np.ndarray) -> int:
  """Index of the largest of `totals [N]`; -1 where none is finite."""
  return int(np.argmax(totals)) if np.isfinite(totals).any() else -1


def pick_weighted(totals: np.ndarray, distances: np.ndarray, bandwidth: float | None = None) -> int:
  """Index of the sample with the largest kernel-weighted sum of totals.

  Args:
    totals: `[N]`; a sample whose total is not finite does not take part.
    distances: squared distances `[N, N]`.
    bandwidth: h > 0, in squared distance; None for the median rule.

  Returns:
    An index, among ties that of the larger total; -1 where no total is finite.
  """
  valid = np.flatnonzero(np.isfinite(totals))
  if not len(valid):
    return -1
  own, near = totals[valid].astype(np.float64), distances[np.ix_(valid, valid)]
  # in standard deviations, so that a rule means the same for verifiers of any scale
  z = (own - own.mean()) / (own.std() or 1.0)
  if bandwidth is None:
    # each pair once, and no sample with itself: its distance of 0 would pull the median down
    pairs = near[np.triu_indices(len(valid), 1)]
    bandwidth = np.median(pairs) / np.log(len(valid)) if len(pairs) else 1.0
  # a bandwidth of 0 (most samples are equal) leaves the sum over samples that are exactly equal
  kernel = np.exp(-near / bandwidth) if bandwidth > 0 else (near == 0).astype(float)
  return int(valid[_argmax_with_ties(kernel @ np.exp(z - z.max()), own)])


def pick_medoid(valid: np.ndarray, distances: np.ndarray) -> int:
  """Index of the sample with the least mean distance to the others, the first among ties.

  Args:
    valid: `[N]` bool, which samples take part.
    distances: squared distances `[N, N]`; the mean is over their roots.

  Returns:
    An index; -1 where no sample is valid.
  """
  own = np.flatnonzero(valid)
  if not len(own):
    return -1
  mean = np.sqrt(distances[np.ix_(own, own)]).mean(1)
  return int(own[_argmax_with_ties(-mean, -np.arange(len(own), dtype=float))])


def _argmax_with_ties(values, tiebreak) -> int:
  """Index of the largest value; among values equal to rounding, of the largest tiebreak."""
  # sums of equal terms in another order differ by rounding, which must not decide
  close = np.flatnonzero(values >= values.max() - 1e-9 * max(abs(values).max(), 1e-30))
  return int(close[np.argmax(tiebreak[close])])


def pick_samples(totals: list[np.ndarray], features: np.ndarray | None) -> dict[str, list[int]]:
  """Which of the first n samples each rule returns, for rising n.

  Args:
    totals: `[n]` for each prefix. A prefix has totals of its own, because an ensemble's totals are
      relative to the candidates at hand.
    features: `[N, D]`, N the largest n; None where there are none, which leaves the rule 'best'.

  Returns:
    `{rule: [index, ...]}`, an index for each prefix; -1 where no sample is valid.
  """
  picks = {'best': [pick_best(t) for t in totals]}
  if features is not None:
    # a sample whose features are not finite is out of the two rules that need them
    valid = np.isfinite(features).all(1)
    distances = squared_distances(np.where(valid[:, None], features, 0))
    picks |= {'weighted': [], 'medoid': []}
    for own in totals:
      n = len(own)
      own = np.where(valid[:n], own, -np.inf)
      picks['weighted'].append(pick_weighted(own, distances[:n, :n]))
      picks['medoid'].append(pick_medoid(np.isfinite(own), distances[:n, :n]))
  return picks
