"""What a generator offers beyond the protocol's core works, and what it does not offer is refused.

The part of `laws.check_generator` that goes through the capabilities, and what it shares with the
rest: candidates cut into two pieces, and equality of pytrees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError

TOLERANCE = 2e-5


def assert_same(a, b, what: str, tolerance: float = TOLERANCE) -> None:
  """Asserts that two pytrees are equal: integers exactly, floats to `tolerance`."""
  assert jax.tree.structure(a) == jax.tree.structure(b), f'{what}: other structure'
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(a)]
  for path, x, y in zip(paths, jax.tree.leaves(a), jax.tree.leaves(b)):
    if jnp.issubdtype(getattr(x, 'dtype', np.int32), jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    where = f'{what}{jax.tree_util.keystr(path)}'
    assert x.shape == y.shape, f'{where}: {x.shape} against {y.shape}'
    close = np.isclose(x, y, tolerance, tolerance) if x.dtype.kind == 'f' else x == y
    assert close.all(), f'{where}: {(~close).sum()} of {x.size} differ'


@dataclasses.dataclass
class GeneratorTrial:
  """A generator with its parameters, prompts and candidates, cut into a first and a second part.

  Attributes:
    gen, params, ctx, keys: what the methods are called with; keys `[B, 3]`.
    cut, end: stages after the first part, and in all.
    start, part, whole: states with 0, `cut` and `end` stages done.
  """

  gen: core.Generator
  params: object
  ctx: object
  keys: jax.Array
  cut: int
  end: int

  def __post_init__(self):
    gen, params = self.gen, self.params

    # weights are arguments of each program: as constants they would be compiled into it; where
    # stages are uniform the stage is one too, so that calls of one length share a program
    fixed = 'count greedy' if gen.uniform_stages else 'stage count greedy'

    @functools.partial(jax.jit, static_argnames=fixed.split())
    def extend(params, ctx, state, keys, stage, count, greedy=False):
      return gen.extend(params, ctx, state, keys, stage, count, greedy=greedy)

    def extend_bound(state, keys, stage, count, greedy=False):
      return extend(params, self.ctx, state, keys, stage=stage, count=count, greedy=greedy)

    self.extend = extend_bound
    rebuild = jax.jit(gen.rebuild_cache, static_argnums=3)
    self.rebuild = functools.partial(rebuild, params, self.ctx)
    self.start = gen.init(params, self.ctx, self.keys)
    self.part = self.extend(self.start, self.keys, 0, self.cut)
    self.whole = self.extend(self.part, self.keys, self.cut, self.end - self.cut)

  def bare(self, state):
    """The state without caches: what identifies the candidates."""
    return self.gen.drop_cache(state)


def mixed_stages(trial: GeneratorTrial):
  """Candidates with 0, `cut` and `end` stages done, and these numbers `[B, 3]`."""
  mixed = pick_rows(*(trial.bare(s) for s in (trial.start, trial.part, trial.whole)))
  return mixed, np.broadcast_to(np.array([0, trial.cut, trial.end], np.int32), trial.keys.shape)


@jax.jit
def pick_rows(*states):
  """Candidate i of the i-th of the states."""
  return jax.tree.map(lambda *x: jnp.stack([y[:, i] for i, y in enumerate(x)], axis=1), *states)


def first_rows(state):
  """The first candidate of each prompt."""
  return jax.tree.map(lambda x: x[:, :1], state)


def assert_refused(call, what: str) -> None:
  """Asserts that a capability which is not offered raises `ConfigError`."""
  try:
    call()
  except ConfigError:
    return
  raise AssertionError(f'{what} is not offered and yet answers')


def check_offers(trial: GeneratorTrial) -> None:
  """What is offered works, and what is not offered is refused."""
  gen, params, ctx, keys = trial.gen, trial.params, trial.ctx, trial.keys
  bare, cut = trial.bare(trial.part), trial.cut
  checks = {
    'fork_distinct': (
      _check_fork_distinct,
      lambda: gen.fork(
        params, ctx, trial.part, core.child_keys(keys, cut, 2), cut, 2, replace=False
      ),
    ),
    'tokens': (_check_tokens, lambda: gen.tokens(bare)),
    'rewind': (_check_rewind, lambda: gen.rewind(bare, 0)),
    'value': (_check_value, lambda: gen.value(params, ctx, bare, cut)),
    'rollout': (_check_rollout, lambda: gen.rollout(params, ctx, bare, keys, cut, 1)),
    'noise': (_check_noise, lambda: gen.initial_noise(trial.start)),
    'perturb': (_check_perturb, lambda: gen.perturb(trial.start, keys, 0.1)),
    'renoise': (_check_renoise, lambda: gen.renoise(bare, keys, cut, 0)),
    'log_prob_gradient': (
      _check_log_prob_gradient,
      lambda: gen.transition_log_probs(params, ctx, bare),
    ),
  }
  unknown = gen.offers - checks.keys() - {'fork', 'stochastic'}
  assert not unknown, f'unknown capabilities {sorted(unknown)}'
  for name, (check, call) in checks.items():
    if name in gen.offers:
      check(trial)
    else:
      assert_refused(call, name)


def _check_fork_distinct(trial: GeneratorTrial) -> None:
  gen, cut, k = trial.gen, trial.cut, min(3, trial.gen.vocab)

  @jax.jit
  def fork_tokens(params, ctx, state, keys):
    children, _ = gen.fork(params, ctx, state, keys, cut, k, replace=False)
    return gen.tokens(children)[..., cut]

  found = fork_tokens(trial.params, trial.ctx, trial.part, core.child_keys(trial.keys, cut, k))
  tokens = np.asarray(found).reshape(-1, k)
  assert all(len(set(row)) == k for row in tokens.tolist()), 'children of a parent must differ'


def _check_tokens(trial: GeneratorTrial) -> None:
  """Tokens alone make the candidate again."""
  gen, params, ctx = trial.gen, trial.params, trial.ctx
  tokens = gen.tokens(trial.whole)
  assert tokens.shape == (*trial.keys.shape, trial.end), f'tokens {tokens.shape}'
  grown = jax.jit(gen.extend_with_tokens)(params, ctx, trial.start, tokens)
  assert_same(trial.bare(grown), trial.bare(trial.whole), 'extend_with_tokens')


def _check_rewind(trial: GeneratorTrial) -> None:
  """A candidate that is cut back draws what it drew before."""
  gen, cut = trial.gen, trial.cut
  back = gen.rewind(trial.bare(trial.whole), cut)
  assert_same(gen.tokens(back), gen.tokens(trial.part), 'rewind')
  ready = trial.rebuild(back, cut)
  again = trial.extend(ready, trial.keys, cut, trial.end - cut)
  assert_same(gen.tokens(again), gen.tokens(trial.whole), 'rewind and extend')


def _check_noise(trial: GeneratorTrial) -> None:
  """A candidate is its initial noise."""
  noise = trial.gen.initial_noise(trial.start)
  assert noise.shape[:2] == trial.keys.shape, f'noise {noise.shape}'
  assert_same(trial.gen.start_state(noise), trial.start, 'start_state')


def _check_perturb(trial: GeneratorTrial) -> None:
  gen, keys, cut = trial.gen, trial.keys, trial.cut
  perturb = jax.jit(gen.perturb)  # one program: with a stage for each candidate
  at = lambda *stages: jnp.broadcast_to(jnp.array(stages), keys.shape)
  near = perturb(trial.start, keys, 0.3, at(0, 0, 0))
  assert_same(perturb(trial.start, keys, 0.0, at(0, 0, 0)), trial.start, 'a perturbation of 0')
  assert_same(perturb(trial.start, keys, 0.3, at(0, 0, 0)), near, 'equal keys')
  pairs = zip(jax.tree.leaves(near), jax.tree.leaves(trial.start))
  assert any(not np.allclose(a, b) for a, b in pairs), 'nothing moved'
  pick = lambda a, b: jnp.stack([a[:, 0], b[:, 1], a[:, 2]], axis=1)
  mixed = perturb(jax.tree.map(pick, trial.start, trial.part), keys, 0.3, at(0, cut, 0))
  later = perturb(trial.part, keys, 0.3, at(cut, cut, cut))
  assert_same(mixed, jax.tree.map(pick, near, later), 'perturb with a stage for each candidate')


def _check_renoise(trial: GeneratorTrial) -> None:
  gen = trial.gen
  back = gen.renoise(trial.bare(trial.whole), trial.keys, trial.end, 0)
  assert jax.tree.structure(back) == jax.tree.structure(trial.start), 'renoise: other structure'
  again = trial.extend(back, trial.keys, 0, trial.end)
  for leaf in jax.tree.leaves(gen.observe(trial.params, trial.ctx, again, trial.end,
                                          tuple(gen.outputs))):  # fmt: skip
    assert np.isfinite(np.asarray(leaf, np.float32)).all(), 'renoised and not finite'
  if 'noise' in gen.offers:  # given noise stands in for the keys
    noise = gen.initial_noise(trial.start)
    found = [gen.renoise(trial.bare(trial.whole), keys, trial.end, trial.cut, noise)
             for keys in (trial.keys, trial.keys[:, ::-1])]  # fmt: skip
    assert_same(*found, 'renoise with given noise')


def _check_log_prob_gradient(trial: GeneratorTrial) -> None:
  """Transitions sum to what the sampler says, and have a gradient in the parameters."""
  gen, ctx, whole = trial.gen, trial.ctx, trial.bare(trial.whole)

  def total(params):
    found = gen.transition_log_probs(params, ctx, whole)
    return found.sum(), found

  slope = jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))
  (_, found), gradient = slope(trial.params)
  assert found.dtype == jnp.float32 and found.shape[:2] == trial.keys.shape
  if 'log_prob' in gen.outputs:
    said = gen.observe(trial.params, ctx, whole, trial.end, ('log_prob',))['log_prob']
    assert_same(found.sum(-1), said, 'transition_log_probs', tolerance=1e-4)
  leaves = [x for x in jax.tree.leaves(gradient) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert all(np.isfinite(np.asarray(x)).all() for x in leaves), 'a gradient is not finite'


def _check_value(trial: GeneratorTrial) -> None:
  """A value sees the stages that are done, and nothing else."""
  gen, params, ctx = trial.gen, trial.params, trial.ctx
  assert gen.value_of, "offers 'value' without value_of"
  ask = functools.partial(jax.jit(gen.value), params, ctx)
  states = [trial.bare(s) for s in (trial.start, trial.part, trial.whole)]
  stages = (0, trial.cut, trial.end)
  mixed, reached = mixed_stages(trial)
  alike = np.stack([ask(s, t)[:, i] for i, (s, t) in enumerate(zip(states, stages))], 1)
  assert alike.shape == trial.keys.shape and alike.dtype == jnp.float32, f'values {alike.shape}'
  assert np.isfinite(np.asarray(alike)).all(), 'a value is not finite'
  assert_same(ask(mixed, reached), alike, 'value with a stage for each candidate')
  part = ask(states[1], trial.cut)
  assert_same(ask(first_rows(states[1]), trial.cut), part[:, :1], 'value of one alone')
  assert_same(ask(states[2], trial.cut), part, 'value must not see stages that are not done')
  assert gen.cost('value').generator > 0, 'a value costs an evaluation'


def _check_rollout(trial: GeneratorTrial) -> None:
  """Rollouts may start anywhere, be cut anywhere, and stop at the end."""
  gen, params, ctx, keys, cut, end = (
    trial.gen, trial.params, trial.ctx, trial.keys, trial.cut, trial.end,
  )  # fmt: skip

  @functools.partial(jax.jit, static_argnames=('count', 'greedy'))
  def rollout(params, ctx, state, keys, stage, count, greedy=False):
    return gen.rollout(params, ctx, state, keys, stage, count, greedy=greedy)

  run_on = functools.partial(rollout, params, ctx)

  states = [trial.bare(s) for s in (trial.start, trial.part, trial.whole)]
  stages = (0, cut, end)
  done = [run_on(s, keys, t, end - t) for s, t in zip(states, stages)]
  assert_same(done[2], states[2], 'a rollout of a finished candidate')
  past = [run_on(s, keys, jnp.int32(t), end) for s, t in zip(states, stages)]
  assert_same(past, done, 'a rollout past the end, from a traced stage')
  mixed, reached = mixed_stages(trial)
  ragged = run_on(mixed, keys, reached, end)
  assert_same(ragged, pick_rows(*done), 'a rollout with a stage for each candidate')
  some = run_on(states[1], keys, cut, 1)
  assert_same(run_on(some, keys, cut + 1, end - cut - 1), done[1], 'a rollout in two pieces')
  a, c = (run_on(states[1], k, cut, end - cut, True) for k in (keys, keys[:, ::-1]))
  assert_same(a, c, 'a greedy rollout must not depend on keys')
  for stage in (0, cut):
    whole, less = gen.cost('rollout', stage, end - stage), gen.cost('rollout', stage, 0)
    assert whole == gen.cost('rollout', stage, end), 'stages past the end cost nothing'
    assert whole.generator - less.generator == end - stage, 'a stage is an evaluation'
    assert less.generator == 1, 'reading the candidate is an evaluation'
