"""Monte-Carlo tree search over prefixes: policy, value and rollout, many leaves a step.

A node is a prefix, cut at every `size` stages; an action is "the k-th continuation of this node",
drawn by the generator from the key of that child, so a node needs its slim state, a key and K
slots, whatever the vocabulary. As the policy draws the continuations, their prior is uniform
(sampled MuZero, Hubert et al. 2021). A leaf is worth (1 - mix) * value head + mix * score of a
rollout, as in AlphaGo (Silver et al. 2016). The tree and its rules are `tree.py` and
`policies.py`, checked against mctx; a leaf's caches are rebuilt from its tokens by one prefill.

Rollouts are complete samples, so the best picture so far is there after every step. Without them
(mix 0) pictures come at the end: `finish` completions of the line with the most visits.

Leaves of all depths run in lockstep: a rollout runs as many stages as one from the root's child
needs, and the bill counts these.
Letters: B prompts, L leaves a step, K slots of a node, T stages.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules
from vtts_jax.search.mcts import rules as policies
from vtts_jax.search.mcts import simulate, tree
from vtts_jax.search.mcts.rule import Rule

RULES = {
  'puct': policies.PUCT,
  'alphago': policies.PUCT.alphago,
  'uct': policies.UCT,
  'gumbel': policies.Gumbel,
  'dts': policies.DTS,
}
ROLLOUT, NOISE, FINISH, COMMIT = (core.CHILD - i for i in range(3, 7))  # folded into keys


@dataclasses.dataclass(frozen=True)
class MCTS(core.Algorithm):
  """Tree search.

  Attributes:
    simulations: leaves evaluated for a prompt, all in all, besides the root.
    leaves: of these, how many a step; they avoid each other by virtual loss.
    slots: continuations that a node may have.
    size: stages from a node to its children.
    rule: how a slot is selected: 'puct' (AlphaZero's constants, which explore little under a
      uniform prior), 'alphago', 'uct', 'gumbel' or 'dts'.
    rule_settings: settings of the rule's class in `policies.py`, as pairs; a mapping in a config.
    commit: after so many simulations the root moves to a child, and what is below that stays; 0 for
      never.
    temperature: the child is drawn by visits ** (1 / temperature); 0 takes the most visited.
    mix: share of the rollout in a leaf's value; below 1 the generator needs a value head.
    rollout: 'policy', or 'small' for the generator's small rollout policy.
    greedy: whether rollouts take the most likely stage or draw.
    finish: completions at the end of the line with the most visits.
    initial: stages that are given and not drawn.
  """

  simulations: int = 64
  leaves: int = 4
  slots: int = 16
  size: int = 4
  rule: str = 'gumbel'
  rule_settings: tuple[tuple[str, object], ...] = ()
  commit: int = 0
  temperature: float = 0.0
  mix: float = 1.0
  rollout: str = 'policy'
  greedy: bool = True
  finish: int = 0
  initial: int = 0

  def __post_init__(self):
    for name, low in (
      ('simulations', 1), ('leaves', 1), ('slots', 1), ('size', 1), ('commit', 0), ('finish', 0),
      ('initial', 0),
    ):  # fmt: skip
      checks.integer(name, getattr(self, name), low)
    checks.number('mix', self.mix, 0, 1)
    checks.number('temperature', self.temperature, 0)
    checks.one_of('rollout', self.rollout, ('policy', 'small'))
    checks.flag('greedy', self.greedy)
    for name in ('simulations', 'commit'):
      if getattr(self, name) % self.leaves:
        raise ConfigError(
          f'search.{name}={getattr(self, name)}: must be a multiple of search.leaves={self.leaves}'
        )
    if not self.mix and not self.finish:
      raise ConfigError('search.finish=0: must be at least 1 without rollouts (search.mix=0)')
    self._rule()

  def _rule(self) -> Rule:
    checks.one_of('rule', self.rule, RULES)
    kind = RULES[self.rule]
    known = [f.name for f in dataclasses.fields(policies.PUCT if self.rule == 'alphago' else kind)]
    for name, _ in self.rule_settings:
      checks.one_of('rule_settings', name, known)
    return kind(**dict(self.rule_settings)).planned(self.commit or self.simulations)

  @property
  def uses_value(self):
    return self.mix < 1

  # -------------------------------------------------------------------------------- static shapes

  @property
  def _steps(self) -> int:
    return self.simulations // self.leaves

  def check(self, gen):
    checks.integer('initial', self.initial, 0, gen.num_stages - 1)
    checks.integer('size', self.size, 1, gen.num_stages - self.initial)
    if self.mix and self.rollout == 'small' and not getattr(gen, 'rollout_policy', ''):
      raise ConfigError(
        f"search.rollout='small': {type(gen).__name__} has no small policy; allowed: 'policy'"
      )

  def phases(self, gen):
    grow = (1, self._steps)
    return ((0, 1), grow, (self._steps + 1, 1)) if self.finish else ((0, 1), grow)

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, gen, params, ctx, keys, initial):
    roots = core.candidate_keys(keys, jnp.arange(1))
    state = gen.slim(schedules.start(gen, params, ctx, roots, initial))
    none = jnp.full(roots.shape, core.NEG_INF)
    return core.Told(state, roots, none, jnp.zeros(roots.shape, jnp.int32), (keys,))

  def ask(self, gen, params, ctx, state, step):
    if step.first == 0:
      return self._ask_root(gen, params, ctx, state)
    if step.first == self._steps + 1:
      return self._ask_finish(gen, params, ctx, state)
    prompt, grown = state.inner
    depth = -(-(gen.num_stages - self.initial) // self.size)
    grown, paths = tree.select(grown, self._rule(), leaves=self.leaves, depth=depth)
    above, data, begin = tree.parents(grown, paths)
    keys = core.child_key(_typed(data, state.keys), begin, paths.action)
    fat = gen.fatten(params, ctx, above, begin)
    fat = gen.extend(params, ctx, fat, keys, begin, self.size)
    leaf, stage = gen.slim(fat), jnp.minimum(begin + self.size, gen.num_stages)
    value = gen.value(params, ctx, leaf, stage) if self.uses_value else jnp.zeros(stage.shape)
    count = gen.num_stages - self.initial - self.size
    shown, seen = self._rollout(gen, params, ctx, leaf, fat, keys, stage, count)
    inner = (prompt, grown, paths, (leaf, jax.random.key_data(keys), stage), value)
    return core.Candidates(shown, seen, jnp.full(seen.shape, -1), inner)

  def _ask_root(self, gen, params, ctx, state):
    keys, begin = state.keys, jnp.full(state.keys.shape, self.initial)
    leaf = state.frontier
    value = gen.value(params, ctx, leaf, begin) if self.uses_value else jnp.zeros(begin.shape)
    fat = gen.fatten(params, ctx, leaf, self.initial)
    count = gen.num_stages - self.initial
    shown, seen = self._rollout(gen, params, ctx, leaf, fat, keys, begin, count)
    inner = ((leaf, jax.random.key_data(keys), begin), value)
    return core.Candidates(shown, seen, jnp.full(seen.shape, -1), inner)

  def _ask_finish(self, gen, params, ctx, state):
    prompt, grown = state.inner
    node = grown.root
    for _ in range(-(-(gen.num_stages - self.initial) // self.size)):
      counts = tree.at(grown.counts, node)
      child = jnp.take_along_axis(tree.at(grown.child, node), counts.argmax(1)[:, None], 1)[:, 0]
      node = jnp.where(counts.max(1) > 0, child, node)
    leaf, data, begin = jax.tree.map(lambda x: tree.at(x, node[:, None]), grown.embedding)
    fat = core.repeat(gen.fatten(params, ctx, leaf, begin), self.finish)
    keys = core.fold(_typed(data, state.keys), FINISH)
    keys = core.fold(jnp.broadcast_to(keys, (len(keys), self.finish)), jnp.arange(self.finish))
    count = gen.num_stages - self.initial
    fat = gen.extend(params, ctx, fat, keys, jnp.broadcast_to(begin, keys.shape), count)
    seen = jnp.full(keys.shape, gen.num_stages)
    return core.Candidates(gen.slim(fat), seen, jnp.full(keys.shape, -1), (prompt, grown))

  def _rollout(self, gen, params, ctx, leaf, fat, keys, stage, count):
    """Complete samples and their stages; without rollouts no candidate is shown."""
    if not self.mix:
      return jax.tree.map(lambda x: x[:, :0], leaf), stage[:, :0]
    keys = core.fold(keys, ROLLOUT)  # or child 0 would draw the same sample again
    if self.rollout == 'small':
      shown = gen.rollout(params, ctx, leaf, keys, stage, count, greedy=self.greedy)
    else:
      shown = gen.slim(gen.extend(params, ctx, fat, keys, stage, count, greedy=self.greedy))
    return shown, jnp.full(stage.shape, gen.num_stages)

  def tell(self, gen, params, ctx, state, cands, totals, step):
    kept = jnp.zeros((totals.shape[0], 0), jnp.int32)
    told = core.Told(state.frontier, state.keys, state.scores, kept)
    if step.first == self._steps + 1:
      return told._replace(inner=cands.inner)
    if step.first == 0:
      (prompt,), (embedding, value) = state.inner, cands.inner
      value = self._value(value, totals, 0.0, jnp.zeros(totals.shape, bool))[:, 0]
      embedding = jax.tree.map(lambda x: x[:, 0], embedding)
      uniform = jnp.zeros((len(value), self.slots))
      keys = prompt if self._rule().random else None
      grown = tree.init(embedding, uniform, value, self.simulations + 1, keys)
      grown = tree.stir(grown, self._rule(), core.fold(prompt, NOISE))
      return told._replace(inner=(prompt, grown))
    prompt, grown, paths, embedding, value = cands.inner
    used = jnp.arange(grown.raw.shape[1]) < grown.used[:, None]
    worst = jnp.where(used & (grown.visits > 0), grown.raw, jnp.inf).min(1, keepdims=True)
    closed = embedding[2] >= gen.num_stages
    value = self._value(value, totals, worst, closed)
    uniform, zero = jnp.zeros((*value.shape, self.slots)), jnp.zeros(value.shape)
    grown = tree.expand(grown, paths, embedding, uniform, value, zero, zero + 1, closed)
    grown = tree.backup(grown, self._rule(), paths, value)
    grown = self._retire(gen, grown)
    if self.commit:
      after = (step.index * self.leaves) % self.commit == 0
      keys = core.fold(core.fold(prompt, COMMIT), step.index) if self.temperature else None
      action = simulate.root_summary(grown, self._rule(), keys, self.temperature).action
      moved = tree.stir(tree.commit(grown, action), self._rule(), self._noise(prompt, step.index))
      pick = lambda a, b: jnp.where(after, a, b)
      grown = grown._replace(
        root=pick(moved.root, grown.root),
        base=pick(moved.base, grown.base),
        noise=pick(moved.noise, grown.noise),
        logits=pick(moved.logits, grown.logits),
      )
    return told._replace(inner=(prompt, grown))

  def _retire(self, gen, grown):
    """No sample is looked at twice: slots below which all is finished are not tried again."""
    below = lambda done: (grown.child >= 0) & jnp.take_along_axis(
      done[:, :, None], jnp.maximum(grown.child, 0), axis=1
    )
    done = grown.embedding[2] >= gen.num_stages
    for _ in range(-(-(gen.num_stages - self.initial) // self.size) - 1):
      done |= below(done).all(-1)
    grown = grown._replace(logits=jnp.where(below(done), -jnp.inf, grown.logits))
    nodes = jnp.broadcast_to(jnp.arange(grown.raw.shape[1]), grown.raw.shape)
    return tree.prepare(grown, self._rule(), nodes)

  def _noise(self, prompt, index):
    return core.fold(core.fold(prompt, NOISE), index)

  def _value(self, value, totals, worst, closed):
    """Values of leaves `[B, L]`; a rollout without a finite score is worth the worst so far, and a
    finished sample just its score."""
    if not self.mix:
      return value
    totals = jnp.where(jnp.isfinite(totals), totals, worst)
    return jnp.where(closed, totals, (1 - self.mix) * value + self.mix * totals)

  # ------------------------------------------------------------------------------------------ bill

  def step_cost(self, gen, step):
    whole = gen.num_stages - self.initial
    if step == self._steps + 1:
      return gen.cost('fatten') + self.finish * gen.cost('extend', self.initial, whole), self.finish
    one = gen.cost('fatten')
    if self.uses_value:
      one += gen.cost('value')
    n, left = (1, whole) if step == 0 else (self.leaves, whole - self.size)
    if step:
      one += gen.cost('extend', self.initial, self.size)
    if self.mix:
      one += gen.cost('rollout' if self.rollout == 'small' else 'extend', self.initial, left)
    start = schedules.start_cost(gen, self.initial) if step == 0 else core.Cost()
    return start + n * one, n if self.mix else 0


def _typed(data, like):
  """Keys of the kind of `like` from the numbers that a tree holds."""
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


def build(**given) -> MCTS:
  """From settings; `rule_settings` may be a mapping.

  Raises:
    ConfigError: an unknown rule or setting.
  """
  given['rule_settings'] = tuple(sorted(dict(given.get('rule_settings', ())).items()))
  return components.build_dataclass(MCTS, **given)
