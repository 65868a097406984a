"""Snapshots: the best candidate of each prompt at each budget, from which curves are drawn.

Best-of-N has one snapshot for each prefix of its samples: 1, 2, 4 .. N. Any other search has one
for each step, from the first step that could return something.

Letters: P prompts, N samples, S budgets.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from vtts_jax import core
from vtts_jax.core import Cost
from vtts_jax.engine import search as engine
from vtts_jax.engine.result import SearchResult
from vtts_jax.study.arms import Arm


class Snapshots(NamedTuple):
  """The best candidates at S budgets.

  Attributes:
    costs: `[P, S, 4]`, what each prompt has spent by then, in the order of `Cost`.
    totals: `[P, S]`, their totals; -inf where nothing was found yet.
    outputs: `[P, S, ...]`, their first outputs; images in 8 bits.
    measured: `{name: [P, S]}`, their scores by the measuring verifiers compiled into the search.
    picked: `[P, S]`, which of best-of-N's samples each one is; None for other searches.
  """

  costs: np.ndarray
  totals: np.ndarray
  outputs: np.ndarray
  measured: dict[str, np.ndarray]
  picked: np.ndarray | None = None


def collected_names(arm: Arm, draws_genealogy: bool) -> tuple[str, ...]:
  """What the search of this arm must `collect` for its snapshots and genealogies."""
  # the best of a prefix may be any sample, so best-of-N keeps all of them
  names = ('samples', 'measured') if arm.holds_all_budgets else ('best',)
  return (*names, 'leaders') if draws_genealogy else names


def take_snapshots(arm: Arm, result: SearchResult) -> Snapshots:
  """The snapshots of a search that has collected `collected_names`."""
  if arm.holds_all_budgets:
    return _prefix_snapshots(arm, result)
  return _step_snapshots(arm, result)


def prefix_totals(arm: Arm, result: SearchResult) -> list[np.ndarray]:
  """Totals `[P, n]` of best-of-N's first n samples, for n = 1, 2, 4 .. N; -inf where not finite.

  N itself is always the last, also where it is no power of two.
  """
  step, samples = result.steps[0], arm.algo.n
  valid = np.isfinite(step.totals)
  totals = []
  for n in sorted({2**i for i in range(samples.bit_length())} | {samples}):
    # a total may be relative to the candidates at hand, so each prefix has its own
    scores = {k: np.where(valid, v, 0)[:, :n] for k, v in step.scores.items()}
    own = np.asarray(arm.ver.total(scores, valid[:, :n]))
    totals.append(np.where(valid[:, :n], own, -np.inf))
  return totals


def _prefix_snapshots(arm: Arm, result: SearchResult) -> Snapshots:
  """The best of each prefix of best-of-N's samples."""
  step, found = result.steps[0], prefix_totals(arm, result)
  # a prefix costs what a search of that size would have cost by itself
  sized = [dataclasses.replace(arm.algo, n=totals.shape[1]) for totals in found]
  bills = [sum(engine.bill(algo, arm.gen, arm.ver), Cost()) for algo in sized]
  costs = np.array([dataclasses.astuple(bill) for bill in bills])
  picked = np.stack([totals.argmax(axis=1) for totals in found], axis=1)
  row = np.arange(len(picked))[:, None]
  return Snapshots(
    np.broadcast_to(costs, (len(picked), *costs.shape)),
    np.stack([totals.max(axis=1) for totals in found], axis=1),
    step.outputs[arm.output_name][row, picked],
    {name: values[row, picked] for name, values in dict(step.measured).items()},
    picked,
  )


def _step_snapshots(arm: Arm, result: SearchResult) -> Snapshots:
  """The best after each step."""
  # a search over grid tokens has nothing to return before its candidates are complete
  first = next((i for i, step in enumerate(result.steps) if np.any(step.final)), 0)
  bests = [step.best for step in result.steps[first:]]
  costs = result.spent()[:, first:]
  # Whoever stops at a step decodes the best there, which the bill has for the last step only, and
  # only for the prompts that were still searching. The others are charged for it here.
  unpaid = np.ones(costs.shape[:2], bool)
  unpaid[:, -1] = ~np.asarray(result.steps[-1].active)
  final = dataclasses.astuple(core.observe_cost(arm.gen, [arm.output_name]))
  collected = [best.shown for best in bests]
  return Snapshots(
    costs + unpaid[..., None] * np.array(final),
    np.stack([best.total for best in bests], axis=1),
    np.stack([one['outputs'][arm.output_name] for one in collected], axis=1),
    {
      name: np.stack([one['measured'][name] for one in collected], axis=1)
      for name in collected[0]['measured']
    },
  )
