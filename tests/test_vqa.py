"""VQAScore: the model's sizes and pictures, what T5 is asked, how it loads, the verifier."""

import dataclasses
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vtts_jax import components, core
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.clip_flant5 import convert, modeling
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.t5 import decoder as t5_decoder
from vtts_jax.models.t5 import modeling as t5
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
GOLDEN = pathlib.Path(__file__).parent / 'golden/clip_flant5.npz'
PROMPTS = core.as_prompts(['a red square', 'two blue dogs sit'])


# ---------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
  ('name', 'count', 'decoder'),
  [
    ('clip_flant5_xl', 3_146_961_920, 1_626_229_760),
    ('clip_flant5_xxl', 11_447_221_248, 6_373_021_696),
  ],
)
def test_released_sizes(name, count, decoder):
  """The tower's last block and norm are not there: 12,598,272 parameters of the released file."""
  _, params = modules.abstract_module(lambda: modeling.build_model(modeling.SIZES[name]))
  size = modules.count_parameters
  assert size(params) == count and size(params['decoder']) == decoder
  assert size(params['image']) + 12_598_272 == 303_507_456  # CLIP L/14 at 336, bare


def test_flops_are_what_xla_counts():
  """With one layer in every loop, which XLA counts once; it adds what is not a matmul."""
  text = t5.Config(vocab_size=300, d_model=128, d_kv=16, d_ff=320, num_layers=1, num_heads=6)
  vision = clip.Config(vit.Config(96, 1, 2, 384), None, 1, image_size=32, patch=4)
  c = modeling.Config(vision, text, text)
  graphdef, params = modules.abstract_module(lambda: modeling.build_model(c))
  shape = lambda *s, dtype='float32': jax.ShapeDtypeStruct(s, jnp.dtype(dtype))
  words = shape(1, 9, 128), shape(1, 7, 128), shape(1, 7, dtype='int32')
  run = lambda p, pixels, before, after, mask, answer: (
    lambda m: m.answer_likelihood(before, m.embed_images(pixels), after, mask, answer)
  )(modules.bind_graph(graphdef, p))
  lowered = jax.jit(run).lower(params, shape(1, 32, 32, 3), *words, shape(1, 2, dtype='int32'))
  counted = lowered.compile().cost_analysis()['flops']
  assert 1 <= counted / modeling.count_flops(c, 9, 7, 2) < 1.1


@pytest.mark.parametrize('shape', [(4, 9), (9, 4), (5, 8), (6, 6)])
def test_pictures_are_squared_as_published(shape):
  picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  side = max(shape)
  want = Image.new('RGB', (side, side), (122, 116, 104))  # int(255 mean)
  want.paste(Image.fromarray(picture), ((side - shape[1]) // 2, (side - shape[0]) // 2))
  have = modeling.pad_to_square(jnp.array(picture[None], jnp.float32) / 255)
  np.testing.assert_array_equal(np.rint(np.asarray(have[0]) * 255), np.asarray(want))


def test_a_likelihood_is_over_the_words_of_the_tokenizer(params):
  """Over all answers of two tokens, P(first) P(second | first) sums to one."""
  c = dataclasses.replace(modeling.SIZES['tiny'], words=12)
  graphdef, _ = modules.abstract_module(lambda: modeling.build_model(c))
  answers = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2)
  states = np.random.default_rng(0).normal(size=(1, 7, 16)).astype(np.float32)

  @jax.jit
  def log_probs(answers):
    model, rows = modules.bind_graph(graphdef, params), len(answers)
    return model.answer_log_probs(np.repeat(states, rows, 0), np.ones((rows, 7), bool), answers)

  found = np.asarray(log_probs(answers))
  np.testing.assert_allclose(np.exp(found.sum(1)).sum(), 1, atol=1e-5)
  assert np.ptp(found[answers[:, 1] == 3, 1]) > 1e-3  # the second hears the first
  np.testing.assert_array_equal(t5_decoder.shift_right(answers)[:, 1], answers[:, 0])


@pytest.fixture
def tensors():
  with np.load(GOLDEN) as file:
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}, json.loads(
      str(file['config'])
    )


def test_what_is_wrong_is_said(tensors):
  values, config = tensors

  def load(values, config=config):
    source = convert.join_tower(source_of_arrays(values, config))
    return convert.load_weights(source, convert.config_of(source))

  load(values)
  towerless = {k: v for k, v in values.items() if not k.startswith('vision_tower.')}
  with pytest.raises(ValueError, match='has no vision_model: name a CLIP .*patch14-336'):
    load(towerless)
  with pytest.raises(ValueError, match=r'no T5 decoder'):
    load({k: v for k, v in values.items() if not k.startswith('lm_head')})
  with pytest.raises(ValueError, match=r'has no CLIP-FlanT5: no .*mm_projector'):
    load({k: v for k, v in values.items() if not k.startswith('mm_projector')})
  with pytest.raises(ValueError, match=r'unused by the model: decoder\.x'):
    load(values | {'decoder.x': np.zeros(2)})
  for wrong in ({'mm_vision_select_layer': -1}, {'image_aspect_ratio': 'square'}):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f'{name}=.*allowed is'):
      load(values, config | wrong)
  with pytest.raises(ConfigError, match='tie_word_embeddings=True is T5 v1.0'):
    load(values, config | {'tie_word_embeddings': True})


# ------------------------------------------------------------------------------------- the verifier


@pytest.fixture(scope='module')
def pictures():
  return np.random.default_rng(0).random((2, 3, 20, 13, 3), np.float32)


