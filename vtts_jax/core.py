"""The protocol: what a generator, a verifier and a search algorithm must offer each other.

A generator is a staged sampler, a verifier scores what a candidate shows, an algorithm is an
ask / tell state machine over a batch of candidates. Behaviour is a frozen, hashable dataclass
without arrays (a static argument of `jax.jit`), data are pytrees of arrays, parameters are always
an argument and never reach an algorithm, which sees one bound `Sampler`.

Letters: B prompts, N candidates kept, M candidates proposed, K children of a candidate, T stages.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError

# the vocabulary of every part: core.take, core.fold ...
from vtts_jax.keys import CHILD as CHILD
from vtts_jax.keys import candidate_keys as candidate_keys
from vtts_jax.keys import child_key as child_key
from vtts_jax.keys import child_keys as child_keys
from vtts_jax.keys import fold as fold
from vtts_jax.keys import prompt_keys as prompt_keys
from vtts_jax.keys import repeat as repeat
from vtts_jax.keys import run_stages as run_stages
from vtts_jax.keys import take as take
from vtts_jax.keys import where as where

NEG_INF = float('-inf')
# a backward pass in forward passes: the gradient costs two, and the forward pass is run once more
# because its activations are not stored
BACKWARD = 3
KINDS = ('image', 'video', 'audio', 'text', 'tokens', 'mask', 'boxes', 'scalar')
Prompt = Mapping[str, Any]  # 'text', 'label', 'image', 'reference', 'include', 'exclude', 'id' ...


class Output(NamedTuple):
  """What a candidate can show, under a name.

  Attributes:
    kind: one of `KINDS`; `media/` saves, shows and grades by it. An image is float32 in [0, 1].
    shape: without the candidate axes `[B, N]`.
  """

  kind: str
  shape: tuple[int, ...]


def as_prompts(entries: Sequence[str | Prompt]) -> list[dict[str, Any]]:
  """Prompt rows; a plain text stands for `{'text': text}`.

  Raises:
    ConfigError: an entry that is neither a text nor a mapping; it names the place.
  """
  rows = []
  for place, entry in enumerate(entries):
    if not isinstance(entry, str | Mapping):
      raise ConfigError(f'prompts: entry {place} is {entry!r}; must be a text or a mapping')
    rows.append({'text': entry} if isinstance(entry, str) else dict(entry))
  return rows


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
  """The text of every prompt.

  Raises:
    ConfigError: a prompt without one.
  """
  for place, prompt in enumerate(prompts):
    if not isinstance(prompt.get('text'), str):
      raise ConfigError(f"prompts: prompt {place} has no 'text': {dict(prompt)}")
  return [prompt['text'] for prompt in prompts]


# ------------------------------------------------------------------------------------------- cost


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a search spends on one prompt; exact before it runs.

  Where candidates may finish early (`Generator.finished`) it is an upper bound, and the measured
  number of evaluations is reported beside it.

  Attributes:
    generator: network evaluations (NFE) of the generator: one token, one scale or one denoising
      step of one candidate. Classifier-free guidance counts once here and twice in `flops`.
    observe: outputs decoded (images, clips of video or audio); signals that are at hand, such as a
      log-probability, cost nothing.
    verify: candidates scored, summed over the verifiers that score them.
    flops: floating-point operations of all of these and of the prompt encoders; a multiply-add is
      2.
  """

  generator: float = 0
  observe: float = 0
  verify: float = 0
  flops: float = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, times: float) -> 'Cost':
    return Cost(*(a * times for a in dataclasses.astuple(self)))

  __rmul__ = __mul__

  def asdict(self) -> dict[str, float]:
    return dataclasses.asdict(self)


# -------------------------------------------------------------------------------------- generators


