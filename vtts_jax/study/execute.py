"""Runs a study: every arm over all prompts and seeds, one result line for each.

For each (arm, seed, batch of prompts) the search runs once and collects what grading needs. Its
best candidate at every budget is a snapshot. `config.metric` grades all snapshots, and the
verifiers of `config.measure` score them; the search sees neither. Nothing is decoded twice: a study
decodes as many outputs as its bill says.

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
  """An arm that is ready to run: its prompts are tokenized and its weights are placed.

  Attributes:
    arm: the arm.
    search: its prepared search.
    scorer: scores what was collected by `arm.measured_after`; None where that is None.
  """

  arm: Arm
  search: PreparedSearch
  scorer: Scorer | None


def execute_study(study: Study, store: Store, on_batch: Callable | None = None) -> int:
  """Runs what is not done yet; returns how many lines were written.

  Args:
    on_batch: called with (arm, seed, prompts of the batch) after each batch, done before or now.

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
  # the directory is made only now: a study that cannot run leaves nothing behind
  store.open_files()
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


def _cut_batches(study: Study, arm: Arm, store: Store) -> list[range]:
  """The batches of this process, as places in the prompt set."""
  count = len(study.prompts)
  size = arm.batch or count
  # every session cuts all prompts, done or not: one shape is compiled, and a batch that was cut off
  # is run again with the same prompts and gives the same numbers to the last bit
  batches = [range(low, min(low + size, count)) for low in range(0, count, size)]
  # whole batches go round the processes, so that the cut does not depend on how many there are
  return batches[store.process :: store.processes]


def _batches_to_do(study: Study, arm: Arm, seed: int, store: Store) -> list[range]:
  """The batches of this process that lack a result line."""

  def is_done(place):
    return (arm.name, seed, study.prompts[place]['id']) in store.done

  return [batch for batch in _cut_batches(study, arm, store) if not all(map(is_done, batch))]


def _run_seed(study, arm, prepared, seed, store, on_batch) -> int:
  """Runs what is missing of one arm with one seed; returns how many lines were written."""

  def run_timed(batch):
    begun = time.perf_counter()
    lines, timing = run_batch(study, prepared, seed, batch, store)
    return lines, {**timing, 'total_seconds': time.perf_counter() - begun}

  todo = _batches_to_do(study, arm, seed, store)
  results, written = overlapped(run_timed, todo, arm.ver), 0
  for batch in _cut_batches(study, arm, store):
    if batch in todo:
      lines, timing = next(results)
      # a batch that was cut off is run whole, but each of its lines may stand in the file once
      lines = [line for line in lines if (arm.name, seed, line['id']) not in store.done]
      # seconds first: after a kill in between a batch is timed twice, which a mean can bear
      store.timing.append_lines([timing])
      store.results.append_lines(lines)
      written += len(lines)
    # a batch of an earlier session counts too, so that a progress bar starts where it stopped
    if on_batch:
      on_batch(arm, seed, [study.prompts[place] for place in batch])
  return written


# ------------------------------------------------------------------------------------------ a batch


