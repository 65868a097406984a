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
from vtts_jax.engine import search as run
from vtts_jax.engine import step
from vtts_jax.errors import ConfigError
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.smc import SMC

TOLERANCE = 2e-5


def same(a, b, what: str, tolerance: float = TOLERANCE) -> None:
  """Asserts that two pytrees are equal: integers exactly, floats to `tolerance`."""
  assert jax.tree.structure(a) == jax.tree.structure(b), f'{what}: other structure'
  for path, x in jax.tree_util.tree_leaves_with_path(a):
    y = functools.reduce(
      lambda t, k: t[_index(k)] if not hasattr(k, 'name') else getattr(t, k.name), path, b
    )
    if jnp.issubdtype(getattr(x, 'dtype', np.int32), jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape, f'{what}{jax.tree_util.keystr(path)}: {x.shape} against {y.shape}'
    close = np.isclose(x, y, tolerance, tolerance) if x.dtype.kind == 'f' else x == y
    assert close.all(), f'{what}{jax.tree_util.keystr(path)}: {(~close).sum()} of {x.size} differ'


def _index(key):
  return getattr(key, 'key', getattr(key, 'idx', key))


def parameters(gen, ver):
  """`{'generator': ..., 'verifier': ...}` as `search` takes them."""
  return {'generator': gen.load(), 'verifier': ver.load()}


# -------------------------------------------------------------------------------------- conformance


def check_generator(gen: core.Generator, prompts, key, *, stages=None) -> None:
  """A generator keeps the protocol; `stages`: where to cut (a third of the way by default)."""
  gen.check()
  assert hash(gen) == hash(dataclasses.replace(gen)), 'a generator must be a frozen dataclass'
  params = gen.load()
  end, b, n = gen.num_stages, len(prompts), 3
  cut = stages or max(1, end // 3)
  ctx = jax.jit(gen.encode)(params, jax.tree.map(jnp.asarray, gen.tokenize(prompts)))
  for leaf in jax.tree.leaves(ctx):
    assert leaf.shape[0] == b, f'context leaf {leaf.shape} has no prompt axis of {b}'
  keys = core.candidate_keys(core.prompt_keys(key, jnp.arange(b)), jnp.arange(n))

  @functools.partial(jax.jit, static_argnums=(3, 4, 5))
  def run_from(ctx, state, keys, begin, count, greedy=False):
    return gen.extend(params, ctx, state, keys, begin, count, greedy=greedy)

  render = jax.jit(lambda ctx, state, stage: gen.render(params, ctx, state, stage))
  start = gen.init(params, ctx, keys)
  for leaf in jax.tree.leaves(start):
    assert leaf.shape[:2] == (b, n), f'state leaf {leaf.shape} must start with {(b, n)}'
  whole = run_from(ctx, start, keys, 0, end)
  part = run_from(ctx, start, keys, 0, cut)
  same(gen.slim(run_from(ctx, part, keys, cut, end - cut)), gen.slim(whole), 'extend in two pieces')
  traced = jax.jit(lambda s, t: gen.extend(params, ctx, s, keys, t, end - cut))(
    part, jnp.int32(cut)
  )
  same(gen.slim(traced), gen.slim(whole), 'extend from a traced stage')
  rebuilt = jax.jit(lambda s: gen.fatten(params, ctx, gen.slim(s), cut))(part)
  again = run_from(ctx, rebuilt, keys, cut, end - cut)
  same(gen.slim(again), gen.slim(whole), 'fatten(slim) and extend')
  reached = jnp.broadcast_to(jnp.array([0, cut, end]), (b, n))
  pick = lambda *rows: jnp.stack([x[:, i] for i, x in enumerate(rows)], axis=1)
  mixed = jax.tree.map(pick, gen.slim(start), gen.slim(part), gen.slim(whole))
  ragged = jax.jit(
    lambda s: gen.extend(params, ctx, gen.fatten(params, ctx, s, reached), keys, reached, end)
  )(mixed)
  same(gen.slim(ragged), gen.slim(whole), 'extend with a stage for each candidate')
  few = run_from(ctx, gen.init(params, ctx, keys[:, :1]), keys[:, :1], 0, end)
  same(gen.slim(few), core.take(gen.slim(whole), jnp.zeros((b, 1), int)), 'a candidate alone')
  a, c = run_from(ctx, part, keys, cut, 1, True), run_from(ctx, part, keys[:, ::-1], cut, 1, True)
  same(gen.slim(a), gen.slim(c), 'greedy extension must not depend on keys')
  children = core.child_keys(keys, cut, 4)
  forked, donor = jax.jit(lambda s: gen.fork(params, ctx, s, children, cut, 4))(part)
  first = core.take(forked, jnp.broadcast_to(jnp.arange(n) * 4, (b, n)))
  same(gen.slim(first), gen.slim(run_from(ctx, part, keys, cut, 1)), 'child 0 of a fork')
  if cut + 1 < end:
    parent = jnp.broadcast_to(jnp.arange(4 * n) // 4, (b, 4 * n))
    grown = gen.fatten(params, ctx, forked, cut + 1, like=core.take(donor, parent))
    grown = run_from(ctx, grown, children.reshape(b, -1), cut + 1, end - cut - 1)
    first = core.take(gen.slim(grown), jnp.broadcast_to(jnp.arange(n) * 4, (b, n)))
    same(first, gen.slim(whole), 'a forked child 0 run to the end')
  images = render(ctx, gen.slim(whole), end)
  assert images.shape == (b, n, *gen.image_shape), f'images {images.shape}'
  assert images.dtype == jnp.float32 and float(images.min()) >= 0 and float(images.max()) <= 1
  same(
    render(ctx, whole, jnp.full((b, n), end)), images, 'render of slim or fat, one stage or many'
  )
  ahead = {'value': gen.value_of, 'rollout': gen.rollout_policy}
  state = (gen.slim(start), gen.slim(part), gen.slim(whole))
  _check_value(gen, params, ctx, state, mixed, (0, cut, end))
  _check_rollout(gen, params, ctx, keys, state, mixed, (0, cut, end))
  for op in ('encode', 'extend', 'fork', 'force', 'fatten', 'render', *filter(ahead.get, ahead)):
    assert isinstance(gen.cost(op), Cost), f'cost({op!r})'
  assert gen.cost('extend', 0, end) == gen.cost('extend', 0, cut) + gen.cost(
    'extend', cut, end - cut
  )
  assert gen.cost('extend', 0, 0) == Cost(), 'no stages cost nothing'


def _refused(call, what: str) -> None:
  """Asserts that an optional method which is not offered raises `ConfigError`."""
  try:
    call()
  except ConfigError:
    return
  raise AssertionError(f'{what} is not offered and yet answers')


def _check_value(gen, params, ctx, states, mixed, stages) -> None:
  """`value` of slim `states`, of which `stages` are done; candidate i of `mixed` is of state i."""
  if not gen.value_of:
    return _refused(lambda: gen.value(params, ctx, states[0], 0), 'value')
  ask = jax.jit(lambda slim, stage: gen.value(params, ctx, slim, stage))
  shape = jax.tree.leaves(mixed)[0].shape[:2]
  alike = jnp.stack([ask(s, t)[:, i] for i, (s, t) in enumerate(zip(states, stages))], 1)
  assert alike.shape == shape and alike.dtype == jnp.float32, f'values {alike.shape} {alike.dtype}'
  assert np.isfinite(np.asarray(alike)).all(), 'a value is not finite'
  reached = jnp.broadcast_to(jnp.array(stages), shape)
  same(ask(mixed, reached), alike, 'value with a stage for each candidate')
  first = jnp.zeros((shape[0], 1), int)
  few = ask(core.take(states[1], first), stages[1])
  same(few, ask(states[1], stages[1])[:, :1], 'value of a candidate alone')
  blind = ask(states[2], stages[1])
  same(blind, ask(states[1], stages[1]), 'value must not see stages that are not done')
  assert gen.cost('value').generator > 0, 'a value costs an evaluation'


def _check_rollout(gen, params, ctx, keys, states, mixed, stages) -> None:
  """`rollout` of the same candidates."""
  if not gen.rollout_policy:
    return _refused(lambda: gen.rollout(params, ctx, states[0], keys, 0, 1), 'rollout')
  (b, n), (_, cut, end) = keys.shape, stages

  @functools.partial(jax.jit, static_argnames=('count', 'greedy'))
  def run_on(slim, keys, stage, count, greedy=False):
    return gen.rollout(params, ctx, slim, keys, stage, count, greedy=greedy)

  done = [gen.rollout(params, ctx, s, keys, t, end - t) for s, t in zip(states, stages)]
  same(done[2], states[2], 'a rollout of a finished candidate')
  past = [gen.rollout(params, ctx, s, keys, t, end) for s, t in zip(states, stages)]
  same(past, done, 'a rollout past the end')
  traced = [run_on(s, keys, jnp.int32(t), end) for s, t in zip(states, stages)]
  same(traced, done, 'a rollout from a traced stage')
  pick = lambda *rows: jnp.stack([x[:, i] for i, x in enumerate(rows)], axis=1)
  reached = jnp.broadcast_to(jnp.array(stages), (b, n))
  ragged = run_on(mixed, keys, reached, end)
  same(ragged, jax.tree.map(pick, *done), 'a rollout with a stage for each candidate')
  some = run_on(states[1], keys, cut, 1)
  same(run_on(some, keys, cut + 1, end - cut - 1), done[1], 'a rollout in two pieces')
  first = jnp.zeros((b, 1), int)
  few = run_on(core.take(states[1], first), keys[:, :1], cut, end - cut)
  same(few, core.take(done[1], first), 'a rollout of a candidate alone')
  a, c = (run_on(states[1], k, cut, end - cut, True) for k in (keys, keys[:, ::-1]))
  same(a, c, 'a greedy rollout must not depend on keys')
  for stage in (0, cut):
    whole, less = gen.cost('rollout', stage, end - stage), gen.cost('rollout', stage, 0)
    assert whole == gen.cost('rollout', stage, end), 'stages past the end cost nothing'
    assert whole.generator - less.generator == end - stage, 'a stage is an evaluation'
    assert less.generator == 1, 'reading the candidate is an evaluation'


def check_verifier(ver: core.Verifier, prompts, images) -> None:
  """A verifier keeps the protocol; images `[B, M, H, W, 3]` for B prompts."""
  ver.check()
  params = ver.load()
  images = jnp.asarray(images)
  b, m = images.shape[:2]
  encode = jax.jit(ver.encode) if ver.jittable else ver.encode  # as the drivers run it
  vctx = encode(params, jax.tree.map(jnp.asarray, ver.tokenize(prompts)))
  signals = {'log_prob': images.mean((2, 3, 4)), 'length': 3} if 'log_prob' in ver.uses else {}
  signals |= {'early': images[:, :, ::-1]} if 'early' in ver.uses else {}
  call = lambda vctx, images, told: ver.score(params, vctx, images, **told)
  call = jax.jit(call) if ver.jittable else call
  scores = call(vctx, images, signals)
  assert set(scores) == set(ver.names), f'scores {set(scores)}, names {ver.names}'
  for name, value in scores.items():
    assert np.shape(value) == (b, m), f'{name}: {np.shape(value)}'
    assert np.isfinite(np.asarray(value)).all(), f'{name}: not finite on finite images'
  flip = lambda t: jax.tree.map(lambda x: x[:, ::-1] if np.ndim(x) > 1 else x, t)
  same(call(vctx, images[:, ::-1], flip(signals)), flip(scores), 'candidates in another order')
  turn = lambda t: jax.tree.map(lambda x: x[::-1] if np.ndim(x) else x, t)
  turned = encode(params, jax.tree.map(jnp.asarray, ver.tokenize(prompts[::-1])))
  same(call(turned, images[::-1], turn(signals)), turn(scores), 'prompts in another order')
  total = ver.total({k: jnp.asarray(v) for k, v in scores.items()}, jnp.ones((b, m), bool))
  assert total.shape == (b, m), f'total {total.shape}'
  assert isinstance(ver.cost('encode'), Cost) and ver.cost('score').verify > 0


def check_algorithm(algo: core.Algorithm, gen, ver, prompts, key, *, shapes: bool = True) -> None:
  """An algorithm keeps the laws that hold for all of them, on these parts.

  `shapes=False` leaves out those that need a program of another shape (batches, render chunks).
  """
  params = parameters(gen, ver)
  find = functools.partial(run.search, algo, gen, ver, params, trace=True)
  base = find(prompts, key)
  same(find(prompts, key, mode='stepped').best, base.best, 'stepped against fused')
  if shapes:
    same(find(prompts, key, batch=2).best, base.best, 'batches of two, padded')
    same(find(prompts, key, render_chunk=3).best, base.best, 'rendered three at a time')
  ids = np.arange(len(prompts))[::-1]
  turned = find(prompts[::-1], key, ids=ids)
  same(jax.tree.map(lambda x: x[::-1], turned.best), base.best, 'prompts in another order')
  best = np.stack([s.best.total for s in base.steps], 1)
  assert (best[:, 1:] >= best[:, :-1] - TOLERANCE).all(), 'the best score fell'
  offered = [np.where(s.final, s.totals, -np.inf) for s in base.steps]
  offered = np.concatenate(offered, axis=1).max(axis=1)
  same(base.best.total, offered, 'the best is the best of what was looked at')
  assert counted(algo, gen, ver, params, prompts[:1], key) == sum(base.costs, Cost()), 'the bill'


def _least(stage) -> int:
  """The stage of a call, or of its least finished candidate."""
  return int(np.min(stage))


class _Counted:
  """A part that passes everything on and adds up what the calls cost."""

  def __init__(self, part, spent):
    self._part, self._spent = part, spent

  def __getattr__(self, name):
    return getattr(self._part, name)

  def __eq__(self, other):
    return self._part == other._part

  def draft(self, **changes):
    return _Counted(self._part.draft(**changes), self._spent)

  def _add(self, cost):
    self._spent.append(cost)

  def encode(self, params, prompt):
    self._add(self._part.cost('encode'))
    return self._part.encode(params, prompt)

  def extend(self, params, ctx, state, keys, stage, count, **options):
    self._add(keys.size * self._part.cost('extend', _least(stage), count))
    return self._part.extend(params, ctx, state, keys, stage, count, **options)

  def fork(self, params, ctx, state, keys, stage, k, **options):
    self._add(keys.shape[0] * keys.shape[1] * self._part.cost('fork', _least(stage), k))
    return self._part.fork(params, ctx, state, keys, stage, k, **options)

  def force(self, params, ctx, state, tokens):
    self._add(tokens.shape[0] * tokens.shape[1] * self._part.cost('force', 0, tokens.shape[2]))
    return self._part.force(params, ctx, state, tokens)

  def fatten(self, params, ctx, slim, stage, like=None):
    if like is None:
      rows = int(np.prod(jax.tree.leaves(slim)[0].shape[:2]))
      self._add(rows * self._part.cost('fatten', 0, _least(stage)))
    return self._part.fatten(params, ctx, slim, stage, like)

  def value(self, params, ctx, slim, stage):
    rows = int(np.prod(jax.tree.leaves(slim)[0].shape[:2]))
    self._add(rows * self._part.cost('value', _least(stage)))
    return self._part.value(params, ctx, slim, stage)

  def rollout(self, params, ctx, slim, keys, stage, count, **options):
    self._add(keys.size * self._part.cost('rollout', _least(stage), count))
    return self._part.rollout(params, ctx, slim, keys, stage, count, **options)

  def render(self, params, ctx, state, stage):
    self._add(int(np.prod(jax.tree.leaves(state)[0].shape[:2])) * self._part.cost('render'))
    return self._part.render(params, ctx, state, stage)

  def early(self, params, ctx, state):
    self._add(int(np.prod(jax.tree.leaves(state)[0].shape[:2])) * self._part.cost('render'))
    return self._part.early(params, ctx, state)

  def score(self, params, vctx, images, **signals):
    rows = int(np.prod((images if images is not None else signals['log_prob']).shape[:2]))
    self._add(rows * self._part.cost('score'))
    return self._part.score(params, vctx, images, **signals)


def counted(algo, gen, ver, params, prompts, key) -> Cost:
  """What a search of one prompt costs, added up from the calls it makes; nothing is jitted."""
  assert len(prompts) == 1
  spent: list[Cost] = []
  job = step.Job(algo, _Counted(gen, spent), _Counted(ver, spent))
  arrays = {'generator': gen.tokenize(prompts), 'verifier': ver.tokenize(prompts)}
  ctx, vctx = step.encode(job, params, jax.tree.map(jnp.asarray, arrays))
  keys = core.prompt_keys(key, jnp.arange(1))
  initial = jnp.zeros((1, algo.initial), jnp.int32)
  state = step.begin(job, params, ctx, keys, initial)
  for first, count in algo.phases(gen):
    for i in range(first, first + count):
      state, _ = step.advance(job, params, ctx, vctx, state, core.Step(i, first))
  step.finish(job, params, ctx, state.best)
  return sum(spent, Cost())


# --------------------------------------------------------------------------------------------- laws


def law_prefix(gen, ver, prompts, key, n: int = 4, more: int = 16) -> None:
  """Best-of-n is the first n of best-of-more, candidate by candidate."""
  params = parameters(gen, ver)
  few, many = (
    run.search(BestOfN(n=m), gen, ver, params, prompts, key, trace=True).steps[0] for m in (n, more)
  )
  same(few.shown, jax.tree.map(lambda x: x[:, :n], many.shown), 'the first candidates')
  same(few.totals, many.totals[:, :n], 'their totals')


def law_beam_is_best_of_n(gen, ver, prompts, key, n: int = 6, **settings) -> None:
  """A beam of n with one child each ends in the n samples of best-of-n, as a set."""
  params = parameters(gen, ver)
  bon = run.search(BestOfN(n=n), gen, ver, params, prompts, key, trace=True)
  beam = run.search(Beam(width=n, branch=1, **settings), gen, ver, params, prompts, key, trace=True)
  ends = [np.sort(r.steps[-1].totals, axis=1) for r in (bon, beam)]
  same(ends[1], ends[0], 'the final candidates')


def law_particles_are_best_of_n(gen, ver, prompts, key, n: int = 5, **settings) -> None:
  """Particles of no strength (an infinite temperature) are the n samples of best-of-n."""
  params = parameters(gen, ver)
  bon = run.search(BestOfN(n=n), gen, ver, params, prompts, key, trace=True)
  smc = SMC(particles=n, strength=0.0, **settings)
  found = run.search(smc, gen, ver, params, prompts, key, trace=True)
  same(found.steps[-1].shown, bon.steps[-1].shown, 'the particles at the end')
  same(found.steps[-1].totals, bon.steps[-1].totals, 'their totals')