class Generator:
  """A staged sampler. Subclasses are frozen dataclasses without arrays.

  A *stage* is the smallest step that search can cut at: one token, one scale, a group of denoising
  steps. State leaves are `[B, N, ...]` and have the same shapes at every stage; context leaves are
  `[B, ...]`. `drop_cache` gives what identifies a candidate (tokens, noise) without its caches, and
  `observe` must accept both forms. Most families need only a part of what stands here: derive from
  `generators.token.TokenGenerator` or `generators.diffusion.DiffusionGenerator`.

  Attributes:
    num_stages: stages of a complete sample.
    uniform_stages: whether all stages do the same work, so that `stage` may be traced, and differ
      from candidate to candidate (`[B, N]`). If False (next-scale generators), the `stage` of every
      method but `observe` and `finished` is a Python integer that all candidates share.
    outputs: what `observe` can show, by name; the first one is what a search returns.
    offers: capabilities that algorithms may ask for, see below.
    vocab: choices at a stage; 0 where a stage draws from a continuum.
    prefixes_are_samples: whether what an unfinished candidate shows may be returned as the result
      (nested token orders). Else only finished candidates can be the best.
    value_of: name of the verifier score that `value` predicts; '' without a value head.

  Capabilities:
    'fork'               children of a candidate by one stage (the default works for all)
    'fork_distinct'      children of one parent that all differ (`replace=False`)
    'stochastic'         stages are random; copies of a candidate diverge only then
    'tokens'             `tokens` and `extend_with_tokens`
    'rewind'             `rewind`: a candidate cut back to an earlier stage
    'value', 'rollout'   a value head, a small and fast rollout model
    'perturb', 'renoise' neighbours of a candidate; back to an earlier time with fresh noise
    'noise'              `initial_noise` and `start_state`: the noise that a candidate starts from
    'log_prob_gradient'  `transition_log_probs`, differentiable in the parameters
  """

  num_stages: int
  uniform_stages: bool = True
  outputs: Mapping[str, Output]
  offers: frozenset[str] = frozenset({'fork', 'stochastic'})
  vocab: int = 0
  prefixes_are_samples: bool = False
  value_of: str = ''

  def check(self) -> None:
    """Raises `ConfigError` on settings that cannot be run; reads no weights."""

  def load(self) -> Any:
    """Parameters (a pytree of arrays); reads the generator's own files."""
    return {}

  def shardings(self, mesh: jax.sharding.Mesh) -> Any:
    """Where the parameters live on a mesh ('data', 'model'): a tree of shardings, or one for all.

    By default every device has all of them.
    """
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def tokenize(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Prompt arrays `[B, ...]`, on the host, once a run; errors name the prompt."""
    raise NotImplementedError

  def encode(self, params, prompt) -> Any:
    """Prompt arrays `[B, ...]` to a context `[B, ...]`; once per prompt."""
    raise NotImplementedError

  def init(self, params, ctx, keys: jax.Array) -> Any:
    """Empty candidates for keys `[B, N]`: state `[B, N, ...]`."""
    raise NotImplementedError

  def extend(self, params, ctx, state, keys, stage, count: int, *, greedy: bool = False) -> Any:
    """Runs stages `stage .. stage + count - 1` of every candidate with keys `[B, N]`.

    With a stage for each candidate those past the last stage stay as they are; a finished candidate
    always does. `greedy` takes the most likely choice and no randomness.
    """
    raise NotImplementedError

  def observe(self, params, ctx, state, stage, names) -> dict[str, jax.Array]:
    """Outputs `{name: [B, N, ...]}` of candidates with or without caches; `stage` (a scalar or
    `[B, N]`, may be traced) stages are done."""
    raise NotImplementedError

  def finished(self, state, stage) -> jax.Array:
    """Which candidates are complete `[B, N]`, of which `stage` (a scalar or `[B, N]`) are done."""
    lead = jax.tree.leaves(state)[0].shape[:2]
    return jnp.broadcast_to(jnp.asarray(stage) >= self.num_stages, lead)

  def stages_done(self, state, stage) -> jax.Array:
    """Stages `[B, N]` int32 that the candidates have run, those after their end left out."""
    lead = jax.tree.leaves(state)[0].shape[:2]
    return jnp.broadcast_to(jnp.asarray(stage, jnp.int32), lead)

  def drop_cache(self, state) -> Any:
    """The state without caches `[B, N, ...]`."""
    return state

  def rebuild_cache(self, params, ctx, state, stage, share=None) -> Any:
    """A state that can be extended, from one without caches of which `stage` stages are done;
    `share` is a state with the same prefix whose caches are taken over, at no cost."""
    return state

  def fork(self, params, ctx, state, keys, stage, k: int, *, replace: bool = True):
    """K continuations of each candidate by one stage: (children without caches `[B, N * K, ...]`,
    cache owners `[B, N, ...]`).

    A child becomes extendable by `rebuild_cache(.., child, .., share=take(owners, parent))`: so K
    children share one cache until they are chosen. Children of one parent lie next to each other;
    `keys [B, N, K]` (see `child_keys`). With `replace=False` the children of a parent differ.
    """
    if not replace:
      raise ConfigError(f"search: {type(self).__name__} does not offer 'fork_distinct'")
    flat = keys.reshape(keys.shape[0], -1)
    return self.extend(params, ctx, repeat(state, k), flat, stage, 1), state

  def draft(self, **changes) -> 'Generator':
    """The same generator, same parameters, with other settings: for cheaper observations."""
    return dataclasses.replace(self, **changes)

  def cost(self, op: str, stage: int = 0, count: int = 1) -> Cost:
    """Cost of one call for one candidate.

    Args:
      op: 'encode' (per prompt), 'extend', 'fork', 'extend_with_tokens', 'rebuild_cache' (without
        `share`), 'observe:NAME', 'value', 'rollout', 'perturb', 'renoise'.
      stage: where it starts.
      count: stages of an extension; of a rollout, which costs one evaluation more for reading the
        candidate, and whose stages past the end are not run and not counted.
    """
    raise NotImplementedError

  # offered by some, and asked for by the algorithms that need it

  def tokens(self, state) -> jax.Array:
    """Tokens `[B, N, T]` int32; those that are not drawn yet are 0."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'tokens'")

  def extend_with_tokens(self, params, ctx, state, tokens: jax.Array, stage=0) -> Any:
    """Candidates continued from `stage` by given tokens `[B, N, t]`."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'tokens'")

  def rewind(self, state, stage) -> Any:
    """Candidates cut back to `stage` (a scalar or `[B, N]`) stages done, without caches."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'rewind'")

  def value(self, params, ctx, state, stage) -> jax.Array:
    """Predicted mean total `[B, N]`, float32, of the completions of candidates without caches."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'value'")

  def rollout(self, params, ctx, state, keys, stage, count: int, *, greedy: bool = False) -> Any:
    """Candidates without caches, continued by `count` stages with the small rollout model; those
    past the end stay as they are.

    Keys `[B, N]` are folded with the stage as in `extend`. Log-probabilities stay those of the
    first `stage` stages.
    """
    raise ConfigError(f"search: {type(self).__name__} does not offer 'rollout'")

  def initial_noise(self, state) -> jax.Array:
    """The noise `[B, N, ...]` that candidates at stage 0 start from, standard normal."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'noise'")

  def start_state(self, noise: jax.Array) -> Any:
    """Candidates at stage 0 that start from `noise [B, N, ...]`."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'noise'")

  def perturb(self, state, keys: jax.Array, scale, stage=0) -> Any:
    """Neighbours of candidates with `stage` stages done (a scalar or `[B, N]`), as far away as
    `scale` says: at stage 0 it is the angle by which their initial noise turns, later a factor of
    the noise that the reverse SDE draws in a step that ends there."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'perturb'")

  def renoise(self, state, keys: jax.Array, stage, to, noise=None) -> Any:
    """Candidates with `stage` stages done, taken back to `to` with fresh noise of the marginal
    there; both are scalars or `[B, N]`. Standard normal `noise [B, N, ...]`, where it is given,
    stands in for the draw by keys."""
    raise ConfigError(f"search: {type(self).__name__} does not offer 'renoise'")

  def transition_log_probs(self, params, ctx, trajectory) -> jax.Array:
    """Log-probability of each transition `[B, N, S]`, float32, differentiable in `params`."""
    raise ConfigError(f"training: {type(self).__name__} does not offer 'log_prob_gradient'")


