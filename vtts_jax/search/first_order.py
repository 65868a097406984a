"""First-order search: the gradient of the verifier, through the sampler, in the initial noise.

Ma et al. (2025, arXiv 2501.09732), appendix; DOODL and ReNO are of this kind. Each start climbs on
its own sphere: the noise turns by an angle towards the gradient's tangent, which keeps its norm and
needs no learning rate in units of the score. A move that lowers the score is taken back, and the
angle shrinks.

The sampler keeps the states between its steps and runs each step again on the way back, so memory
does not grow with the network's activations times the steps. A backward pass counts three forward
passes (`core.BACKWARD`), as published.

Letters: B prompts, N starts.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.search import checks


class Own(NamedTuple):
  """What a start carries besides its noise: the gradient of the score there `[B, N, ...]`, the
  angle of the next move `[B, N]`, and its scores `{name: [B, N]}`."""

  gradient: Any
  angle: Any
  scores: Any


@dataclasses.dataclass(frozen=True)
class FirstOrder(core.Algorithm):
  """Gradient ascent on the sphere of the initial noise.

  Attributes:
    starts: N; start i begins as candidate i of best-of-N.
    rounds: evaluations of a start; the first one is of the noise that it begins with.
    angle: of a move, in radians.
    shrink: factor of the angle after a move that did not raise the score, in [0, 1].
  """

  starts: int = 1
  rounds: int = 16
  angle: float = 0.2
  shrink: float = 0.5

  needs = frozenset({'noise', 'gradient'})

  def __post_init__(self):
    checks.check_integer('starts', self.starts, 1)
    checks.check_integer('rounds', self.rounds, 1)
    checks.check_number('angle', self.angle, 0, math.pi / 2)
    checks.check_number('shrink', self.shrink, 0, 1)

  def plan(self, gen):
    """A row holds the number of the round."""
    return (core.Phase('round', tuple((number,) for number in range(self.rounds))),)

  def init(self, sampler, keys, initial):
    keys = core.candidate_keys(keys, jnp.arange(self.starts))
    start = sampler.init(keys)
    flat, none = jnp.zeros_like(sampler.initial_noise(start)), jnp.full(keys.shape, core.NEG_INF)
    scores = dict.fromkeys(sampler.score_names, none)
    own = Own(flat, jnp.full(keys.shape, self.angle), scores)
    return core.Frontier(start, keys, none, own)

  def ask(self, sampler, frontier, shape, row):
    # the first move is none: there is no gradient yet
    noise = sampler.initial_noise(frontier.state)
    noise = _turn_towards(noise, frontier.own.gradient, frontier.own.angle)

    def sample_and_score(noise):
      start = sampler.start_state(noise)
      grown = sampler.extend(start, frontier.keys, 0, sampler.num_stages)
      # a candidate's score depends on its own noise alone, so the sum has all gradients
      return sampler.score(grown, sampler.num_stages).sum(), (start, grown)

    (_, (start, grown)), gradient = sampler.differentiate(sample_and_score, noise)
    index = jnp.broadcast_to(jnp.arange(self.starts), frontier.keys.shape)
    parent = jnp.where(frontier.scores > core.NEG_INF, index, -1)
    own = (start, jnp.nan_to_num(gradient))
    return core.Candidates(sampler.drop_cache(grown), sampler.num_stages, parent, own=own)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    start, gradient = candidates.own
    batch, n = totals.shape
    # totals of the last round may be relative to its candidates, so both are judged together
    own = frontier.own
    named = {name: candidates.scores[name] for name in own.scores}
    pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), named, own.scores)
    new, before = jnp.split(sampler.total(pool), 2, axis=1)
    better = new > before
    # every start decides for itself: it is a row of its own
    pairs = ((start, gradient, named), (frontier.state, own.gradient, own.scores))
    rows = [_reshape(pair, (batch * n,), 2) for pair in pairs]
    chosen = core.where(better.reshape(-1), *rows)
    state, gradient, scores = _reshape(chosen, (batch, n), 1)
    # too long a move is tried again from the same noise, and shorter
    angle = own.angle * jnp.where(better, 1.0, self.shrink)
    kept = jnp.where(better, jnp.arange(n), -1)
    total = jnp.maximum(new, before)
    return core.Frontier(state, frontier.keys, total, Own(gradient, angle, scores)), kept

  def step_cost(self, gen, shape, row):
    # scored for its gradient, and once more by the engine
    through = 1 + core.BACKWARD
    sampled = self.starts * through * gen.cost('extend', 0, gen.num_stages)
    return sampled, self.starts * (through + 1)


def _turn_towards(noise, gradient, angle):
  """Noise `[B, N, ...]` turned by `angle [B, N]` towards the gradient, its norm kept; it stays
  where the gradient has no part across it."""
  axes = tuple(range(2, noise.ndim))
  dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
  across = gradient - noise * dot(gradient, noise) / dot(noise, noise)
  length = jnp.sqrt(dot(across, across))
  turns = length > 0
  angle = jnp.where(turns, jnp.reshape(angle, length.shape), 0.0)
  unit = across / jnp.where(turns, length, 1.0)
  return jnp.cos(angle) * noise + jnp.sin(angle) * jnp.sqrt(dot(noise, noise)) * unit


def _reshape(tree, lead: tuple[int, ...], axes: int):
  """The first `axes` axes of every leaf, reshaped to `lead`."""
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[axes:]), tree)