class GradedBatch(NamedTuple):
  """A batch that was searched and graded.

  Attributes:
    result: what the search found.
    snapshots: the best candidates at S budgets.
    correct: `[P, S]` bool, which snapshots are right.
    measured: `{name: [P, S]}`, scores of the snapshots by all measuring verifiers.
    samples: every sample of best-of-N, graded; None for other searches.
    prefixes: totals of best-of-N's prefixes, see `prefix_totals`; None for other searches.
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
  """Searches, grades and saves the prompts at the places `batch`.

  Returns:
    The result lines, one for each prompt, and the timing line. The files that they name are
    written; the lines are not.
  """
  arm, prompts = prepared.arm, [study.prompts[place] for place in batch]
  result = prepared.search.run(batch, seed)
  graded = _grade_batch(study, prepared, result, prompts)
  lines = [_write_line(study, arm, graded, seed, i, prompts[i], store) for i in range(len(batch))]
  timing = {'arm': arm.name, 'seed': seed, 'first_id': prompts[0]['id'], **result.seconds}
  return lines, timing


def _grade_batch(study, prepared, result, prompts) -> GradedBatch:
  """Grades and measures every snapshot of a batch."""
  arm = prepared.arm
  snapshots = take_snapshots(arm, result)
  count = snapshots.totals.shape[1]
  # metric and scorer take a flat list of outputs, each with its prompt
  flat = snapshots.outputs.reshape(-1, *snapshots.outputs.shape[2:])
  repeated = [prompt for prompt in prompts for _ in range(count)]

  # some verifiers were compiled into the search; the others score what it collected
  measured = dict(snapshots.measured)
  if prepared.scorer is not None:
    scores = prepared.scorer({arm.output_name: flat}, repeated)
    measured |= {name: v.reshape(len(prompts), count) for name, v in scores.items()}

  if not arm.holds_all_budgets:
    correct = study.metric.grade(flat, repeated).reshape(len(prompts), count)
    return GradedBatch(result, snapshots, correct, measured)
  # each snapshot of best-of-N is one of its samples, so that grading these grades both
  prefixes = prefix_totals(arm, result)
  valid = np.isfinite(prefixes[-1])
  samples = grade_samples(arm, result.steps[0], valid, prompts, study.metric)
  correct = np.take_along_axis(samples.correct, snapshots.picked, axis=1)
  return GradedBatch(result, snapshots, correct, measured, samples, prefixes)


def _write_line(study, arm: Arm, graded: GradedBatch, seed, i, prompt, store) -> dict[str, Any]:
  """The result line of prompt `i` of a batch, see `store`; writes the files that it names."""
  result, snapshots, config = graded.result, graded.snapshots, study.config
  name = f'{arm.name}/{seed}/{prompt["id"]:05d}'
  # a prompt none of whose candidates had finite scores has a line too: it counts as wrong
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
    'scores': {key: _null_unless_finite(value[i]) for key, value in result.best.scores.items()},
    'curve': [_curve_point(graded, i, j) for j in range(snapshots.totals.shape[1])],
  }
  if graded.samples is not None:
    line['samples'] = record_samples(graded.samples, graded.prefixes, i)
  if found:
    line[arm.output_kind] = store.save_output(name, arm.output_kind, snapshots.outputs[i, -1])
    line['state'] = store.save_state(name, result.best, i)
  # outputs at every budget and genealogies are large, so only the first prompts have them
  if prompt['id'] < config['traces'] and seed == config['seeds'][0]:
    line['grid'] = [
      store.save_output(f'{name}-{j}', arm.output_kind, output)
      for j, output in enumerate(snapshots.outputs[i])
    ]
    ancestry = genealogy.trace_ancestry(result, i) | genealogy.leader_outputs(result, i)
    line['trace'] = store.save_trace(name, ancestry)
  return line


def _curve_point(graded: GradedBatch, i, j) -> dict[str, Any]:
  """What the line of prompt `i` says of budget `j`."""
  total = graded.snapshots.totals[i, j]
  return {
    **Cost(*graded.snapshots.costs[i, j].tolist()).asdict(),
    'total': _null_unless_finite(total),
    # what has no finite score is not returned, so its output is not right, whatever it shows
    'correct': int(graded.correct[i, j]) if np.isfinite(total) else 0,
    'measured': {name: _null_unless_finite(value[i, j]) for name, value in graded.measured.items()},
  }


def prompt_text(prompt) -> str:
  """How a result line names a prompt: by its text, or by the class that it asks for."""
  return str(prompt.get('text', prompt.get('label', '')))


def _null_unless_finite(value) -> float | None:
  """A number for JSON, which has no NaN and no infinity: they are null."""
  return float(value) if np.isfinite(value) else None
