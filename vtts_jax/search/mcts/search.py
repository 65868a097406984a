"""Monte-Carlo tree search over prefixes: policy, value and rollout, many leaves a step.

A node is a prefix, cut at every `size` stages; an action is "the k-th continuation of this node",
drawn by the generator from the key of that child, so a node needs its state without caches, a key
and K slots, whatever the vocabulary. As the policy draws the continuations, their prior is uniform
(sampled MuZero, Hubert et al. 2021). A leaf is worth (1 - mix) * value head + mix * score of a
rollout, as in AlphaGo (Silver et al. 2016). The tree and its rules are `tree.py` and `rules.py`,
checked against mctx; a leaf's caches are rebuilt from its tokens by one prefill.

Rollouts are complete samples, so the best sample so far is there after every step. Without them
(mix 0) samples come at the end: `finish` completions of the line with the most visits.

Leaves of all depths run in lockstep: a rollout runs as many stages as one from the root's child
needs, and the bill counts these.
Letters: B prompts, L leaves a step, K slots of a node, T stages.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.search import checks, schedules
from vtts_jax.search.mcts import rules, simulate, tree
from vtts_jax.search.mcts.rule import Rule

RULES = {
  'puct': rules.PUCT,
  'alphago': rules.PUCT.alphago,
  'uct': rules.UCT,
  'gumbel': rules.Gumbel,
  'dts': rules.DTS,
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
    rule_settings: settings of the rule's class in `rules.py`, as pairs; a mapping in a config.
    commit: after so many simulations the root moves to a child, and what is below that stays; 0 for
      never.
    temperature: the child is drawn by visits ** (1 / temperature); 0 takes the most visited.
    mix: share of the rollout in a leaf's value; below 1 the generator needs a value head.
    rollout: 'policy', or 'small' for the generator's small rollout model.
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
    given = tuple(sorted(dict(self.rule_settings).items()))
    object.__setattr__(self, 'rule_settings', given)
    for name, low in (
      ('simulations', 1), ('leaves', 1), ('slots', 1), ('size', 1), ('commit', 0), ('finish', 0),
      ('initial', 0),
    ):  # fmt: skip
      checks.check_integer(name, getattr(self, name), low)
    checks.check_number('mix', self.mix, 0, 1)
    checks.check_number('temperature', self.temperature, 0)
    checks.check_choice('rollout', self.rollout, ('policy', 'small'))
    checks.check_flag('greedy', self.greedy)
    for name in ('simulations', 'commit'):
      if getattr(self, name) % self.leaves:
        raise ConfigError(
          f'search.{name}={getattr(self, name)}: must be a multiple of search.leaves={self.leaves}'
        )
    if not self.mix and not self.finish:
      raise ConfigError('search.finish=0: must be at least 1 without rollouts (search.mix=0)')
    self.tree_rule()

  def tree_rule(self) -> Rule:
    """The selection rule with its settings, planned for the simulations of one root."""
    checks.check_choice('rule', self.rule, RULES)
    kind = RULES[self.rule]
    known = [f.name for f in dataclasses.fields(rules.PUCT if self.rule == 'alphago' else kind)]
    for name, _ in self.rule_settings:
      checks.check_choice('rule_settings', name, known)
    return kind(**dict(self.rule_settings)).for_simulations(self.commit or self.simulations)

  @property
  def needs(self):
    needs = {'ragged_stages'}
    if self.mix < 1:
      needs.add('value')
    if self.mix and self.rollout == 'small':
      needs.add('rollout')
    return frozenset(needs)

  # -------------------------------------------------------------------------------- static shapes

  @property
  def grow_steps(self) -> int:
    """Steps that add leaves, after that of the root."""
    return self.simulations // self.leaves

  def check(self, gen):
    checks.check_integer('initial', self.initial, 0, gen.num_stages - 1)
    checks.check_integer('size', self.size, 1, gen.num_stages - self.initial)

  def plan(self, gen):
    """A row of 'grow' holds the number of the step, from 1."""
    grow = core.Phase('grow', tuple((number,) for number in range(1, self.grow_steps + 1)))
    finish = (core.Phase('finish', ((self.grow_steps + 1,),)),) if self.finish else ()
    return (core.Phase('root', ((0,),)), grow, *finish)

  def _depth(self, gen) -> int:
    """Nodes below the root on the longest line."""
    return -(-(gen.num_stages - self.initial) // self.size)

  # ---------------------------------------------------------------------------------- ask and tell

  def init(self, sampler, keys, initial):
    roots = core.candidate_keys(keys, jnp.arange(1))
    state = sampler.drop_cache(sampler.init(roots, initial))
    return core.Frontier(state, roots, jnp.full(roots.shape, core.NEG_INF), own=(keys,))

  def ask(self, sampler, frontier, shape, row):
    ask = {'root': self._ask_root, 'grow': self._ask_leaves, 'finish': self._ask_finish}[shape]
    return ask(sampler, frontier)

  def _ask_root(self, sampler, frontier):
    keys, leaf = frontier.keys, frontier.state
    begin = jnp.full(keys.shape, self.initial)
    value = self._predicted_value(sampler, leaf, begin)
    ready = sampler.rebuild_cache(leaf, self.initial)
    count = sampler.num_stages - self.initial
    shown, stage = self._rollout(sampler, leaf, ready, keys, begin, count)
    own = ((leaf, jax.random.key_data(keys), begin), value)
    return core.Candidates(shown, stage, jnp.full(stage.shape, -1), own)

  def _ask_leaves(self, sampler, frontier):
    gen, (prompt, grown) = sampler.gen, frontier.own
    grown, paths = tree.select_leaves(
      grown, self.tree_rule(), leaves=self.leaves, depth=self._depth(gen)
    )
    # each leaf continues the prefix of the node that it hangs from, with the key of its slot
    above, data, begin = tree.parent_embeddings(grown, paths)
    keys = core.child_key(_typed_keys(data, frontier.keys), begin, paths.action)
    ready = sampler.rebuild_cache(above, begin)
    ready = sampler.extend(ready, keys, begin, self.size)
    leaf, stage = sampler.drop_cache(ready), jnp.minimum(begin + self.size, gen.num_stages)
    value = self._predicted_value(sampler, leaf, stage)
    count = gen.num_stages - self.initial - self.size
    shown, seen = self._rollout(sampler, leaf, ready, keys, stage, count)
    own = (prompt, grown, paths, (leaf, jax.random.key_data(keys), stage), value)
    return core.Candidates(shown, seen, jnp.full(seen.shape, -1), own)

  def _ask_finish(self, sampler, frontier):
    prompt, grown = frontier.own
    # down the line with the most visits, as far as there are any
    node = grown.root
    for _ in range(self._depth(sampler.gen)):
      counts = tree.at_nodes(grown.counts, node)
      child = tree.at_nodes(grown.child, node)
      child = jnp.take_along_axis(child, counts.argmax(1)[:, None], 1)[:, 0]
      node = jnp.where(counts.max(1) > 0, child, node)
    embedding = jax.tree.map(lambda x: tree.at_nodes(x, node[:, None]), grown.embedding)
    leaf, data, begin = embedding
    ready = core.repeat(sampler.rebuild_cache(leaf, begin), self.finish)
    keys = core.fold(_typed_keys(data, frontier.keys), FINISH)
    keys = core.fold(jnp.broadcast_to(keys, (len(keys), self.finish)), jnp.arange(self.finish))
    count = sampler.num_stages - self.initial
    done = sampler.extend(ready, keys, jnp.broadcast_to(begin, keys.shape), count)
    none = jnp.full(keys.shape, -1)
    return core.Candidates(
      sampler.drop_cache(done), sampler.num_stages, none, own=(prompt, grown)
    )

  def _predicted_value(self, sampler, leaf, stage):
    return sampler.value(leaf, stage) if self.mix < 1 else jnp.zeros(stage.shape)

  def _rollout(self, sampler, leaf, ready, keys, stage, count):
    """Complete samples and their stages; without rollouts no candidate is shown."""
    if not self.mix:
      return jax.tree.map(lambda x: x[:, :0], leaf), stage[:, :0]
    keys = core.fold(keys, ROLLOUT)  # or child 0 would draw the same sample again
    if self.rollout == 'small':
      shown = sampler.rollout(leaf, keys, stage, count, greedy=self.greedy)
    else:
      shown = sampler.extend(ready, keys, stage, count, greedy=self.greedy)
      shown = sampler.drop_cache(shown)
    return shown, jnp.full(stage.shape, sampler.num_stages)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    tell = {'root': self._tell_root, 'grow': self._tell_leaves, 'finish': self._tell_finish}[shape]
    own = tell(sampler, frontier, candidates, totals, row)
    return frontier._replace(own=own), jnp.zeros((totals.shape[0], 0), jnp.int32)

  def _tell_root(self, sampler, frontier, candidates, totals, row):
    (prompt,), (embedding, value) = frontier.own, candidates.own
    value = self._leaf_value(value, totals, 0.0, jnp.zeros(totals.shape, bool))[:, 0]
    embedding = jax.tree.map(lambda x: x[:, 0], embedding)
    uniform = jnp.zeros((len(value), self.slots))
    keys = prompt if self.tree_rule().random else None
    grown = tree.init_tree(embedding, uniform, value, self.simulations + 1, keys)
    return prompt, tree.add_root_noise(grown, self.tree_rule(), core.fold(prompt, NOISE))

  def _tell_leaves(self, sampler, frontier, candidates, totals, row):
    prompt, grown, paths, embedding, value = candidates.own
    # the worst value so far stands for a rollout that could not be scored
    used = jnp.arange(grown.raw.shape[1]) < grown.used[:, None]
    worst = jnp.where(used & (grown.visits > 0), grown.raw, jnp.inf).min(1, keepdims=True)
    closed = embedding[2] >= sampler.num_stages
    value = self._leaf_value(value, totals, worst, closed)
    uniform, zero = jnp.zeros((*value.shape, self.slots)), jnp.zeros(value.shape)
    grown = tree.expand_leaves(grown, paths, embedding, uniform, value, zero, zero + 1, closed)
    grown = tree.back_up(grown, self.tree_rule(), paths, value)
    grown = self._close_finished(sampler.gen, grown)
    if self.commit:
      grown = self._commit_child(prompt, grown, row[0])
    return prompt, grown

  def _tell_finish(self, sampler, frontier, candidates, totals, row):
    return candidates.own

  def _commit_child(self, prompt, grown, number):
    """The tree with its root moved to a child, if it is time to."""
    due = (number * self.leaves) % self.commit == 0
    keys = core.fold(core.fold(prompt, COMMIT), number) if self.temperature else None
    action = simulate.root_summary(grown, self.tree_rule(), keys, self.temperature).action
    noise = core.fold(core.fold(prompt, NOISE), number)
    moved = tree.add_root_noise(tree.move_root(grown, action), self.tree_rule(), noise)
    # these are all that a move of the root changes
    return grown._replace(
      root=jnp.where(due, moved.root, grown.root),
      base=jnp.where(due, moved.base, grown.base),
      noise=jnp.where(due, moved.noise, grown.noise),
      logits=jnp.where(due, moved.logits, grown.logits),
    )

  def _close_finished(self, gen, grown):
    """No sample is observed twice: slots below which all is finished are not tried again."""

    def below(done):
      children = jnp.maximum(grown.child, 0)
      return (grown.child >= 0) & jnp.take_along_axis(done[:, :, None], children, axis=1)

    done = grown.embedding[2] >= gen.num_stages
    for _ in range(self._depth(gen) - 1):
      done |= below(done).all(-1)
    grown = grown._replace(logits=jnp.where(below(done), -jnp.inf, grown.logits))
    nodes = jnp.broadcast_to(jnp.arange(grown.raw.shape[1]), grown.raw.shape)
    return tree.refresh_choices(grown, self.tree_rule(), nodes)

  def _leaf_value(self, value, totals, worst, closed):
    """Values of leaves `[B, L]`; a rollout without a finite score is worth `worst`, and a finished
    sample just its score."""
    if not self.mix:
      return value
    totals = jnp.where(jnp.isfinite(totals), totals, worst)
    return jnp.where(closed, totals, simulate.mix_values(value, totals, self.mix))

  # ------------------------------------------------------------------------------------------ bill

  def init_cost(self, gen):
    return schedules.given_cost(gen, self.initial)

  def step_cost(self, gen, shape, row):
    whole = gen.num_stages - self.initial
    if shape == 'finish':
      completed = self.finish * gen.cost('extend', self.initial, whole)
      return gen.cost('rebuild_cache') + completed, self.finish
    one = gen.cost('rebuild_cache')
    if self.mix < 1:
      one += gen.cost('value')
    n, left = (1, whole) if shape == 'root' else (self.leaves, whole - self.size)
    if shape == 'grow':
      one += gen.cost('extend', self.initial, self.size)
    if self.mix:
      one += gen.cost('rollout' if self.rollout == 'small' else 'extend', self.initial, left)
    return n * one, n if self.mix else 0


def _typed_keys(data, like):
  """Keys of the kind of `like` from the numbers that a tree holds."""
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
