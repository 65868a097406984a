"""Searches over noise on a problem whose optimum is known: the picture is the noise, the score a
square; and how their candidates are drawn as a genealogy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.engine.search import search
from vtts_jax.generators.diffusion import DiffusionGenerator
from vtts_jax.report import plots
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.cma_es import CMAES
from vtts_jax.search.evolution import Evolution
from vtts_jax.search.first_order import FirstOrder
from vtts_jax.search.noise_bandit import NoiseBandit
from vtts_jax.search.paths import Paths
from vtts_jax.search.zero_order import ZeroOrder
from vtts_jax.study import genealogy
from vtts_jax.testing import laws, toys

KEY = jax.random.key(12)
PROMPTS = ['a', 'bb', 'ccc', 'dddd']
SIDE = 4


@dataclasses.dataclass(frozen=True)
class Mirror(DiffusionGenerator):
  """A flow of no velocity: what it predicts at any time is its noise."""

  steps: int = 8

  data_shape = (SIDE, SIDE, 3)
  decoded_output = core.Output('image', (SIDE, SIDE, 3))

  def tokenize(self, prompts):
    return {'hash': toys.hash_prompts(prompts)}

  def encode(self, params, prompt):
    return prompt['hash'][:, None]

  def predict(self, params, ctx, x, t):
    return jnp.zeros_like(x)

  def decode(self, params, x):
    return 0.5 + 0.1 * x

  def count_flops(self, op):
    return 1


class Square(toys.Target):
  """A target that noise can reach: rows of brightness within a deviation of grey."""

  def encode(self, params, prompt):
    return 0.5 + 0.2 * (super().encode(params, prompt) - 0.5)


GEN, VER = Mirror(), Square(rows=SIDE)
# what noise would show the target exactly, [P, 4, 4, 3]
ROWS = (np.asarray(VER.encode({}, VER.tokenize(core.as_prompts(PROMPTS)))) - 0.5) / 0.1
WANTED = np.broadcast_to(ROWS[:, :, None, None], (len(PROMPTS), SIDE, SIDE, 3))
FIRST = np.asarray(GEN.init({}, None, core.candidate_keys(
  core.prompt_keys(KEY, jnp.arange(len(PROMPTS))), jnp.arange(1))).noise[:, 0])  # fmt: skip


def find(algo, **options):
  return search(algo, GEN, VER, PROMPTS, seed=KEY, **options)


def score_of(noise):
  return -0.01 * ((noise - WANTED) ** 2).mean((1, 2, 3))


def best_on_the_sphere():
  """The score of the nearest noise of the same norm."""
  length = lambda x: np.sqrt((x**2).sum((1, 2, 3), keepdims=True))
  return score_of(WANTED * length(FIRST) / length(WANTED))


@pytest.fixture(scope='module')
def random():
  """Best-of-N of more evaluations than any other search here."""
  return find(BestOfN(n=80), collect=('states',))


def test_the_problem_is_what_it_says(random):
  shown = random.steps[0].states.x[:, 0]
  np.testing.assert_allclose(shown, FIRST, atol=1e-5)
  np.testing.assert_allclose(random.steps[0].totals[:, 0], score_of(FIRST), rtol=1e-4)


def test_first_order_ends_at_the_optimum():
  found = find(FirstOrder(rounds=24, angle=1.0))
  np.testing.assert_allclose(found.best.total, best_on_the_sphere(), rtol=1e-3)
  norms = [np.linalg.norm(x.reshape(len(PROMPTS), -1), axis=1)
           for x in (found.best.state.noise, FIRST)]  # fmt: skip
  np.testing.assert_allclose(*norms, rtol=1e-5)


def test_zero_order_climbs_to_the_optimum_and_is_drawn_as_a_genealogy():
  rounds = 64
  algo = ZeroOrder(neighbours=8, rounds=rounds, adapt=1.5, patience=0)
  found = find(algo, collect=('leaders', 'best'))
  gap = (best_on_the_sphere() - found.best.total) / (best_on_the_sphere() - score_of(FIRST))
  assert (gap < 0.06).all(), gap
  for row in range(len(PROMPTS)):
    line = found.lineage(row)
    steps = [entry['step'] for entry in line]
    assert steps[-1] == 0 and len(steps) <= steps[0], 'rounds without a gain are left out'
    assert all(a['total'] > b['total'] for a, b in zip(line, line[1:])), 'every pivot is better'
    trace = genealogy.trace_ancestry(found, row)
    assert np.flatnonzero(trace['winner'] >= 0).tolist() == steps[::-1]
    # the neighbours of a round have one parent: the pivot, wherever it was found
    for s in range(1, rounds):
      pivot = max(entry['step'] for entry in line if entry['step'] < s)
      assert (trace['parent_step'][s] == pivot).all()
  drawn = trace | genealogy.leader_outputs(found, row)
  few = {name: array[:, :2] if array.ndim > 1 else array for name, array in drawn.items()}
  assert plots.plot_genealogy(few).startswith(b'\x89PNG')


def test_cma_es_finds_the_low_frequencies():
  """The rest is that of the first noise."""
  found = find(CMAES(population=12, generations=50, block=2))
  rows = np.cos(np.pi * (np.arange(4) + 0.5) * np.arange(2)[:, None] / 4) / np.sqrt([[4], [2]])
  keep = rows.T @ rows  # onto the two lowest frequencies
  np.testing.assert_allclose(keep @ keep, keep, atol=1e-12)
  low = np.einsum('ij,kl,bjlc->bikc', keep, keep, FIRST - WANTED)
  optimum = score_of(FIRST - low)
  assert (optimum - found.best.total < 1e-3 * (optimum - score_of(FIRST))).all()
  high = np.asarray(found.best.state.noise) - FIRST
  np.testing.assert_allclose(
    high, np.einsum('ij,kl,bjlc->bikc', keep, keep, high), atol=1e-4
  )


@pytest.mark.parametrize(
  'algo',
  [
    Paths(paths=2, expansions=6, start=0.5, forward=0.25, backward=0.375),
    NoiseBandit(rounds=4),
  ],
  ids=lambda algo: type(algo).__name__,
)
def test_trajectories_beat_more_random_samples(algo, random):
  found = find(algo)
  assert sum(found.costs, core.Cost()).generator <= sum(random.costs, core.Cost()).generator
  assert (found.best.total > random.best.total).all()


def test_evolution_beats_more_random_samples_and_shows_its_parents(random):
  algo = Evolution(schedule=(0.0, 0.5), sizes=(24, 24, 16), elites=2, mutation=0.6)
  found = find(algo, collect=('leaders', 'best'))
  assert sum(found.costs, core.Cost()).generator <= sum(random.costs, core.Cost()).generator
  assert found.best.total.mean() > random.best.total.mean()
  # the first child is the elite: where no noise is drawn it ends where it did
  elites = np.stack([step.totals[:, 0] for step in found.steps[1:]])
  laws.assert_same(elites[0], found.steps[0].totals.max(axis=1), 'the elite')
  trace = genealogy.trace_ancestry(found, 0)
  assert (trace['parent_step'][1] <= 0).all() and trace['parent_step'][1, 0] == 0
  assert trace['parent'][1, 0] == 0, 'the best of a generation is drawn first'


# ------------------------------------------------------------------------------------- gradients


class Wide(Mirror):
  """A network whose activations are many times as large as its noise."""

  def predict(self, params, ctx, x, t):
    return jnp.tanh(x[..., None] * jnp.linspace(0, 1, 512)).mean(-1)


def test_a_gradient_through_the_sampler_stores_no_activations():
  """Memory grows with the steps by states alone, since each step runs again on the way back."""

  def memory(steps):
    gen, keys = Wide(steps=steps), core.candidate_keys(core.prompt_keys(KEY, jnp.arange(1)),
                                                       jnp.arange(4))  # fmt: skip
    end = lambda noise: gen.extend({}, jnp.zeros((1, 1)), gen.start_state(noise), keys, 0, steps)
    noise = jnp.zeros((1, 4, SIDE, SIDE, 3))
    compiled = jax.jit(jax.grad(lambda noise: end(noise).x.sum())).lower(noise).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  state = 4 * 4 * SIDE * SIDE * 3  # bytes of one leaf of all candidates
  grown = memory(40) - memory(8)
  assert grown < 32 * 8 * state < 32 * 512 * state / 4
