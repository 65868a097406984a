"""Particles and tree search on a diffusion generator: against plain loops written from the papers,
and against a target that is known in closed form."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.engine.search import search, validate
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import DiffusionGenerator, paths, steppers
from vtts_jax.search.smc import SMC
from vtts_jax.testing import laws, toys

KEY = jax.random.key(21)
SPREAD = 0.5  # data are normal around the prompt's mean, with this standard deviation
LINEAR = paths.LinearPath()


@dataclasses.dataclass(frozen=True)
class Normal(DiffusionGenerator):
  """Normal data of three numbers, whose best prediction is known; pictures are these numbers."""

  steps: int = 4

  data_shape = (1, 1, 3)
  decoded_output = core.Output('image', (1, 1, 3))

  def tokenize(self, prompts):
    return {'hash': toys.hash_prompts(prompts)}

  def encode(self, params, prompt):
    return jnp.float32(prompt['hash'] % 5)[:, None] / 5

  def predict(self, params, ctx, x, t):
    mean, t = ctx[:, :, None, None, None, None], t[..., None, None, None]
    off = x - t * mean
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    return mean + (t * SPREAD**2 - (1 - t)) / variance * off

  def decode(self, params, x):
    return x

  def count_flops(self, op):
    return {'encode': 0, 'predict': 7, 'decode': 1}[op]


@dataclasses.dataclass(frozen=True)
class Mean(core.Verifier):
  """The mean of a picture's numbers."""

  names = ('mean',)

  def score(self, params, vctx, observed):
    return {'mean': observed['image'].mean((2, 3, 4))}


VER = Mean()


# ------------------------------------------------------------------------------------- the sampler


def test_the_inner_flow_samples_the_transition():
  """Of normal data it is known: mean and variance of x later, given x, whatever the correlation."""
  t, after, mean = 0.3, 0.7, 0.4
  x = jnp.array([-0.5, 0.9])[:, None, None, None, None]
  fresh = jax.random.normal(KEY, (2, 4000, 1, 1, 3))
  gen, ctx = Normal(inner_steps=40), jnp.full((2, 1), mean)
  split = gen._bind_split({}, ctx, ())
  x = jnp.broadcast_to(x, fresh.shape)
  ddpm = t * (1 - after) / (after * (1 - t))
  for correlation in (0.0, 0.4, ddpm):
    given = -1 if correlation == ddpm else correlation
    step = jax.jit(steppers.GlassStepper(40, given).take_step, static_argnums=(0, 1))
    moved, _ = step(split, LINEAR, x, jnp.float32(t), jnp.float32(after), fresh)
    kept = correlation * (1 - after) / (1 - t)
    weight, spread = after - kept * t, (1 - after) * math.sqrt(1 - correlation**2)
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    data = mean + t * SPREAD**2 * (x[:, 0, 0, 0, 0] - t * mean) / variance
    left = SPREAD**2 * (1 - t) ** 2 / variance  # variance of the data, given x
    want = kept * x[:, 0, 0, 0, 0] + weight * data, math.sqrt(weight**2 * left + spread**2)
    np.testing.assert_allclose(moved.mean((1, 2, 3, 4)), want[0], atol=0.015)
    np.testing.assert_allclose(moved.std((1, 2, 3, 4)), want[1], rtol=0.03)


def test_one_inner_step_is_ddpm():
  gen = Normal()
  split = gen._bind_split({}, jnp.full((1, 1), 0.4), ())
  x, fresh = (jax.random.normal(key, (1, 5, 1, 1, 3)) for key in jax.random.split(KEY))
  for t, after in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
    args = split, LINEAR, x, jnp.float32(t), jnp.float32(after), fresh
    one = steppers.GlassStepper(1, -1).take_step(*args)
    laws.assert_same(one, steppers.AncestralStepper(1.0).take_step(*args), 'one step')


