"""FlexTok AR as a generator: protocol, the published beam against a plain loop, cost, errors."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.cli import main
from vtts_jax.data import prompts
from vtts_jax.engine import search as run
from vtts_jax.errors import ConfigError
from vtts_jax.generators import flextok_parts as parts
from vtts_jax.generators.flextok import FlexTokAR, build
from vtts_jax.models.autoencoder_kl import modeling as autoencoder_kl
from vtts_jax.models.flexar import modeling as flexar
from vtts_jax.models.flextok import flow
from vtts_jax.models.t5 import modeling as t5
from vtts_jax.search.beam import Beam
from vtts_jax.study import execute as study
from vtts_jax.testing import laws

KEY = jax.random.key(3)
PROMPTS = ['a cat', 'two red dogs on grass']
tiny = functools.partial(FlexTokAR, random='tiny', words=6, decode_steps=2)


@pytest.mark.parametrize(
  ('settings', 'prompts'),
  [
    ({'noise': 'candidate', 'decode_guidance': 1.0}, PROMPTS),
    ({'condition': 'class', 'temperature': 0.7, 'top_k': 9}, ['3', '0']),
    ({'prior': 'uniform', 'decode_guidance': 1.0}, PROMPTS),
  ],
  ids=['text', 'class', 'uniform'],
)
def test_conformance(settings, prompts):
  laws.check_generator(tiny(**settings), prompts, KEY)


# ------------------------------------------------------------------------------- the published beam

WIDTH, BRANCH = 2, 3
PATTERN = jax.random.normal(jax.random.key(9), (16, 16, 3))


@dataclasses.dataclass(frozen=True)
class Pattern(core.Verifier):
  """How much a picture looks like a fixed pattern."""

  names = ('pattern',)

  def score(self, params, vctx, images, **signals):
    return {'pattern': (images * PATTERN).mean((2, 3, 4))}

  def cost(self, op):
    return core.Cost(verify=float(op == 'score'))


class Plain:
  """The models without caches or batches: one prefix at a time."""

  def __init__(self, params):
    configs = tiny().configs
    self.models = {n: parts.merge(c, params[n]) for n, c in configs._asdict().items()}
    prior, decoder, vae = (self.models[n] for n in ('prior', 'tokenizer', 'vae'))

    def context(ids, mask):
      return prior.text_context(self.models['text'](ids, mask)[None], mask[None])

    def picture(ids, keep, noise):
      latent = flow.sample(decoder, decoder.condition(ids[None], keep), noise[None], 2, 7.5)
      return jnp.clip((vae.decode(vae.unscale(latent))[0] + 1) / 2, 0, 1)

    self._context, self._picture = jax.jit(context), jax.jit(picture)
    self._logits = jax.jit(lambda ctx, ids: prior.logits(prior.prefill(ctx, ids)[0])[0, 0])

  def read(self, gen, text):
    """Takes the prompt and the settings of what follows."""
    self.gen = gen
    ids, mask = np.zeros((2, 2, gen.words), np.int32)
    for row, words in enumerate((parts.hash_tokenizer(text), [parts.END])):
      ids[row, : len(words)], mask[row, : len(words)] = words, 1
    self.ctx = self._context(ids, mask)

  def logits(self, prefix):
    """Adjusted guided logits `[V]` after a list of tokens."""
    ids = np.full((1, 1, self.gen.num_stages), 7, np.int32)  # rubbish after the prefix
    ids[0, 0, : len(prefix)] = prefix
    prompt, null = np.asarray(self._logits(self.ctx, ids)[len(prefix)])
    x = (null + self.gen.scale * (prompt - null)) / self.gen.temperature
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


@functools.cache
def models():
  """(parameters, `Plain` of them), far from the initialisation: a token depends on all before."""
  params = tiny().load()
  params['prior'] = jax.tree.map(lambda x: 2 * x, params['prior'])
  return params, Plain(params)


def published(plain, prompt_key, marks, replace):
  """[(tokens of the candidates, their scores, kept)] of each step: from one root, a beam is
  continued to the last token of its chunk, which is drawn BRANCH times; the best WIDTH go on."""
  noisy = lambda x, key, t: x + jax.random.gumbel(jax.random.fold_in(key, t), x.shape)
  root = jax.random.fold_in(prompt_key, 0)
  noise = parts.noise(parts.noise_seed(root[None]), (8, 8, 3))[0]
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
  ('replace', 'marks', 'settings'),
  [(True, (1, 2, 4), {'temperature': 0.8, 'top_k': 7}), (False, (2, 4, 6), {'top_p': 0.95})],
  ids=['with-replacement', 'without'],
)
def test_beam_is_the_published_loop_token_by_token(replace, marks, settings):
  gen, ver = tiny(**settings), Pattern()
  beam = Beam(width=WIDTH, branch=BRANCH, roots=1, schedule=marks, replace=replace, complete=False)
  params, plain = models()
  params = {'generator': params, 'verifier': {}}
  found = run.search(beam, gen, ver, params, PROMPTS, KEY, trace=True)
  for p, text in enumerate(PROMPTS):
    plain.read(gen, text)
    steps = published(plain, jax.random.fold_in(KEY, p), marks, replace)
    for step, mark, (tokens, scores, kept) in zip(found.steps, marks, steps, strict=True):
      np.testing.assert_array_equal(step.shown.tokens[p, :, :mark], tokens)
      np.testing.assert_array_equal(step.kept[p], kept)
      np.testing.assert_allclose(step.totals[p], scores, atol=2e-5)
      assert replace or len({tuple(t) for t in tokens}) == len(tokens)


# ----------------------------------------------------------------------------------------- settings


def noises(gen, n=3):
  keys = core.candidate_keys(core.prompt_keys(KEY, jnp.arange(2)), jnp.arange(n))
  return np.asarray(dataclasses.replace(gen, prior='uniform').init({}, {}, keys).noise)


def test_noise_is_one_for_a_prompt_or_one_for_each_candidate():
  shared, own = noises(tiny()), noises(tiny(noise='candidate'))
  assert (shared == shared[:, :1]).all() and (shared[0] != shared[1]).all()
  assert len(np.unique(own.reshape(-1, 2), axis=0)) == 6
  np.testing.assert_array_equal(noises(tiny(), 1)[:, 0], shared[:, 0])


def test_cost_follows_streams_and_decoder_steps():
  extend = lambda **s: tiny(**s).cost('extend', 0, 4)
  assert extend().flops == 2 * extend(guidance=1.0).flops > 0
  assert extend().generator == extend(condition='none').generator == 4
  # without a prompt there is one word to look at
  assert extend(condition='none') == extend(guidance=0.0)
  assert extend(guidance=0.0).flops < extend(guidance=1.0).flops
  assert extend(prior='uniform') == core.Cost()
  render = lambda **s: tiny(**s).cost('render').flops
  assert render(decode_steps=3) - render() == render() - render(decode_steps=1) > 0
  assert render() - render(decode_steps=1) == 2 * (
    render(decode_guidance=1.0) - render(decode_guidance=1.0, decode_steps=1)
  )
  words, null = t5.flops(tiny().configs.text, 6), t5.flops(tiny().configs.text, 1)
  text = flexar.flops_text(tiny().configs.prior, 6)
  assert tiny().cost('encode').flops == words + null + 2 * text


def test_flops_of_the_vae_are_those_of_the_compiled_program():
  c = tiny().configs
  params = parts.load('vae', c.vae, '', 'float32')
  decode = jax.jit(lambda p, x: parts.merge(c.vae, p).decode(x))
  latent = jnp.zeros((1, c.tokenizer.size, c.tokenizer.size, c.tokenizer.channels))
  counted = decode.lower(params, latent).compile().cost_analysis()['flops']
  # fewer: XLA does not count what falls on the padding; more: norms at 4 channels
  assert 0.85 < counted / autoencoder_kl.flops_decode(c.vae, c.tokenizer.size) < 1.3


def test_published_settings_and_sizes_by_name():
  text, classes = (
    FlexTokAR(random='flexar_3b'),
    FlexTokAR(random='flexar_1b_c2i', condition='class'),
  )
  assert (text.scale, text.decode_scale, text.num_stages, text.vocab) == (3.0, 7.5, 256, 64000)
  assert text.image_shape == (256, 256, 3) and text.anytime
  assert classes.scale == 1.5 and classes.configs.text is None
  grid = FlexTokAR(random='gridar_3b')
  assert grid.decode_scale == 5.0 and not grid.anytime and grid.num_stages == 256
  small = FlexTokAR(random='flexar_113m/small')
  assert small.configs.tokenizer.decoder_layers == 4 and small.image_shape == (256, 256, 3)
  for gen in (text, classes, grid, small):
    gen.check()


def test_classes_are_numbers_or_names(tmp_path):
  names = tmp_path / 'names.txt'
  names.write_text('tench\ngoldfish\nshark\n')
  gen = tiny(condition='class', class_names=str(names))
  np.testing.assert_array_equal(gen.tokenize(['goldfish', '4', ' tench'])['labels'], [1, 4, 0])
  none = tiny(condition='none', random='flexar_1b_c2i')
  np.testing.assert_array_equal(none.tokenize(['whatever'])['labels'], [-1])


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'random': 'flexar_2b'}, "generator.random='flexar_2b': must be '' or PRIOR"),
    ({'noise': 'none'}, "generator.noise='none': must be one of prompt, candidate"),
    ({'decode_steps': 0}, 'generator.decode_steps=0: must be an integer >= 1'),
    ({'guidance': -2.0}, 'generator.guidance=-2.0: must be >= 0'),
    ({'decode_guidance': 0.0}, 'generator.decode_guidance=0.0: must be > 0'),
    ({'top_k': 17}, 'generator.top_k=17: must be in 0'),
    ({'random': 'flexar_1b_c2i'}, 'the prior is a class model'),
    ({'random': 'flexar_113m', 'condition': 'class'}, 'the prior is a text model'),
    ({'random': 'flexar_113m/tiny'}, 'generator.tokenizer_from: has tokens=8, the prior wants 256'),
    ({'size': 3}, 'unknown setting size=3'),
  ],
)
def test_settings_that_cannot_run(settings, message):
  with pytest.raises(ConfigError, match=message.replace('(', r'\(')):
    build(**{'random': 'tiny', **settings}).check()


@pytest.mark.parametrize(
  ('settings', 'text', 'message'),
  [
    ({}, 'a b c d e f', 'generator.words=6: .* has 7 tokens'),
    ({'condition': 'class'}, '5', "prompt '5' must be a number in 0 .. 4"),
    ({'condition': 'class'}, 'tench', "prompt 'tench' must be a number in 0 .. 4"),
  ],
)
def test_prompts_that_cannot_be_read(settings, text, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**settings).tokenize([text])


# ----------------------------------------------------------------------------- configs and prompts

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
def test_configs_build_and_foretell_their_bill(name, steps, evals):
  (arm,) = study.arms(main.read_config([f'--config={CONFIGS}/flextok_{name}.py:runlocal']))
  assert arm.algo.num_steps(arm.gen) == steps and arm.cost.generator == evals
  published = main.read_config([f'--config={CONFIGS}/flextok_{name}.py:coco'])
  assert published['generator']['random'] == '' and published['prompts']['count'] == 300


def test_a_config_names_what_its_argument_may_be():
  with pytest.raises(ConfigError, match='must be one of geneval, coco, file, one verifier'):
    main.read_config([f'--config={CONFIGS}/flextok_beam.py:imagenet'])


def test_prompts_come_from_a_file_or_the_config(tmp_path):
  lines, objects = tmp_path / 'a.txt', tmp_path / 'b.jsonl'
  lines.write_text('a cat\n\n two dogs \n')
  objects.write_text('{"prompt": "a cat", "tag": "single_object"}\n')
  assert prompts.prompts(str(lines)) == [{'prompt': 'a cat'}, {'prompt': 'two dogs'}]
  assert prompts.prompts(str(lines), count=1) == prompts.prompts(texts=['a cat'])
  assert prompts.prompts(str(objects))[0]['tag'] == 'single_object'
  objects.write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
  for given, message in (
    ({'path': str(objects)}, 'line 2: an object'),
    ({'path': str(lines), 'count': 3}, 'count=3: must be in 0'),
    ({'path': str(tmp_path / 'c.txt')}, 'no such file'),
    ({}, 'give one of the two'),
  ):
    with pytest.raises(ValueError, match=message):
      prompts.prompts(**given)
