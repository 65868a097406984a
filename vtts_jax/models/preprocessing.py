"""Reads how a checkpoint's own files say that pictures become the network's input.

transformers writes `preprocessor_config.json` (version 5 also `processor_config.json`, where it is
the entry `image_processor`), open_clip the entry `preprocess_cfg` of `open_clip_config.json`. A
checkpoint may have both: that of the library whose layout its weights have counts. Checked against
transformers' image processors in tests/parity; open_clip's rules are of its transform.py.

Letter: S side of the network's square.
"""

import dataclasses

from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import Preprocessing
from vtts_jax.models.clip.modeling import MEAN, STD

# classes of transformers, and what they do where a file does not say it
_EVERY = {
  'do_resize': True, 'resample': 3, 'do_rescale': True, 'rescale_factor': 1 / 255,
  'do_normalize': True,
}  # fmt: skip
PROCESSORS = {
  'CLIPImageProcessor': _EVERY | {
    'size': {'shortest_edge': 224}, 'do_center_crop': True, 'crop_size': 224, 'image_mean': MEAN,
    'image_std': STD,
  },
  'SiglipImageProcessor': _EVERY | {
    'size': {'height': 224, 'width': 224}, 'do_center_crop': False, 'image_mean': 0.5,
    'image_std': 0.5,
  },
}  # fmt: skip
# steps of a picture that are known; a file may switch any other 'do_' step off, not on
STEPS = ('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize', 'do_convert_rgb')
RESAMPLE = {1: 'lanczos', 2: 'bilinear', 3: 'bicubic'}  # PIL's numbers
# 'random' is a filter of open_clip's training; what is scored is resized by the bicubic one
INTERPOLATION = {'bicubic': 'bicubic', 'bilinear': 'bilinear', 'random': 'bicubic'}


def read_preprocessing(source, released: Preprocessing, side: int, processor: str) -> Preprocessing:
  """Returns the preprocessing of a checkpoint; that of the release if its files name no other.

  A file that says of all but the crop's half pixel what was released has the release's: then the
  score's published pipeline rounds, else the library that wrote the file.

  Args:
    source: `checkpoints.Source`.
    released: the family's own preprocessing.
    side: S.
    processor: key of `PROCESSORS`, for a file that does not name its class.

  Raises:
    ConfigError: a preprocessing that is not supported, or one that does not make S x S.
  """
  ours = source.config.get('preprocess_cfg')
  ours = ours or source.read_sibling('open_clip_config.json').get('preprocess_cfg')
  theirs = source.read_sibling('processor_config.json').get('image_processor')
  theirs = theirs or source.read_sibling('preprocessor_config.json')
  for name, said in (('preprocess_cfg', ours), ('image_processor', theirs)):
    if said and not isinstance(said, dict):
      raise ConfigError(f'{source.where}: {name}={said!r}: must be a mapping')
  # the files belong to the library whose names the weights have
  if ours and ('visual.conv1.weight' in source or not theirs):
    found = _of_open_clip(ours, _Naming(source.where, 'preprocess_cfg'))
  elif theirs:
    found = _of_transformers(theirs, side, processor, _Naming(source.where, 'preprocessor_config'))
  else:
    return released
  return released if dataclasses.replace(found, crop=released.crop) == released else found


@dataclasses.dataclass(frozen=True)
class _Naming:
  """Errors that name the checkpoint, the file's entry, its value and what is allowed."""

  where: str
  file: str

  def refuse(self, name, value, allowed):
    return ConfigError(f'{self.where}: {self.file}: {name}={value!r}: must be {allowed}')

  def read_three(self, name, value) -> tuple[float, float, float]:
    """A number, or one for each channel, as three."""
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(map(_is_number, values)):
      raise self.refuse(name, value, 'a number or three')
    return tuple(map(float, values))


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def _of_open_clip(options, naming) -> Preprocessing:
  """Reads a `preprocess_cfg`. Its size is not read: open_clip takes the model's, and so do we."""
  # an entry that is null has its default, as in open_clip
  said = {name: value for name, value in options.items() if value is not None}
  mode, method = said.get('resize_mode', 'shortest'), said.get('interpolation', 'bicubic')
  fill = said.get('fill_color', 0)
  if mode not in ('shortest', 'longest', 'squash'):
    raise naming.refuse('resize_mode', mode, "one of 'shortest', 'longest', 'squash'")
  if not isinstance(method, str) or method not in INTERPOLATION:
    raise naming.refuse('interpolation', method, f'one of {", ".join(map(repr, INTERPOLATION))}')
  if not isinstance(fill, int) or not 0 <= fill <= 255:
    raise naming.refuse('fill_color', fill, 'a grey in 0 .. 255')
  if said.get('mode', 'RGB') != 'RGB':
    raise naming.refuse('mode', said['mode'], "'RGB'")
  mean = naming.read_three('mean', said.get('mean', MEAN))
  std = naming.read_three('std', said.get('std', STD))
  # colour padding exists with the longer side only
  fill = fill / 255 if mode == 'longest' else 0.0
  return Preprocessing(mean, std, mode, INTERPOLATION[method], fill=fill)