@pytest.mark.parametrize('settings', [{'eta': 0.6}, {'inner_steps': 3}], ids=['eta', 'glass'])
def test_children_share_the_first_call(settings):
  gen = Normal(steps_per_stage=2, **settings)
  # a child is what its key draws, though the first call was made once for all children
  ctx = gen.encode({}, gen.tokenize(core.as_prompts(['a', 'bc'])))
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(2))
  children = core.child_keys(keys, 0, 3)
  calls = []

  class Counted(type(gen)):
    def predict(self, params, ctx, x, t):
      calls.append(x.shape[2])
      return super().predict(params, ctx, x, t)

  counted = Counted(**dataclasses.asdict(gen))
  start = gen.init({}, ctx, keys)
  forked, _ = counted.fork({}, ctx, start, children, 0, 3)
  flat = children.reshape(2, -1)
  want = gen.extend({}, ctx, core.repeat(start, 3), flat, 0, 1)
  laws.assert_same(forked, want, 'forked children')
  # a compiled loop is traced once, for its two steps' first calls and for their inner ones
  assert calls == ([2, 6] if 'eta' in settings else [2, 6, 6, 6])
  ones = 1 + 3 * 1 if 'eta' in settings else 1 + 3 * 2 + 3 * 3
  assert gen.cost('fork', 0, 3) == core.Cost(generator=ones, flops=7 * ones)


# ------------------------------------------------------------------------- particles by plain loops


@functools.partial(jax.jit, static_argnums=0)
def start(gen, ctx, key):
  return gen.init({}, ctx, key)


@functools.partial(jax.jit, static_argnums=(0, 5), static_argnames='greedy')
def move(gen, ctx, state, key, begin, count, greedy=False):
  """One candidate `[1, 1]` and its picture's score."""
  grown = gen.extend({}, ctx, state, key, begin, count, greedy=greedy)
  return grown, gen.observe({}, ctx, grown, begin + count, ('image',))['image'].mean()


class Prompt:
  """What a plain loop starts from: the context and the keys of prompt 0."""

  def __init__(self, gen, text):
    self.gen, self.ctx = gen, gen.encode({}, gen.tokenize(core.as_prompts([text])))
    self.key = jax.random.fold_in(KEY, 0)

  def slots(self, i):
    return jax.random.fold_in(self.key, i)[None, None]

  def start(self, key):
    return start(self.gen, self.ctx, key)

  def move(self, state, key, begin, count, **how):
    grown, score = move(self.gen, self.ctx, state, key, begin, count, **how)
    return grown, np.float64(score)


def pick_multinomial(key, weights, n):
  """Ancestors by the inverse of the cumulated weights."""
  points = np.sort(np.asarray(jax.random.uniform(key, (n,)), np.float64))
  return np.searchsorted(np.cumsum(weights) / weights.sum(), points, side='right')


def pick_ssp(key, weights, n):
  """Counts that are rounded up or down, pair by pair (Gerber, Chopin and Whiteley, 2019)."""
  share = n * weights / weights.sum()
  counts, parts = np.floor(share + 1e-5), np.maximum(share - np.floor(share + 1e-5), 0)
  draws = np.asarray(jax.random.uniform(key, (n,)), np.float64)
  held = 0
  for i in range(1, n):
    both = parts[held] + parts[i]
    up = 0 if both < 1 else 1  # what the decided one of the two becomes
    total = both if both < 1 else 2 - both
    stays = draws[i] * total < (parts[held] if both < 1 else 1 - parts[i])
    # below 1 the held one stays undecided with probability held / both, above it is the next's
    decided, left = (i, held) if stays == (both < 1) else (held, i)
    counts[decided] += up
    parts[left], held = both - up, left
  counts[held] += counts.sum() < n
  return np.repeat(np.arange(n), counts.astype(int))


def weigh(potential, scores, now, before):
  """Log-potential of a lineage's scores; inverse temperatures of this step and the last one."""
  if potential == 'difference':
    return now * scores[-1] - (before * scores[-2] if len(scores) > 1 else 0)
  return now * {'max': max(scores), 'sum': sum(scores), 'current': scores[-1]}[potential]


