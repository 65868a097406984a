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


class StepTrace(NamedTuple):
  """What a step leaves behind.

  Attributes:
    totals: `[B, M]`, -inf where a score was NaN or infinite.
    scores: `{name: [B, M]}` as the verifier gave them.
    bad: `{name: [B]}`, how many candidates had a NaN or infinite score of that name.
    parent: `[B, M]`, the frontier candidate that each came from, -1 for none.
    kept: `[B, N']`, which candidates make the next frontier.
    stage: `[B]`, stages done of what was looked at.
    best: the best so far; its state is dropped from the trace unless `trace` is asked for.
    shown: slim states `[B, M, ...]` of what was looked at; only when `trace` is asked for.
  """

  totals: Any
  scores: Any
  bad: Any
  parent: Any
  kept: Any
  stage: Any
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


def look(job: Job, params, ctx, vctx, cands: core.Candidates):
  """Renders and scores the candidates in chunks, so that no more images than `render_chunk` exist
  at a time."""

  def one(shown):
    images = show(job, params, ctx, shown, cands.stage)
    return job.ver.score(params['verifier'], vctx, images, **signals(job, shown, cands.stage))

  return in_chunks(job, one, cands.shown)


def show(job: Job, params, ctx, shown, stage):
  """Images `[B, M, H, W, 3]` of slim states, or None where the verifier looks at none."""
  if 'images' not in job.ver.uses:
    return None
  return job.gen.render(params['generator'], ctx, shown, stage)


def signals(job: Job, shown, stage) -> dict[str, Any]:
  """What the generator tells the verifier besides images."""
  if 'log_prob' not in job.ver.uses:
    return {}
  return {'log_prob': job.gen.log_prob(shown), 'length': stage}


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


def judge(job: Job, state: SearchState, cands: core.Candidates, scores):
  """Totals `[B, M]`, the best including these candidates, and the count of bad scores by name."""
  finite = {name: jnp.isfinite(value) for name, value in scores.items()}
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

  final = jnp.logical_or(job.gen.anytime, cands.stage >= job.gen.num_stages)
  offered = jnp.where(final, totals, NEG_INF)
  winner = jnp.argmax(offered, axis=1)
  value = offered.max(axis=1)
  new = Best(
    jax.tree.map(lambda x: x[:, 0], core.take(cands.shown, winner[:, None])),
    jnp.broadcast_to(cands.stage, winner.shape),
    {
      name: jnp.take_along_axis(scores[name], winner[:, None], axis=1)[:, 0]
      for name in job.ver.names
    },
    value,
  )
  old = state.best._replace(total=before)
  best = core.where(value > before, new, old)
  bad = {name: (~ok).sum(axis=1) for name, ok in finite.items()}
  return totals, best, bad


def settle(
  job: Job, params, ctx, state, cands, scores, step: Step
) -> tuple[SearchState, StepTrace]:
  """`tell`, with what every algorithm shares: elitism and the exclusion of bad scores."""
  totals, best, bad = judge(job, state, cands, scores)
  told = job.algo.tell(job.gen, params['generator'], ctx, state, cands, totals, step)
  shown = cands.shown if job.trace else ()
  seen = best if job.trace else best._replace(state=())
  stage = jnp.broadcast_to(cands.stage, best.stage.shape)
  trace = StepTrace(totals, scores, bad, cands.parent, told.kept, stage, seen, shown)
  return SearchState(told.frontier, told.keys, told.scores, best, told.inner), trace


def advance(job: Job, params, ctx, vctx, state: SearchState, step: Step):
  """One whole step: the function that both drivers run."""
  cands = job.algo.ask(job.gen, params['generator'], ctx, state, step)
  scores = look(job, params, ctx, vctx, cands)
  return settle(job, params, ctx, state, cands, scores, step)


def finish(job: Job, params, ctx, best: Best):
  """Images `[B, H, W, 3]` of the best candidates."""
  state = jax.tree.map(lambda x: x[:, None], best.state)
  return job.gen.render(params['generator'], ctx, state, best.stage[:, None])[:, 0]
