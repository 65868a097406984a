"""A checkpoint's own preprocessing: what its files say is what its pictures go through.

The live comparison with transformers' image processors is in tests/parity.
"""

import dataclasses
import json
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from vtts_jax import components, core
from vtts_jax.checkpoints.files import write_weights
from vtts_jax.checkpoints.source import Source, source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import Preprocessing
from vtts_jax.models.clip import convert, modeling
from vtts_jax.models.siglip import convert as siglip_convert
from vtts_jax.verifiers.parts.colours import ColourClip

GOLDEN = pathlib.Path(__file__).parent / 'golden'
HALF = (0.5, 0.5, 0.5)
PICTURE = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
# the golden CLIP and SigLIP read 12 x 12
PLAIN = {
  'image_processor_type': 'CLIPImageProcessor', 'size': {'shortest_edge': 12},
  'crop_size': {'height': 12, 'width': 12}, 'resample': 3, 'image_mean': list(modeling.MEAN),
  'image_std': list(modeling.STD),
}  # fmt: skip
MEANS = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}


def tensors(name):
  with np.load(GOLDEN / f'{name}.npz') as file:
    return {k[7:]: file[k] for k in file.files if k.startswith('params/')}


def checkpoint(folder, name='clip_hf', **files) -> str:
  """A folder with a golden file's weights and these JSON files beside them."""
  folder.mkdir(exist_ok=True)
  heads = {'num_attention_heads': 2}
  write_weights(folder / 'model.safetensors', tensors(name))
  config = {'text_config': heads, 'vision_config': heads}
  for file, content in ({'config': config} | files).items():
    (folder / f'{file}.json').write_text(json.dumps(content))
  return str(folder)


def test_pictures_go_through_what_the_file_says(tmp_path):
  """`preprocessor_half.json` of the cases: plain arithmetic, through a verifier; so in both halves
  of CLIP-I, whose references are cut on the host."""
  place = checkpoint(tmp_path / 'half', preprocessor_config=PLAIN | MEANS)
  ver = components.load('verifiers.clip', weights=place)
  small = Image.fromarray(PICTURE).resize((16, 12), Image.Resampling.BICUBIC)
  want = np.asarray(small, np.float32)[:, 2:14] / 255
  have = ver.preprocess(PICTURE[None] / np.float32(255))[0]
  np.testing.assert_allclose(have, (want - 0.5) / 0.5, atol=1e-6)
  Image.fromarray(PICTURE).save(tmp_path / 'a.png')
  squash = PLAIN | {'size': {'height': 12, 'width': 12}, 'do_center_crop': False, 'resample': 2}
  place = checkpoint(tmp_path / 'squash', preprocessor_config=squash)
  ver = components.load(
    'verifiers.image_similarity', backbone='clip', weights=place, references=str(tmp_path / 'a.png')
  )
  small = Image.fromarray(PICTURE).resize((12, 12), Image.Resampling.BILINEAR)
  found = ver.tokenize(core.as_prompts(['a']))['pictures'][0, 0]
  np.testing.assert_array_equal(found, small)
  config = ver.model_part.config
  have = modeling.preprocess(config, PICTURE[None] / np.float32(255))[0]
  want = (np.asarray(small) / 255 - modeling.MEAN) / modeling.STD
  np.testing.assert_allclose(have, want, atol=1e-5)
  np.testing.assert_allclose(
    modeling.preprocess(config, found / np.float32(255), fitted=True), have, atol=1e-6
  )


def source(tmp_path, name='clip_hf', **files) -> Source:
  for file, content in files.items():
    (tmp_path / f'{file}.json').write_text(json.dumps(content))
  return dataclasses.replace(source_of_arrays(tensors(name)), folder=str(tmp_path))