def steer(prompt, n, marks, potential, inverse, pick, ess=1.0, strength=None):
  """FK steering (2501.06848, algorithm 1), with DAS's weights carried on (2501.05803, algorithm 1).
  `inverse(step)` is the inverse temperature, `strength` the last one. Yields scores, ancestors."""
  states = [prompt.start(prompt.slots(i)) for i in range(n)]
  past = [[] for _ in range(n)]  # scores of each lineage
  spent, log_weights = np.zeros(n), np.zeros(n)  # log of the product of potentials, of weights
  for step, mark in enumerate(marks):
    begin = marks[step - 1] if step else 0
    moved = [prompt.move(states[i], prompt.slots(i), begin, mark - begin) for i in range(n)]
    states, scores = [m[0] for m in moved], np.array([m[1] for m in moved])
    past = [[*before, score] for before, score in zip(past, scores)]
    if step == len(marks) - 1:  # the product of all potentials is exp(strength score)
      gain = strength * scores - spent
    else:
      gain = np.array([weigh(potential, row, inverse(step), inverse(step - 1)) for row in past])
    spent, log_weights = spent + gain, log_weights + gain
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    chosen = np.arange(n)
    if 1 / (weights**2).sum() < ess * n * (1 - 1e-5):
      key = jax.random.fold_in(jax.random.fold_in(prompt.key, core.CHILD - 2), step)
      chosen = pick(jax.random.split(key, 1)[0], weights, n)
      log_weights = np.zeros(n)
    yield scores, chosen
    states, past, spent = [states[i] for i in chosen], [past[i] for i in chosen], spent[chosen]


def assert_equal_choices(algo, gen, loop):
  """The search takes the choices of the plain loop at every step."""
  found = search(algo, gen, VER, ['bb'], seed=KEY).steps
  for step, (scores, chosen) in zip(found, loop, strict=True):
    np.testing.assert_allclose(step.totals[0], scores, atol=2e-6)
    np.testing.assert_array_equal(step.kept[0], chosen)
  kept = np.concatenate([step.kept[0] for step in found])
  assert len(set(kept.tolist())) > 1


@pytest.mark.parametrize('potential', ['max', 'difference', 'sum', 'current'])
def test_fk_steering_is_the_published_loop(potential):
  gen = Normal(eta=0.7)
  algo = components.load('search.smc', preset='fk', size=1, particles=5, potential=potential)
  same = lambda step: 10.0
  loop = steer(Prompt(gen, 'bb'), 5, (1, 2, 3, 4), potential, same, pick_multinomial, strength=10.0)
  assert_equal_choices(algo, gen, loop)


def test_das_is_the_published_loop():
  gen = Normal(steps=6, inner_steps=1, correlation=-1)  # DDPM's steps, as published
  gamma = 0.2
  algo = components.load(
    'search.smc', preset='das', particles=6, gamma=gamma, strength=30.0, ess=0.8
  )
  # tempering: min((1 + gamma) ** i - 1, 1) at the i-th step, and 1 for the finished pictures
  inverse = lambda i: 30.0 * (1.0 if i == 5 else min((1 + gamma) ** i - 1, 1.0))
  loop = list(steer(
    Prompt(gen, 'bb'), 6, range(1, 7), 'difference', inverse, pick_ssp, ess=0.8, strength=30.0
  ))  # fmt: skip
  assert_equal_choices(algo, gen, loop)
  stays = [(chosen == np.arange(6)).all() for _, chosen in loop]
  assert any(stays) and not all(stays), 'some steps resample, some carry weights on'


def test_svdd_is_the_published_loop():
  """Of M next points the best by the data predicted there (SVDD-PM, 2408.08252, algorithm 1)."""
  gen, m = Normal(eta=0.7), 4
  algo = components.load('search.smc', preset='svdd', branch=m)
  prompt = Prompt(gen, 'bb')
  key = prompt.slots(0)
  state, want = prompt.start(key), []
  for stage in range(4):
    children = core.child_keys(key, stage, m)
    points = [prompt.move(state, children[:, :, j], stage, 1) for j in range(m)]
    if stage < 3:  # the last step lands on the data that are known
      points = [
        (point, prompt.move(point, key, stage + 1, 1, greedy=True)[1]) for point, _ in points
      ]
    values = np.array([value for _, value in points])
    best = int(values.argmax())
    want.append((values, best))
    state = points[best][0]
  found = search(algo, gen, VER, ['bb'], seed=KEY)
  for step, (values, best) in zip(found.steps[:-1], want):
    np.testing.assert_allclose(step.totals[0], values, atol=2e-6)
    assert step.kept[0].tolist() == [best]
  np.testing.assert_allclose(found.best.total[0], want[-1][0].max(), atol=2e-6)
  # as in the authors' code: a call for the particle and one for each child, at the end one alone
  total = sum(found.costs, core.Cost())
  assert (total.generator, total.verify) == (4 + 3 * m, 4 * m)
  assert laws.counted_cost(algo, gen, VER, ['bb'], KEY) == total


