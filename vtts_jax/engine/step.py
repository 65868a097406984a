"""One step of a search, and what every algorithm shares: rendering in chunks, elitism, bad scores.

    encode -> begin -> [ ask -> render -> score -> tell ] x num_steps -> finish

Letters: B prompts, M candidates of a step, N kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.core import NEG_INF, Algorithm, Best, Generator, SearchState, Step, Verifier


class Job(NamedTuple):
  """What a program is compiled for; static and hashable."""

  algo: Algorithm
  gen: Generator
  ver: Verifier
  render_chunk: int = 0
  trace: bool = False
  stop: float = float('inf')  # a prompt whose best total reaches this needs no further step


class StepTrace(NamedTuple):
  """What a step leaves behind.

  Attributes:
    totals: `[B, M]`, -inf where a score was NaN or infinite.
    scores: `{name: [B, M]}` as the verifier gave them.
    bad: `{name: [B]}`, how many candidates had a NaN or infinite score of that name.
    parent: `[B, M]`, the frontier candidate that each came from, -1 for none.
    kept: `[B, N']`, which candidates make the next frontier.
    stage: `[B, M]`, stages done of what was looked at.
    final: `[B, M]`, which of these were pictures to hand out.
    active: `[B]`, whether the prompt still needed this step; where not, totals are -inf and nothing
      was spent.
    best: the best so far; its state is dropped from the trace unless `trace` is asked for.
    shown: slim states `[B, M, ...]` of what was looked at; only when `trace` is asked for.
  """

  totals: Any
  scores: Any
  bad: Any
  parent: Any
  kept: Any
  stage: Any
  final: Any
  active: Any
  best: Best
  shown: Any


def encode(job: Job, params, prompts):
  """Prompt arrays to the contexts of generator and verifier, once per prompt."""
  return (
    job.gen.encode(params['generator'], prompts['generator']),
    job.ver.encode(params['verifier'], prompts['verifier']),
  )


def begin(job: Job, params, ctx, keys, initial) -> SearchState:
  """The state before the first step; prompt keys `[B]`, initial tokens `[B, t]`."""
  told = job.algo.init(job.gen, params['generator'], ctx, keys, initial)
  empty = job.gen.slim(job.gen.init(params['generator'], ctx, keys[:, None]))
  none = jnp.full(keys.shape, NEG_INF)
  best = Best(
    jax.tree.map(lambda x: x[:, 0], empty),
    jnp.zeros(keys.shape, jnp.int32),
    dict.fromkeys(job.ver.names, none),
    none,
  )
  return SearchState(told.frontier, told.keys, told.scores, best, told.inner)


def look(job: Job, params, ctx, vctx, cands: core.Candidates, step: Step):
  """Scores `{name: [B, M]}` of the candidates, and the candidates with features if these are asked
  for; in chunks, so that no more images than `render_chunk` of a prompt exist at a time."""
  if not cands.parent.shape[1]:
    return dict.fromkeys(job.ver.names, jnp.zeros(cands.parent.shape)), cands

  def one(shown):
    images, told = show(job, params, ctx, shown, step)
    features = job.ver.features(params['verifier'], images) if job.algo.features else ()
    return job.ver.score(params['verifier'], vctx, images, **told), features

  scores, features = in_chunks(job, one, staged(cands))
  return scores, cands._replace(features=features)


def staged(cands: core.Candidates):
  """(slim states `[B, M, ...]`, stages done of each `[B, M]`)."""
  return cands.shown, jnp.broadcast_to(cands.stage, cands.parent.shape)


def show(job: Job, params, ctx, shown, step: Step):
  """Images `[B, M, H, W, 3]` of what `staged` gives, None where the verifier looks at none, and
  what the generator tells it besides."""
  states, stage = shown
  images, view = None, job.algo.view(job.gen, step.first)
  if 'images' in job.ver.uses:
    images = view.render(params['generator'], ctx, states, stage)
  return images, signals(view, job.ver, params['generator'], ctx, states, stage)


def signals(gen: Generator, ver: Verifier, params, ctx, states, stage):
  """What the verifier asks of the generator beside images."""
  told = {}
  if 'log_prob' in ver.uses:
    told = {'log_prob': gen.log_prob(states), 'length': stage}
  if 'early' in ver.uses:
    told['early'] = gen.early(params, ctx, states)
  return told


def in_chunks(job: Job, function, shown):
  """`function` of slim states `[B, M, ...]`, applied to `render_chunk` of the M at a time by a
  compiled loop."""
  batch, m = jax.tree.leaves(shown)[0].shape[:2]
  chunk = min(job.render_chunk or m, m)
  if chunk == m:
    return function(shown)
  pieces = -(-m // chunk)
  index = jnp.minimum(jnp.arange(pieces * chunk), m - 1).reshape(pieces, chunk)
  out = jax.lax.map(
    lambda i: function(core.take(shown, jnp.broadcast_to(i, (batch, chunk)))), index
  )
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :m], out)


def judge(job: Job, state: SearchState, cands: core.Candidates, scores, step: Step):
  """Totals `[B, M]`, which are pictures to hand out `[B, M]`, the best including these candidates,
  and the count of bad scores by name."""
  finite = {name: jnp.isfinite(value) for name, value in scores.items()}
  bad = {name: (~ok).sum(axis=1) for name, ok in finite.items()}
  stage = jnp.broadcast_to(cands.stage, cands.parent.shape)
  if not cands.parent.shape[1]:
    return jnp.zeros(stage.shape), stage > 0, state.best, bad
  valid = functools.reduce(jnp.logical_and, finite.values())
  pool = {
    name: jnp.concatenate(
      [jnp.where(valid, scores[name], 0), state.best.scores[name][:, None]], axis=1
    )
    for name in job.ver.names
  }
  had = jnp.isfinite(state.best.total)
  valid_pool = jnp.concatenate([valid, had[:, None]], axis=1)
  pool = {name: jnp.where(valid_pool, value, 0) for name, value in pool.items()}
  totals = jnp.where(valid_pool, job.ver.total(pool, valid_pool), NEG_INF)
  totals, before = totals[:, :-1], totals[:, -1]

  final = jnp.logical_or(job.gen.anytime, stage >= job.gen.num_stages)
  final &= job.algo.view(job.gen, step.first) == job.gen
  offered = jnp.where(final, totals, NEG_INF)
  winner = jnp.argmax(offered, axis=1)[:, None]
  value = offered.max(axis=1)
  own = core.take((cands.shown, stage, {name: scores[name] for name in job.ver.names}), winner)
  new = Best(*jax.tree.map(lambda x: x[:, 0], own), value)
  old = state.best._replace(total=before)
  return totals, final, core.where(value > before, new, old), bad


def settle(
  job: Job, params, ctx, state, cands, scores, step: Step
) -> tuple[SearchState, StepTrace]:
  """`tell`, with what all algorithms share: elitism, the exclusion of bad scores, and stopping."""
  active = ~resting(job, state)
  totals, final, best, bad = judge(job, state, cands, scores, step)
  told = job.algo.tell(job.gen, params['generator'], ctx, state, cands, totals, step)
  best = core.where(active, best, state.best)
  totals = jnp.where(active[:, None], totals, NEG_INF)
  bad = {name: jnp.where(active, count, 0) for name, count in bad.items()}
  shown = cands.shown if job.trace else ()
  seen = best if job.trace else best._replace(state=())
  stage = jnp.broadcast_to(cands.stage, cands.parent.shape)
  final &= active[:, None]
  trace = StepTrace(
    totals, scores, bad, cands.parent, told.kept, stage, final, active, seen, shown
  )
  return SearchState(told.frontier, told.keys, told.scores, best, told.inner), trace


def resting(job: Job, state: SearchState) -> jax.Array:
  """Prompts `[B]` that need no further step: done, or good enough."""
  return job.algo.done(job.gen, state) | (state.best.total >= job.stop)


def advance(job: Job, params, ctx, vctx, state: SearchState, step: Step):
  """One whole step: the function that both drivers run."""
  cands = job.algo.ask(job.gen, params['generator'], ctx, state, step)
  scores, cands = look(job, params, ctx, vctx, cands, step)
  return settle(job, params, ctx, state, cands, scores, step)


def finish(job: Job, params, ctx, best: Best):
  """Images `[B, H, W, 3]` of the best candidates."""
  state = jax.tree.map(lambda x: x[:, None], best.state)
  return job.gen.render(params['generator'], ctx, state, best.stage[:, None])[:, 0]
