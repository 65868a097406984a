"""Monte-Carlo tree search over prefixes: policy, value and rollout, many leaves a step.

A node is a prefix, cut at every `size` stages; an action is "the k-th continuation of this node",
drawn by the generator from the key of that child, so a node needs its state without caches, a key
and K slots, whatever the vocabulary. As the policy draws the continuations, their prior is uniform
(sampled MuZero, Hubert et al. 2021). A leaf is worth (1 - mix) * value head + mix * score of a
rollout, as in AlphaGo (Silver et al. 2016). The tree and its rules are `tree.py` and `rules.py`,
checked against mctx; a leaf's caches are rebuilt from its tokens by one prefill.

Where the initial noise is drawn too (diffusion), a child of the root draws its own: the root stands
for the prompt alone.

Rollouts are complete samples, so the best sample so far is there after every step. Without them
(mix 0) samples come at the end: `finish` completions of the line with the most visits.

`PRESETS` has diffusion tree sampling and search (Jain et al., 2506.20701) for any generator:

  'dts'       a leaf's rollout is drawn by the sampler, and all of its chunks become nodes
              (`keep_rollouts`); a node's value is the soft mean of its children; descents draw a
              child by exp(sharpness value), and open a new one as visits allow. The lines that
              `finish` draws are samples of p(x) exp(sharpness score), exact in the limit.
  'dts_star'  takes the best child instead (DTS*): a search for high scores.

The constants of the widening, 2 n ** 0.8 children after n visits, are ours; the paper's chunks are
single steps. On a flow whose last step draws nothing (all but GLASS's) the last chunk needs two.

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
from vtts_jax.search.mcts import lines, rules, simulate, tree
from vtts_jax.search.mcts.rule import Rule

RULES = {
  'puct': rules.PUCT,
  'alphago': rules.PUCT.alphago,
  'uct': rules.UCT,
  'gumbel': rules.Gumbel,
  'dts': rules.DTS,
}
SOFT = {'rule': 'dts', 'leaves': 1, 'size': 1, 'greedy': False, 'keep_rollouts': True}
WIDENING = (('widen', 2.0), ('widen_power', 0.8))
PRESETS = {
  'dts': {**SOFT, 'rule_settings': WIDENING},
  'dts_star': {**SOFT, 'rule_settings': (('greedy', True), *WIDENING)},
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
    keep_rollouts: every `size` stages of a rollout become a node of the tree; for rollouts that
      draw from the policy, and a `size` that divides the stages.
    finish: completions at the end of the line with the most visits; with the rule 'dts' each at the
      end of a line drawn by exp(sharpness value).
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
  keep_rollouts: bool = False
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
    checks.check_flag('keep_rollouts', self.keep_rollouts)
    if self.keep_rollouts and (self.greedy or self.mix < 1 or self.rollout != 'policy'):
      raise ConfigError(
        f"search.keep_rollouts=True: needs greedy=False, mix=1, rollout='policy'; not "
        f'greedy={self.greedy}, mix={self.mix}, rollout={self.rollout!r}'
      )
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
    needs = {'ragged_stages', 'stochastic'}
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
    stages = gen.num_stages - self.initial
    checks.check_integer('size', self.size, 1, stages)
    if self.keep_rollouts and stages % self.size:
      raise ConfigError(
        f'search.size={self.size}: must divide the {stages} stages with search.keep_rollouts'
      )

  def plan(self, gen):
    """A row of 'grow' holds the number of the step, from 1."""
    grow = core.Phase('grow', tuple((number,) for number in range(1, self.grow_steps + 1)))
    finish = (core.Phase('finish', ((self.grow_steps + 1,),)),) if self.finish else ()
    return (core.Phase('root', ((0,),)), grow, *finish)

  @property
  def _draws_lines(self) -> bool:
    """Whether each completion at the end goes down a line of its own."""
    return self.tree_rule().random

  def _depth(self, gen) -> int:
    """Nodes below the root on the longest line."""
    return -(-(gen.num_stages - self.initial) // self.size)

  def _nodes(self, gen) -> int:
    """Room for the root and for what each simulation adds."""
    if self.keep_rollouts:  # at most a whole line each, the root's own rollout included
      return 1 + (1 + self.simulations) * self._depth(gen)
    return 1 + self.simulations

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
    shown, stage, chain = self._rollout(sampler, leaf, ready, keys, begin, count)
    own = ((leaf, jax.random.key_data(keys), begin), chain, value)
    return core.Candidates(shown, stage, jnp.full(stage.shape, -1), own)

  def _ask_leaves(self, sampler, frontier):
    gen, (prompt, grown) = sampler.gen, frontier.own
    grown, paths = tree.select_leaves(
      grown, self.tree_rule(), leaves=self.leaves, depth=self._depth(gen)
    )
    # each leaf continues the prefix of the node that it hangs from, with the key of its slot
    above, data, begin = tree.parent_embeddings(grown, paths)
    keys = core.child_key(_typed_keys(data, frontier.keys), begin, paths.action)
    if not self.initial:  # a child of the root starts by itself: from noise of its own
      above = self._fresh_starts(sampler, above, keys, begin)
    ready = sampler.rebuild_cache(above, begin)
    ready = sampler.extend(ready, keys, begin, self.size)
    leaf, stage = sampler.drop_cache(ready), jnp.minimum(begin + self.size, gen.num_stages)
    value = self._predicted_value(sampler, leaf, stage)
    count = gen.num_stages - self.initial - self.size
    shown, seen, chain = self._rollout(sampler, leaf, ready, keys, stage, count)
    own = (prompt, grown, paths, (leaf, jax.random.key_data(keys), stage), chain, value)
    return core.Candidates(shown, seen, jnp.full(seen.shape, -1), own)

  def _fresh_starts(self, sampler, states, keys, begin):
    """States at stage 0 drawn anew under their own keys, the others as they are."""
    fresh = sampler.drop_cache(sampler.init(keys))

    def choose(new, old):
      return jnp.where(begin.reshape(begin.shape + (1,) * (old.ndim - 2)) == 0, new, old)

    return jax.tree.map(choose, fresh, states)

  def _ask_finish(self, sampler, frontier):
    prompt, grown = frontier.own
    numbers, depth = jnp.arange(self.finish), self._depth(sampler.gen)
    keys = jnp.broadcast_to(core.fold(frontier.keys, FINISH), (len(prompt), self.finish))
    none = jnp.full(keys.shape, -1)
    if self._draws_lines:
      node = lines.draw_lines(grown, self.tree_rule(), core.fold(keys, numbers), depth)
    else:
      node = self._most_visited(grown, depth)[:, None]
    leaf, data, begin = jax.tree.map(lambda x: tree.at_nodes(x, node), grown.embedding)
    if self._draws_lines and self.keep_rollouts:  # all of its lines end in finished samples
      return core.Candidates(leaf, begin, none, own=(prompt, grown))
    ready = sampler.rebuild_cache(leaf, begin)
    if not self._draws_lines:
      ready = core.repeat(ready, self.finish)
    own_keys = core.fold(_typed_keys(data, frontier.keys), FINISH)
    keys = core.fold(jnp.broadcast_to(own_keys, keys.shape), numbers)
    count = sampler.num_stages - self.initial
    done = sampler.extend(ready, keys, jnp.broadcast_to(begin, keys.shape), count)
    return core.Candidates(
      sampler.drop_cache(done), sampler.num_stages, none, own=(prompt, grown)
    )

  def _most_visited(self, grown, depth):
    """Where the line with the most visits ends `[B]`."""
    node = grown.root
    for _ in range(depth):
      counts = tree.at_nodes(grown.counts, node)
      child = tree.at_nodes(grown.child, node)
      child = jnp.take_along_axis(child, counts.argmax(1)[:, None], 1)[:, 0]
      node = jnp.where(counts.max(1) > 0, child, node)
    return node

  def _predicted_value(self, sampler, leaf, stage):
    return sampler.value(leaf, stage) if self.mix < 1 else jnp.zeros(stage.shape)

  def _rollout(self, sampler, leaf, ready, keys, stage, count):
    """Complete samples, their stages and the nodes on the way (or ()); without rollouts no
    candidate is shown."""
    if not self.mix:
      return jax.tree.map(lambda x: x[:, :0], leaf), stage[:, :0], ()
    end = jnp.full(stage.shape, sampler.num_stages)
    if self.keep_rollouts:  # child 0 has its parent's key, so a rollout is a line of these
      shown, chain = self._rollout_chunks(sampler, ready, keys, stage, count)
      return shown, end, chain
    keys = core.fold(keys, ROLLOUT)  # or child 0 would draw the same sample again
    if self.rollout == 'small':
      shown = sampler.rollout(leaf, keys, stage, count, greedy=self.greedy)
    else:
      shown = sampler.extend(ready, keys, stage, count, greedy=self.greedy)
      shown = sampler.drop_cache(shown)
    return shown, end, ()

  def _rollout_chunks(self, sampler, ready, keys, stage, count):
    """Complete samples, and their states and stages `[B, L, C, ...]` after each of C chunks."""
    gen, quiet = sampler.gen, sampler._replace(meter=None)

    def run_chunk(carry, _):
      state, at = carry
      state = quiet.extend(state, keys, at, self.size)
      at = jnp.minimum(at + self.size, gen.num_stages)
      return (state, at), (sampler.drop_cache(state), at)

    start = ready, jnp.asarray(stage, jnp.int32)
    (last, at), chain = jax.lax.scan(run_chunk, start, None, length=count // self.size)
    # a meter does not see into a compiled loop
    if sampler.meter is not None:
      evals = None
      if core.finishes_early(gen):
        evals = (gen.stages_done(last, at) - gen.stages_done(ready, stage)).sum(axis=1)
      sampler.meter.append(core.Call(gen, 'extend', keys.shape[1], stage, count, evals))
    chain = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), chain)
    return sampler.drop_cache(last), chain if count else ()

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    tell = {'root': self._tell_root, 'grow': self._tell_leaves, 'finish': self._tell_finish}[shape]
    own = tell(sampler, frontier, candidates, totals, row)
    return frontier._replace(own=own), jnp.zeros((totals.shape[0], 0), jnp.int32)

  def _tell_root(self, sampler, frontier, candidates, totals, row):
    (prompt,), (embedding, chain, value) = frontier.own, candidates.own
    value = self._leaf_value(value, totals, 0.0, jnp.zeros(totals.shape, bool))
    root = jax.tree.map(lambda x: x[:, 0], embedding)
    uniform = jnp.zeros((len(value), self.slots))
    keys, gen = prompt if self.tree_rule().random else None, sampler.gen
    grown = tree.init_tree(root, uniform, value[:, 0], self._nodes(gen), keys)
    grown = tree.add_root_noise(grown, self.tree_rule(), core.fold(prompt, NOISE))
    if chain:  # the root's one visit is its rollout, whose value it has
      paths = lines.root_paths(grown, self._depth(gen))
      grown, paths = self._keep_rollouts(gen, grown, paths, embedding, chain, value)
      grown = lines.close_finished(grown, self.tree_rule(), paths)
    return prompt, grown

  def _keep_rollouts(self, gen, grown, paths, embedding, chain, value):
    """The trees with the chunks of rollouts below their leaves, and the paths to these ends."""
    (_, data, stage), (states, stages) = embedding, chain
    data = jnp.broadcast_to(data[:, :, None], (*stages.shape, data.shape[-1]))
    left = (gen.num_stages - stage) // self.size
    return lines.append_chains(grown, paths, (states, data, stages), left, value)

  def _tell_leaves(self, sampler, frontier, candidates, totals, row):
    prompt, grown, paths, embedding, chain, value = candidates.own
    # the worst value so far stands for a rollout that could not be scored
    used = jnp.arange(grown.raw.shape[1]) < grown.used[:, None]
    worst = jnp.where(used & (grown.visits > 0), grown.raw, jnp.inf).min(1, keepdims=True)
    closed = embedding[2] >= sampler.num_stages
    value = self._leaf_value(value, totals, worst, closed)
    uniform, zero = jnp.zeros((*value.shape, self.slots)), jnp.zeros(value.shape)
    grown = tree.expand_leaves(grown, paths, embedding, uniform, value, zero, zero + 1, closed)
    ends = paths
    if chain:
      grown, ends = self._keep_rollouts(sampler.gen, grown, paths, embedding, chain, value)
    grown = tree.back_up(grown, self.tree_rule(), paths, value)
    grown = lines.close_finished(grown, self.tree_rule(), ends)
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
      if self._draws_lines and self.keep_rollouts:
        return core.Cost(), self.finish
      heads = self.finish if self._draws_lines else 1
      completed = self.finish * gen.cost('extend', self.initial, whole)
      return heads * gen.cost('rebuild_cache') + completed, self.finish
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


def build(preset: str = '', **settings) -> MCTS:
  """From settings; `preset` names a published method, whose settings the others replace.

  Raises:
    ConfigError: an unknown preset or setting.
  """
  return checks.build_preset(MCTS, PRESETS, preset, settings)
