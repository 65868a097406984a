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


def test_shortest_side_crop_and_normalise():
  picture = np.random.default_rng(1).random((2, 3, 30, 47, 3), np.float32)
  small = images.resize_shortest(picture, 20)
  assert small.shape == (2, 3, 20, 31, 3)
  crop = images.center_crop(small, 15)
  np.testing.assert_array_equal(crop, small[..., 2:17, 8:23, :])
  np.testing.assert_allclose(
    images.normalize_channels(crop, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))[..., 2],
    (crop[..., 2] - 0.3) / 0.5,
    rtol=1e-6,
  )  # fmt: skip
  with pytest.raises(ConfigError, match='crop of 40 from a picture of 30 x 47'):
    images.center_crop(picture, 40)


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