OPEN = {'size': 12, 'mean': [0.5] * 3, 'std': [0.5] * 3}
CLIP = modeling.PREPROCESSING
# files of a folder -> what they say
FILES = {
  'none': ({}, CLIP),
  'as released': ({'preprocessor_config': PLAIN}, CLIP),
  'old names': (
    {'preprocessor_config': {
      'feature_extractor_type': 'CLIPFeatureExtractor', 'size': 12, 'crop_size': 12, **MEANS}},
    Preprocessing(HALF, HALF, crop='transformers'),
  ),
  'of transformers 5': (
    {'processor_config': {'image_processor': PLAIN | {'resample': 2}},
     'preprocessor_config': PLAIN},
    dataclasses.replace(CLIP, method='bilinear', crop='transformers'),
  ),
  'larger, then cut': (
    {'preprocessor_config': PLAIN | {'size': {'shortest_edge': 16}}},
    dataclasses.replace(CLIP, size=16, crop='transformers'),
  ),
  'bytes': (
    {'preprocessor_config': PLAIN | {'do_rescale': False, 'image_mean': 127.5, 'image_std': 255}},
    Preprocessing(HALF, (1.0, 1.0, 1.0), crop='transformers'),
  ),
  '-1 .. 1': (
    {'preprocessor_config':
      PLAIN | {'rescale_factor': 2 / 255, 'image_mean': 1.0, 'image_std': 1.0}},
    Preprocessing(HALF, HALF, crop='transformers'),
  ),
  'not normalised': (
    {'preprocessor_config': PLAIN | {'do_normalize': False, 'do_resize': False}},
    Preprocessing((0.0,) * 3, (1.0,) * 3, 'keep', crop='transformers'),
  ),
  'open_clip': (
    {'open_clip_config': {'preprocess_cfg': OPEN | {'resize_mode': 'squash'}}},
    Preprocessing(HALF, HALF, 'squash'),
  ),
  'open_clip padded': (
    {'open_clip_config': {
      'preprocess_cfg': OPEN | {'resize_mode': 'longest', 'interpolation': 'bilinear',
                                'fill_color': 51}}},
    Preprocessing(HALF, HALF, 'longest', 'bilinear', fill=0.2),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', FILES)
def test_what_the_files_say(tmp_path, name):
  files, said = FILES[name]
  assert convert.config_of(source(tmp_path, **files)).preprocessing == said


def test_the_library_of_the_weights_decides(tmp_path):
  both = {
    'preprocessor_config': PLAIN | {'resample': 2},
    'open_clip_config': {'preprocess_cfg': {'mean': 0.5}},
  }
  found = convert.config_of(source(tmp_path, **both)).preprocessing
  assert (found.method, found.mean) == ('bilinear', modeling.MEAN)
  found = convert.config_of(source(tmp_path, 'clip_open')).preprocessing
  assert (found.method, found.mean) == ('bicubic', HALF)
  # a text tower reads no pictures: what is said of them is not even read
  (tmp_path / 'preprocessor_config.json').write_text('no JSON')
  assert convert.config_of(source(tmp_path), 'text').preprocessing == CLIP
  with pytest.raises(ValueError, match='preprocessor_config.json.* does not parse'):
    convert.config_of(source(tmp_path))


def test_siglip_is_read_likewise(tmp_path):
  square = {'image_processor_type': 'SiglipImageProcessor', 'size': {'height': 12, 'width': 12}}
  read = lambda **more: siglip_convert.config_of(
    source(tmp_path, 'siglip', preprocessor_config=square | more)
  ).preprocessing
  assert read() == Preprocessing(HALF, HALF, 'squash')
  changed = Preprocessing(modeling.MEAN, HALF, 'squash', 'bilinear', crop='transformers')
  assert read(resample=2, image_mean=modeling.MEAN) == changed


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'image_processor_type': 'Siglip2ImageProcessorFast'}, "'Siglip2ImageProcessor': must be one"),
    ({'crop_size': 14, 'size': 14}, 'makes pictures of 14 x 14; the network reads 12 x 12'),
    ({'crop_size': {'height': 12, 'width': 14}}, 'crop_size=.*: must be a number or a square'),
    ({'size': {'longest_edge': 12}}, r'size=.*must be a number, \{shortest_edge\} or a square'),
    ({'size': {'shortest_edge': True}}, 'size=.*must be a number'),
    ({'do_center_crop': False}, 'do_center_crop=False: must be true, or size a square'),
    ({'do_pad': True}, 'do_pad=True: must be false: this step is not supported'),
    ({'resample': 0}, r'resample=0: must be one of 1 \(lanczos\), 2'),
    ({'resample': [3]}, 'resample=.*must be one of'),
    ({'image_mean': [0.5, 0.5]}, 'image_mean=.*: must be a number or three'),
    ({'image_std': 'half'}, "image_std='half': must be a number or three"),
    ({'rescale_factor': 0}, 'rescale_factor=0: must be a number > 0'),
    ({'image_processor_type': 7}, "image_processor_type='7': must be one of CLIPImageProcessor"),
  ],
)
def test_what_is_not_supported_is_said(tmp_path, change, said):
  with pytest.raises(ConfigError, match=f'preprocessor_config.*{said}'):
    convert.config_of(source(tmp_path, preprocessor_config=PLAIN | change))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'resize_mode': 'crop'}, "resize_mode='crop': must be one of 'shortest'"),
    ({'interpolation': 'nearest'}, "interpolation='nearest': must be one of 'bicubic'"),
    ({'fill_color': [0, 0, 0]}, 'fill_color=.*: must be a grey in 0 .. 255'),
    ({'mode': 'L'}, "mode='L': must be 'RGB'"),
    ({'std': None, 'mean': 'x'}, "mean='x': must be a number or three"),
  ],
)
def test_what_is_not_supported_of_open_clip_is_said(tmp_path, change, said):
  with pytest.raises(ConfigError, match=f'preprocess_cfg: {said}'):
    convert.config_of(source(tmp_path, open_clip_config={'preprocess_cfg': OPEN | change}))


