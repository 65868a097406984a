"""The base of diffusion generators on Gaussian data, where every network and every end is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import DiffusionGenerator, guidance, paths, steppers
from vtts_jax.testing import laws, toys

KEY = jax.random.key(6)
SIDE, SPREAD = 4, 0.5  # data are normal around the prompt's mean, with this standard deviation


@dataclasses.dataclass(frozen=True)
class Gaussian(DiffusionGenerator):
  """The best prediction of Gaussian data on any path, in the words of any predictor. `words`, `vp`,
  `method`, `projected` and `moved` stand for what a family would fix."""

  words: str = 'velocity'
  vp: bool = False
  method: str = ''
  projected: bool = False
  moved: bool = False

  data_shape = (SIDE, SIDE, 3)
  decoded_output = core.Output('image', (SIDE, SIDE, 3))

  @property
  def path(self):
    return paths.VariancePreservingPath() if self.vp else paths.LinearPath()

  @property
  def predictor(self):
    return {
      'velocity': guidance.VelocityPredictor(),
      'noise': guidance.NoisePredictor(),
      'data': guidance.DataPredictor(),
    }[self.words]

  @property
  def sampled_path(self):
    return paths.VariancePreservingPath() if self.moved else None

  @property
  def stepper(self):
    return {
      '': super().stepper,
      '2m': steppers.AncestralStepper(order=2),
      'heun': steppers.HeunStepper(),
      'sde': steppers.EulerMaruyamaStepper(),
    }[self.method]

  @property
  def guidance_rule(self):
    plain = super().guidance_rule
    return guidance.ProjectedGuidance(plain.scale) if self.projected else plain

  @property
  def step_times(self):
    # noise says nothing of the data at t = 0
    return np.maximum(super().step_times, 1e-3 if self.words == 'noise' else 0)

  def tokenize(self, prompts):
    return {'hash': toys.hash_prompts(prompts)}

  def encode(self, params, prompt):
    """The mean by stream `[B, C]`: 0 without the prompt."""
    mean = {'prompt': jnp.float32(prompt['hash'] % 5) / 5, 'null': jnp.zeros(len(prompt['hash']))}
    return jnp.stack([mean[s] for s in self.guidance_streams], axis=1)

  def predict(self, params, ctx, x, t):
    mean, t = ctx[:, :, None, None, None, None], t[..., None, None, None]
    (alpha, sigma), slopes = self.path.alpha_sigma(t), self.path.alpha_sigma_slopes(t)
    off = x - alpha * mean
    variance = (alpha * SPREAD) ** 2 + sigma**2
    data, noise = mean + alpha * SPREAD**2 * off / variance, sigma * off / variance
    velocity = slopes[0] * data + slopes[1] * noise
    return {'velocity': velocity, 'noise': noise, 'data': data}[self.words]

  def decode(self, params, x):
    return jnp.clip(x, 0, 1)

  def count_flops(self, op):
    return {'encode': 1, 'predict': 10 * len(self.guidance_streams), 'decode': 3}[op]


def candidates(count, prompts=2):
  return core.candidate_keys(core.prompt_keys(KEY, jnp.arange(prompts)), jnp.arange(count))


def run(gen, means, keys):
  """Complete candidates of prompts with these means."""
  ctx = jnp.float32(means)[:, None]
  return jax.jit(lambda k: gen.extend({}, ctx, gen.init({}, ctx, k), k, 0, gen.num_stages))(keys)


@pytest.mark.parametrize(
  'settings',
  [
    {'eta': 0.5, 'early_at': 2},
    {'steps_per_stage': 2, 'guidance': 1.5, 'words': 'data', 'inner_steps': 2},
    {'method': '2m', 'guidance': 1.5, 'projected': True},
  ],
)
def test_a_family_of_a_few_lines_keeps_the_laws(settings):
  laws.check_generator(Gaussian(steps=6, **settings), ['a', 'bc'], KEY)


@pytest.mark.parametrize('vp', [False, True])
@pytest.mark.parametrize('words', ['velocity', 'noise', 'data'])
def test_steps_converge_to_the_known_end(words, vp):
  """The flow keeps a candidate's distance from the mean in standard deviations: it ends at the mean
  plus SPREAD times its initial noise. Half the step, half the error."""
  errors = []
  for steps in (20, 40):
    found = run(Gaussian(steps=steps, words=words, vp=vp), [0.3, 0.8], candidates(2))
    mean = jnp.array([0.3, 0.8])[:, None, None, None, None]
    errors.append(float(jnp.abs(found.x - mean - SPREAD * found.noise).max()))
    np.testing.assert_allclose(found.x, found.end, atol=1e-6)
  assert errors[1] < 0.1 and 1.6 < errors[0] / errors[1] < 2.6


def test_another_path_leads_to_the_same_data():
  """A linear network sampled on the variance-preserving path, with and without noise."""
  ends = [run(Gaussian(steps=160, method='heun', moved=moved), [0.3], candidates(3, 1)).x
          for moved in (False, True)]  # fmt: skip
  np.testing.assert_allclose(*ends, atol=2e-3)
  gen = Gaussian(steps=100, method='sde', moved=True)
  found = run(gen, [0.3, 0.8], candidates(100)).x
  np.testing.assert_allclose(found.mean((1, 2, 3, 4)), [0.3, 0.8], atol=0.03)
  np.testing.assert_allclose(found.std((1, 2, 3, 4)), SPREAD, rtol=0.05)


def test_predictors_say_the_same():
  for vp in (False, True):
    ends = [run(Gaussian(steps=5, words=w, vp=vp), [0.3], candidates(2, 1)).x
            for w in ('velocity', 'data')]  # fmt: skip
    np.testing.assert_allclose(*ends, atol=1e-5)


def test_fresh_noise_spreads_candidates_as_its_share_says():
  """Every step is linear in x, so the variance around the mean obeys a recursion."""
  gen, variance = Gaussian(steps=12, eta=0.4), 1.0
  for t, after in zip(gen.step_times[:-1], gen.step_times[1:]):
    total = (t * SPREAD) ** 2 + (1 - t) ** 2
    data, noise = t * SPREAD**2 / total, (1 - t) / total  # of what x is off its mean
    kept = after * data + (1 - after) * np.sqrt(1 - 0.4**2) * noise
    variance = kept**2 * variance + (0.4 * (1 - after)) ** 2
  found, greedy = (
    run(gen, [0.3, 0.8], candidates(200)),
    run(dataclasses.replace(gen, eta=0.0), [0.3, 0.8], candidates(2)),
  )
  error = 3 * np.sqrt(variance / (200 * 48))
  np.testing.assert_allclose(found.x.mean((1, 2, 3, 4)), [0.3, 0.8], atol=error)
  np.testing.assert_allclose(found.x.std((1, 2, 3, 4)), np.sqrt(variance), atol=error)
  ctx, keys = jnp.array([[0.3], [0.8]]), candidates(2)
  start = gen.init({}, ctx, keys)
  most_likely = gen.extend({}, ctx, start, core.fold(keys, 7), 0, 12, greedy=True)
  laws.assert_same(most_likely, greedy, 'greedy takes no noise')


def test_a_sample_does_not_depend_on_how_steps_are_grouped():
  ends = [run(Gaussian(steps=6, eta=0.3, steps_per_stage=k), [0.3], candidates(2, 1))
          for k in (1, 3)]  # fmt: skip
  laws.assert_same(*ends, 'one step a stage, three steps a stage')


def test_perturbing_turns_the_noise_and_keeps_its_norm():
  gen, keys = Gaussian(steps=4), candidates(3)
  done = run(gen, [0.3, 0.8], keys)
  angle = jnp.array([[0.0, 0.3, 1.5]] * 2)
  for scale in (angle, 0.3):
    near = gen.perturb(done, keys, scale)
    flat = lambda x: np.asarray(x, np.float64).reshape(2, 3, -1)
    before, after = flat(done.noise), flat(near.noise)
    norms = [np.linalg.norm(x, axis=-1) for x in (before, after)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    turned = np.arccos((before * after).sum(-1) / norms[0] / norms[1])
    np.testing.assert_allclose(turned, np.broadcast_to(scale, (2, 3)), atol=2e-3)
    laws.assert_same(near, gen.start_state(near.noise), 'a neighbour is at stage 0')
  other = gen.perturb(done, core.fold(keys, 1), 0.3)
  assert not np.allclose(other.noise, near.noise)
  draw = jax.vmap(lambda k: jax.random.normal(k, gen.data_shape))
  fresh = draw(keys.reshape(-1)).reshape(done.noise.shape)
  assert not np.allclose(fresh, done.noise), 'the noise has a key of its own'


@pytest.mark.parametrize('vp', [False, True])
def test_renoised_candidates_have_the_marginal_of_the_path(vp):
  gen, count = Gaussian(steps=4, vp=vp), 400
  data = jnp.broadcast_to(jnp.linspace(-1, 1, 48).reshape(1, 1, 4, 4, 3), (1, count, 4, 4, 3))
  keys, other = candidates(count, 1), candidates(count, 3)[2:]
  noise = gen.init({}, {}, other).x
  for stage, to in ((4, 2), (3, 1), (2, 0), (4, 4)):
    x = paths.mix_noise(gen.path, data, noise, gen.step_times[stage])
    back = gen.renoise(gen.start_state(noise)._replace(x=x), keys, stage, to)
    alpha, sigma = gen.path.alpha_sigma(gen.step_times[to])
    error = 4 * float(sigma) / np.sqrt(count) + 1e-5
    np.testing.assert_allclose(back.x.mean(1)[0], alpha * data[0, 0], atol=error)
    whole = (back.x - alpha * data).std()
    np.testing.assert_allclose(whole, sigma, atol=4 * float(sigma) / np.sqrt(2 * 48 * count) + 1e-5)
    np.testing.assert_array_equal(back.noise, back.x if to == 0 else noise)
  # a stage for each candidate
  stages, to = jnp.arange(count)[None] % 3 + 2, jnp.arange(count)[None] % 2
  state = gen.start_state(noise)._replace(x=x)
  back = gen.renoise(state, keys, stages, to)
  for i in range(6):
    one = gen.renoise(state, keys, i % 3 + 2, i % 2)
    np.testing.assert_allclose(back.x[:, i], one.x[:, i], atol=1e-6)


@pytest.mark.parametrize('settings', [{'method': '2m'}, {'projected': True, 'guidance': 2.0}])
def test_what_a_step_remembers_ends_where_a_candidate_is_renoised(settings):
  """The steps after it are those of a candidate that started at the new point."""
  gen, keys = Gaussian(steps=6, **settings), candidates(2, 1)
  ctx = jnp.array([[0.3, 0.0][: len(gen.guidance_streams)]])
  extend = jax.jit(lambda state: gen.extend({}, ctx, state, keys, 2, 2))
  part = gen.extend({}, ctx, gen.init({}, ctx, keys), keys, 0, 4)
  back = gen.renoise(part, keys, 4, 2)
  anew = gen.start_state(back.x)
  np.testing.assert_allclose(extend(back).x, extend(anew).x, atol=1e-6)
  # the control: with what it remembers, it goes elsewhere
  remembers = part._replace(x=back.x)
  assert np.abs(extend(remembers).x - extend(anew).x).max() > 1e-3


def test_the_log_probability_of_a_step():
  gen, keys = Gaussian(steps=6, method='sde'), candidates(2, 1)
  ctx = jnp.array([[0.3]])
  state = gen.extend({}, ctx, gen.init({}, ctx, keys), keys, 0, 3)
  landed = gen.extend({}, ctx, state, keys, 3, 1)
  density = lambda mean: gen.step_log_probs({}, mean, state.x, landed.x, 3)
  # 48 numbers with standard deviation sqrt(2 sigma dt) around what greedy SDE steps would give
  found, scale = density(ctx), np.sqrt(2 * 0.5 / 6)
  assert found.shape == (1, 2) and found.dtype == jnp.float32
  expected = -48 * (0.5 + np.log(scale * np.sqrt(2 * np.pi)))
  np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(24))
  assert np.all(density(ctx + 9) < found - 10)
  gradient = jax.grad(lambda mean: density(mean).sum())(ctx)
  assert np.isfinite(gradient).all() and np.any(gradient != 0)
  # the last step draws nothing
  assert not np.any(gen.step_log_probs({}, ctx, state.x, landed.x, 5))
  with pytest.raises(ConfigError, match='a step that x alone does not determine'):
    Gaussian(steps=6, method='2m').step_log_probs({}, ctx, state.x, landed.x, 3)


def test_the_bill_counts_steps_and_streams():
  gen = Gaussian(steps=6, steps_per_stage=2, guidance=2.0)
  assert gen.num_stages == 3
  assert gen.cost('extend', 1, 2) == core.Cost(generator=4, flops=80)
  # the children share the first step's call and take the second step each by itself
  assert gen.cost('fork', 0, 5) == core.Cost(generator=6, flops=120)
  assert gen.cost('observe:image') == core.Cost(observe=1, flops=3)
  assert Gaussian(steps=6, method='heun').cost('extend', 0, 2) == core.Cost(generator=4, flops=40)
  assert gen.cost('perturb') == gen.cost('renoise') == core.Cost()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'steps': 0}, 'generator.steps=0: must be an integer >= 1'),
    ({'steps_per_stage': 4}, 'generator.steps_per_stage=4: must divide steps=6'),
    ({'early_at': 7}, 'generator.early_at=7: must be an integer in 0 .. 6'),
    ({'eta': 1.5}, 'generator.eta=1.5: must be in'),
    ({'guidance': -2.0}, 'generator.guidance=-2.0: must be >= 0'),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message):
    Gaussian(**{'steps': 6, **settings})
