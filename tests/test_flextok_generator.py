"""FlexTok AR as a generator: protocol, the published beam against a plain loop, cost, errors."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import components, core
from vtts_jax.cli import run
from vtts_jax.engine import sharding
from vtts_jax.engine.search import search
from vtts_jax.errors import ConfigError
from vtts_jax.generators import flextok as generator
from vtts_jax.generators.flextok import TINY, FlexTokAR
from vtts_jax.models.autoencoder_kl import modeling as autoencoder_kl
from vtts_jax.models.flexar import modeling as flexar
from vtts_jax.models.flextok import flow
from vtts_jax.models.t5 import modeling as t5
from vtts_jax.search.beam import Beam
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
KEY = jax.random.key(3)
PROMPTS = ['a cat', 'two red dogs']
tiny = functools.partial(FlexTokAR, **TINY, words=6, decode_steps=2)
tiny_class = functools.partial(
  FlexTokAR, **TINY | {'prior_weights': 'random:tiny_c2i'}, condition='class', decode_steps=2
)
random_3b = {
  'prior_weights': 'random:flexar_3b',
  'tokenizer_weights': 'random:flextok_d18_d28_dfn',
  'vae_weights': 'random:flextok_vae_c16',
  'text_weights': 'random:thin_xl',
}


def test_conformance():
  gen = tiny(noise='candidate', decode_guidance=1.0)
  laws.check_generator(gen, PROMPTS, KEY)


def test_without_a_prior_tokens_are_uniform_and_cost_nothing():
  gen = tiny(prior='uniform')
  assert set(gen.model_parts()) == {'tokenizer', 'vae'}
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(150))
  state = gen.extend({}, {}, gen.init({}, {}, keys), keys, 0, gen.num_stages)
  counts = np.bincount(np.ravel(state.tokens), minlength=gen.vocab)
  expected = state.tokens.size / gen.vocab
  assert abs(counts - expected).max() < 5 * np.sqrt(expected)
  np.testing.assert_allclose(state.log_probs, -np.log(gen.vocab), rtol=1e-6)
  assert gen.cost('extend', 0, 8) == gen.cost('encode') == core.Cost()


# ------------------------------------------------------------------------------- the published beam

WIDTH, BRANCH = 2, 3
PATTERN = jax.random.normal(jax.random.key(9), (16, 16, 3))


@dataclasses.dataclass(frozen=True)
class Pattern(core.Verifier):
  """How much a picture looks like a fixed pattern."""

  names = ('pattern',)

  def score(self, params, vctx, observed):
    return {'pattern': (observed['image'] * PATTERN).mean((2, 3, 4))}


class Plain:
  """The models of a generator without caches or batches: one prefix at a time."""

  def __init__(self, gen, params):
    self.gen, models = gen, {name: gen.bind_part(params, name) for name in params}
    prior, decoder, vae = (models[n] for n in ('prior', 'tokenizer', 'vae'))

    def text_context(ids, mask):
      return prior.text_context(models['text'](ids, mask)[None], mask[None])

    def picture(ids, keep, noise):
      registers = decoder.embed_registers(ids[None], keep)
      latent = flow.sample_latents(decoder, registers, noise[None], 2, 7.5)
      return jnp.clip((vae.decode(vae.unscale_latents(latent))[0] + 1) / 2, 0, 1)

    self._text_context, self._class_context = jax.jit(text_context), prior.class_context
    self._picture = jax.jit(picture)
    self._logits = jax.jit(lambda ctx, ids: prior.token_logits(prior.prefill(ctx, ids)[0])[0, 0])

  def read(self, text):
    """Takes the prompt of what follows."""
    if self.gen.condition == 'class':
      self.ctx = self._class_context(np.array([[int(text), -1]]))
      return
    arrays = self.gen.tokenize([{'text': text}])
    end = np.eye(1, self.gen.words, dtype=np.int32)  # one word, and then padding
    null = {'ids': generator.TEXT_END * end, 'mask': end}
    self.ctx = self._text_context(
      *(np.concatenate([arrays[name], null[name]]) for name in ('ids', 'mask'))
    )

  def logits(self, prefix):
    """Adjusted guided logits `[V]` after a list of tokens."""
    ids = np.full((1, 1, self.gen.num_stages), 7, np.int32)  # rubbish after the prefix
    ids[0, 0, : len(prefix)] = prefix
    prompt, null = np.asarray(self._logits(self.ctx, ids)[len(prefix)])
    x = (null + self.gen.guidance_scale * (prompt - null)) / self.gen.temperature
    if self.gen.top_k:
      x[np.argsort(-x)[self.gen.top_k :]] = -np.inf
    if self.gen.top_p < 1:
      order = np.argsort(-x)
      p = np.exp(x[order] - x.max())
      before = np.cumsum(p / p.sum()) - p / p.sum()
      x[order[before >= self.gen.top_p]] = -np.inf
    return x

  def score(self, prefix, noise):
    ids = np.zeros(self.gen.num_stages, np.int32)
    ids[: len(prefix)] = prefix
    return float((self._picture(ids, len(prefix), noise) * PATTERN).mean())


def far_parameters(gen):
  """Parameters far from the initialisation: a token depends on all before."""
  params = gen.load()
  params['prior'] = jax.tree.map(lambda x: 2 * x, params['prior'])
  return params


def published(plain, prompt_key, marks, replace):
  """[(tokens of the candidates, their scores, kept)] of each step: from one root, a beam is
  continued to the last token of its chunk, which is drawn BRANCH times; the best WIDTH go on."""
  noisy = lambda x, key, t: x + jax.random.gumbel(jax.random.fold_in(key, t), x.shape)
  root = jax.random.fold_in(prompt_key, 0)
  noise = generator.draw_noise(generator.noise_seeds(root[None]), (8, 8, 3))[0]
  beams, steps = [([], root)], []
  for mark in marks:
    candidates = []
    for prefix, key in beams:
      for t in range(len(prefix), mark - 1):
        prefix = [*prefix, int(noisy(plain.logits(prefix), key, t).argmax())]
      t, logits = mark - 1, plain.logits(prefix)
      fresh = jax.random.fold_in(key, core.CHILD + t)
      keys = [key, *(jax.random.fold_in(fresh, j) for j in range(1, BRANCH))]
      if replace:
        last = [int(noisy(logits, k, t).argmax()) for k in keys]
      else:
        last = np.argsort(-noisy(logits, key, t), stable=True)[:BRANCH].tolist()
      candidates += [([*prefix, token], k) for token, k in zip(last, keys)]
    scores = [plain.score(prefix, noise) for prefix, _ in candidates]
    kept = np.argsort(-np.array(scores), stable=True)[:WIDTH]
    beams = [candidates[i] for i in kept]
    steps.append(([prefix for prefix, _ in candidates], scores, kept))
  return steps


@pytest.mark.parametrize(
  ('gen', 'prompts', 'replace', 'marks'),
  [
    (tiny(temperature=0.8, top_k=7), PROMPTS, True, (1, 2, 4)),
    (tiny_class(top_p=0.95), ['3', '0'], False, (2, 4, 6)),
  ],
  ids=['text-with-replacement', 'class-without'],
)
def test_beam_is_the_published_loop_token_by_token(gen, prompts, replace, marks):
  beam = Beam(width=WIDTH, branch=BRANCH, roots=1, schedule=marks, replace=replace, complete=False)
  params = far_parameters(gen)
  plain, given = Plain(gen, params), {'generator': params}
  found = search(beam, gen, Pattern(), prompts, seed=KEY, params=given, collect=('states',))
  for p, text in enumerate(prompts):
    plain.read(text)
    steps = published(plain, jax.random.fold_in(KEY, p), marks, replace)
    for step, mark, (tokens, scores, kept) in zip(found.steps, marks, steps, strict=True):
      np.testing.assert_array_equal(step.states.tokens[p, :, :mark], tokens)
      np.testing.assert_array_equal(step.kept[p], kept)
      np.testing.assert_allclose(step.totals[p], scores, atol=2e-5)
      assert replace or len({tuple(t) for t in tokens}) == len(tokens)


# ----------------------------------------------------------------------------------------- settings


def noises(gen, n=3):
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(n))
  return np.asarray(dataclasses.replace(gen, prior='uniform').init({}, {}, keys).extra)


def test_noise_is_one_for_a_prompt_or_one_for_each_candidate():
  shared, own = noises(tiny()), noises(tiny(noise='candidate'))
  assert (shared == shared[:, :1]).all() and (shared[0] != shared[1]).all()
  assert len(np.unique(own.reshape(-1, 2), axis=0)) == 6
  np.testing.assert_array_equal(noises(tiny(), 1)[:, 0], shared[:, 0])


def test_cost_follows_streams_and_decoder_steps():
  extend = lambda **s: tiny(**s).cost('extend', 0, 4)
  assert extend().flops == 2 * extend(guidance=1.0).flops > 0
  assert extend().generator == extend(condition='none').generator == 4
  # without a prompt there is one word to attend to
  assert extend(condition='none') == extend(guidance=0.0)
  assert extend(guidance=0.0).flops < extend(guidance=1.0).flops
  assert extend(prior='uniform') == core.Cost()
  decode = lambda **s: tiny(**s).cost('observe:image').flops
  assert decode(decode_steps=3) - decode() == decode() - decode(decode_steps=1) > 0
  assert decode() - decode(decode_steps=1) == 2 * (
    decode(decode_guidance=1.0) - decode(decode_guidance=1.0, decode_steps=1)
  )
  words, null = (t5.count_flops(tiny().part_config('text'), width) for width in (6, 1))
  text = flexar.count_text_flops(tiny().part_config('prior'), 6)
  assert tiny().cost('encode').flops == words + null + 2 * text


def test_flops_of_the_vae_are_those_of_the_compiled_program():
  vae, sizes = tiny().model_parts()['vae'], tiny().part_config('tokenizer')
  decode = jax.jit(lambda params, x: vae.bind(params).decode(x))
  latent = jnp.zeros((1, sizes.size, sizes.size, sizes.channels))
  counted = decode.lower(vae.load(), latent).compile().cost_analysis()['flops']
  # fewer: XLA does not count what falls on the padding; more: norms at 4 channels
  assert 0.85 < counted / autoencoder_kl.count_decode_flops(vae.config, *(sizes.size,) * 2) < 1.3


def test_published_settings_and_sizes_by_name():
  image = core.Output('image', (256, 256, 3))
  text = FlexTokAR(**random_3b)
  assert (text.guidance_scale, text.decode_scale) == (3.0, 7.5)
  assert (text.num_stages, text.vocab, text.outputs['image']) == (256, 64000, image)
  assert text.prefixes_are_samples
  of_classes = random_3b | {'prior_weights': 'random:flexar_1b_c2i'}
  classes = FlexTokAR(**of_classes, condition='class')
  assert classes.guidance_scale == 1.5 and 'text' not in classes.model_parts()
  grids = {'prior_weights': 'random:gridar_3b', 'tokenizer_weights': 'random:gridtok_d18_d28'}
  grid = FlexTokAR(**random_3b | grids)
  assert grid.decode_scale == 5.0 and not grid.prefixes_are_samples and grid.num_stages == 256
  sizes = {
    'prior': 'flexar_113m', 'tokenizer': 'small', 'vae': 'small', 'text': 'thin_xl',
  }  # fmt: skip
  small = FlexTokAR(**{f'{part}_weights': f'random:{size}' for part, size in sizes.items()})
  assert small.part_config('tokenizer').decoder_layers == 4 and small.outputs['image'] == image
  for gen in (text, classes, grid, small):
    gen.check()


def test_weights_are_placed_by_the_tables_of_the_models():
  mesh = sharding.make_mesh(model=1, devices=jax.devices()[:1])
  params, places = jax.eval_shape(tiny().load), tiny().shardings(mesh)
  assert jax.tree.structure(params) == jax.tree.structure(places)
  for part in ('prior', 'tokenizer', 'text'):
    assert any('model' in place.spec for place in jax.tree.leaves(places[part])), part


def test_classes_are_numbers_or_names(tmp_path):
  names = tmp_path / 'names.txt'
  names.write_text('tench\ngoldfish\nshark\n')
  gen = tiny_class(class_names=str(names))
  prompts = core.as_prompts(['goldfish', '4', ' tench', {'label': 2, 'text': 'tench'}])
  np.testing.assert_array_equal(gen.tokenize(prompts)['labels'], [1, 4, 0, 2])
  none = dataclasses.replace(tiny_class(), condition='none')
  np.testing.assert_array_equal(none.tokenize([{'text': 'whatever'}])['labels'], [-1])


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'prior_weights': 'random:2b'}, "generator.prior_weights='random:2b': must be a checkpoint"),
    ({'vae_weights': ''}, "generator.vae_weights='': must be owner/name@revision"),
    ({'dtype': 'int8'}, "generator.dtype='int8': must be one of float32, bfloat16"),
    ({'noise': 'none'}, "generator.noise='none': must be one of prompt, candidate"),
    ({'decode_steps': 0}, 'generator.decode_steps=0: must be an integer >= 1'),
    ({'guidance': -2.0}, 'generator.guidance=-2.0: must be >= 0'),
    ({'decode_guidance': 0.0}, 'generator.decode_guidance=0.0: must be > 0'),
    ({'top_k': 17}, 'generator.top_k=17: must be in 0'),
    ({'prior_weights': 'random:tiny_c2i'}, 'the prior is a class model'),
    ({'condition': 'class'}, 'the prior is a text model'),
    (
      {'prior_weights': 'random:flexar_113m', 'text_weights': 'random:thin_xl'},
      'generator.tokenizer_weights: has tokens=8, the prior wants 256',
    ),
    ({'text_weights': 'random:thin_xl'}, 'generator.text_weights: has d_model=2048, the prior'),
    ({'size': 3}, 'unknown setting size=3'),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message.replace('(', r'\(')):
    components.load('generators.flextok', **{**TINY, **settings}).check()


@pytest.mark.parametrize(
  ('gen', 'text', 'message'),
  [
    (tiny(), 'a b c d e', 'generator.words=6: .* has 7 tokens'),
    (tiny_class(), '5', r"prompt 0 \('5'\) is no class; must be in 0 .. 4"),
    (tiny_class(), 'tench', r"prompt 0 \('tench'\) is no class; must be in 0 .. 4"),
  ],
)
def test_prompts_that_cannot_be_read(gen, text, message):
  with pytest.raises(ConfigError, match=message):
    gen.tokenize([{'text': text}])


# ----------------------------------------------------------------------------------------- configs

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


@pytest.mark.parametrize(
  ('name', 'steps', 'evals'),
  [
    # local: 2 beams of 3 after 1, 2, 4, 8 of 8 tokens: 1 root, then 2 beams, 1 + 1 + 2 + 4 tokens
    ('beam', 4, 1 + 2 * 7),
    ('bon', 1, 4 * 8),
    ('lookahead', 4, 1 + 2 * 7 + 3 * 2 + 6 * 2 + 6 * 2),
    ('uncond', 4, 1 + 2 * 7),
    ('uniform', 3, 0),
  ],
)
def test_configs_build_and_know_their_bill(name, steps, evals):
  (arm,) = build_study(run.read_config([f'--config={CONFIGS}/flextok.py:{name},runlocal'])).arms
  assert len(core.steps_of(arm.algo, arm.gen)) == steps and arm.cost.generator == evals
  published = run.read_config([f'--config={CONFIGS}/flextok.py:{name},coco'])
  assert not published['generator']['prior_weights'].startswith('random')
  assert published['prompts']['count'] == 300


def test_a_config_names_what_its_argument_may_be():
  with pytest.raises(ConfigError, match='must be one of geneval, coco, file, one verifier'):
    run.read_config([f'--config={CONFIGS}/flextok.py:beam,imagenet'])