def test_each_score_follows_its_published_pipeline(monkeypatch):
  """17 x 23 has an odd column too many: torchvision's crop and transformers' differ; PickScore is
  transformers', which does not clean texts either."""
  config = dataclasses.replace(modeling.SIZES['tiny'], image_size=224)
  monkeypatch.setattr('vtts_jax.models.pretrained.Pretrained.config', config)
  whole = Image.fromarray(PICTURE).resize((303, 224), Image.Resampling.BICUBIC)
  whole = (np.asarray(whole) / 255 - modeling.MEAN) / modeling.STD
  curly, plain = 'a dog\u2019s &amp; bone', "a dog's & bone"
  for name, left in (('clip', 40), ('pickscore', 39)):
    ver = components.load(f'verifiers.{name}', weights='random:tiny')
    have = ver.preprocess(PICTURE[None] / np.float32(255))[0]
    np.testing.assert_allclose(have, whole[:, left : left + 224], atol=1e-5)
    same = (ver.token_ids([curly]) == ver.token_ids([plain])).all()
    assert same == (name == 'clip')
  for name in ('hpsv2', 'clip_classifier'):
    ver = components.load(f'verifiers.{name}', weights='random:tiny')
    np.testing.assert_array_equal(ver.token_ids([curly]), ver.token_ids([plain]))
  colours = ColourClip('clip', 'random:tiny')
  np.testing.assert_array_equal(colours.tokenize([['dog\u2019s']]), colours.tokenize([["dog's"]]))


def test_colours_refuse_what_they_cannot_do(monkeypatch):
  squash = dataclasses.replace(CLIP, mode='squash')
  config = dataclasses.replace(modeling.SIZES['tiny'], preprocessing=squash)
  monkeypatch.setattr('vtts_jax.models.pretrained.Pretrained.config', config)
  with pytest.raises(ConfigError, match='must be resized by the shorter side to the crop'):
    ColourClip('clip', 'random:tiny').tokenize([['cup']])


