"""One step of a search, and what every algorithm shares: chunks, elitism, bad scores, collection.

    encode -> begin -> [ ask -> observe -> score -> tell ] x steps -> finish

Letters: B prompts, M candidates of a step, N kept, C columns of a genealogy.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.core import NEG_INF, Best, Candidates, Sampler, SearchState
from vtts_jax.engine.program import COLUMNS, Contexts, Observed, SearchProgram, StepTrace

# ------------------------------------------------------------------------------------ begin and end


def encode_prompts(program: SearchProgram, params, prompts) -> Contexts:
  """Prompt arrays to contexts, once per prompt."""
  measure = ()
  if program.measure is not None:
    measure = program.measure.encode(params['measure'], prompts['measure'])
  return Contexts(
    program.gen.encode(params['generator'], prompts['generator']),
    program.ver.encode(params['verifier'], prompts['verifier']),
    measure,
  )


def bind_sampler(program: SearchProgram, params, contexts: Contexts, meter=None) -> Sampler:
  """All that the algorithm sees of the models."""
  sampler = Sampler(
    program.gen, params['generator'], contexts.generator, meter=meter,
    total=functools.partial(pool_totals, program.ver), score_names=program.ver.names,
  )  # fmt: skip
  if 'gradient' not in program.algo.needs:
    return sampler

  def score_state(state, stage):
    seen = sampler.observe(state, stage, program.ver.needs)
    if meter is not None:
      meter.append(core.Call(program.ver, 'score', jax.tree.leaves(state)[0].shape[1]))
    scores = program.ver.score(params['verifier'], contexts.verifier, seen)
    valid = functools.reduce(jnp.logical_and, map(jnp.isfinite, scores.values()))
    return program.ver.total(scores, valid)

  return sampler._replace(score=score_state)


def pool_totals(ver, scores) -> jax.Array:
  """Totals `[B, M]` of the scores `{name: [B, M]}` of a pool of candidates; -inf for those that
  have a bad one, whose scores become 0 and are marked as not valid."""
  named = {name: scores[name] for name in ver.names}
  valid = functools.reduce(jnp.logical_and, map(jnp.isfinite, named.values()))
  filled = {name: jnp.where(valid, column, 0) for name, column in named.items()}
  return jnp.where(valid, ver.total(filled, valid), NEG_INF)


def begin_search(
  program: SearchProgram, params, contexts, keys, initial, meter=None
) -> SearchState:
  """The state before the first step; prompt keys `[B]`, initial tokens `[B, t]`."""
  sampler = bind_sampler(program, params, contexts, meter)
  frontier = program.algo.init(sampler, keys, initial)
  # an empty candidate stands for the best until there is one, with a total of -inf
  empty = program.gen.init(params['generator'], contexts.generator, keys[:, None])
  empty = jax.tree.map(lambda x: x[:, 0], program.gen.drop_cache(empty))
  none = jnp.full(keys.shape, NEG_INF)
  best = Best(
    empty,
    jnp.zeros(keys.shape, jnp.int32),
    dict.fromkeys(program.ver.names, none),
    none,
    _nothing_shown(program, keys.shape[0]),
  )
  rows = jnp.arange(keys.shape[0], dtype=jnp.int32)
  return jax.tree.map(_with_own_dtype, SearchState(jnp.int32(0), frontier, best, rows))


def _with_own_dtype(leaf):
  """The array without JAX's weak type: else the second step would be another program than the
  first."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf
  return jax.lax.convert_element_type(leaf, leaf.dtype)


def _nothing_shown(program: SearchProgram, batch: int):
  """What the best shows before there is one."""
  if 'best' not in program.collect:
    return ()
  output = program.gen.outputs[program.main_output]
  dtype = _collected_dtype(output)
  measured = dict.fromkeys(program.measure.names if program.measure else (), jnp.zeros(batch))
  outputs = {program.main_output: jnp.zeros((batch, *output.shape), dtype)}
  return {'outputs': outputs, 'measured': measured}


