"""Which slot of a tree node is tried next: PUCT, UCT, Gumbel with sequential halving, and DTS.

Sources: AlphaGo (Silver et al. 2016), AlphaZero (2018), MuZero (2020, Appendix B), UCT
(Kocsis and Szepesvari 2006), "Policy improvement by planning with Gumbel" (Danihelka et al. 2022),
diffusion tree sampling (arXiv 2506.20701). PUCT and Gumbel were checked against
`mctx.muzero_policy` and `mctx.gumbel_muzero_policy` of mctx 0.0.71, visit for visit.

Virtual loss: to PUCT and UCT a descent under way stands for `virtual_loss` visits that were lost:
their Q is scaled to [0, 1], so a loss is 0 and no scale of scores has to be known. Gumbel counts
it as a visit and leaves Q alone, since its visits follow a plan; DTS draws, and needs none.

Letters: B prompts, K slots of a node; `...` is any shape of nodes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.search.mcts.rule import (
  NEVER,
  TINY,
  Rule,
  check_bounds,
  check_positive,
  check_within,
  draw_per_prompt,
  first_maximum,
  mask_invalid,
  scaled_q,
  with_virtual_loss,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PUCT(Rule):
  """`q + c(n) P sqrt(n) / (1 + n_slot)`, `c(n) = init + log((n + base + 1) / base)`, n the visits
  of the node.

  The defaults are AlphaZero's and MuZero's. Ties go to the lowest slot (mctx draws).

  Attributes:
    init: c of a node without visits. A rule of thumb holds for Q in [0, 1], which is what is used
      here; double it for a constant that was tuned on Q in [-1, 1].
    base: how slowly c grows; `math.inf` for a constant c.
    bounds: (low, high) to scale Q by; None for the least and greatest Q among the node and its
      children.
    fraction: share of Dirichlet noise in the prior of the root.
    alpha: its concentration; about 10 / slots.
    virtual_loss: lost games that a descent under way stands for.
  """

  init: float = 1.25
  base: float = 19652.0
  bounds: tuple[float, float] | None = None
  fraction: float = 0.25
  alpha: float = 0.3
  virtual_loss: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_positive('init', self.init, zero=True)
    check_positive('base', self.base)
    check_positive('alpha', self.alpha)
    check_positive('virtual_loss', self.virtual_loss)
    check_within('fraction', self.fraction, 0, 1)
    check_bounds(self.bounds)

  @classmethod
  def alphago(cls, **given) -> 'PUCT':
    """AlphaGo's constants: c = 5, three virtual losses, no noise at the root."""
    return cls(**{'init': 5.0, 'base': math.inf, 'fraction': 0.0, 'virtual_loss': 3.0} | given)

  @classmethod
  def alphazero(cls, **given) -> 'PUCT':
    """AlphaZero's constants: c from 1.25 with base 19652, a quarter of Dirichlet(0.3) noise."""
    return cls(**given)

  def choose_slot(self, row):
    # a descent under way counts as lost games, so that the next one goes elsewhere
    tried = row.visits + self.virtual_loss * row.pending
    n = row.node_visits + self.virtual_loss * row.pending.sum(-1)
    c = self.init + (0.0 if math.isinf(self.base) else jnp.log((n + self.base + 1) / self.base))
    prior = jax.nn.softmax(row.logits)
    bonus = (jnp.sqrt(n) * c)[..., None] * prior / (tried + 1)
    value = with_virtual_loss(row, scaled_q(row, self.bounds), tried)
    return first_maximum(value + bonus, row.open)

  def draw_noise(self, key, logits, invalid):
    if self.fraction:
      alpha = jnp.full(logits.shape[-1:], self.alpha)
      dirichlet = lambda k, shape: jax.random.dirichlet(k, alpha, shape[:-1])
      noise = draw_per_prompt(key, dirichlet, logits.shape)
      prior = (1 - self.fraction) * jax.nn.softmax(logits) + self.fraction * noise
      # noise gives an illegal slot some mass too: it stays illegal
      legal = logits > NEVER
      logits = jnp.where(legal, jnp.log(jnp.maximum(prior, TINY)), -jnp.inf)
    return super().draw_noise(key, logits, invalid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UCT(Rule):
  """UCB1 on trees: `q + c sqrt(log n / n_slot)`; slots never tried come first, in their order.

  Attributes:
    c: exploration, on Q in [0, 1].
    bounds: as for `PUCT`.
    virtual_loss: as for `PUCT`.
  """

  c: float = math.sqrt(2)
  bounds: tuple[float, float] | None = None
  virtual_loss: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_positive('c', self.c, zero=True)
    check_positive('virtual_loss', self.virtual_loss)
    check_bounds(self.bounds)

  def choose_slot(self, row):
    tried = row.visits + self.virtual_loss * row.pending
    n = tried.sum(-1, keepdims=True)
    bonus = self.c * jnp.sqrt(jnp.log(jnp.maximum(n, 1)) / jnp.maximum(tried, 1))
    score = with_virtual_loss(row, scaled_q(row, self.bounds), tried) + bonus
    return first_maximum(jnp.where(tried > 0, score, -NEVER), row.open)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gumbel(Rule):
  """Gumbel MuZero: sequential halving over Gumbel-top-k slots at the root, below it visits that
  follow `softmax(logits + q)`.

  The root considers all legal slots: the widening holds below it only.

  Attributes:
    simulations: budget per root, which the halving is planned for; `run_search` fills it in.
    considered: slots that the root starts with.
    scale: of the Gumbel noise; 0 for none.
    value_scale, visit_offset: q is scaled to [0, 1] and then by
      `(visit_offset + most visits of a slot) * value_scale`.
    rescale: whether to scale to [0, 1] first; False for values that are so already.
  """

  simulations: int = 0
  considered: int = 16
  scale: float = 1.0
  value_scale: float = 0.1
  visit_offset: float = 50.0
  rescale: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.considered < 1:
      raise ConfigError(f'search.considered={self.considered!r}: must be an integer >= 1')
    check_positive('scale', self.scale, zero=True)
    check_positive('value_scale', self.value_scale)
    check_positive('visit_offset', self.visit_offset, zero=True)

  def for_simulations(self, simulations):
    return dataclasses.replace(self, simulations=simulations)

  def split_key(self, key):
    search, noise = jax.random.split(key)
    return None, noise, search

  def choose_slot(self, row):
    wanted = jax.nn.softmax(row.logits + self.completed_q(row))
    tried = row.visits + row.pending
    return first_maximum(wanted - tried / (1 + tried.sum(-1, keepdims=True)), row.open)

  def choose_root(self, row, root):
    if self.simulations < 1:
      raise ConfigError(
        f'search.simulations={self.simulations!r}: Gumbel plans its root, set simulations >= 1'
      )
    # how often the slot that is due must have been tried before: the plan of sequential halving
    table = jnp.asarray(halving_table(self.considered, self.simulations), jnp.float32)
    start = jnp.minimum(self.considered, (row.logits > NEVER).sum(-1))
    tried = root.since + row.pending
    turn = jnp.minimum(tried.sum(-1).astype(jnp.int32), self.simulations - 1)
    return self._leader(row, root, tried, table[start, turn])

  def draw_noise(self, key, logits, invalid):
    noise = self.scale * draw_per_prompt(key, jax.random.gumbel, logits.shape)
    return mask_invalid(logits, invalid), noise

  def final_policy(self, row, root):
    return row.logits + self.completed_q(row)

  def best_slot(self, row, root):
    most = jnp.where(row.logits > NEVER, root.since, -1).max(-1)
    return self._leader(row, root, root.since, most)

  def _leader(self, row, root, tried, wanted):
    """The best by noise, prior and q among the slots with the wanted number of visits `[B]`."""
    # as mctx does it: shifted and cut off, so that a masked slot cannot overflow
    logits = row.logits - row.logits.max(-1, keepdims=True)
    score = jnp.maximum(-1e9, root.noise + logits + self.completed_q(row))
    considered = tried == wanted[:, None]
    return first_maximum(jnp.where(considered, score, NEVER), row.logits > NEVER)

  def completed_q(self, row):
    """Scaled q `[..., K]`; slots without a visit get the mixed value of the paper's Appendix D."""
    seen = row.visits > 0
    total = row.visits.sum(-1)
    prior = jnp.maximum(TINY, jax.nn.softmax(row.logits))
    # the mean q of what was visited, weighed by the prior, mixed with the node's own value
    mass = jnp.where(seen, prior, 0).sum(-1, keepdims=True)
    mean = jnp.where(seen, prior * row.q / jnp.where(seen, mass, 1), 0).sum(-1)
    mixed = (row.raw + total * mean) / (total + 1)
    q = jnp.where(seen, row.q, mixed[..., None])
    if self.rescale:
      low, high = q.min(-1, keepdims=True), q.max(-1, keepdims=True)
      q = (q - low) / jnp.maximum(high - low, 1e-8)
    return ((self.visit_offset + row.visits.max(-1)) * self.value_scale)[..., None] * q


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTS(Rule):
  """Diffusion tree sampling: a node's value is `log mean exp(sharpness q) / sharpness` of its
  children, and descents draw a child with probability proportional to `exp(sharpness q)`.

  A slot that may be tried and was not comes first; with `widen=c` that is the paper's rule that a
  node has at most `c n ** widen_power` children. As visits grow, the leaves reached follow the
  prior tilted by `exp(sharpness value)`.

  Attributes:
    sharpness: inverse temperature, in units of the scores.
    greedy: take the best child instead of drawing one (the paper's search, DTS*).
  """

  sharpness: float = 1.0
  greedy: bool = False

  soft = True

  def __post_init__(self):
    super().__post_init__()
    check_positive('sharpness', self.sharpness)

  @property
  def random(self):
    return not self.greedy

  def split_key(self, key):
    return None, *super().split_key(key)[1:]

  def choose_slot(self, row):
    score = self.sharpness * row.q
    if self.random:
      # an argmax over Gumbel noise draws in proportion to exp(score)
      flat = row.keys.reshape(-1)
      noise = jax.vmap(lambda k: jax.random.gumbel(k, row.q.shape[-1:]))(flat)
      score = score + noise.reshape(row.q.shape)
    # what only other descents are trying comes last, what nobody has tried comes first
    score = jnp.where(row.visits > 0, score, NEVER * (1 + row.pending))
    return first_maximum(jnp.where(row.visits + row.pending > 0, score, -NEVER), row.open)

  def soft_value(self, row):
    seen = row.visits > 0
    score = jnp.where(seen, self.sharpness * row.q, -jnp.inf)
    # the maximum is taken out, as in any log-sum-exp
    top = jnp.max(score, -1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    mean = jnp.exp(score - top).sum(-1) / jnp.maximum(seen.sum(-1), 1)
    return (jnp.log(jnp.maximum(mean, TINY)) + top[..., 0]) / self.sharpness

  def final_policy(self, row, root):
    return jnp.where(row.visits > 0, self.sharpness * row.q, -jnp.inf)

  def best_slot(self, row, root):
    return first_maximum(row.q, (row.visits > 0) & (row.logits > NEVER))


def halving_table(considered: int, simulations: int) -> tuple[tuple[int, ...], ...]:
  """For each number of slots 0 .. considered that the root starts with: how often the slot that is
  tried in each simulation was tried before (sequential halving, Karnin et al. 2013)."""
  return tuple(_halving(m, simulations) for m in range(considered + 1))


def _halving(considered, simulations):
  if considered < 2:
    return tuple(range(simulations))
  # every phase has an equal share of the budget and drops the worse half
  phases = math.ceil(math.log2(considered))
  plan, visits = [], [0] * considered
  while len(plan) < simulations:
    for _ in range(max(1, simulations // (phases * considered))):
      plan += visits[:considered]
      visits[:considered] = [v + 1 for v in visits[:considered]]
    considered = max(2, considered // 2)
  return tuple(plan[:simulations])
