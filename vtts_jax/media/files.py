"""Files of what a candidate shows: reads pictures, writes every kind of output.

This is the one place that knows endings and encodings. Images are read as 8 bit RGB, as a person
sees them: upright, with transparency laid on white and 16 bits scaled to 8. Files are written whole
or not at all. An output is saved by its kind (`core.Output`):

  kind     array                                        file
  image    `[H, W, 3]` in [0, 1], or uint8              .webp, lossless (or .png)
  video    `[T, H, W, 3]`, likewise                     .webp, animated
  audio    `[S]` or `[S, channels]` in [-1, 1]          .wav, 16 bit
  text     `[L]` bytes of UTF-8, 0 after the end        .txt
  tokens, boxes, scalar   numbers of any shape          .json
  mask     `[H, W]` or `[K, H, W]`                      .npz under 'mask'

Paths may be on a bucket (`etils.epath`).
Letters: H W sides, T frames, S samples, L bytes, K masks.
"""

import base64
import contextlib
import io
import json
import uuid
import wave
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from vtts_jax.errors import ConfigError

IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
OUTPUT_ENDINGS = {
  'image': '.webp',
  'video': '.webp',
  'audio': '.wav',
  'text': '.txt',
  'tokens': '.json',
  'boxes': '.json',
  'scalar': '.json',
  'mask': '.npz',
}
# samples of audio and frames of video per second, where an output does not say its own
SAMPLE_RATE = 16_000
FRAME_RATE = 8


# ------------------------------------------------------------------------------------ whole files


@contextlib.contextmanager
def atomic_path(path) -> Iterator[epath.Path]:
  """Yields a temporary path beside `path`, so that no reader ever sees half a file.

  The temporary file is renamed to `path` at the end and removed after an error. Missing folders are
  made.
  """
  path = epath.Path(path)
  # beside the target: renaming is atomic only within one file system
  path.parent.mkdir(parents=True, exist_ok=True)
  # the ending stays, because some writers append one that they miss
  temporary = path.parent / f'.{uuid.uuid4().hex[:8]}.{path.name}'
  try:
    yield temporary
    temporary.replace(path)
  # an interrupt must not leave the temporary file behind either
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_atomic(path, data: bytes) -> None:
  """Writes a file whole or not at all."""
  with atomic_path(path) as temporary:
    temporary.write_bytes(data)


# ------------------------------------------------------------------------------------------ images


def read_image(source, upright: bool = True) -> np.ndarray:
  """Reads a picture (path or open file) as uint8 `[H, W, 3]`; transparency is laid on white.

  Args:
    source: path or open file.
    upright: whether a camera's note of how it was held (EXIF orientation) turns the picture, as it
      does in any viewer. FID is computed without it, as in pytorch-fid.

  Raises:
    ConfigError: the picture cannot be read; the message names a path.
  """
  try:
    with _open_binary(source) as file, Image.open(file) as picture:
      # PIL reads lazily: a truncated file fails here and not later
      picture.load()
      if upright:
        picture = ImageOps.exif_transpose(picture)
      if picture.mode.startswith('I'):
        return _read_deep_grey(picture)
      # converting to RGB drops the alpha channel and shows colours that were meant to be hidden;
      # PNGs without one may name a colour that is transparent
      if picture.mode in ('RGBA', 'LA', 'P', 'PA') or 'transparency' in picture.info:
        over = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', over.size, 'white'), over)
      return np.asarray(picture.convert('RGB'))
  except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
    where = '' if hasattr(source, 'read') else f'{source}: '
    raise ConfigError(f'{where}cannot be read as a picture: {error}') from None


def _read_deep_grey(picture):
  """Returns a grey picture of 16 bits as uint8 `[H, W, 3]`."""
  # PIL's own conversion cuts values off at 255 and leaves white almost everywhere
  grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
  shown = np.rint(grey / 257).astype(np.uint8)
  if 'transparency' in picture.info:
    shown[grey == picture.info['transparency']] = 255
  return np.repeat(shown[..., None], 3, axis=-1)


def _open_binary(source):
  if hasattr(source, 'read'):
    return contextlib.nullcontext(source)
  return epath.Path(source).open('rb')


def image_bytes(image) -> np.ndarray:
  """Returns pictures `[..., H, W, 3]` in [0, 1] as uint8, NaN as black; uint8 stays as it is."""
  image = np.asarray(image)
  if image.dtype == np.uint8:
    return image
  return np.clip(np.rint(np.nan_to_num(image) * 255), 0, 255).astype(np.uint8)


def image_floats(image) -> np.ndarray:
  """Returns pictures `[..., H, W, 3]` as float32 in [0, 1]; floats stay as they are."""
  image = np.asarray(image)
  return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image


def encode_png(image) -> bytes:
  """Encodes a picture `[H, W, 3]`, uint8 or in [0, 1], as PNG."""
  return _encode_picture(image, 'png')


def encode_webp(image) -> bytes:
  """Encodes a picture `[H, W, 3]`, uint8 or in [0, 1], as lossless WebP."""
  # method 0 is the fastest; the files are a little larger
  return _encode_picture(image, 'webp', lossless=True, method=0)


def _encode_picture(image, kind, **options):
  buffer = io.BytesIO()
  Image.fromarray(image_bytes(image)).save(buffer, kind, **options)
  return buffer.getvalue()


# ----------------------------------------------------------------------------------------- outputs