# --------------------------------------------------------------------------------- known answers


def end_variance(gen):
  """Variance of a number at the end, of the steps that `gen` takes: all of them are linear."""
  variance, times = 1.0, np.linspace(0, 1, gen.steps + 1)
  for t, after in zip(times, times[1:]):
    total = (t * SPREAD) ** 2 + (1 - t) ** 2
    data, noise = t * SPREAD**2 / total, (1 - t) / total
    if gen.inner_steps:  # DDPM's step
      drawn = 1 - (t * (1 - after) / (after * (1 - t))) ** 2
    else:
      drawn = gen.eta**2
    slope = after * data + math.sqrt(1 - drawn) * (1 - after) * noise
    variance = slope**2 * variance + drawn * (1 - after) ** 2
  return variance


@pytest.mark.parametrize(
  ('settings', 'algo'),
  [
    ({'eta': 0.7}, {'preset': 'fk'}),
    ({'inner_steps': 1, 'correlation': -1}, {'preset': 'das', 'gamma': 0.2, 'ess': 1.0}),
  ],
  ids=['fk', 'das'],
)
def test_particles_follow_the_tilted_normal(settings, algo):
  """p(x) exp(strength mean(x)) is normal again: a number is shifted by strength / 3 variances."""
  gen, strength, texts = Normal(**settings), 6.0, [f'{i:02d}' for i in range(16)]
  algo = components.load('search.smc', **algo, particles=600, size=1, strength=strength)
  found = search(algo, gen, VER, texts, seed=KEY, collect=('states',)).steps[-1]
  kept = np.take_along_axis(found.states.end[:, :, 0, 0], found.kept[:, :, None], 1)
  assert_tilted(gen, texts, kept, strength)


def assert_tilted(gen, texts, ends, strength):
  """Samples `[B, N, 3]` of every prompt are of the tilted normal; each prompt is an estimate of its
  own, and their spread says how well the mean of all is known."""
  mean = np.asarray(gen.encode({}, gen.tokenize(core.as_prompts(texts))))
  off = (ends - mean[:, :, None]).mean((1, 2))
  variance, error = end_variance(gen), off.std() / math.sqrt(len(off))
  shift = strength / 3 * variance
  assert shift > 5 * error, 'the tilt must be worth seeing'
  assert abs(off.mean() - shift) < 3 * error + 0.03 * math.sqrt(variance)
  np.testing.assert_allclose((ends - mean[:, :, None]).std(), math.sqrt(variance), rtol=0.05)


def test_glass_keeps_the_marginal():
  """Without strength: the marginal at the end is that of the data, however few the outer steps."""
  gen = Normal(steps=3, inner_steps=120)
  algo = SMC(particles=4000, size=1, strength=0.0)
  found = search(algo, gen, VER, ['a', 'bb'], seed=KEY, collect=('states',)).steps[-1]
  np.testing.assert_allclose(found.states.end.std((1, 2, 3, 4)), SPREAD, rtol=0.02)


# ------------------------------------------------------------------------------ the tree, by hand


next_key = jax.jit(core.child_key)


@functools.partial(jax.jit, static_argnums=3)
def draw_noise(key, number, visits, slots):
  return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, number), visits), (slots,))


class Line:
  """A node of the plain tree of DTS (2506.20701, algorithm 1)."""

  def __init__(self, number, state, key, stage):
    self.number, self.state, self.key, self.stage = number, state, key, stage
    self.children, self.visits, self.value, self.done = [], 0, 0.0, False


