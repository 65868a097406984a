"""Runs a study: every arm over prompts and seeds, and writes one result line for each.

For each (arm, seed, batch of prompts) the search runs once and collects what grading needs. Every
snapshot of its result is graded by `config.metric` and measured by the verifiers of
`config.measure`, none of which the search has seen. Nothing is decoded a second time: what a study
decodes is what its bill says.

Letters: P prompts of a batch, S budgets.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vtts_jax.core import Cost
from vtts_jax.engine.result import SearchResult
from vtts_jax.engine.scorer import Scorer
from vtts_jax.engine.search import (
  PreparedSearch,
  load_parameters,
  overlapped,
  prepare_search,
)
from vtts_jax.errors import ConfigError
from vtts_jax.study import genealogy
from vtts_jax.study.arms import Arm, Study, searched_name
from vtts_jax.study.graded_samples import GradedSamples, grade_samples, record_samples
from vtts_jax.study.snapshots import Snapshots, collected_names, prefix_totals, take_snapshots
from vtts_jax.study.store import Store


class PreparedArm(NamedTuple):
  """An arm whose prompts are tokenized and whose weights are placed, and the scorer of the
  verifiers that measure what was collected, or None."""

  arm: Arm
  search: PreparedSearch
  scorer: Scorer | None


def execute_study(study: Study, store: Store, on_batch: Callable | None = None) -> int:
  """Runs what is not done yet; returns how many lines were written.

  Prompts are cut into the same batches in every session, so a batch that was cut off is run again
  whole and gives the same numbers; only its missing lines are written.

  Args:
    on_batch: called with (arm, seed, prompts of the batch) after each.

  Raises:
    ConfigError: a prompt that a part cannot read, or weights that cannot be loaded; nothing has
      been written then.
  """
  # all arms with work left are prepared before the first one runs, so that errors come at once
  prepared = {
    arm.name: prepare_arm(study, arm)
    for arm in study.arms
    if any(_batches_to_do(study, arm, seed, store) for seed in study.config['seeds'])
  }
  store.begin()
  written = 0
  for arm in study.arms:
    for seed in study.config['seeds']:
      written += _run_seed(study, arm, prepared.get(arm.name), seed, store, on_batch)
  return written


def prepare_arm(study: Study, arm: Arm) -> PreparedArm:
  """Tokenizes the prompts and places the weights of an arm, once for all seeds and batches."""
  after, measure = arm.measured_after, arm.measured_in_search
  scorer = None if after is None else Scorer(after, study.mesh)
  try:
    # member by member, so that what is searched on and measured has its weights once on the device
    members = measure.members if measure is not None else ()
    weights = {name: load_parameters(member, study.mesh) for name, member in members}
    search = prepare_search(
      arm.algo,
      arm.gen,
      arm.ver,
      study.prompts,
      params={'measure': weights},
      measure=measure,
      mesh=study.mesh,
      mode=arm.mode,
      batch=arm.batch,
      render_chunk=arm.render_chunk,
      stop=arm.stop,
      collect=collected_names(arm, draws_genealogy=study.config['traces'] > 0),
    )
    if scorer is not None:
      scorer.tokenize_prompts(study.prompts)
  except ConfigError as err:
    raise ConfigError(f'arm {arm.name}: {err}') from None
  return PreparedArm(arm, search, scorer)


def _batches(study: Study, arm: Arm, store: Store) -> list[range]:
  """This process's batches, as places in the prompt set."""
  count = len(study.prompts)
  size = arm.batch or count
  batches = [range(low, min(low + size, count)) for low in range(0, count, size)]
  return batches[store.process :: store.processes]


def _batches_to_do(study: Study, arm: Arm, seed: int, store: Store) -> list[range]:
  is_done = lambda place: (arm.name, seed, study.prompts[place]['id']) in store.done
  return [batch for batch in _batches(study, arm, store) if not all(map(is_done, batch))]


def _run_seed(study, arm, prepared, seed, store, on_batch) -> int:
  """One arm with one seed: runs and writes what is missing."""

  def run_timed(batch):
    begun = time.perf_counter()
    lines, timing = run_batch(study, prepared, seed, batch, store)
    return lines, {**timing, 'total_seconds': time.perf_counter() - begun}

  todo = _batches_to_do(study, arm, seed, store)
  results, written = overlapped(run_timed, todo, arm.ver), 0
  for batch in _batches(study, arm, store):
    if batch in todo:
      lines, timing = next(results)
      lines = [line for line in lines if (arm.name, seed, line['id']) not in store.done]
      store.timing.append([timing])
      store.results.append(lines)
      written += len(lines)
    if on_batch:
      on_batch(arm, seed, [study.prompts[place] for place in batch])
  return written


# ------------------------------------------------------------------------------------------ a batch


