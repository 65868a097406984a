"""Laws that every part must obey, as functions to run on parts of your own.

`check_generator`, `check_verifier` and `check_algorithm` are conformance tests in the manner of
pgx's `api_test`: they raise `AssertionError` with what differs. Integers must be equal, floats
agree to `TOLERANCE` (programs of other shapes sum in another order).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.core import Cost
from vtts_jax.engine import step
from vtts_jax.engine.program import SearchProgram
from vtts_jax.engine.search import search
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.smc import SMC
from vtts_jax.testing.offers import (
  TOLERANCE,
  GeneratorTrial,
  assert_refused,
  assert_same,
  check_offers,
  first_rows,
  mixed_stages,
)

# -------------------------------------------------------------------------------------- generators


def check_generator(gen: core.Generator, prompts, key, *, stages: int | None = None) -> None:
  """A generator keeps the protocol.

  Args:
    prompts: at least two texts or prompt rows.
    stages: where to cut a candidate; a third of the way by default.
  """
  gen.check()
  assert hash(gen) == hash(dataclasses.replace(gen)), 'a generator must be a frozen dataclass'
  prompts = core.as_prompts(prompts)
  params, b, n = gen.load(), len(prompts), 3
  arrays = jax.tree.map(jnp.asarray, gen.tokenize(prompts))
  ctx = jax.jit(gen.encode)(params, arrays)
  for leaf in jax.tree.leaves(ctx):
    assert leaf.shape[0] == b, f'context leaf {leaf.shape} has no prompt axis of {b}'
  keys = core.candidate_keys(core.prompt_keys(key, jnp.arange(b)), jnp.arange(n))
  end = gen.num_stages
  trial = GeneratorTrial(gen, params, ctx, keys, stages or max(1, end // 3), end)
  for leaf in jax.tree.leaves(trial.start):
    assert leaf.shape[:2] == (b, n), f'state leaf {leaf.shape} must start with {(b, n)}'
  _check_pieces(trial)
  if gen.uniform_stages:
    _check_ragged_stages(trial)
  _check_fork(trial)
  _check_outputs(trial)
  _check_finished(trial)
  check_offers(trial)
  _check_generator_costs(trial)


def _check_pieces(trial: GeneratorTrial) -> None:
  """A candidate is the same however it is cut, batched, or rebuilt from what identifies it."""
  gen, params, ctx, cut, end = trial.gen, trial.params, trial.ctx, trial.cut, trial.end
  whole = trial.bare(trial.whole)
  rebuilt = trial.rebuild(trial.bare(trial.part), cut)
  again = trial.extend(rebuilt, trial.keys, cut, end - cut)
  assert_same(trial.bare(again), whole, 'rebuild_cache and extend')
  # alone and in one piece: one program for both laws
  one = trial.extend(gen.init(params, ctx, trial.keys[:, :1]), trial.keys[:, :1], 0, end)
  assert_same(trial.bare(one), first_rows(whole), 'a candidate alone, in one piece')
  a = trial.extend(trial.part, trial.keys, cut, end - cut, greedy=True)
  c = trial.extend(trial.part, trial.keys[:, ::-1], cut, end - cut, greedy=True)
  assert_same(trial.bare(a), trial.bare(c), 'greedy extension must not depend on keys')


def _check_ragged_stages(trial: GeneratorTrial) -> None:
  """`stage` may be a Python integer, and may differ from candidate to candidate."""
  gen, params, ctx, cut, end = trial.gen, trial.params, trial.ctx, trial.cut, trial.end
  whole = trial.bare(trial.whole)

  mixed, reached = mixed_stages(trial)

  @jax.jit
  def extend_ragged(params, ctx, part, mixed):
    fixed = gen.extend(params, ctx, part, trial.keys, cut, 1)
    ready = gen.rebuild_cache(params, ctx, mixed, reached)
    return fixed, gen.extend(params, ctx, ready, trial.keys, reached, end)

  fixed, ragged = extend_ragged(params, ctx, trial.part, mixed)
  assert_same(trial.bare(ragged), whole, 'extend with a stage for each candidate')
  traced = trial.extend(trial.part, trial.keys, cut, 1)
  assert_same(trial.bare(fixed), trial.bare(traced), 'a stage that is known while compiling')


def _check_fork(trial: GeneratorTrial) -> None:
  """Child 0 is its parent's next stage; a child and its cache owner are a state again."""
  gen, params, ctx, cut, end = trial.gen, trial.params, trial.ctx, trial.cut, trial.end
  if cut >= end:
    return
  b, n = trial.keys.shape
  children = core.child_keys(trial.keys, cut, 4)
  parent = jnp.broadcast_to(jnp.arange(4 * n) // 4, (b, 4 * n))

  @jax.jit
  def fork_and_finish(params, ctx, state):
    forked, owners = gen.fork(params, ctx, state, children, cut, 4)
    grown = gen.rebuild_cache(params, ctx, forked, cut + 1, share=core.take(owners, parent))
    keys = children.reshape(b, -1)
    return forked, gen.drop_cache(gen.extend(params, ctx, grown, keys, cut + 1, end - cut - 1))

  forked, grown = fork_and_finish(params, ctx, trial.part)
  first = jnp.broadcast_to(jnp.arange(n) * 4, (b, n))
  next_stage = trial.extend(trial.part, trial.keys, cut, 1)
  assert_same(
    core.take(trial.bare(forked), first), trial.bare(next_stage), 'child 0 of a fork'
  )
  assert_same(core.take(grown, first), trial.bare(trial.whole), 'a forked child 0 run to the end')


def _check_outputs(trial: GeneratorTrial) -> None:
  """Everything in `outputs` can be observed, of candidates with caches or without."""
  gen, params, ctx, end = trial.gen, trial.params, trial.ctx, trial.end
  names = tuple(sorted(gen.outputs))

  @jax.jit
  def observe(params, ctx, state, stage):
    return gen.observe(params, ctx, state, stage, names)

  seen = observe(params, ctx, trial.bare(trial.whole), end)
  assert set(seen) == set(names), f'observed {set(seen)}, outputs {set(names)}'
  for name, output in gen.outputs.items():
    assert output.kind in core.KINDS, f'{name}: kind {output.kind!r}'
    shape = (*trial.keys.shape, *output.shape)
    assert seen[name].shape == shape, f'{name}: {seen[name].shape}, must be {shape}'
    if output.kind == 'image':
      picture = np.asarray(seen[name])
      inside = picture.dtype == np.float32 and picture.min() >= 0 and picture.max() <= 1
      assert inside, f'{name}: not float32 in [0, 1]'
  many = observe(params, ctx, trial.whole, np.full(trial.keys.shape, end))
  assert_same(many, seen, 'observe with caches, a stage for each candidate')


def _check_finished(trial: GeneratorTrial) -> None:
  gen, end = trial.gen, trial.end
  done = gen.finished(trial.bare(trial.whole), end)
  assert done.shape == trial.keys.shape and bool(done.all()), 'complete candidates are finished'
  stages = gen.stages_done(trial.bare(trial.whole), end)
  assert stages.dtype == jnp.int32 and int(stages.max()) <= end, 'stages_done'
  if not core.finishes_early(gen):
    assert not bool(gen.finished(trial.bare(trial.start), 0).any()), 'empty and yet finished'


def _check_generator_costs(trial: GeneratorTrial) -> None:
  gen, cut, end = trial.gen, trial.cut, trial.end
  ops = ['encode', 'extend', 'fork', 'rebuild_cache', *(f'observe:{name}' for name in gen.outputs)]
  ops += [op for op in ('value', 'rollout') if op in gen.offers]
  for op in ops:
    assert isinstance(gen.cost(op), Cost), f'cost({op!r})'
  pieces = gen.cost('extend', 0, cut) + gen.cost('extend', cut, end - cut)
  assert gen.cost('extend', 0, end) == pieces, 'the cost of two pieces'
  assert gen.cost('extend', 0, 0) == Cost(), 'no stages cost nothing'


# --------------------------------------------------------------------------------------- verifiers


def check_verifier(ver: core.Verifier, prompts, observed) -> None:
  """A verifier keeps the protocol.

  Args:
    prompts: B texts or prompt rows.
    observed: `{name: [B, M, ...]}`, or images `[B, M, H, W, 3]`.
  """
  ver.check()
  prompts, params = core.as_prompts(prompts), ver.load()
  observed = dict(observed) if isinstance(observed, dict) else {'image': observed}
  # on the host, where another order needs no compiled program
  observed = {name: np.asarray(value) for name, value in observed.items()}
  missing = ver.needs - observed.keys()
  assert not missing, f'give the check {sorted(missing)} as well'
  b, m = next(iter(observed.values())).shape[:2]
  # compiled or not, as the drivers run it; all that is checked is one program
  encode = jax.jit(ver.encode) if ver.jittable else ver.encode
  see = functools.partial(_score_and_more, ver)
  see = jax.jit(see) if ver.jittable else see

  def call(prompts, observed):
    return see(params, encode(params, jax.tree.map(jnp.asarray, ver.tokenize(prompts))), observed)

  scores, features, gradient = call(prompts, observed)
  assert set(scores) == set(ver.names), f'scores {set(scores)}, names {ver.names}'
  for name, value in scores.items():
    assert np.shape(value) == (b, m), f'{name}: {np.shape(value)}'
    assert np.isfinite(np.asarray(value)).all(), f'{name}: not finite on what is finite'
  flip = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:, ::-1], tree)
  assert_same(call(prompts, flip(observed))[0], flip(scores), 'candidates in another order')
  turn = lambda tree: jax.tree.map(lambda x: np.asarray(x)[::-1], tree)
  assert_same(call(prompts[::-1], turn(observed))[0], turn(scores), 'prompts in another order')
  total = ver.total({k: jnp.asarray(v) for k, v in scores.items()}, jnp.ones((b, m), bool))
  assert total.shape == (b, m), f'total {total.shape}'
  assert isinstance(ver.cost('encode'), Cost) and ver.cost('score').verify > 0
  unknown = ver.gives - {'features', 'gradient'}
  assert not unknown, f'unknown capabilities {sorted(unknown)}'
  if 'features' in ver.gives:
    assert features.shape[:2] == (b, m) and features.ndim == 3, f'features {features.shape}'
  else:
    assert_refused(lambda: ver.embed_images(params, observed.get('image')), 'embed_images')
  if 'gradient' in ver.gives:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    assert all(np.isfinite(leaf).all() for leaf in leaves), 'a gradient is not finite'
    assert any((leaf != 0).any() for leaf in leaves), "gives 'gradient', and it is 0 everywhere"