def finish_search(program: SearchProgram, params, contexts, best: Best, meter=None):
  """The first output of the best candidates, `{name: [B, ...]}`."""
  state = jax.tree.map(lambda x: x[:, None], best.state)
  sampler = bind_sampler(program, params, contexts, meter)
  shown = sampler.observe(state, best.stage[:, None], (program.main_output,))
  return {program.main_output: shown[program.main_output][:, 0]}


# ---------------------------------------------------------------------------------------- observing


def observe_and_score(
  program: SearchProgram, params, contexts, cands: Candidates, shape, meter=None
) -> Observed:
  """Observes the candidates and scores what they show, in chunks: no more than `render_chunk` of a
  prompt are decoded at a time. A host verifier's needs are kept instead of scored."""
  ver, measure = program.ver, program.measure
  observer = program.algo.observer(program.gen, shape)
  sampler = bind_sampler(program, params, contexts, meter)._replace(gen=observer)
  # a host verifier scores later, so what it reads must outlive the chunk too
  keeps = program.kept_outputs | (frozenset() if ver.jittable else ver.needs)

  def observe_chunk(states, stages):
    seen = sampler.observe(states, stages, program.observed_outputs)
    scores = features = measured = measured_features = ()
    if meter is not None:
      meter.append(core.Call(ver, 'score', stages.shape[1]))
    if ver.jittable:
      scores = ver.score(params['verifier'], contexts.verifier, seen)
    if 'features' in program.algo.needs:
      features = ver.embed_images(params['verifier'], seen['image'])
    if measure is not None and 'measured' in program.collect:
      measured = measure.score(params['measure'], contexts.measure, seen)
      if 'features' in measure.gives:
        measured_features = measure.embed_images(params['measure'], seen['image'])
    outputs = {name: seen[name] for name in sorted(keeps)}
    return Observed(scores, features, measured, measured_features, outputs)

  if not cands.parent.shape[1]:  # a tree search by value alone observes nothing on the way
    names = ver.names if ver.jittable else ()
    none = jnp.zeros(cands.parent.shape)
    return Observed(dict.fromkeys(names, none) or (), (), (), (), {})
  return map_chunks(program.render_chunk, observe_chunk, cands.state, stages_of(cands))


def stages_of(cands: Candidates) -> jax.Array:
  """Stages done of each candidate, `[B, M]`."""
  return jnp.broadcast_to(jnp.asarray(cands.stage, jnp.int32), cands.parent.shape)


def map_chunks(size: int, function, states, stages):
  """`function` of states and stages `[B, M, ...]`, applied to `size` (0: all) of the M at a time by
  a compiled loop."""
  batch, m = stages.shape
  chunk = min(size or m, m)
  if chunk == m:
    return function(states, stages)
  # the last chunk is filled up with its last candidate
  pieces = -(-m // chunk)
  index = jnp.minimum(jnp.arange(pieces * chunk), m - 1).reshape(pieces, chunk)
  out = jax.lax.map(
    lambda i: function(*core.take((states, stages), jnp.broadcast_to(i, (batch, chunk)))), index
  )
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :m], out)


# ----------------------------------------------------------------------------------------- telling


class Judged(NamedTuple):
  """Totals `[B, M]`, which candidates may be returned `[B, M]`, the best including these
  candidates, and the number of bad scores by name `{name: [B]}`."""

  totals: jax.Array
  final: jax.Array
  best: Best
  bad: dict[str, jax.Array]


