"""What a search is compiled for, and what its steps see and leave behind.

Letters: B prompts, M candidates of a step, N kept, C columns of a genealogy, D features.
"""

from typing import Any, NamedTuple

from vtts_jax.core import Algorithm, Best, Generator, Verifier

COLUMNS = 8  # candidates of a step that a genealogy draws
COLLECT = ('scores', 'best', 'states', 'samples', 'measured', 'leaders')


class SearchProgram(NamedTuple):
  """What is compiled; static and hashable.

  Attributes:
    algo, gen, ver: the parts.
    measure: a verifier that scores what was decoded anyway and that no search sees, or None.
    render_chunk: candidates of a prompt that are observed and scored at a time; 0 for all.
    stop: a prompt whose best total reaches this needs no further step.
    collect: what a step leaves behind besides its scores, of `COLLECT`:
      'best'      state, outputs and measured scores of the best after each step
      'states'    the state of every candidate
      'samples'   the first output of every candidate (images in 8 bits)
      'measured'  scores by `measure`, and its features, of every candidate
      'leaders'   the first output of the C candidates that a genealogy draws
  """

  algo: Algorithm
  gen: Generator
  ver: Verifier
  measure: Verifier | None = None
  render_chunk: int = 0
  stop: float = float('inf')
  collect: frozenset[str] = frozenset({'scores'})

  @property
  def main_output(self) -> str:
    return next(iter(self.gen.outputs))

  @property
  def shown_outputs(self) -> frozenset[str]:
    """Names of what is collected of a few candidates, the best and the leaders."""
    shown = {self.main_output} if self.collect & {'best', 'leaders'} else set()
    measured = self.measure.needs if self.measure and 'best' in self.collect else frozenset()
    return frozenset(shown) | measured

  @property
  def observed_outputs(self) -> frozenset[str]:
    """Names of what is observed of every candidate: what scores and samples need. What only the few
    need is observed of them alone."""
    sampled = {self.main_output} if 'samples' in self.collect else set()
    measured = self.measure.needs if self.measure and 'measured' in self.collect else frozenset()
    return self.ver.needs | frozenset(sampled) | measured

  @property
  def kept_outputs(self) -> frozenset[str]:
    """Names of what must outlive the chunk that it was observed in."""
    sampled = {self.main_output} if 'samples' in self.collect else set()
    return (self.shown_outputs & self.observed_outputs) | frozenset(sampled)


class Contexts(NamedTuple):
  """The encoded prompts, `[B, ...]` each; `measure` is () without a measuring verifier."""

  generator: Any
  verifier: Any
  measure: Any


class Observed(NamedTuple):
  """What was seen of the candidates of a step.

  Attributes:
    scores: `{name: [B, M]}` by the verifier; () before a host verifier has scored.
    features: `[B, M, D]` where the algorithm needs them, else ().
    measured, measured_features: `{name: [B, M]}` and `[B, M, D]`, or ().
    outputs: `{name: [B, M, ...]}`, what is kept or waits for a host verifier.
  """

  scores: Any
  features: Any
  measured: Any
  measured_features: Any
  outputs: Any


class StepTrace(NamedTuple):
  """What a step leaves behind; see `SearchProgram.collect`.

  Attributes:
    totals: `[B, M]`, -inf where a score was NaN or infinite.
    scores: `{name: [B, M]}` as the verifier gave them.
    bad: `{name: [B]}`, how many candidates had a NaN or infinite score of that name.
    parent: `[B, M]`, the frontier candidate that each came from, -1 for none.
    kept: `[B, N']`, which candidates make the next frontier, -1 where an old one stays.
    stage: `[B, M]`, stages done of what was observed.
    final: `[B, M]`, which of these may be returned.
    active: `[B]`, whether the prompt still needed this step; where not, totals are -inf and nothing
      was spent.
    evals: `[B]`, network evaluations that were needed, where candidates may finish early; else ().
    best: the best so far; its state is () unless 'best' is collected, and so is what it shows,
      `{'outputs': {name: [B, ...]}, 'measured': {name: [B]}}`.
    states: `[B, M, ...]`, or ().
    outputs: `{name: [B, M, ...]}`, or ().
    measured, features: `{name: [B, M]}` and `[B, M, D]`, or ().
    leaders: `{'index': [B, C], 'outputs': {name: [B, C, ...]}}`, or ().
  """

  totals: Any
  scores: Any
  bad: Any
  parent: Any
  kept: Any
  stage: Any
  final: Any
  active: Any
  evals: Any
  best: Best
  states: Any = ()
  outputs: Any = ()
  measured: Any = ()
  features: Any = ()
  leaders: Any = ()
