"""Inception Score oracle: log-probability of the class asked for, or the rise of the running score.

Ma et al. (2025, arXiv 2501.09732) search ImageNet with the final metric itself, for the Inception
Score by the probability that InceptionV3 gives the class. That is `log_prob_inception_v3`, of
prompts that are classes. With pictures kept so far (`running_from`), any prompts will do and
`log_is_inception_v3` is how much the logarithm of their Inception Score, all in one split, would
rise with this picture: exact. To first order it is (KL(p(y|x) || p(y)) - log IS) / (n + 1), so of
the candidates it prefers what is sure and rare so far, the first what is sure. Probabilities have
no bias, as in the Inception Score. An oracle: never report the IS of a search on it as a finding.

Letters: B prompts · M candidates · K classes.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.components import build_dataclass
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import statistics as stats
from vtts_jax.models.inception import convert, modeling
from vtts_jax.verifiers.fid import check_settings, see


@dataclasses.dataclass(frozen=True)
class InceptionScore(core.Verifier):
  """The oracle.

  Attributes:
    model_from: as in `verifiers.fid`.
    running_from: '' scores the class; else statistics of the pictures kept so far.
    label_map: '' where prompts are output numbers of the network (whose order is not ImageNet's);
      else the file imagenet_2012_challenge_label_map_proto.pbtxt of inception-2015-12-05.tgz, and
      prompts are ImageNet's usual numbers 0 .. 999 or WordNet ids such as n01440764.
    random, dtype, look: as in `verifiers.fid`.
  """

  model_from: str = ''
  running_from: str = ''
  label_map: str = ''
  random: str = ''
  dtype: str = 'float32'
  look: str = 'pytorch_fid'

  def __post_init__(self):
    check_settings(self)

  @property
  def names(self):
    return ('log_is_inception_v3' if self.running_from else 'log_prob_inception_v3',)

  @property
  def config(self) -> modeling.Config:
    return convert.config_at(self.model_from, self.random)

  def load(self):
    params = {'model': convert.params_at(self.model_from, self.random, self.dtype)}
    if not self.running_from:
      return params
    stats.check_look(self.running_from, stats.read(self.running_from), self.look)
    return self.updated(params, stats.Statistics.load(self.running_from))

  def updated(self, params, kept: stats.Statistics):
    """Parameters for other pictures kept: `kept + Statistics.of(features, logits)` of new ones."""
    return params | {'oracle': oracle(kept)}

  def tokenize(self, texts):
    if self.running_from:
      return {}
    outputs = _outputs(self.label_map) if self.label_map else {}
    known = outputs or {str(i): i for i in range(self.config.classes)}
    strange = [text for text in texts if text.strip() not in known]
    if strange:
      allowed = '0 .. 999 or a WordNet id' if outputs else f'0 .. {self.config.classes - 1}'
      raise ConfigError(
        f'prompts: {strange[0]!r} is no class; must be {allowed} '
        f'(verifier.label_map={self.label_map!r}; with running_from any prompt will do)'
      )
    return {'label': np.array([known[text.strip()] for text in texts], np.int32)}

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    model, features = see(self, params['model'], images)
    logs = jax.nn.log_softmax(model.logits(features)).reshape(*images.shape[:2], -1)
    if self.running_from:
      return {self.names[0]: rise(params['oracle'], logs)}
    chosen = jax.nn.one_hot(vctx['label'], logs.shape[-1])[:, None]  # a NaN stays with its picture
    return {self.names[0]: jnp.sum(logs * chosen, -1)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    return core.Cost(verify=1, flops=modeling.flops(self.config))

  def check(self):
    _ = self.config


def oracle(kept: stats.Statistics) -> dict:
  """What `rise` needs of the pictures kept, at least one."""
  if kept.count < 1:
    raise ConfigError('running_from: no pictures kept; at least 1 is needed')
  found = {'p': kept.probs / kept.count, 'plogp': kept.plogp / kept.count, 'n': kept.count}
  return {k: jnp.asarray(v, jnp.float32) for k, v in found.items()}


def rise(oracle, logs):
  """log IS with each picture added minus log IS now, `[...]`, of log-probabilities `[..., K]`.

  Written so that nothing large cancels: H(q) - H(p) with q = p + (x - p) / (n + 1) is
  - sum (q - p) log p - sum q log(q / p).
  """
  share, p = 1 / (oracle['n'] + 1), jnp.maximum(oracle['p'], 1e-30)
  x = jnp.exp(logs)
  step = share * (x - p)
  marginal = -(step * jnp.log(p) + (p + step) * jnp.log1p(step / p)).sum(-1)
  return marginal + share * ((x * jnp.maximum(logs, -1e30)).sum(-1) - oracle['plogp'])


@functools.cache
def _outputs(path) -> dict[str, int]:
  """Output of the network for each of ImageNet's numbers and ids."""
  with open(path, encoding='utf-8') as handle:
    entries = re.findall(r'target_class:\s*(\d+)\s*target_class_string:\s*"(n\d+)"', handle.read())
  if len(entries) != 1000:
    raise ConfigError(
      f'verifier.label_map={path!r}: has {len(entries)} entries, must have the 1000 of ImageNet'
    )
  ids = {name: int(output) for output, name in entries}
  return ids | {str(i): ids[name] for i, name in enumerate(sorted(ids))}


def build(**given):
  return build_dataclass(InceptionScore, **given)