# --------------------------------------------------------------------------------------- verifiers


class Verifier:
  """Scores what candidates show. Subclasses are frozen dataclasses without arrays.

  Attributes:
    needs: names among the generator's outputs that `score` reads.
    gives: what algorithms may ask of it: 'features' (`embed_images`), 'gradient' (`score` is
      differentiable in what it reads, in a useful way).
    jittable: False when `score` runs on the host; the stepped driver is then used.
  """

  needs: frozenset[str] = frozenset({'image'})
  gives: frozenset[str] = frozenset()
  jittable: bool = True

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the scores returned; the backbone belongs into the name."""
    raise NotImplementedError

  def check(self) -> None:
    """Raises `ConfigError` on settings that cannot be run; reads no weights."""

  def load(self) -> Any:
    """Parameters (a pytree of arrays); reads the verifier's own files."""
    return {}

  def shardings(self, mesh: jax.sharding.Mesh) -> Any:
    """As `Generator.shardings`."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def tokenize(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Prompt arrays `[B, ...]`, on the host, once a run; errors name the prompt."""
    return {}

  def encode(self, params, prompt) -> Any:
    """Prompt arrays `[B, ...]` to a context `[B, ...]`; once per prompt."""
    return prompt

  def score(self, params, vctx, observed: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Observed outputs `{name: [B, M, ...]}` to scores `{name: [B, M]}`, larger is better; called
    on chunks of M."""
    raise NotImplementedError

  def embed_images(self, params, images: jax.Array) -> jax.Array:
    """Images `[B, M, H, W, 3]` to features `[B, M, D]`, where `gives` has 'features'."""
    raise ConfigError(f"verifier {type(self).__name__}: does not give 'features'")

  def total(self, scores: Mapping[str, jax.Array], valid: jax.Array) -> jax.Array:
    """The one number to search on, `[B, M]`, from all scores of all M candidates; larger is better.

    `valid [B, M]` is False where a score is NaN or infinite: such a candidate is out whatever is
    returned for it, and must not move the others. The best seen so far is always among the M.
    """
    return scores[self.names[0]]

  def cost(self, op: str) -> Cost:
    """Cost of 'encode' (one prompt) or 'score' (one candidate)."""
    return Cost(verify=float(op == 'score'))


# -------------------------------------------------------------------------------------- the search


class Call(NamedTuple):
  """A call that was counted: of which part, for how many candidates of each prompt, and where
  candidates may finish early the evaluations that were needed `[B]`, else None."""

  part: Any
  op: str
  candidates: int
  stage: Any = 0
  count: int = 1
  evals: Any = None


def finishes_early(gen: Generator) -> bool:
  """Whether candidates may be complete before the last stage."""
  return type(gen).finished is not Generator.finished


class Sampler(NamedTuple):
  """A generator bound to its parameters and to the context of the prompts: all that an algorithm
  sees of a model.

  Attributes:
    gen, params, ctx: what is bound.
    score: `(state, stage) -> totals [B, N]`: observed and scored at once, differentiable in the
      state; only for algorithms that need 'gradient', else None.
    total: `{name: [B, M]} -> totals [B, M]`, -inf for bad scores: what `tell` compares candidates
      of several steps by, since the totals that it is given may be relative to those of one step.
    score_names: names of the scores.
    meter: a list of `Call`, to which every call is added while it is traced, or None. (So an
      algorithm must not call the sampler inside a compiled loop of its own.)
  """

  gen: Generator
  params: Any
  ctx: Any
  score: Callable | None = None
  total: Callable | None = None
  score_names: tuple[str, ...] = ()
  meter: list | None = None

  @property
  def num_stages(self) -> int:
    return self.gen.num_stages

  def _count(self, op, candidates, stage=0, count=1, evals=None):
    if self.meter is not None:
      self.meter.append(Call(self.gen, op, candidates, stage, count, evals))

  def init(self, keys, initial=None):
    """Candidates for keys `[B, N]`, continued by the initial tokens `[B, t]` where there are
    any."""
    state = self.gen.init(self.params, self.ctx, keys)
    if initial is not None and initial.shape[1]:
      tokens = jnp.broadcast_to(initial[:, None], (*keys.shape, initial.shape[1]))
      state = self.extend_with_tokens(state, tokens)
    return state

  def extend(self, state, keys, stage, count: int, *, greedy: bool = False):
    grown = self.gen.extend(self.params, self.ctx, state, keys, stage, count, greedy=greedy)
    evals = None
    # candidates that had ended before the call, or end in it, needed fewer stages than it runs
    if self.meter is not None and finishes_early(self.gen):
      before, after = self.gen.stages_done(state, stage), self.gen.stages_done(grown, stage + count)
      evals = (after - before).sum(axis=1)
    self._count('extend', keys.shape[1], stage, count, evals)
    return grown

  def fork(self, state, keys, stage, k: int, *, replace: bool = True):
    evals = None
    if self.meter is not None and finishes_early(self.gen):
      evals = (~self.gen.finished(state, stage)).sum(axis=1)
    self._count('fork', keys.shape[1], stage, k, evals)
    return self.gen.fork(self.params, self.ctx, state, keys, stage, k, replace=replace)

  def extend_with_tokens(self, state, tokens, stage=0):
    self._count('extend_with_tokens', tokens.shape[1], stage, tokens.shape[2])
    return self.gen.extend_with_tokens(self.params, self.ctx, state, tokens, stage)

  def rebuild_cache(self, state, stage, share=None):
    if share is None:
      self._count('rebuild_cache', jax.tree.leaves(state)[0].shape[1], stage)
    return self.gen.rebuild_cache(self.params, self.ctx, state, stage, share)

  def drop_cache(self, state):
    return self.gen.drop_cache(state)

  def observe(self, state, stage, names) -> dict[str, jax.Array]:
    for name in sorted(names):
      self._count(f'observe:{name}', jax.tree.leaves(state)[0].shape[1])
    return self.gen.observe(self.params, self.ctx, state, stage, tuple(sorted(names)))

  def value(self, state, stage):
    self._count('value', jax.tree.leaves(state)[0].shape[1], stage)
    return self.gen.value(self.params, self.ctx, state, stage)

  def rollout(self, state, keys, stage, count: int, *, greedy: bool = False):
    self._count('rollout', keys.shape[1], stage, count)
    return self.gen.rollout(self.params, self.ctx, state, keys, stage, count, greedy=greedy)

  def tokens(self, state):
    return self.gen.tokens(state)

  def rewind(self, state, stage):
    return self.gen.rewind(state, stage)

  def initial_noise(self, state):
    return self.gen.initial_noise(state)

  def start_state(self, noise):
    return self.gen.start_state(noise)

  def perturb(self, state, keys, scale, stage=0):
    self._count('perturb', keys.shape[1])
    return self.gen.perturb(state, keys, scale, stage)

  def renoise(self, state, keys, stage, to, noise=None):
    self._count('renoise', keys.shape[1], stage)
    return self.gen.renoise(state, keys, stage, to, noise)

  def differentiate(self, function, argument):
    """`((value, extra), gradient)` of `function(argument) -> (value, extra)`. What `function` calls
    counts 1 + `BACKWARD` times."""
    before = len(self.meter or ())
    found = jax.value_and_grad(function, has_aux=True)(argument)
    if self.meter is not None:
      self.meter.extend(BACKWARD * self.meter[before:])
    return found


class Phase(NamedTuple):
  """Steps of equal array shapes: one compiled program.

  Attributes:
    shape: what fixes the shapes; static and hashable.
    rows: one tuple of numbers for each step, of what differs between them: scanned in the fused
      driver, fed in the stepped one. A phase of one row gets Python numbers, else they are traced.
  """

  shape: Hashable
  rows: tuple[tuple, ...] = ((),)


class Candidates(NamedTuple):
  """What `ask` proposes.

  Attributes:
    state: without caches `[B, M, ...]`; it is observed and scored (a lookahead completes it first).
    stage: stages done of `state`; an integer, a scalar or `[B, M]`.
    parent: which frontier candidate each came from `[B, M]`; -1 for none.
    own: what the algorithm's own `tell` needs.
    cache_owner: (states `[B, D, ...]`, index `[B, M]`): the states whose caches the candidates may
      take over (`rebuild_cache(.., share=take(states, index))`) and the index of each one's; or ().
    scores: `{name: [B, M]}` by the verifier; filled in between ask and tell.
    features: `[B, M, D]` of the verifier, where `needs` has 'features'; filled in likewise.
    context: the verifier's context `[B, ...]`; filled in likewise.
  """

  state: Any
  stage: Any
  parent: jax.Array
  own: Any = ()
  cache_owner: Any = ()
  scores: Any = ()
  features: Any = ()
  context: Any = ()


class Frontier(NamedTuple):
  """The candidates kept: state `[B, N, ...]`, keys and scores `[B, N]`, and the algorithm's own
  arrays `[B, ...]`."""

  state: Any
  keys: jax.Array
  scores: jax.Array
  own: Any = ()


class Best(NamedTuple):
  """The best candidate seen of each prompt.

  Attributes:
    state: without caches `[B, ...]`.
    stage: stages done `[B]`.
    scores: `{name: [B]}`.
    total: `[B]`, -inf before there is one.
    shown: outputs `{name: [B, ...]}` and, where they are collected, measured scores; else ().
  """

  state: Any
  stage: jax.Array
  scores: dict[str, jax.Array]
  total: jax.Array
  shown: Any = ()


class SearchState(NamedTuple):
  """A search between two steps: all that is needed to go on, on any number of devices.

  Attributes:
    step: steps done, int32 scalar.
    frontier: candidates kept.
    best: the best of each prompt.
    rows: which prompt of the batch each row is `[B]`, int32 (prompts that need no further step
      leave the batch of the stepped driver).
  """

  step: jax.Array
  frontier: Frontier
  best: Best
  rows: jax.Array


class Algorithm:
  """An ask / tell state machine. Subclasses are frozen dataclasses.

  `ask`, `tell` and `init` see a `Sampler`, never parameters or a verifier. They may use whatever
  stands in `needs`; `engine.search.validate` refuses parts that lack it.

  Attributes:
    needs: capabilities of the generator ('value', 'perturb', 'ragged_stages': a stage for each
      candidate) and of the verifier ('features', 'gradient').
    offers_caches: whether its candidates come with a `cache_owner`.
    initial: stages that are given, not drawn; their tokens are an argument of `search`.
  """

  needs: frozenset[str] = frozenset()
  offers_caches: bool = False
  initial: int = 0

  def check(self, gen: Generator) -> None:
    """Raises `ConfigError` where the settings do not fit the generator."""

  def plan(self, gen: Generator) -> tuple[Phase, ...]:
    """All steps, known before anything runs."""
    raise NotImplementedError

  def init(self, sampler: Sampler, keys: jax.Array, initial: jax.Array) -> Frontier:
    """The first frontier under prompt keys `[B]`; initial tokens `[B, t]` (t = 0 for none)."""
    raise NotImplementedError

  def ask(self, sampler: Sampler, frontier: Frontier, shape, row) -> Candidates:
    raise NotImplementedError

  def tell(
    self, sampler: Sampler, frontier: Frontier, candidates: Candidates, totals, shape, row
  ) -> tuple[Frontier, jax.Array]:
    """Takes totals `[B, M]`; -inf marks a candidate that must not be kept.

    Returns:
      The next frontier, and which candidate each of its N' came from `[B, N']` int32; -1 says that
      the old one stays.
    """
    raise NotImplementedError

  def init_cost(self, gen: Generator) -> Cost:
    """Generator cost of `init`."""
    return Cost()

  def step_cost(self, gen: Generator, shape, row) -> tuple[Cost, int]:
    """Generator cost of `ask` and `tell`, and the number M of candidates that are observed and
    scored; one that is scored inside `Sampler.differentiate` counts 1 + `BACKWARD` times more."""
    raise NotImplementedError

  def observer(self, gen: Generator, shape) -> Generator:
    """The generator that observes the candidates of a step. Where it is not `gen` itself it is a
    draft of it (the same parameters, fewer decoder steps), and what it shows is never returned."""
    return gen

  def stages_shown(self, gen: Generator, shape, row) -> int:
    """Stages done of the candidates of a step (of the least finished, where they differ)."""
    return gen.num_stages

  def finished_prompts(self, gen: Generator, frontier: Frontier) -> jax.Array:
    """Prompts `[B]` that need no further step; what comes after changes nothing for them."""
    return jnp.zeros(frontier.scores.shape[0], bool)


def steps_of(algo: Algorithm, gen: Generator) -> list[tuple[Hashable, tuple]]:
  """(shape, row) of every step, in order."""
  return [(phase.shape, row) for phase in algo.plan(gen) for row in phase.rows]


def observe_cost(gen: Generator, names) -> Cost:
  """Cost of observing these outputs of one candidate."""
  return sum((gen.cost(f'observe:{name}') for name in names), Cost())


def step_costs(algo: Algorithm, gen: Generator, ver: Verifier) -> tuple[Cost, ...]:
  """Cost per prompt of each step; the encoders and the first frontier are in the first."""
  bill = []
  for shape, row in steps_of(algo, gen):
    cost, m = algo.step_cost(gen, shape, row)
    observed = observe_cost(algo.observer(gen, shape), ver.needs)
    bill.append(cost + m * (observed + ver.cost('score')))
  bill[0] = bill[0] + algo.init_cost(gen) + gen.cost('encode') + ver.cost('encode')
  return tuple(bill)