class GradedBatch(NamedTuple):
  """A batch that was searched and graded.

  Attributes:
    result, snapshots: what was found.
    correct: `[P, S]` bool, which snapshots are right.
    measured: `{name: [P, S]}` by all measuring verifiers.
    samples, prefixes: of best-of-N, every sample graded and the totals of its prefixes; else None.
  """

  result: SearchResult
  snapshots: Snapshots
  correct: np.ndarray
  measured: dict[str, np.ndarray]
  samples: GradedSamples | None = None
  prefixes: list[np.ndarray] | None = None


def run_batch(
  study: Study, prepared: PreparedArm, seed: int, batch: Sequence[int], store: Store
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Searches, grades and saves the prompts at the places `batch`: (result lines, timing line)."""
  arm, prompts = prepared.arm, [study.prompts[place] for place in batch]
  result = prepared.search.run(batch, seed)
  graded = _grade_batch(study, prepared, result, prompts)
  lines = [_write_line(study, arm, graded, seed, i, prompts[i], store) for i in range(len(batch))]
  timing = {'arm': arm.name, 'seed': seed, 'first_id': prompts[0]['id'], **result.seconds}
  return lines, timing


def _grade_batch(study, prepared, result, prompts) -> GradedBatch:
  arm = prepared.arm
  snapshots = take_snapshots(arm, result)
  count = snapshots.totals.shape[1]
  flat = snapshots.outputs.reshape(-1, *snapshots.outputs.shape[2:])
  repeated = [prompt for prompt in prompts for _ in range(count)]

  measured = dict(snapshots.measured)
  if prepared.scorer is not None:
    scores = prepared.scorer({arm.output: flat}, repeated)
    measured |= {name: v.reshape(len(prompts), count) for name, v in scores.items()}

  if not arm.holds_all_budgets:
    correct = study.metric.grade(flat, repeated).reshape(len(prompts), count)
    return GradedBatch(result, snapshots, correct, measured)
  # each snapshot of best-of-N is one of its samples, and all of these are graded
  prefixes = prefix_totals(arm, result)
  valid = np.isfinite(prefixes[-1])
  samples = grade_samples(arm, result.steps[0], valid, prompts, study.metric)
  correct = np.take_along_axis(samples.correct, snapshots.picked, axis=1)
  return GradedBatch(result, snapshots, correct, measured, samples, prefixes)


def _write_line(study, arm: Arm, graded: GradedBatch, seed, i, prompt, store) -> dict[str, Any]:
  """The result line of prompt `i` of a batch; the files that it names are written first."""
  result, snapshots, config = graded.result, graded.snapshots, study.config
  name = f'{arm.name}/{seed}/{prompt["id"]:05d}'
  found = bool(np.isfinite(snapshots.totals[i, -1]))
  line = {
    'arm': arm.name,
    'seed': seed,
    'id': prompt['id'],
    'prompt': prompt_text(prompt),
    'tag': prompt.get('tag', ''),
    'found': found,
    'bad': {key: int(count[i]) for key, count in result.bad.items() if count[i]},
    'searched': searched_name(arm.ver, arm.measured),
    'ladder': arm.holds_all_budgets,
    'stage': int(result.best.stage[i]),
    'scores': {key: _number(value[i]) for key, value in result.best.scores.items()},
    'curve': [_curve_point(graded, i, j) for j in range(snapshots.totals.shape[1])],
  }
  if graded.samples is not None:
    line['samples'] = record_samples(graded.samples, graded.prefixes, i)
  if found:
    line[arm.kind] = store.save_output(name, arm.kind, snapshots.outputs[i, -1])
    line['state'] = store.save_state(name, result.best, i)
  if prompt['id'] < config['traces'] and seed == config['seeds'][0]:
    line['grid'] = [
      store.save_output(f'{name}-{j}', arm.kind, output)
      for j, output in enumerate(snapshots.outputs[i])
    ]
    tree = genealogy.family_tree(result, i) | genealogy.leader_outputs(result, i)
    line['trace'] = store.save_trace(name, tree)
  return line


def _curve_point(graded: GradedBatch, i, j) -> dict[str, Any]:
  """What a line says of one budget."""
  total = graded.snapshots.totals[i, j]
  return {
    **Cost(*graded.snapshots.costs[i, j].tolist()).asdict(),
    'total': _number(total),
    'correct': int(graded.correct[i, j]) if np.isfinite(total) else 0,
    'measured': {name: _number(value[i, j]) for name, value in graded.measured.items()},
  }


def prompt_text(prompt) -> str:
  """What a prompt is called in a result line: its text, or the class that it asks for."""
  return str(prompt.get('text', prompt.get('label', '')))


def _number(value) -> float | None:
  """JSON has no NaN: what is not finite is null."""
  return float(value) if np.isfinite(value) else None