def _score_and_more(ver: core.Verifier, params, vctx, observed):
  """Scores, and the features and the gradient in what was observed where these are given."""

  # only numbers on a scale have a gradient
  smooth = {n: x for n, x in observed.items() if jnp.issubdtype(x.dtype, jnp.floating)}

  def total(smooth):
    scores = ver.score(params, vctx, {**observed, **smooth})
    return sum(x.sum() for x in scores.values()), scores

  features = gradient = None
  if 'features' in ver.gives:
    features = ver.embed_images(params, observed['image'])
  if 'gradient' in ver.gives:
    (_, scores), gradient = jax.value_and_grad(total, has_aux=True)(smooth)
  else:
    scores = ver.score(params, vctx, observed)
  return scores, features, gradient


# -------------------------------------------------------------------------------------- algorithms


def check_algorithm(algo: core.Algorithm, gen, ver, prompts, key) -> None:
  """An algorithm keeps the laws that hold for all of them, on these parts."""
  find = functools.partial(search, algo, gen, ver, seed=key)
  base = find(prompts)
  best = base.best
  # one more program for three laws: each step compiled alone, batches padded, candidates in chunks
  stepped = find(prompts, mode='stepped', batch=2, render_chunk=3).best
  assert_same(stepped, best, 'stepped, in batches of two and chunks of three, against fused')
  # the same ids in another order: results belong to ids, not to rows
  ids = np.arange(len(prompts))[::-1]
  turned = find(prompts[::-1], ids=ids)
  assert_same(jax.tree.map(lambda x: x[::-1], turned.best), best, 'prompts in another order')
  totals = np.stack([trace.best.total for trace in base.steps], 1)
  assert (totals[:, 1:] >= totals[:, :-1] - TOLERANCE).all(), 'the best score fell'
  # elitism: nothing better than the result was ever observed
  offered = [np.where(trace.final, trace.totals, -np.inf) for trace in base.steps]
  offered = np.concatenate(offered, axis=1).max(axis=1)
  assert_same(best.total, offered, 'the best is the best of what was observed')
  assert counted_cost(algo, gen, ver, prompts[:1], key) == sum(base.costs, Cost()), 'the bill'
  generator = sum(base.costs, Cost()).generator
  if core.finishes_early(gen):
    assert (base.measured_evals <= generator).all(), 'measured above the bill'