def save_output(path, kind: str, array, rate: int = 0) -> epath.Path:
  """Saves what a candidate shows and returns the path written.

  Args:
    path: where to save. A path without one of the kind's endings gets the kind's own ending; an
      image may be a '.png' as well.
    kind: kind of `core.Output`.
    array: the output without candidate axes; shapes are in the table above.
    rate: samples of audio or frames of video per second; 0 for `SAMPLE_RATE` or `FRAME_RATE`.

  Raises:
    ConfigError: an unknown kind, or an array whose shape is not of that kind.
  """
  if kind not in OUTPUT_ENDINGS:
    raise ConfigError(f'output kind {kind!r}: must be one of {", ".join(OUTPUT_ENDINGS)}')
  path = epath.Path(path)
  # the first ending is the kind's own
  endings = (OUTPUT_ENDINGS[kind], *(['.png'] if kind == 'image' else []))
  if path.suffix not in endings:
    path = path.parent / (path.name + endings[0])
  write_atomic(path, encode_output(kind, array, path.suffix, rate))
  return path


def encode_output(kind: str, array, ending: str = '', rate: int = 0) -> bytes:
  """Returns the bytes of the file that `save_output` writes; arguments and errors as there."""
  array = np.asarray(array)
  if kind == 'image':
    _check_shape(kind, array, array.ndim == 3 and array.shape[-1] == 3, '[H, W, 3]')
    return encode_png(array) if ending == '.png' else encode_webp(array)
  if kind == 'video':
    _check_shape(kind, array, array.ndim == 4 and array.shape[-1] == 3, '[T, H, W, 3]')
    return _encode_video(array, rate or FRAME_RATE)
  if kind == 'audio':
    _check_shape(kind, array, array.ndim in (1, 2), '[S] or [S, channels]')
    return _encode_wav(array, rate or SAMPLE_RATE)
  if kind == 'text':
    return text_of(array).encode('utf-8')
  if kind == 'mask':
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=array)
    return buffer.getvalue()
  # JSON has no NaN: what is not finite is null
  values = np.where(np.isfinite(array), array.astype(object), None)
  return (json.dumps(values.tolist()) + '\n').encode()


def _check_shape(kind, array, fits, shape):
  if not fits:
    raise ConfigError(f'output kind {kind!r}: shape {array.shape}; must be {shape}')


def _encode_video(frames, rate):
  first, *others = [Image.fromarray(frame) for frame in image_bytes(frames)]
  buffer = io.BytesIO()
  # lossless: a video of a search may be scored again
  first.save(
    buffer, 'webp', save_all=True, append_images=others, duration=round(1000 / rate), loop=0,
    lossless=True, method=0,
  )  # fmt: skip
  return buffer.getvalue()


def _encode_wav(samples, rate):
  # 32767 and not 32768, so that -1 and 1 read back as they were
  whole = np.rint(np.clip(np.nan_to_num(samples), -1, 1) * 32767).astype('<i2')
  buffer = io.BytesIO()
  with wave.open(buffer, 'wb') as file:
    file.setnchannels(1 if whole.ndim == 1 else whole.shape[1])
    file.setsampwidth(2)
    file.setframerate(rate)
    file.writeframes(whole.tobytes())
  return buffer.getvalue()


def text_of(array) -> str:
  """Returns the text of UTF-8 bytes `[L]`; it ends at the first 0."""
  data = np.asarray(array).astype(np.uint8).tobytes()
  return data.partition(b'\0')[0].decode('utf-8', 'replace')


def data_uri(data: bytes, media_type: str) -> str:
  """Returns a `data:` address of bytes, such as those of an 'image/png'."""
  return f'data:{media_type};base64,{base64.b64encode(data).decode()}'


def describe_output(kind: str, array, width: int = 40) -> str:
  """Describes an output that is no picture in at most `width` characters.

  This is the text itself, up to 8 numbers, or the kind and its shape.
  """
  array = np.asarray(array)
  if kind == 'text':
    words = text_of(array)
  elif array.size <= 8:
    words = ' '.join(f'{v:.4g}' for v in array.reshape(-1).tolist())
  else:
    words = f'{kind} {" x ".join(map(str, array.shape))}'
  return words if len(words) <= width else words[: width - 3] + '...'


def read_output(path, kind: str):
  """Reads what `save_output` wrote.

  Pictures and frames come back as uint8, audio as float32, a text as str, other kinds as numbers.

  Raises:
    ConfigError: an unknown kind, or a picture that cannot be read.
  """
  path = epath.Path(path)
  if kind == 'image':
    return read_image(path)
  if kind == 'text':
    return path.read_text()
  if kind in ('tokens', 'boxes', 'scalar'):
    return np.array(json.loads(path.read_text()))
  with path.open('rb') as file:
    if kind == 'video':
      with Image.open(file) as clip:
        # a picture of one frame may have no `n_frames`
        frames = []
        for i in range(getattr(clip, 'n_frames', 1)):
          clip.seek(i)
          frames.append(np.asarray(clip.convert('RGB')))
      return np.stack(frames)
    if kind == 'audio':
      with wave.open(file) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), '<i2').astype(np.float32)
        channels = sound.getnchannels()
      return (samples if channels == 1 else samples.reshape(-1, channels)) / 32767
    if kind == 'mask':
      with np.load(file) as arrays:
        return arrays['mask']
  raise ConfigError(f'output kind {kind!r}: must be one of {", ".join(OUTPUT_ENDINGS)}')
