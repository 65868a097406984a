"""Searches over noise against loops written from the papers, one candidate at a time in numpy, with
the same keys: every score of every step is equal."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.engine.search import search
from vtts_jax.search.cma_es import CMAES
from vtts_jax.search.evolution import Evolution
from vtts_jax.search.first_order import FirstOrder
from vtts_jax.search.noise_bandit import NoiseBandit
from vtts_jax.search.paths import Paths
from vtts_jax.search.zero_order import ZeroOrder
from vtts_jax.testing import toys

KEY = jax.random.key(11)
PROMPTS = ['a', 'bb', 'ccc']
GEN, VER = toys.Flow(), toys.Target(rows=2)
T = GEN.num_stages


class OneByOne:
  """One prompt, one candidate at a time: the toy's operations on `[1, 1, ...]`, scores as numbers.
  All that the loops below share with the library are these and the keys."""

  def __init__(self, number: int):
    rows = [{'text': PROMPTS[number]}]
    self.ctx = GEN.encode({}, GEN.tokenize(rows))
    self.vctx = VER.encode({}, VER.tokenize(rows))
    self.prompt = jax.random.fold_in(KEY, number)

  def start(self, i):
    """Candidate i of best-of-N: its state and key."""
    key = jax.random.fold_in(self.prompt, i)
    return draw(key), key

  def run(self, state, key, begin, end, greedy=False):
    return run_on(self.ctx, state, key[None, None], begin, end - begin, greedy)

  def score(self, state):
    return float(see(self.ctx, self.vctx, state))

  def child(self, key, number, j):
    """Key of child j >= 1 in round `number`."""
    return jax.random.fold_in(jax.random.fold_in(key, core.CHILD + number), j)


@jax.jit
def draw(key):
  """The noise of a key."""
  return GEN.init({}, None, key[None, None])


@functools.partial(jax.jit, static_argnums=3)
def perturb(state, key, scale, stage=0):
  return GEN.perturb(state, key[None, None], scale, stage)


@functools.partial(jax.jit, static_argnums=(2, 3))
def renoise(state, key, stage, to):
  return GEN.renoise(state, key[None, None], stage, to)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def run_on(ctx, state, keys, begin, count, greedy):
  return GEN.extend({}, ctx, state, keys, begin, count, greedy=greedy)


@jax.jit
def see(ctx, vctx, state):
  return VER.score({}, vctx, GEN.observe({}, ctx, state, T, ('image',)))['target'][0, 0]


def assert_equal_totals(algo, loop):
  """The scores of all candidates of all steps, prompt by prompt, are those of the loop."""
  found = search(algo, GEN, VER, PROMPTS, seed=KEY)
  for i in range(len(PROMPTS)):
    want = loop(OneByOne(i))
    assert len(want) == len(found.steps)
    for step, totals in zip(found.steps, want):
      np.testing.assert_allclose(step.totals[i], totals, atol=2e-5)
  return found


def test_zero_order_is_the_published_hill_climb():
  algo = ZeroOrder(neighbours=2, rounds=6, adapt=1.5)
  restarts, gains = [], []

  def loop(one):
    base, angle, failures, pivot_score, steps = 0, algo.angle, 0, -np.inf, []
    pivot, key = one.start(0)
    for number in range(algo.rounds):
      tried, scores = [], []
      for j in range(algo.neighbours):
        at = 0.0 if pivot_score == -np.inf and j == 0 else angle
        near = perturb(pivot, one.child(key, number, j + 1), at)
        tried.append(near)
        scores.append(one.score(one.run(near, key, 0, T)))
      steps.append(scores)
      if pivot_score > -np.inf:  # all better: times 1.5; none: by its fourth root
        share = sum(score > pivot_score for score in scores) / algo.neighbours
        angle = min(angle * 1.5 ** {0: -0.25, 0.5: 0.375, 1: 1.0}[share], math.pi / 2)
      if max(scores) > pivot_score:
        pivot, pivot_score, failures = tried[int(np.argmax(scores))], max(scores), 0
        gains.append(number)
      else:
        failures += 1
      if failures == algo.patience:
        base, failures, angle, pivot_score = base + 1, 0, algo.angle, -np.inf
        pivot, key = one.start(base)
        restarts.append(number)
    return steps

  found = assert_equal_totals(algo, loop)
  assert restarts and any(number for number in gains), 'both cases must occur'
  # the base noises are the candidates of best-of-N
  first = [step.parent[:, 0] for step in found.steps]
  assert (first[0] == -1).all() and (np.stack(first[1:]) == -1).any()


def test_paths_are_expanded_and_the_best_kept():
  algo = Paths(paths=2, expansions=3, start=0.5, forward=0.25, backward=0.5)

  def loop(one):
    slots, left, steps = [one.start(i)[1] for i in range(2)], 2, []
    kept = [one.run(*one.start(i), 0, T - left) for i in range(2)]
    for number, at in enumerate((2, 3)):
      grown, scores = [], []
      for state, slot in zip(kept, slots):
        for j in range(3):
          key = one.child(slot, number, j + 1)
          noised = renoise(state, key, at, at - 1)
          grown.append(one.run(noised, key, at - 1, at + 1))
          scores.append(one.score(grown[-1]))
      kept = [grown[i] for i in np.argsort(-np.array(scores), kind='stable')[:2]]
      steps.append(scores)
    return steps

  found = assert_equal_totals(algo, loop)
  assert (found.best.stage == T).all()


def test_bandit_tries_arms_and_the_last_winner_goes_on():
  algo = NoiseBandit(arms=3, rounds=(1, 2, 3))
  fresh_arms = []

  def loop(one):
    state, slot = one.start(0)
    pivot, steps, number = np.asarray(state), [], 0
    for level, rounds in enumerate(algo.rounds):
      if level:
        pivot = np.asarray(draw(jax.random.fold_in(slot, core.CHILD + number)))
      for _ in range(rounds):
        arms, grown, scores = [], [], []
        for j in range(algo.arms):
          key = one.child(slot, number, j + 1)
          fresh = np.asarray(draw(key))
          chance, share = np.asarray(jax.random.uniform(key, (2,)))
          fresh_arms.append(chance < 0.4)
          near = pivot + share * 0.15 * math.sqrt(12) * fresh / np.linalg.norm(fresh)
          arms.append(fresh if fresh_arms[-1] else near)
          noised = jnp.asarray(arms[-1])
          if level:  # the share of what is kept, and what is missing to variance 1
            share = level / (level + 1)
            noised = share * state + math.sqrt(1 - share**2) * arms[-1]
          grown.append(one.run(noised, key, level, level + 2, greedy=True))
          scores.append(one.score(grown[-1]))
        pivot, number = arms[int(np.argmax(scores))], number + 1
        steps.append(scores)
      state = grown[int(np.argmax(scores))]
    return steps

  assert_equal_totals(algo, loop)
  assert 0.2 < np.mean(fresh_arms) < 0.6


def test_evolution_breeds_from_all_that_passed_the_mark():
  algo = Evolution(schedule=(0.0, 0.5), sizes=(6, 5, 4), elites=1, mutation=0.3)
  marks = (0, 2)

  def loop(one):
    pools, scores, steps, count = [[], []], [], [], 0
    for generation, size in enumerate(algo.sizes):
      begin, children = (0, marks[0], marks[1])[generation], []
      if generation:
        order = np.argsort(-np.array(scores), kind='stable')
        parents = list(order[: algo.elites])
        keys = jax.random.split(
          jax.random.fold_in(jax.random.fold_in(one.prompt, core.CHILD - 4), generation),
          size - algo.elites,
        )
        for key in keys:
          invited = np.asarray(jax.random.permutation(key, len(scores)))[: int(0.9 * len(scores))]
          parents.append(max(invited, key=lambda i: scores[i]))
      for j in range(size):
        state, key = one.start(count + j)
        if generation:
          scale = 0.0 if j < algo.elites else math.asin(0.3) if begin == 0 else 1.0
          state = perturb(pools[generation - 1][parents[j]], key, scale, begin)
        passed = []
        for a, b in zip((begin, *(m for m in marks if m > begin)),
                        (*(m for m in marks if m > begin), T)):  # fmt: skip
          passed.append(state)
          state = one.run(state, key, a, b)
        # a state at its own first mark is kept only by the first generation
        at = dict(zip((begin, *(m for m in marks if m > begin)), passed))
        children.append((one.score(state), at))
      steps.append([score for score, _ in children])
      count += size
      for score, at in sorted(children, key=lambda c: -c[0]):
        scores.append(score)
        for pool, mark in zip(pools[generation:], marks[generation:]):
          pool.append(at[mark])
    return steps

  found = assert_equal_totals(algo, loop)
  parents = found.steps[2].parent
  assert (parents < 6).any() and (parents >= 6).any(), 'parents of both generations'


def test_cma_es_is_hansens():
  algo, n, mu = CMAES(population=6, generations=3, block=2), 12, 3
  weights = np.log(3.5) - np.log([1, 2, 3])
  weights /= weights.sum()
  mass = 1 / (weights**2).sum()
  c_s, c_c = (mass + 2) / (n + mass + 5), (4 + mass / n) / (n + 4 + 2 * mass / n)
  d_s = 1 + c_s + 2 * max(0, np.sqrt((mass - 1) / (n + 1)) - 1)
  c_1 = 2 / ((n + 1.3) ** 2 + mass)
  c_mu = 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass)
  chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
  # the whole 2 x 2 block: sums and differences of neighbours
  haar = np.array([[1, 1], [1, -1]]) / np.sqrt(2)

  def loop(one):
    _, key = one.start(0)
    m, sigma, C, p_s, p_c, steps = np.zeros(n), 1.0, np.eye(n), np.zeros(n), np.zeros(n), []
    for g in range(algo.generations):
      squares, basis = np.linalg.eigh(C)
      root, inverse = (basis @ np.diag(squares**power) @ basis.T for power in (0.5, -0.5))
      ys, scores = [], []
      for j in range(algo.population):
        ys.append(root @ np.asarray(jax.random.normal(one.child(key, g, j + 1), (n,))))
        low = (m + sigma * ys[-1]).reshape(2, 2, 3)
        noise = np.einsum('ki,lj,klc->ijc', haar, haar, low)
        scores.append(one.score(one.run(jnp.float32(noise)[None, None], key, 0, T)))
      best = np.argsort(-np.array(scores), kind='stable')[:mu]
      y = sum(w * ys[i] for w, i in zip(weights, best))
      m = m + sigma * y
      p_s = (1 - c_s) * p_s + np.sqrt(c_s * (2 - c_s) * mass) * inverse @ y
      length = np.linalg.norm(p_s)
      h = length / np.sqrt(1 - (1 - c_s) ** (2 * (g + 1))) < (1.4 + 2 / (n + 1)) * chi
      p_c = (1 - c_c) * p_c + h * np.sqrt(c_c * (2 - c_c) * mass) * y
      rank_mu = sum(w * np.outer(ys[i], ys[i]) for w, i in zip(weights, best))
      C = (
        (1 - c_1 - c_mu) * C
        + c_1 * (np.outer(p_c, p_c) + (1 - h) * c_c * (2 - c_c) * C)
        + c_mu * rank_mu
      )
      sigma *= np.exp(c_s / d_s * (length / chi - 1))
      steps.append(scores)
    return steps

  assert_equal_totals(algo, loop)


def test_first_order_follows_the_gradient_on_the_sphere():
  algo = FirstOrder(starts=2, rounds=4)

  def loop(one):
    columns = []
    for i in range(algo.starts):
      pivot, key = one.start(i)

      def score(noise, key=key, one=one):
        grown = GEN.extend({}, one.ctx, noise, key[None, None], 0, T)
        seen = GEN.observe({}, one.ctx, grown, T, ('image',))
        return VER.score({}, one.vctx, seen)['target'][0, 0]

      climb = jax.jit(jax.value_and_grad(score))
      tried, best, angle, column = pivot, -np.inf, algo.angle, []
      for _ in range(algo.rounds):
        value, gradient = climb(tried)
        column.append(float(value))
        if value > best:
          pivot, best, slope = tried, float(value), np.asarray(gradient).ravel()
        else:
          angle *= algo.shrink
        z = np.asarray(pivot).ravel()
        across = slope - z * (slope @ z) / (z @ z)
        across *= np.linalg.norm(z) / np.linalg.norm(across)
        turned = np.cos(angle) * z + np.sin(angle) * across
        tried = jnp.float32(turned).reshape(pivot.shape)
      columns.append(column)
    return np.array(columns).T

  found = assert_equal_totals(algo, loop)
  assert (found.best.total > found.steps[0].totals.max(axis=1)).all()