# ------------------------------------------------------------------- activation and name by sizes


def header(size, *more, **config) -> Source:
  """The names and shapes of an open_clip file of this size; no tensor is made."""
  c, shapes = modeling.SIZES[size], {}
  for tower, trunk, lead in (('image', c.image, 'visual.'), ('text', c.text, '')):
    width, tokens = trunk.width, c.tokens if tower == 'image' else c.length
    shapes[f'{lead}positional_embedding'] = (tokens, width)
    shapes[f'{lead}proj' if lead else 'text_projection'] = (width, c.projection)
    for i in range(trunk.layers):
      shapes[f'{lead}transformer.resblocks.{i}.mlp.c_fc.weight'] = (trunk.hidden, width)
  shapes['visual.conv1.weight'] = (c.image.width, 3, c.patch, c.patch)
  shapes['token_embedding.weight'] = (c.vocab, c.text.width)
  shapes |= dict.fromkeys(more, ())
  return Source('x', {k: (v, 'float32') for k, v in shapes.items()}, None, config)


@pytest.mark.parametrize('size', convert.OPENAI_SIZES)
def test_gelu_in_openai_s_sizes_is_said(size, caplog, tmp_path):
  def read(*more, folder='', **config):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      found = convert.config_of(dataclasses.replace(header(size, *more, **config), folder=folder))
    return found.image.act, found.text.act, [r.getMessage() for r in caplog.records]

  # open_clip decides by the model's name, which no tensor holds: one line says what was guessed
  *acts, lines = read()
  assert acts == ['gelu'] * 2 and len(lines) == 1
  assert f'CLIP {size} of OpenAI' in lines[0] and '"quick_gelu": true' in lines[0]
  assert read(quick_gelu=False) == ('gelu', 'gelu', [])
  assert read(model_cfg={'quick_gelu': True}) == ('quick_gelu', 'quick_gelu', [])
  assert read('input_resolution') == ('quick_gelu', 'quick_gelu', [])
  # transformers' config.json is read first; open_clip's beside it still counts
  (tmp_path / 'open_clip_config.json').write_text('{"quick_gelu": true}')
  assert read(folder=str(tmp_path), model_type='clip') == ('quick_gelu', 'quick_gelu', [])


def test_other_sizes_are_gelu_without_a_word(caplog):
  with caplog.at_level(logging.WARNING):
    assert convert.config_of(header('h14')).image.act == 'gelu'
  assert not caplog.records


def test_a_local_folder_has_the_name_of_its_copy_on_the_hub(tmp_path, monkeypatch):
  load = lambda place, name='clip': components.load(f'verifiers.{name}', weights=str(place))
  cached = '/c/models--openai--clip-vit-base-patch16/snapshots/57c216476eefef5ab752'
  assert load(cached).names == load('openai/clip-vit-base-patch16@57c2').names == ('clip_b16',)
  similar = [
    components.load('verifiers.image_similarity', backbone='clip', weights=place).names
    for place in (cached, 'openai/clip-vit-base-patch16')
  ]
  assert similar[0] == similar[1] == ('clip_i_clip_vit_base_patch16',)
  own = checkpoint(tmp_path / 'mine')
  assert load(own).names == ('clip_mine',)  # of no released size
  assert load(tmp_path).names == (f'clip_{tmp_path.name.lower()}',)  # no model: `check` says so
  for size, name in (('b16', 'clip_b16'), ('l14_336', 'clip_l14_336'), ('h14', 'clip_h14')):
    config = dataclasses.replace(modeling.SIZES[size], eos=49407)
    monkeypatch.setattr('vtts_jax.models.pretrained.Pretrained.config', config)
    assert load(own).names == (name,)
  # not with another preprocessing
  config = dataclasses.replace(config, preprocessing=Preprocessing(HALF, HALF))
  monkeypatch.setattr('vtts_jax.models.pretrained.Pretrained.config', config)
  assert load(own).names == ('clip_mine',)
