"""Inception Score oracle: log-probability of the class asked for, or the rise of the running score.

Ma et al. (2025, arXiv 2501.09732) search ImageNet with the final metric itself, for the Inception
Score by the probability that InceptionV3 gives the class. That is `log_prob_inception_v3`, of
prompts that are classes: they have a label, or their text is a class number. With pictures kept so
far (`running_from`), any prompts will do and `log_is_inception_v3` is how much the logarithm of
their Inception Score, all in one split, would rise with this picture: exact. To first order it is
(KL(p(y|x) || p(y)) - log IS) / (n + 1), so of the candidates it prefers what is sure and rare so
far, the first what is sure. Probabilities have no bias, as in the Inception Score. An oracle: never
report the IS of a search on it as a finding.

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
  """The oracle.

  Attributes:
    weights, dtype, preprocessing: as in `verifiers.fid`.
    running_from: '' scores the class; else statistics of the pictures kept so far.
    label_map: '' where classes are output numbers of the network (whose order is not ImageNet's);
      else the file imagenet_2012_challenge_label_map_proto.pbtxt of inception-2015-12-05.tgz, and
      classes are ImageNet's usual numbers 0 .. 999 or WordNet ids such as n01440764.
  """

  weights: str = ''
  running_from: str = ''
  label_map: str = ''
  dtype: str = 'float32'
  preprocessing: str = 'pytorch_fid'

  gives = frozenset({'gradient'})

  def __post_init__(self):
    inception.check_preprocessing(self.preprocessing)
    _ = self.inception  # refuses what is unknown

  @property
  def inception(self) -> Pretrained:
    """The network."""
    return inception.open_inception(self.weights, self.dtype)

  @property
  def names(self):
    return ('log_is_inception_v3' if self.running_from else 'log_prob_inception_v3',)

  def check(self):
    _ = self.inception.config

  def load(self):
    params = {'inception': self.inception.load()}
    if not self.running_from:
      return params
    stats.check_preprocessing(
      self.running_from, stats.read_arrays(self.running_from), self.preprocessing
    )
    return self.update_statistics(params, stats.Statistics.load(self.running_from))

  def update_statistics(self, params, kept: stats.Statistics):
    """Parameters for other pictures kept: `kept + Statistics.of(features, logits)` of new ones."""
    return params | {'statistics': tabulate_is(kept)}

  def tokenize(self, prompts):
    """The network's output for each prompt, `{'output': [B]}`; nothing with `running_from`."""
    if self.running_from:
      return {}
    setting = 'verifier.label_map'
    if not self.label_map:
      return {'output': classes.class_labels(prompts, self.inception.config.classes, setting)}
    ids, outputs = classes.inception_outputs(self.label_map, setting)
    return {'output': outputs[classes.class_labels(prompts, len(ids), setting, ids)]}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = observed['image']
    rows = images.reshape(-1, *images.shape[2:])
    _, logits = inception.features_and_logits(
      self.inception, params['inception'], rows, self.preprocessing
    )
    logs = jax.nn.log_softmax(logits).reshape(*images.shape[:2], -1)
    if self.running_from:
      return {self.names[0]: log_is_gain(params['statistics'], logs)}
    # a product and not a gather: so a NaN stays with its picture
    chosen = jax.nn.one_hot(vctx['output'], logs.shape[-1])[:, None]
    return {self.names[0]: jnp.sum(logs * chosen, -1)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=modeling.flops(self.inception.config))


def tabulate_is(kept: stats.Statistics) -> dict:
  """What `log_is_gain` needs of the pictures kept.

  Raises:
    ConfigError: there are none.
  """
  if kept.count < 1:
    raise ConfigError('running_from: no pictures kept; at least 1 is needed')
  found = {'p': kept.probs / kept.count, 'plogp': kept.plogp / kept.count, 'n': kept.count}
  return {k: jnp.asarray(v, jnp.float32) for k, v in found.items()}


def log_is_gain(tables, logs):
  """log IS with each picture added minus log IS now, `[...]`, of log-probabilities `[..., K]`.

  Written so that nothing large cancels: H(q) - H(p) with q = p + (x - p) / (n + 1) is
  - sum (q - p) log p - sum q log(q / p).
  """
  share, p = 1 / (tables['n'] + 1), jnp.maximum(tables['p'], 1e-30)
  x = jnp.exp(logs)
  step = share * (x - p)
  marginal = -(step * jnp.log(p) + (p + step) * jnp.log1p(step / p)).sum(-1)
  return marginal + share * ((x * jnp.maximum(logs, -1e30)).sum(-1) - tables['plogp'])