def counted_cost(algo, gen, ver, prompts, key) -> Cost:
  """What a search of one prompt costs, added up from the calls it makes; it is traced, not run."""
  assert len(prompts) == 1
  prompts, meter = core.as_prompts(prompts), []
  program = SearchProgram(algo, gen, ver)
  params = {'generator': gen.load(), 'verifier': ver.load()}
  arrays = {'generator': gen.tokenize(prompts), 'verifier': ver.tokenize(prompts)}

  def run(params, arrays):
    contexts = step.encode_prompts(program, params, arrays)
    keys = core.prompt_keys(key, jnp.arange(1))
    initial = jnp.zeros((1, algo.initial), jnp.int32)
    state = step.begin_search(program, params, contexts, keys, initial, meter)
    for shape, row in core.steps_of(algo, gen):
      state, _ = step.silent_step(program, params, contexts, state, shape, row, meter)
    step.finish_search(program, params, contexts, state.best, meter)

  jax.eval_shape(run, params, arrays)
  total = gen.cost('encode') + ver.cost('encode')
  for call in meter:
    if call.op == 'score':
      total += call.candidates * call.part.cost('score')
    else:  # where candidates differ in their stage, the bill counts from the first one
      stage = algo.initial if isinstance(call.stage, jax.core.Tracer) else int(call.stage)
      total += call.candidates * call.part.cost(call.op, stage, call.count)
  return total


