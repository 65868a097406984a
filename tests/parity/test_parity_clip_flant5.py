"""CLIP-FlanT5 stage by stage against transformers' classes put together as published
(make_golden_vqa.py), its pictures against PIL, its key table at full size."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
from full_size import check_table, header
from make_golden_vqa import TEXT, VISION, Published, given, torches
from PIL import Image
from reference import nchw, torch, transformers

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.clip_flant5 import convert, modeling

transformers.CLIPImageProcessorPil  # noqa: B018, loads as it is named
CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
SIZES = TEXT | {'d_model': 24, 'd_kv': 6, 'd_ff': 40, 'num_layers': 3, 'num_heads': 5}
TOWER = VISION | {'hidden_size': 24, 'num_hidden_layers': 4, 'num_attention_heads': 3}
OPTIONS = SIZES | {'vision_config': TOWER, 'tie_word_embeddings': False}


@pytest.fixture(scope='module')
def theirs():
  return reference.randomise(Published(SIZES, TOWER), 3)


@pytest.fixture(scope='module')
def ours(theirs):
  source = convert.join_tower(reference.source(theirs, OPTIONS))
  return reference.bind_port(convert, modeling, source)


@pytest.mark.parametrize('words', [20, 14], ids=['all', 'fewer'])
def test_every_stage(theirs, ours, words):
  """With all words, and with a table cut to those that the tokenizer knows."""
  inputs = given(6, vocab=14)
  with torch.no_grad():
    want = {k: v.numpy() for k, v in theirs.stages(**torches(inputs), words=words).items()}
  config = dataclasses.replace(ours.config, words=words)
  graphdef, _ = modules.abstract_module(lambda: modeling.build_model(config))
  ours = modules.bind_graph(graphdef, modules.split_module(ours)[1])
  embed, shown = ours.encoder.embed, ours.embed_images(inputs['pixels'])
  read = embed(inputs['before']), shown, embed(inputs['after']), inputs['mask']
  states, mask = ours.encode_question(*read)
  have = {
    'patches': ours.image(inputs['pixels']), 'shown': shown, 'states': states,
    'log_probs': ours.answer_log_probs(states, mask, inputs['answer']),
    'likelihood': ours.answer_likelihood(*read, inputs['answer']),
  }  # fmt: skip
  for name, value in have.items():
    np.testing.assert_allclose(value, want[name], err_msg=name, **CLOSE)
    print(f'{name}: {np.abs(np.asarray(value) - want[name]).max():.2g}')
  assert (want['likelihood'] > 1e-4).all()


def test_other_places_of_the_same_weights(theirs, ours):
  """The tower as a CLIP of its own, and the names of RE-N-Y/clip-t5-xxl."""
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  lead = 'vision_tower.vision_tower.'
  text = {k: v for k, v in state.items() if not k.startswith(lead)}
  vision = {k.removeprefix(lead): v for k, v in state.items() if k.startswith(lead)}
  whole_clip = vision | {
    'text_model.x': np.zeros(2), 'visual_projection.weight': np.zeros((2, 2)),
    'logit_scale': np.zeros(()),
  }  # fmt: skip
  apart = convert.join_tower(
    source_of_arrays(text, SIZES), source_of_arrays(whole_clip, {'vision_config': TOWER})
  )
  other = {f't5.{k}' if not k.startswith('mm_') else k: v for k, v in text.items()}
  for name in ('shared', 'encoder.embed_tokens', 'embed_tokens'):  # as safetensors keeps one
    other.pop(f't5.{name}.weight')
  other |= {f'v.{k}': v for k, v in vision.items()}
  renamed = convert.join_tower(source_of_arrays(other, OPTIONS))
  want = modules.split_module(ours)[1]
  for source in (apart, renamed):
    params = convert.load_weights(source, convert.config_of(source))
    jax.tree.map(np.testing.assert_array_equal, params, want)


@pytest.mark.parametrize('shape', [(40, 40), (33, 50), (50, 33), (512, 377), (300, 640), (336, 1)])
def test_pictures_are_the_published_code_s(shape):
  """Squared, then resized by transformers' own processor: the same 8 bit picture."""
  c = modeling.SIZES['clip_flant5_xl']
  picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  side, (height, width) = max(shape), shape
  canvas = Image.new('RGB', (side, side), tuple(int(x * 255) for x in clip.MEAN))
  canvas.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
  whole = {'height': 336, 'width': 336}
  processor = transformers.CLIPImageProcessorPil(size={'shortest_edge': 336}, crop_size=whole)
  want = processor(canvas, return_tensors='np')['pixel_values']
  have = modeling.preprocess(c, picture[None].astype(np.float32) / 255)
  scale = np.array(clip.STD)[:, None, None] * 255
  assert (np.abs(nchw(have) - want) * scale).max() < 1e-3


@pytest.mark.parametrize(('name', 'count'), [('xl', 3_159_560_192), ('xxl', 11_459_819_520)])
def test_released_sizes(name, count):
  """The released file's names, from the classes on meta; the tower's last block and norm are
  knowingly left."""
  config = modeling.SIZES[f'clip_flant5_{name}']
  text = dataclasses.asdict(config.encoder) | {'num_decoder_layers': config.decoder.num_layers}
  tower = transformers.CLIPVisionConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    image_size=336, patch_size=14, hidden_act='quick_gelu',
  ).to_dict()  # fmt: skip
  with torch.device('meta'):
    theirs = Published(text, tower)
  buffer = 'vision_tower.vision_tower.vision_model.embeddings.position_ids'  # in old files
  source = convert.join_tower(header(theirs, convert.SETTINGS, also=(buffer,)))
  assert convert.config_of(source) == config
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  check_table(convert.arrange_layers(source), convert.RULES, template)
  own = {id(p): p.numel() for p in theirs.parameters()}
  last = sum(p.numel() for p in theirs.vision_tower.vision_tower.encoder.layers[-1].parameters())
  assert sum(own.values()) == count == modules.count_parameters(template) + last + 2 * 1024
