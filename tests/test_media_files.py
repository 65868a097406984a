"""Files of every kind of output: what is written is read again, whole or not at all."""

import io
import os
import wave

import numpy as np
import pytest
from etils import epath
from PIL import Image

from vtts_jax.core import KINDS
from vtts_jax.errors import ConfigError
from vtts_jax.media import files
from vtts_jax.metrics import inception

RNG = np.random.default_rng(0)
EXAMPLES = {
  'image': RNG.integers(0, 256, (5, 4, 3), np.uint8),
  'video': RNG.integers(0, 256, (3, 5, 4, 3), np.uint8),
  'audio': RNG.uniform(-1, 1, (50, 2)).astype(np.float32),
  'text': np.frombuffer('Grüße'.encode() + bytes(4), np.uint8),
  'tokens': RNG.integers(0, 9, (2, 3)),
  'boxes': RNG.uniform(0, 9, (2, 4)),
  'scalar': np.float64(1.5),
  'mask': RNG.random((2, 5, 4)) < 0.5,
}


def test_every_kind_has_an_ending():
  assert set(files.OUTPUT_ENDINGS) == set(EXAMPLES) == set(KINDS)


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_saved_is_read_again(kind, tmp_path):
  array = EXAMPLES[kind]
  path = files.save_output(tmp_path / 'deep' / 'a.b-3', kind, array)
  assert path.name == f'a.b-3{files.OUTPUT_ENDINGS[kind]}'
  assert [p.name for p in path.parent.iterdir()] == [path.name], 'a temporary file was left'
  got = files.read_output(path, kind)
  if kind == 'text':
    assert got == 'Grüße' == files.text_of(array)
  else:
    np.testing.assert_allclose(got, array, atol=1 / 32767 if kind == 'audio' else 0)
  assert files.save_output(path, kind, array) == path  # its ending is not added twice
  assert 0 < len(files.describe_output(kind, array)) <= 40


def test_pictures_are_rounded_to_8_bits():
  image = np.array([[[0.0, 1.0, 0.5], [np.nan, 2.0, -1.0]]], np.float32)
  np.testing.assert_array_equal(files.image_bytes(image), [[[0, 255, 128], [0, 255, 0]]])
  np.testing.assert_allclose(files.image_floats(files.image_bytes(image))[0, 0], [0, 1, 128 / 255])
  for encode in (files.encode_png, files.encode_webp):
    again = files.read_image(io.BytesIO(encode(image)))
    np.testing.assert_array_equal(again, files.image_bytes(image))


RED, WHITE, GREY = [255, 0, 0], [255, 255, 255], [117, 117, 117]
# a picture of two pixels, options of its file, and what is seen
SEEN = {
  'alpha': ([[[255, 0, 0, 255], [9, 9, 9, 0]]], 'uint8', {}, [RED, WHITE]),
  # a PNG without alpha may name a colour that is transparent
  'colour': ([[RED, [0, 0, 255]]], 'uint8', {'transparency': (0, 0, 255)}, [RED, WHITE]),
  'grey': ([[117, 0]], 'uint8', {'transparency': 0}, [GREY, WHITE]),
  '16 bits': ([[30000, 65535]], 'uint16', {}, [GREY, WHITE]),
  '16 bits and a colour': ([[30000, 0]], 'uint16', {'transparency': 0}, [GREY, WHITE]),
}


@pytest.mark.parametrize('name', SEEN)
def test_transparency_is_white_and_16_bits_are_8(name):
  pixels, dtype, options, seen = SEEN[name]
  buffer = io.BytesIO()
  Image.fromarray(np.array(pixels, dtype)).save(buffer, 'png', **options)
  assert files.read_image(buffer).tolist() == [seen]
  assert files.read_image(buffer, upright=False).tolist() == [seen]


def test_pictures_are_upright_but_for_fid(tmp_path):
  """A camera that was held on its side, and a CMYK file; a hidden file is no picture."""
  sideways = np.zeros((2, 3, 3), np.uint8)
  sideways[0, 0] = RED
  note = Image.Exif()
  note[0x0112] = 6
  Image.fromarray(sideways).save(tmp_path / 'a.png', exif=note)
  upright = files.read_image(tmp_path / 'a.png')
  assert upright.shape == (3, 2, 3) and upright[0, 1].tolist() == RED
  Image.new('CMYK', (2, 2), (0, 255, 255, 0)).save(tmp_path / 'b.jpg')
  np.testing.assert_allclose(files.read_image(tmp_path / 'b.jpg'), [[RED] * 2] * 2, atol=2)
  (tmp_path / '._a.png').write_bytes(b'a leftover')
  np.testing.assert_array_equal(next(inception.read_pictures(tmp_path)), sideways)
  assert len(list(inception.read_pictures(tmp_path))) == 2


def test_sound_and_film_keep_their_rates(tmp_path):
  path = files.save_output(tmp_path / 'a', 'audio', EXAMPLES['audio'][:, 0], rate=8000)
  with wave.open(os.fspath(path)) as file:
    assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, 50)
  with Image.open(io.BytesIO(files.encode_output('video', EXAMPLES['video'], rate=4))) as film:
    film.seek(1)
    film.load()
    assert film.n_frames == 3 and film.info['duration'] == 250


def test_numbers_that_are_not_finite_are_null(tmp_path):
  path = files.save_output(tmp_path / 'a', 'boxes', np.array([[1.0, np.nan]]))
  assert path.read_text() == '[[1.0, null]]\n'


def test_a_file_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / 'a.txt'
  files.write_atomic(path, b'one')
  with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
    temporary.write_bytes(b'tw')
    raise RuntimeError
  assert path.read_bytes() == b'one' and list(epath.Path(tmp_path).iterdir()) == [path]


@pytest.mark.parametrize(
  ('kind', 'array', 'message'),
  [
    ('smell', np.zeros(3), "output kind 'smell': must be one of image, video"),
    ('image', np.zeros((4, 4)), r"output kind 'image': shape \(4, 4\); must be \[H, W, 3\]"),
    ('video', np.zeros((4, 4, 3)), r'must be \[T, H, W, 3\]'),
    ('audio', np.zeros((1, 4, 3)), r'must be \[S\] or \[S, channels\]'),
  ],
)
def test_what_is_none_of_its_kind_is_named(kind, array, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    files.save_output(tmp_path / 'a', kind, array)
  with pytest.raises(ConfigError, match='cannot be read as a picture'):
    files.read_image(io.BytesIO(b'no picture'))