# --------------------------------------------------------------------------------------------- laws


def law_prefix(gen, ver, prompts, key, n: int = 4, more: int = 16) -> None:
  """Best-of-n is the first n of best-of-more, candidate by candidate."""
  few, many = (
    search(BestOfN(n=m), gen, ver, prompts, seed=key, collect=('states',)).steps[0]
    for m in (n, more)
  )
  first = jax.tree.map(lambda x: x[:, :n], many.states)
  assert_same(few.states, first, 'the first candidates')
  assert_same(few.totals, many.totals[:, :n], 'their totals')


def law_beam_is_best_of_n(gen, ver, prompts, key, n: int = 6, **settings) -> None:
  """A beam of n with one child each ends in the n samples of best-of-n, as a set."""
  bon = search(BestOfN(n=n), gen, ver, prompts, seed=key)
  beam = search(Beam(width=n, branch=1, **settings), gen, ver, prompts, seed=key)
  ends = [np.sort(result.steps[-1].totals, axis=1) for result in (bon, beam)]
  assert_same(ends[1], ends[0], 'the final candidates')


def law_particles_are_best_of_n(gen, ver, prompts, key, n: int = 5, **settings) -> None:
  """Particles of no strength (an infinite temperature) are the n samples of best-of-n."""
  smc = SMC(particles=n, strength=0.0, **settings)
  ends = [
    search(algo, gen, ver, prompts, seed=key, collect=('states',)).steps[-1]
    for algo in (BestOfN(n=n), smc)
  ]
  assert_same(ends[1].states, ends[0].states, 'the particles at the end')
  assert_same(ends[1].totals, ends[0].totals, 'their totals')