def _of_transformers(options, side, processor, naming) -> Preprocessing:
  """Reads an image processor of transformers, as far as it makes S x S."""
  name = options.get('image_processor_type') or options.get('feature_extractor_type') or processor
  # one class has had several names: an older one, and one for each of its implementations
  name = str(name).replace('FeatureExtractor', 'ImageProcessor')
  name = name.removesuffix('Fast').removesuffix('Pil')
  if name not in PROCESSORS:
    raise naming.refuse('image_processor_type', name, f'one of {", ".join(PROCESSORS)}')
  said = PROCESSORS[name] | {k: v for k, v in options.items() if v is not None}
  unknown = [k for k, v in said.items() if k.startswith('do_') and v and k not in STEPS]
  if unknown:
    raise naming.refuse(unknown[0], said[unknown[0]], 'false: this step is not supported')
  mode, size = _read_size(said, naming) if said['do_resize'] else ('keep', 0)
  if said['do_center_crop']:
    made = _square_side(said.get('crop_size'))
    if made is None:
      raise naming.refuse('crop_size', said.get('crop_size'), 'a number or a square')
  elif mode == 'squash':
    made = size
  else:
    # other pictures than squares would keep another shape than the network's
    raise naming.refuse('do_center_crop', False, 'true, or size a square of height and width')
  if made != side:
    raise ConfigError(
      f'{naming.where}: {naming.file} makes pictures of {made} x {made}; the network reads '
      f'{side} x {side}'
    )
  if not _is_number(said['resample']) or said['resample'] not in RESAMPLE:
    allowed = ', '.join(f'{number} ({method})' for number, method in RESAMPLE.items())
    raise naming.refuse('resample', said['resample'], f'one of {allowed}')
  mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  if said['do_normalize']:
    mean, std = (naming.read_three(k, said[k]) for k in ('image_mean', 'image_std'))
  if not _is_number(said['rescale_factor']) or said['rescale_factor'] <= 0:
    raise naming.refuse('rescale_factor', said['rescale_factor'], 'a number > 0')
  # the mean is taken from bytes times this; ours are bytes / 255
  factor = 255 * said['rescale_factor'] if said['do_rescale'] else 255.0
  # 1 / 255 written in decimals
  if abs(factor - 1) > 1e-6:
    mean, std = (tuple(v / factor for v in values) for values in (mean, std))
  return Preprocessing(
    mean, std, mode, RESAMPLE[said['resample']], 0 if size == side else size, 'transformers'
  )


def _read_size(said, naming):
  """Returns (mode, size) of `size`: a number or `shortest_edge` is the shorter side."""
  size = said['size']
  if isinstance(size, dict) and set(size) == {'shortest_edge'}:
    size = size['shortest_edge']
  mode = 'squash' if isinstance(size, dict) else 'shortest'
  found = _square_side(size)
  if found is None:
    raise naming.refuse('size', said['size'], 'a number, {shortest_edge} or a square')
  return mode, found


def _square_side(size):
  """Returns the side of a number or of a square {height, width}, else None."""
  if isinstance(size, dict):
    square = set(size) == {'height', 'width'} and size['height'] == size['width']
    size = size['height'] if square else None
  whole = isinstance(size, int) and not isinstance(size, bool)
  return size if whole and size > 0 else None
