"""Preprocessing inside jit against PIL."""

import jax
import numpy as np
import pytest
from PIL import Image

from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess as images

SIZES = [
  ((61, 40), (24, 33)), ((40, 61), (33, 24)), ((16, 20), (37, 41)), ((9, 9), (9, 9)),
  ((75, 65), (64, 56)), ((53, 41), (30, 30)), ((53, 41), (31, 30)), ((91, 31), (61, 19)),
  ((64, 64), (224, 224)), ((500, 380), (61, 40)),
]  # fmt: skip


@pytest.mark.parametrize('method', ['bilinear', 'bicubic', 'lanczos'])
@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_resize_is_pil(method, old, new):
  rng = np.random.default_rng(0)
  picture = rng.integers(0, 256, (*old, 3), np.uint8)  # noise: the filters overshoot everywhere
  want = Image.fromarray(picture).resize(new[::-1], getattr(Image.Resampling, method.upper()))
  have = jax.jit(lambda x: images.resize_images(x, new, method))(picture[None] / np.float32(255))[0]
  np.testing.assert_array_equal(np.rint(np.asarray(have) * 255), want)


def test_channels_are_normalised():
  picture = np.random.default_rng(1).random((2, 3, 30, 47, 3), np.float32)
  made = images.normalize_channels(picture, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
  np.testing.assert_allclose(made[..., 2], (picture[..., 2] - 0.3) / 0.5, rtol=1e-6)


# (height, width), options, size after the resize, (top, left) of the crop; negative: padding
FITS = {
  'sdxl': ((832, 1216), {}, (224, 327), (0, 52)),  # 51.5: torchvision takes the even pixel
  'sdxl floor': ((832, 1216), {'crop': 'transformers'}, (224, 327), (0, 51)),
  'small': ((17, 23), {}, (224, 303), (0, 40)),
  'small floor': ((17, 23), {'crop': 'transformers'}, (224, 303), (0, 39)),
  'tall': ((61, 40), {'size': 256, 'method': 'bilinear'}, (390, 256), (83, 16)),
  'squash': ((40, 61), {'mode': 'squash'}, (224, 224), (0, 0)),
  'longest': ((40, 61), {'mode': 'longest', 'fill': 1.0}, (147, 224), (-38, 0)),
  'keep': ((225, 40), {'mode': 'keep', 'crop': 'transformers'}, (225, 40), (0, -92)),
  'thin': ((4, 4000), {}, (224, 224000), (0, 111888)),
}


@pytest.mark.parametrize('name', FITS)
def test_pictures_are_resized_and_cut_as_by_pil(name):
  """By matrices and on the host: PIL's resize of the whole, then a slice or grey around. The thin
  one would need a matrix of 4000 x 224000 if all of it were made."""
  old, options, size, (top, left) = FITS[name]
  how = images.Preprocessing((0, 0, 0), (1, 1, 1), **options)
  picture = np.random.default_rng(0).integers(0, 256, (*old, 3), np.uint8)
  resample = getattr(Image.Resampling, how.method.upper())
  whole = np.asarray(Image.fromarray(picture).resize(size[::-1], resample))
  want = np.full((224, 224, 3), round(how.fill * 255), np.uint8)
  part = whole[max(top, 0) :, max(left, 0) :][:224, :224]
  want[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]] = part
  have = how.fit_images(picture[None] / np.float32(255), 224)[0]
  np.testing.assert_array_equal(np.rint(np.asarray(have) * 255), want)
  np.testing.assert_array_equal(how.fit_picture(picture, 224), want)


def test_what_cannot_be_preprocessed_is_said():
  for options, said in (
    ({'mode': 'crop'}, "mode='crop': must be one of 'shortest'"),
    ({'method': 'box'}, "method='box': must be one of 'bilinear'"),
    ({'crop': 'pil'}, "crop='pil': must be one of 'torchvision', 'transformers'"),
  ):
    with pytest.raises(ConfigError, match=said):
      images.Preprocessing((0, 0, 0), (1, 1, 1), **options)
  how = images.Preprocessing((0, 0, 0), (1, 1, 1), mode='longest')
  for fit, picture in ((how.fit_images, np.float32), (how.fit_picture, np.uint8)):
    with pytest.raises(ConfigError, match='a picture of 4 x 4000 is too thin: .* to 0 x 224'):
      fit(np.zeros((4, 4000, 3), picture), 224)


def test_what_is_no_picture_is_said():
  good = np.full((3, 4, 4, 3), 0.5, np.float32)
  images.check_images(good)
  for value in (np.nan, 1.5, -0.1, np.inf):
    bad = good.copy()
    bad[1, 2, 2, 0] = value
    with pytest.raises(ConfigError, match='picture 1 has values .* must be in'):
      images.check_images(bad)
  with pytest.raises(ConfigError, match='dtype uint8'):
    images.check_images(good.astype(np.uint8))
  with pytest.raises(ConfigError, match=r'shape \(3, 3, 4, 4\)'):
    images.check_images(good.transpose(0, 3, 1, 2))


def test_floats_are_neither_rounded_nor_cut():
  picture = np.zeros((1, 8, 8, 3), np.float32)
  picture[:, :, 4:] = 1
  small = images.resize_images(picture, (8, 5), rounded=False)
  assert small.min() < -0.01 and small.max() > 1.01  # bicubic overshoots beside an edge
  resized = images.resize_images(picture, (8, 5))
  np.testing.assert_array_equal(images.quantize_pixels(small), resized)