def score_totals(
  program: SearchProgram, params, contexts, best: Best, cands, seen: Observed, shape
) -> Judged:
  """What the scores say: one total each, the best so far compared anew, bad scores out."""
  ver, gen, scores = program.ver, program.gen, seen.scores
  finite = {name: jnp.isfinite(value) for name, value in scores.items()}
  bad = {name: (~ok).sum(axis=1) for name, ok in finite.items()}
  stage = stages_of(cands)
  if not cands.parent.shape[1]:
    return Judged(jnp.zeros(stage.shape), stage > 0, best, bad)

  # A total may be relative to the candidates at hand, so the best so far is judged along with them:
  # it is the last of the pool.
  pool = {
    name: jnp.concatenate([scores[name], best.scores[name][:, None]], axis=1) for name in ver.names
  }
  totals = pool_totals(ver, pool)
  totals, before = totals[:, :-1], totals[:, -1]

  # Only what may be returned competes with the best: finished candidates, seen in full.
  final = jnp.logical_or(gen.prefixes_are_samples, gen.finished(cands.state, stage))
  final &= program.algo.observer(gen, shape) == gen
  offered = jnp.where(final, totals, NEG_INF)
  winner = jnp.argmax(offered, axis=1)[:, None]
  value = offered.max(axis=1)
  named = {name: scores[name] for name in ver.names}
  own = core.take((cands.state, stage, named), winner)
  own = jax.tree.map(lambda x: x[:, 0], own)
  shown = _shown_by_winner(program, params, contexts, cands, seen, winner)
  better = value > before
  new, old = Best(*own, value, shown), best._replace(total=before)
  return Judged(totals, final, core.where(better, new, old), bad)


def _shown_by_winner(program: SearchProgram, params, contexts, cands, seen: Observed, winner):
  """Outputs and measured scores of the candidate `winner [B, 1]`, where the best is collected."""
  if 'best' not in program.collect:
    return ()
  outputs = outputs_of(program, params, contexts, cands, seen, winner, program.shown_outputs)
  measured = {}
  if program.measure is not None:
    measured = program.measure.score(params['measure'], contexts.measure, outputs)
  first = _collected(program, {program.main_output: outputs[program.main_output]})
  return jax.tree.map(lambda x: x[:, 0], {'outputs': first, 'measured': measured})


def outputs_of(program: SearchProgram, params, contexts, cands, seen: Observed, index, names):
  """Outputs `{name: [B, C, ...]}` of the candidates `index [B, C]`: gathered where they have been
  observed, else observed now, of these few."""
  at_hand = sorted(names & seen.outputs.keys())
  outputs = {name: core.take(seen.outputs[name], index) for name in at_hand}
  if missing := names - seen.outputs.keys():
    states, stages = core.take((cands.state, stages_of(cands)), index)
    sampler = bind_sampler(program, params, contexts)
    outputs |= sampler.observe(states, stages, missing)
  return outputs


def resting_prompts(program: SearchProgram, state: SearchState) -> jax.Array:
  """Prompts `[B]` that need no further step: finished, or good enough."""
  finished = program.algo.finished_prompts(program.gen, state.frontier)
  return finished | (state.best.total >= program.stop)


def update_state(
  program: SearchProgram, params, contexts, state, cands, seen: Observed, shape, row, evals=None
) -> tuple[SearchState, StepTrace]:
  """`tell`, with what all algorithms share: elitism, the exclusion of bad scores, stopping."""
  active = ~resting_prompts(program, state)
  totals, final, best, bad = score_totals(
    program, params, contexts, state.best, cands, seen, shape
  )
  cands = cands._replace(
    scores=seen.scores, features=seen.features, context=contexts.verifier
  )
  sampler = bind_sampler(program, params, contexts)
  frontier, kept = program.algo.tell(sampler, state.frontier, cands, totals, shape, row)

  # A prompt at rest keeps its best, and its trace says that nothing happened.
  best = core.where(active, best, state.best)
  totals = jnp.where(active[:, None], totals, NEG_INF)
  bad = {name: jnp.where(active, count, 0) for name, count in bad.items()}
  trace = StepTrace(
    totals=totals,
    scores=seen.scores,
    bad=bad,
    parent=cands.parent,
    kept=kept,
    stage=stages_of(cands),
    final=final & active[:, None],
    active=active,
    evals=() if evals is None else jnp.where(active, evals, 0),
    best=best if 'best' in program.collect else best._replace(state=(), shown=()),
  )
  trace = _add_collected(program, params, contexts, trace, cands, seen)
  state = SearchState(state.step + 1, frontier, best, state.rows)
  return state, trace


