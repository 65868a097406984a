"""What a selection rule is: the statistics it sees of a node, and what all rules share.

A rule is a frozen dataclass that looks at `NodeStatistics`s; `tree.py` keeps these, the rules
themselves are in `rules.py`.

Letters: B prompts, K slots of a node; `...` is any shape of nodes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax.errors import ConfigError

NEVER = -1e30  # logits at or below this mark slots that must not be tried
TINY = float(jnp.finfo(jnp.float32).tiny)


class NodeStatistics(NamedTuple):
  """Statistics of nodes, as a rule sees them.

  Attributes:
    logits: prior logits of the slots `[..., K]`.
    open: which slots may be tried now `[..., K]`, bool: legal, and allowed by the widening.
    visits: finished visits of the slots `[..., K]`, float32.
    pending: descents under way through the slots `[..., K]`, float32.
    q: reward + discount * value of the children `[..., K]`; meaningless where `visits` is 0.
    node_visits: visits of the node `[...]`, float32; its own evaluation counts as one.
    value: mean value of the node `[...]`.
    raw: value of the node when it was evaluated `[...]`.
    keys: what to draw with `[...]`, for rules with `random`; else None.
  """

  logits: jax.Array
  open: jax.Array
  visits: jax.Array
  pending: jax.Array
  q: jax.Array
  node_visits: jax.Array
  value: jax.Array
  raw: jax.Array
  keys: jax.Array | None = None


class RootStatistics(NamedTuple):
  """What a rule knows of the root besides its `NodeStatistics`.

  Attributes:
    noise: what `draw_noise` drew `[B, K]`.
    since: visits of the slots since this node became the root `[B, K]`, float32.
  """

  noise: jax.Array
  since: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """What the rules share: progressive widening, the noise at the root and the final policy.

  Attributes:
    widen: a node of n visits may try its first `ceil(widen * n ** widen_power)` slots; 0 for all.
    widen_power: exponent in (0, 1].
  """

  widen: float = 0.0
  widen_power: float = 0.5

  soft = False  # values are backed up by `soft_value`, not as means
  random = False  # `choose_slot` draws, and needs `NodeStatistics.keys`

  def __post_init__(self):
    check_positive('widen', self.widen, zero=True)
    check_within('widen_power', self.widen_power, 0, 1, low_open=True)

  def for_simulations(self, simulations: int) -> 'Rule':
    """This rule for a budget of so many simulations per root."""
    return self

  def split_key(self, key):
    """Keys as mctx splits them: for the final action (None: take the best), noise and search."""
    return tuple(jax.random.split(key, 3))

  def allowed_slots(self, node_visits, slots: int):
    """Which slots the widening allows `[..., K]` at nodes of so many visits `[...]`."""
    if not self.widen:
      return jnp.ones((*node_visits.shape, slots), bool)
    allowed = jnp.ceil(self.widen * jnp.maximum(node_visits, 1.0) ** self.widen_power)
    return jnp.arange(slots) < jnp.maximum(allowed, 1)[..., None]

  def choose_slot(self, row: NodeStatistics) -> jax.Array:
    """The slot to try next `[...]`, int32."""
    raise NotImplementedError

  def choose_root(self, row: NodeStatistics, root: RootStatistics) -> jax.Array:
    """The same at the root, `[B]`."""
    return self.choose_slot(row)

  def soft_value(self, row: NodeStatistics) -> jax.Array:
    """Values `[...]` of nodes from their children; only for rules with `soft`."""
    raise NotImplementedError

  def draw_noise(self, key, logits, invalid):
    """Logits `[B, K]` of a new root with noise mixed in, and noise `[B, K]` for `choose_root`.

    `key` is one key for the batch or one per prompt `[B]`; `invalid [B, K]` slots, True or 1, or
    None.
    """
    return mask_invalid(logits, invalid), jnp.zeros_like(logits)

  def final_policy(self, row: NodeStatistics, root: RootStatistics) -> jax.Array:
    """Logits `[B, K]` of the search's own policy at the root: proportional to visits. Rules that
    draw read no `root`, so that theirs holds at any node."""
    total = row.visits.sum(-1, keepdims=True)
    share = jnp.where(total > 0, row.visits / jnp.maximum(total, 1), 1 / row.visits.shape[-1])
    return jnp.where(row.logits > NEVER, jnp.log(jnp.maximum(share, TINY)), jnp.log(TINY))

  def best_slot(self, row: NodeStatistics, root: RootStatistics) -> jax.Array:
    """The slot to commit to `[B]`: the most visited, the better one on ties."""
    legal = row.logits > NEVER
    most = row.visits == jnp.where(legal, row.visits, -1).max(-1, keepdims=True)
    return first_maximum(jnp.where(row.visits > 0, row.q, NEVER), most & legal)


# ----------------------------------------------------------------------------------------- pieces


def first_maximum(score, among):
  """Index `[...]` of the greatest finite `score [..., K]` where `among` holds, the first on ties.

  Slot 0 where nothing holds. Two plain reductions: XLA's argmax is several times slower on CPU.
  """
  score = jnp.where(among, score, -jnp.inf)
  slots = jnp.arange(score.shape[-1], dtype=jnp.int32)
  top = score == score.max(-1, keepdims=True)
  return jnp.where(top, slots, score.shape[-1] - 1).min(-1)


def scaled_q(row: NodeStatistics, bounds=None):
  """q `[..., K]` in [0, 1], 0 without a visit: by the given bounds, or by the least and greatest of
  the node's value and its children's q."""
  seen = row.visits > 0
  if bounds is not None:
    return jnp.where(seen, (row.q - bounds[0]) / (bounds[1] - bounds[0]), 0)
  q = jnp.where(seen, row.q, row.value[..., None])
  low = jnp.minimum(row.value, q.min(-1))[..., None]
  high = jnp.maximum(row.value, q.max(-1))[..., None]
  return jnp.where(seen, row.q - low, 0) / jnp.maximum(high - low, 1e-8)


def with_virtual_loss(row: NodeStatistics, q, tried):
  """q `[..., K]` in [0, 1] as the mean over `tried` games, those beyond the visits lost."""
  return q * (row.visits / jnp.maximum(tried, 1))


def mask_invalid(logits, invalid):
  return logits if invalid is None else jnp.where(invalid, -jnp.inf, logits)


def draw_per_prompt(key, sampler, shape):
  """`sampler(key, shape [B, K])`; with keys `[B]` each prompt draws its own row."""
  if key.ndim == 0:
    return sampler(key, shape)
  return jax.vmap(lambda k: sampler(k, shape[1:]))(key)


def check_positive(name, value, *, zero=False):
  """Raises `ConfigError` unless the setting is a number > 0, or >= 0 with `zero`."""
  if not (value >= 0 if zero else value > 0):
    raise ConfigError(f'search.{name}={value!r}: must be a number {">=" if zero else ">"} 0')


def check_within(name, value, low, high, *, low_open=False):
  """Raises `ConfigError` unless low <= value <= high (low < value with `low_open`)."""
  if not low <= value <= high or (low_open and value == low):
    raise ConfigError(
      f'search.{name}={value!r}: must be in {"(" if low_open else "["}{low}, {high}]'
    )


def check_bounds(bounds):
  if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
    raise ConfigError(f'search.bounds={bounds!r}: must be (low, high) with low < high, or None')