@pytest.fixture(scope='module')
def ver():
  settings = {'weights': 'random:tiny', 'dtype': 'float32', 'length': 24}
  return components.load('verifiers.vqa_score', **settings)


@pytest.fixture(scope='module')
def params(ver):
  return ver.load()


def test_conformance(ver, pictures):
  laws.check_verifier(ver, PROMPTS, pictures)
  assert ver.names == ('vqa_score_tiny_random',)
  released = components.load('verifiers.vqa_score')
  assert released.names == ('vqa_score_clip_flant5_xl',) and released.dtype == 'bfloat16'


def test_a_bad_pixel_breaks_one_score_and_bfloat16_is_near(ver, params, pictures):
  prompt = ver.tokenize(PROMPTS)

  @jax.jit
  def score(p, images):
    return ver.score(p, ver.encode(p, prompt), {'image': images})[ver.names[0]]

  broken = pictures.copy()
  broken[0, 1, 5, 5] = np.nan
  good, bad = (np.asarray(score(params, p)) for p in (pictures, broken))
  assert np.isnan(bad[0, 1]) and np.isnan(bad).sum() == 1
  np.testing.assert_array_equal(bad[1], good[1])
  assert ((good > 0) & (good < 1)).all() and np.ptp(good) > 1e-4
  near = score(jax.tree.map(lambda x: x.astype('bfloat16'), params), pictures)
  assert near.dtype == np.float32 and 0 < np.abs(np.log(near / good)).max() < 0.1


@pytest.fixture
def tokenizer(tmp_path):
  """A folder with a tokenizer that, as T5's, splits at white space and puts an end."""
  from tokenizers import Tokenizer, models, pre_tokenizers, processors
  from transformers import PreTrainedTokenizerFast

  words = ['<pad>', '</s>', '<unk>', 'USER:', 'ASSISTANT:', 'Yes', 'or', 'no.', 'red', '"', 'a']
  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split('"', 'isolated')]
  )
  made.post_processor = processors.TemplateProcessing('$A </s>', special_tokens=[('</s>', 1)])
  PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token='<pad>', eos_token='</s>', unk_token='<unk>'
  ).save_pretrained(tmp_path)
  return str(tmp_path)


def test_what_t5_is_asked(ver, tokenizer, monkeypatch, caplog):
  """The words around the picture, an end before it and after the question, none of the question
  lost to a prompt that is too long."""
  asked = dataclasses.replace(ver, weights='some/checkpoint', tokenizer=tokenizer, length=17)
  monkeypatch.setattr(Pretrained, 'config', modeling.SIZES['tiny'])
  said = asked.tokenize(core.as_prompts(['red red', ' '.join(['a'] * 40)]))
  assert said['before'].shape == (2, 25) and said['before'][0, -2:].tolist() == [3, 1]
  assert said['answer'].tolist() == [[5, 1]] * 2
  question = [2, 2, 2, 2, 9, 8, 8, 9, 2, 2, 2, 2, 6, 7, 4, 1]
  whole = lambda prompt: [*question[:5], *prompt, *question[7:]]
  assert said['after'][0].tolist() == [*whole([8, 8]), 0]
  assert said['mask'].sum(1).tolist() == [16, 17]
  assert said['after'][1].tolist() == whole([10, 10, 10])
  (record,) = caplog.records
  assert record.levelno == logging.WARNING and 'the first has 54' in record.getMessage()
  with pytest.raises(ConfigError, match="verifier.length=14: too few tokens for any of 'a"):
    dataclasses.replace(asked, length=14).tokenize(core.as_prompts(['a a']))


def test_loading_with_the_tower_inside_or_apart(tensors, tmp_path):
  from safetensors.numpy import save_file

  values, config = tensors
  lead = 'vision_tower.vision_tower.'
  text = {k: v for k, v in values.items() if not k.startswith(lead)}
  vision = {k.removeprefix(lead): v for k, v in values.items() if k.startswith(lead)}
  files = {
    'clip-flant5-xs': (values, config), 'towerless': (text, config),
    'clip': (vision, {'vision_config': config['vision_config']}),
  }  # fmt: skip
  for name, (held, options) in files.items():
    (tmp_path / name).mkdir()
    save_file(held, tmp_path / name / 'model.safetensors')
    (tmp_path / name / 'config.json').write_text(json.dumps(options))

  def make(*names):
    weights = '+'.join(str(tmp_path / name) for name in names)
    return components.load('verifiers.vqa_score', weights=weights)

  inside, apart = make('clip-flant5-xs'), make('towerless', 'clip')
  assert inside.names == ('vqa_score_clip_flant5_xs',)
  config = inside.model_part.config
  assert config == apart.model_part.config and config.vision.image_size == 12
  params = inside.load()
  jax.tree.map(np.testing.assert_array_equal, params, apart.load())
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {'bfloat16'}
  with pytest.raises(ConfigError, match='verifier.weights=.*has no vision_model'):
    make('towerless').check()


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'weights': 'random:huge'}, "verifier.weights='random:huge': must be .*random:clip_flant5_xl"),
    ({'dtype': 'int8'}, "verifier.dtype='int8'"),
    ({'question': 'Is it?'}, "verifier.question='Is it\\?': must have '{}' once"),
    ({'answer': ' '}, 'verifier.answer'),
    ({'length': 0}, 'verifier.length=0'),
  ],
)
def test_bad_settings(given, said):
  with pytest.raises(ConfigError, match=said):
    components.load('verifiers.vqa_score', **given)


def test_an_empty_prompt(ver):
  with pytest.raises(ConfigError, match='prompt 1 is empty'):
    ver.tokenize(core.as_prompts(['a', ' ']))