def _add_collected(
  program: SearchProgram, params, contexts, trace: StepTrace, cands, seen: Observed
) -> StepTrace:
  """The trace with what `collect` asks for of the candidates."""
  collect, m = program.collect, cands.parent.shape[1]
  if 'states' in collect:
    trace = trace._replace(states=cands.state)
  if not m:
    return trace
  if 'measured' in collect:
    trace = trace._replace(measured=seen.measured, features=seen.measured_features)
  if 'samples' in collect:
    first = {program.main_output: seen.outputs[program.main_output]}
    trace = trace._replace(outputs=_collected(program, first))
  if 'leaders' in collect:
    index = leading_candidates(trace.kept, trace.totals)
    names = frozenset({program.main_output})
    first = outputs_of(program, params, contexts, cands, seen, index, names)
    trace = trace._replace(leaders={'index': index, 'outputs': _collected(program, first)})
  return trace


def leading_candidates(kept, totals) -> jax.Array:
  """Indices `[B, C]` of the candidates that a genealogy draws: those that were kept (they have
  children), then the best of the others; each once, at most `COLUMNS`."""
  m = totals.shape[1]
  positions = jnp.arange(m)
  # a kept candidate ranks by its first place in `kept`; the others follow, by their totals
  matches = kept[:, :, None] == positions
  place = jnp.where(matches.any(1), jnp.argmax(matches, axis=1), m) if kept.shape[1] else (
    jnp.full(totals.shape, m)
  )
  order = jnp.lexsort((jnp.broadcast_to(positions, totals.shape), -totals, place), axis=-1)
  return order[:, :COLUMNS].astype(jnp.int32)


COLLECTED = {'image': jnp.uint8, 'video': jnp.uint8, 'text': jnp.uint8, 'tokens': jnp.int32}


def _collected_dtype(output: core.Output):
  return COLLECTED.get(output.kind, jnp.float32)


def _collected(program: SearchProgram, outputs: dict) -> dict:
  """Outputs as they are kept: images in 8 bits, NaN as black."""
  kept = {}
  for name, value in outputs.items():
    output = program.gen.outputs[name]
    if output.kind in ('image', 'video'):
      value = jnp.round(jnp.nan_to_num(jnp.clip(value, 0, 1)) * 255)
    kept[name] = value.astype(_collected_dtype(output))
  return kept


# ----------------------------------------------------------------------------------------- the step


def propose(program: SearchProgram, params, contexts, state: SearchState, shape, row, meter=None):
  """`ask`: the candidates, and the evaluations that they needed `[B]` (None: as the bill says)."""
  early = core.finishes_early(program.gen)
  meter = [] if meter is None and early else meter
  sampler = bind_sampler(program, params, contexts, meter)
  cands = program.algo.ask(sampler, state.frontier, shape, row)
  return cands, sum(call.evals for call in meter if call.evals is not None) if early else None


def advance_search(
  program: SearchProgram, params, contexts, state: SearchState, shape, row, meter=None
) -> tuple[SearchState, StepTrace]:
  """One whole step: the function that both drivers run."""
  cands, evals = propose(program, params, contexts, state, shape, row, meter)
  seen = observe_and_score(program, params, contexts, cands, shape, meter)
  return update_state(program, params, contexts, state, cands, seen, shape, row, evals)


def silent_step(
  program: SearchProgram, params, contexts, state: SearchState, shape, row, meter=None
) -> tuple[SearchState, StepTrace]:
  """A step whose host verifier says nothing: for `jax.eval_shape`, to learn what a step leaves."""
  cands, evals = propose(program, params, contexts, state, shape, row, meter)
  seen = observe_and_score(program, params, contexts, cands, shape, meter)
  if not program.ver.jittable:
    seen = with_host_scores(
      program, seen, dict.fromkeys(program.ver.names, jnp.zeros(cands.parent.shape))
    )
  return update_state(program, params, contexts, state, cands, seen, shape, row, evals)


def with_host_scores(program: SearchProgram, seen: Observed, scores) -> Observed:
  """What was observed, with the scores of a host verifier and without what only it had to see."""
  kept = sorted(program.kept_outputs & seen.outputs.keys())
  outputs = {name: seen.outputs[name] for name in kept}
  return seen._replace(scores=scores, outputs=outputs)
