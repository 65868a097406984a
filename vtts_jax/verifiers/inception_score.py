"""Inception Score oracle: log-probability of the prompt's class, or gain of the running score.

Ma et al. (2025, arXiv 2501.09732) search ImageNet with the final metric itself; for the Inception
Score they use the probability that InceptionV3 gives to the class. That is `log_prob_inception_v3`;
its prompts have a label, or their text is a class number. With `running_from` (the statistics of
the pictures kept so far) any prompts are allowed. The score `log_is_inception_v3` is then the exact
gain of the log Inception Score of these pictures, in one split, from adding this picture. To first
order it is (KL(p(y|x) || p(y)) - log IS) / (n + 1): it prefers pictures whose class is certain and
rare so far, while the first score only prefers certainty. The logits omit the bias, as in the
published Inception Score. It is an oracle: never report the IS of a search that used it as a
result.

Letters: B prompts · M candidates · K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import classes
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import inception
from vtts_jax.metrics import statistics as stats
from vtts_jax.models.inception import modeling
from vtts_jax.models.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class InceptionScore(core.Verifier):
  """The Inception Score as a verifier; see the head of the file.

  Attributes:
    weights, dtype, preprocessing: as in `verifiers.fid`.
    running_from: '' to score the class; else a file with statistics of the pictures kept so far.
    label_map: '' if class numbers are outputs of the network (its order is not ImageNet's). Or the
      file imagenet_2012_challenge_label_map_proto.pbtxt of inception-2015-12-05.tgz; classes are
      then ImageNet's usual numbers 0 .. 999 or WordNet ids such as n01440764.
  """

  weights: str = ''
  running_from: str = ''
  label_map: str = ''
  dtype: str = 'float32'
  preprocessing: str = 'pytorch_fid'

  gives = frozenset({'gradient'})

  def __post_init__(self):
    inception.check_preprocessing(self.preprocessing)
    _ = self.model_part  # raises on unknown settings

  @property
  def model_part(self) -> Pretrained:
    """The network."""
    return inception.open_inception(self.weights, self.dtype)

  @property
  def names(self):
    return ('log_is_inception_v3' if self.running_from else 'log_prob_inception_v3',)

  def check(self):
    _ = self.model_part.config

  def load(self):
    params = {'inception': self.model_part.load()}
    if not self.running_from:
      return params
    stats.check_preprocessing(
      self.running_from, stats.read_arrays(self.running_from), self.preprocessing
    )
    return self.update_statistics(params, stats.Statistics.read_npz(self.running_from))

  def update_statistics(self, params, kept: stats.Statistics):
    """Parameters for the pictures `kept`; `kept + Statistics.of_batch(..)` adds new ones."""
    return params | {'statistics': tabulate_is(kept)}

  def tokenize(self, prompts):
    """The network's output for each prompt, `{'output': [B]}`; {} with `running_from`."""
    if self.running_from:
      return {}
    setting = 'verifier.label_map'
    if not self.label_map:
      return {'output': classes.class_labels(prompts, self.model_part.config.classes, setting)}
    # the network's outputs are not in ImageNet's order: the label map translates
    ids, outputs = classes.inception_outputs(self.label_map, setting)
    return {'output': outputs[classes.class_labels(prompts, len(ids), setting, ids)]}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = observed['image']
    rows = images.reshape(-1, *images.shape[2:])
    _, logits = inception.features_and_logits(
      self.model_part, params['inception'], rows, self.preprocessing
    )
    logs = jax.nn.log_softmax(logits).reshape(*images.shape[:2], -1)
    # the running score does not depend on the prompt
    if self.running_from:
      return {self.names[0]: log_is_gain(params['statistics'], logs)}
    # a product instead of a gather, so that a NaN stays with its picture
    chosen = jax.nn.one_hot(vctx['output'], logs.shape[-1])[:, None]
    return {self.names[0]: jnp.sum(logs * chosen, -1)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=modeling.count_flops(self.model_part.config))


def tabulate_is(kept: stats.Statistics) -> dict:
  """Tables for `log_is_gain`, from the pictures kept.

  Raises:
    ConfigError: no pictures are kept.
  """
  if kept.count < 1:
    raise ConfigError('running_from: no pictures kept; at least 1 is needed')
  found = {'p': kept.probs / kept.count, 'plogp': kept.plogp / kept.count, 'n': kept.count}
  return {k: jnp.asarray(v, jnp.float32) for k, v in found.items()}


def log_is_gain(tables, logs):
  """log IS after adding each picture minus log IS now, `[...]`, of log-probabilities `[..., K]`.

  To avoid the difference of two large entropies, H(q) - H(p) with q = p + (x - p) / (n + 1) is
  written as - sum (q - p) log p - sum q log(q / p).
  """
  # a class never seen so far has p = 0; the bound keeps its logarithm finite
  share, p = 1 / (tables['n'] + 1), jnp.maximum(tables['p'], 1e-30)
  x = jnp.exp(logs)
  # q - p, the change of the marginal
  step = share * (x - p)
  marginal = -(step * jnp.log(p) + (p + step) * jnp.log1p(step / p)).sum(-1)
  return marginal + share * ((x * jnp.maximum(logs, -1e30)).sum(-1) - tables['plogp'])