def grow_tree(prompt, simulations, slots, sharpness, widen, widen_power):
  """Selection, expansion, a rollout whose states all join the tree, soft back-up. Finished samples
  are not visited again. Yields the score of each rollout, at last the root."""
  end = prompt.gen.num_stages
  root = Line(0, prompt.start(prompt.slots(0)), prompt.slots(0), 0)
  nodes = [root]

  def add(parent, key):
    state = prompt.start(key) if parent is root else parent.state
    grown, score = prompt.move(state, key, parent.stage, 1)
    child = Line(len(nodes), grown, key, parent.stage + 1)
    parent.children.append(child)
    nodes.append(child)
    return child, score

  def choose(node):
    """A child, or None to open a slot."""
    allowed = min(math.ceil(widen * max(node.visits, 1) ** widen_power), slots)
    going = [i for i, child in enumerate(node.children) if not child.done]
    if len(node.children) < allowed or not going:
      return None
    # an argmax over Gumbel noise draws in proportion to exp(sharpness value)
    noise = np.asarray(draw_noise(prompt.key, node.number, node.visits, slots))
    return node.children[max(going, key=lambda i: sharpness * node.children[i].value + noise[i])]

  for number in range(simulations + 1):
    line = [root]
    if number:
      while (child := choose(line[-1])) is not None:
        line.append(child)
      opened = len(line[-1].children)
      leaf, score = add(line[-1], next_key(line[-1].key, line[-1].stage, opened))
      line.append(leaf)
    while line[-1].stage < end:
      leaf, score = add(line[-1], line[-1].key)
      line.append(leaf)
    yield score
    for node in reversed(line):
      node.visits += 1
      found = [sharpness * child.value for child in node.children]
      node.value = np.logaddexp.reduce(found) - np.log(len(found)) if found else sharpness * score
      node.value /= sharpness
      full = len(node.children) == slots and all(child.done for child in node.children)
      node.done = node.stage == end or full
  yield root


WIDENING = {'widen': 2.0, 'widen_power': 0.55}  # no power of two makes a whole number


def test_dts_is_the_published_loop_and_samples_the_tilted_normal():
  """Its lines are samples of p(x) exp(sharpness mean(x)), in the limit of many rollouts."""
  gen, sharpness, texts = Normal(eta=0.9, steps_per_stage=2), 4.0, [f'{i:02d}' for i in range(16)]
  algo = components.load(
    'search.mcts', preset='dts', simulations=120, slots=16, finish=64,
    rule_settings={'sharpness': sharpness, **WIDENING},
  )  # fmt: skip
  found = search(algo, gen, VER, texts, seed=KEY, collect=('states',))
  *scores, root = grow_tree(Prompt(gen, texts[0]), 120, 16, sharpness, **WIDENING)
  np.testing.assert_allclose([step.totals[0, 0] for step in found.steps[:-1]], scores, atol=2e-6)
  assert len(root.children) > 1 and max(len(c.children) for c in root.children) > 1
  np.testing.assert_allclose(found.best.total[0], max(scores), atol=2e-6)
  assert_tilted(gen, texts, found.steps[-1].states.end[:, :, 0, 0], sharpness)


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
  ('name', 'settings', 'gen', 'text'),
  [
    ('smc', {'preset': 'fk'}, Normal(), 'SMC needs stochastic; Normal offers'),
    ('mcts', {'preset': 'dts'}, Normal(), 'MCTS needs stochastic'),
    ('rollover', {'preset': 'rbf'}, Normal(), 'Rollover needs stochastic'),
    ('smc', {'potential': 'gain'}, Normal(eta=1), "search.potential='gain': must be one of 'curr"),
    ('smc', {'schedule': (21, 100)}, Normal(eta=1), r'integers in 1 \.\. 4'),
    ('smc', {'gamma': 0.1}, Normal(eta=1), "search.gamma=0.1: must be 0 with search.anneal='cons"),
    ('rollover', {'preset': 'rbf', 'steps': 2}, Normal(eta=1), 'shows stage 3 of 4'),
    ('rollover', {'size': 1, 'tries': 9}, Normal(eta=1), 'search.tries=9: must be 0 or at least'),
    ('mcts', {'preset': 'dts', 'size': 3}, Normal(eta=1), 'search.size=3: must divide the 4 stag'),
    ('mcts', {'preset': 'dts', 'greedy': True}, Normal(eta=1), 'needs greedy=False'),
    ('mcts', {'preset': 'dtss'}, Normal(eta=1), "'dts_star'"),
  ],
)  # fmt: skip
def test_bad_settings(name, settings, gen, text):
  with pytest.raises(ConfigError, match=text):
    validate(components.load(f'search.{name}', **settings), gen, VER)


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'inner_steps': -1}, 'generator.inner_steps=-1'),
    ({'inner_steps': 2, 'eta': 0.5}, 'generator.eta=0.5: must be 0 with inner_steps=2'),
    ({'correlation': 1.0}, r'generator.correlation=1.0: must be in \[0, 1\), or -1'),
  ],
)
def test_bad_transitions(settings, text):
  with pytest.raises(ConfigError, match=text):
    Normal(**settings)

