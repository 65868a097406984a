"""The types that everything else plugs into: costs, keys, candidates, and the three roles.

A generator is a staged sampler, a verifier scores images, an algorithm is an ask / tell state
machine over a batch of candidates. Behaviour is a frozen, hashable dataclass without arrays (a
static argument of `jax.jit`), data are pytrees of arrays, parameters are always an argument.

Letters: B prompts, N candidates kept, M candidates proposed, K children of a candidate, T stages,
H W C image.
"""

import dataclasses
from collections.abc import Mapping, Sequence
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


# ----------------------------------------------------------------------------------------------
# cost


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a search spends on one prompt; exact before it runs.

  Attributes:
    generator: network evaluations (NFE) of the generator: one token, one scale or one denoising
      step of one candidate. Classifier-free guidance counts once here and twice in `flops`.
    render: images decoded.
    verify: images (or candidates) scored, summed over the verifiers that score them.
    flops: floating-point operations of all of these and of the prompt encoders; a multiply-add is
      2.
  """

  generator: float = 0
  render: float = 0
  verify: float = 0
  flops: float = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, times: float) -> 'Cost':
    return Cost(*(a * times for a in dataclasses.astuple(self)))

  __rmul__ = __mul__

  def asdict(self) -> dict[str, float]:
    return dataclasses.asdict(self)


# --------------------------------------------------------------------------------------- the roles


class Generator:
  """A staged sampler. Subclasses are frozen dataclasses without arrays; this base holds what is
  optional.

  A *stage* is the smallest step that search can cut at: one token, one scale, one denoising step.
  `extend` runs `count` (static) stages from `stage`: a scalar, which may be traced, or one for each
  candidate `[B, N]` (tree search: leaves of different depth in one call), in which case those past
  the last stage change nothing. `render` shows a candidate of
  which `stage` stages are done. State leaves are `[B, N, ...]`, context leaves `[B, ...]`. The
  *slim* form of a state is what identifies the candidate (tokens, log-probability) without caches:
  `render` and `log_prob` must accept it.

  Attributes:
    num_stages: stages of a complete sample.
    image_shape: `(H, W, 3)`.
    vocab: choices at a stage; 0 where a stage draws from a continuum.
    anytime: whether the render of an unfinished candidate is a picture to hand out (nested token
      orders), not just a look at what may come (grids, denoising). Only such renders may be
      returned as the best.
    stochastic: whether a stage draws anything, so that two copies of a candidate part ways.
    value_of: name of the verifier score that `value` predicts; '' without a value head.
    rollout_policy: name of the small policy that `rollout` runs; '' without one.
    keeps_early: whether `early` can be asked.
  """

  num_stages: int
  image_shape: tuple[int, int, int]
  vocab: int = 0
  anytime: bool = False
  stochastic: bool = True
  value_of: str = ''
  rollout_policy: str = ''
  keeps_early: bool = False

  def load(self) -> Any:
    """Parameters (a pytree of arrays); reads the generator's own files."""
    return {}

  def tokenize(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Host side of the prompt: arrays `[B, ...]`; errors name the text that cannot be read."""
    raise NotImplementedError

  def encode(self, params, prompt) -> Any:
    """Prompt arrays `[B, ...]` to a context `[B, ...]`; once per prompt."""
    raise NotImplementedError

  def init(self, params, ctx, keys: jax.Array) -> Any:
    """Empty candidates for keys `[B, N]`: state `[B, N, ...]`."""
    raise NotImplementedError

  def extend(self, params, ctx, state, keys, stage, count: int, *, greedy: bool = False) -> Any:
    """Runs stages `stage .. stage + count - 1` of every candidate with keys `[B, N]`.

    `greedy` takes the most likely choice and no randomness.
    """
    raise NotImplementedError

  def render(self, params, ctx, state, stage) -> jax.Array:
    """Images `[B, N, H, W, 3]`, float32 in [0, 1], of candidates (slim or not); stages done: a
    scalar or `[B, N]`."""
    raise NotImplementedError

  def cost(self, op: str, stage: int = 0, count: int = 1) -> Cost:
    """Cost of one call for one candidate: op is 'encode' (per prompt), 'extend', 'fork', 'force',
    'fatten' (without `like`), 'render', 'value' or 'rollout'.

    A value is one evaluation; a rollout is one that reads the candidate and one for each of its
    `count` stages, of which those past the end of a static `stage` are not run and not counted.
    """
    raise NotImplementedError

  def slim(self, state) -> Any:
    """The state without caches `[B, N, ...]`."""
    return state

  def fatten(self, params, ctx, slim, stage, like=None) -> Any:
    """A state from its slim form, `stage` (scalar or `[B, N]`) stages done; `like` is a state with
    the same prefix whose caches can be taken over."""
    return slim

  def fork(self, params, ctx, state, keys, stage, k: int, *, replace: bool = True):
    """K continuations of each candidate by one stage: (slim children `[B, N * K, ...]`, donor `[B,
    N, ...]`).

    A child with its parent's donor is a state again, `fatten(.., child, .., like=take(donor,
    parent))`: that is how K children share one cache until they are chosen. Children of one parent
    lie next to each other; `keys [B, N, K]` (see `child_keys`). With `replace=False` the children
    of a parent differ, which only generators with a finite choice per stage can offer.
    """
    if not replace:
      raise NotImplementedError(f'{type(self).__name__}.fork without replacement')
    children = repeat(state, k)
    flat = keys.reshape(keys.shape[0], -1)
    grown = self.extend(params, ctx, children, flat, stage, 1)
    return grown, state

  def force(self, params, ctx, state, tokens: jax.Array) -> Any:
    """Empty candidates continued by given tokens `[B, N, t]`; token generators only."""
    raise ConfigError(f'search.initial: {type(self).__name__} takes no initial tokens')

  def draft(self, **changes) -> 'Generator':
    """The same generator, same parameters, with other settings: for cheaper looks."""
    return dataclasses.replace(self, **changes)

  def log_prob(self, state) -> jax.Array:
    """Log-probability `[B, N]` of what was drawn so far; token generators only."""
    raise ConfigError(f'verifier likelihood: {type(self).__name__} has no log-probabilities')

  def early(self, params, ctx, state) -> jax.Array:
    """Images `[B, N, H, W, 3]` of what candidates were predicted to become at an earlier stage;
    diffusion and flow only."""
    raise ConfigError(f'verifier self_consistency: {type(self).__name__} keeps no early prediction')

  def value(self, params, ctx, slim, stage) -> jax.Array:
    """Predicted total `[B, N]`, float32, that the completions of slim candidates will have on
    average; `stage` (scalar or `[B, N]`, may be traced) stages are done, 0 .. num_stages."""
    raise ConfigError(f'generator {type(self).__name__}: has no value head (value_of is empty)')

  def rollout(self, params, ctx, slim, keys, stage, count: int, *, greedy: bool = False) -> Any:
    """Slim candidates continued from `stage` (scalar or `[B, N]`, may be traced) by `count`
    (static) stages with the small policy; those past the end stay as they are.

    Keys `[B, N]` are folded with the stage as in `extend`. The log-probability is not updated: it
    stays that of the first `stage` stages.
    """
    raise ConfigError(
      f'generator {type(self).__name__}: has no rollout policy (rollout_policy is empty)'
    )

  def check(self) -> None:
    """Raises `ConfigError` on settings that cannot be run; reads no weights."""


class Verifier:
  """Scores images. Subclasses are frozen dataclasses without arrays.

  Attributes:
    uses: what `score` needs: 'images', and of the generator's signals 'log_prob' (`[B, M]`, with
      'length') and 'early' (images, see `Generator.early`). Without 'images' nothing is rendered.
    jittable: False when `score` runs on the host; the stepped driver is then used.
  """

  uses: frozenset = frozenset({'images'})
  jittable: bool = True

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the scores returned; the backbone belongs into the name."""
    raise NotImplementedError

  def load(self) -> Any:
    return {}

  def tokenize(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    return {}

  def encode(self, params, prompt) -> Any:
    """Prompt arrays `[B, ...]` to a context `[B, ...]`; once per prompt."""
    return prompt

  def score(self, params, vctx, images, **signals) -> dict[str, jax.Array]:
    """Images `[B, M, H, W, 3]` to scores `{name: [B, M]}`, larger is better; called on chunks of
    M."""
    raise NotImplementedError

  def total(self, scores: Mapping[str, jax.Array], valid: jax.Array) -> jax.Array:
    """The one number to search on, `[B, M]`, from all scores of all M candidates; larger is better.

    `valid [B, M]` is False where a score is NaN or infinite: such a candidate is out whatever is
    returned for it, and must not move the others. The best seen so far is always among the M.
    """
    return scores[self.names[0]]

  def cost(self, op: str) -> Cost:
    """Cost of 'encode' (one prompt) or 'score' (one image)."""
    raise NotImplementedError

  def check(self) -> None:
    """Raises `ConfigError` on settings that cannot be run; reads no weights."""


class Candidates(NamedTuple):
  """What `ask` proposes.

  Attributes:
    shown: slim state `[B, M, ...]` that is rendered and scored (a lookahead completes it first).
    stage: how many stages of `shown` are done; int32, a scalar or `[B, M]`.
    parent: which frontier candidate each came from `[B, M]`; -1 for none.
    inner: what the algorithm's own `tell` needs.
    donor: (fat states `[B, D, ...]`, index `[B, M]` into them) whose caches candidates can take
      over (`fatten(.., like=take(state, index))`), or empty.
    features: `[B, M, D]`, the verifier's features of the pictures, where `Algorithm.features` asks
      for them; filled in by the driver between ask and tell.
  """

  shown: Any
  stage: jax.Array
  parent: jax.Array
  inner: Any
  donor: Any = ()
  features: Any = ()


class Best(NamedTuple):
  """The best candidate seen: slim state `[B, ...]`, its stages done `[B]`, its scores `{name:
  [B]}`, total `[B]`."""

  state: Any
  stage: jax.Array
  scores: dict[str, jax.Array]
  total: jax.Array


class SearchState(NamedTuple):
  """Between two steps: frontier `[B, N, ...]` with its keys `[B, N]` and scores `[B, N]`, best,
  algorithm's own."""

  frontier: Any
  keys: jax.Array
  scores: jax.Array
  best: Best
  inner: Any = ()


class Step(NamedTuple):
  """Which step is run: `index` may be traced, `first` is static and has the same shapes as
  `index`."""

  index: Any
  first: int


class Told(NamedTuple):
  """What `tell` returns: frontier `[B, N', ...]`, keys and scores `[B, N']`, kept candidates `[B,
  N']`, own."""

  frontier: Any
  keys: jax.Array
  scores: jax.Array
  kept: jax.Array
  inner: Any = ()


class Algorithm:
  """An ask / tell state machine. Subclasses are frozen dataclasses; they never see a model or a
  verifier.

  Attributes:
    features: whether `tell` needs the verifier's features of the pictures.
    uses_value: whether it asks for `Generator.value`, which must predict the score searched on.
    donates: whether its candidates come with a `donor`.
  """

  features: bool = False
  donates: bool = False
  initial: int = 0  # stages that are given
  uses_value: bool = False

  def view(self, gen: Generator, step: int) -> Generator:
    """The generator that renders the candidates of a step. Where it is not `gen` itself it is a
    draft of it (the same parameters, fewer decoder steps) and no such picture is returned."""
    return gen

  def reach(self, gen: Generator, step: int) -> int:
    """Stages done of what a step shows (of the least finished, where they differ)."""
    return gen.num_stages

  def done(self, gen: Generator, state: SearchState) -> jax.Array:
    """Prompts `[B]` that need no further step; what comes after changes nothing for them."""
    return jnp.zeros(state.best.total.shape, bool)

  def check(self, gen: Generator) -> None:
    """Raises `ConfigError` where the settings do not fit the generator."""

  def phases(self, gen: Generator) -> tuple[tuple[int, int], ...]:
    """Runs of steps of equal shapes, `((first, count), ...)`; each is compiled once."""
    raise NotImplementedError

  def num_steps(self, gen: Generator) -> int:
    return sum(count for _, count in self.phases(gen))

  def init(self, gen, params, ctx, keys: jax.Array, initial: jax.Array) -> Told:
    """The first frontier under prompt keys `[B]`; initial tokens `[B, t]` (t = 0 for none)."""
    raise NotImplementedError

  def ask(self, gen, params, ctx, state: SearchState, step: Step) -> Candidates:
    raise NotImplementedError

  def tell(
    self, gen, params, ctx, state: SearchState, cands: Candidates, totals, step: Step
  ) -> Told:
    """Takes totals `[B, M]`; -inf marks a candidate that must not be kept."""
    raise NotImplementedError

  def step_cost(self, gen: Generator, step: int, initial: int = 0) -> tuple[Cost, int]:
    """Generator cost of `ask` and the number M of candidates that a step has rendered and
    scored."""
    raise NotImplementedError

  def costs(self, gen: Generator, ver: Verifier) -> tuple[Cost, ...]:
    """Cost per prompt of each step; the encoders are in the first."""
    bill = []
    for step in range(self.num_steps(gen)):
      cost, m = self.step_cost(gen, step)
      rendered = len(ver.uses & {'images', 'early'}) * self.view(gen, step).cost('render')
      bill.append(cost + m * (rendered + ver.cost('score')))
    bill[0] = bill[0] + gen.cost('encode') + ver.cost('encode')
    return tuple(bill)

  def cost(self, gen: Generator, ver: Verifier) -> Cost:
    """The whole bill per prompt, before anything runs."""
    return sum(self.costs(gen, ver), Cost())
