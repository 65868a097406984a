"""Scores from outside XLA: a Python callable, or a batch HTTP endpoint; scored between ask and
tell.

The endpoint gets one POST a batch: JSON `{"prompts": [...], "images": [<base64 PNG>, ...]}`, and
answers `{"scores": [...]}`, one finite or null number an image (null: could not be scored, never
selected).
"""

import base64
import dataclasses
import http.client
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import numpy as np

from vtts_jax import components, core
from vtts_jax.errors import ConfigError

_ONE = threading.Lock()  # batches are scored side by side; a Python function need not bear that


@dataclasses.dataclass(frozen=True)
class Host(core.Verifier):
  """A scorer on the host; searches with it are stepped.

  Attributes:
    score_fn: called with (prompts, images `[R, H, W, 3]` float32 in [0, 1]), returns R scores,
      larger is better; one call at a time, from any thread.
    url: or an endpoint as described above; exactly one of the two.
    name: what the score is called.
    batch: images in one call.
    timeout: seconds for one request.
    retries: further tries after a failed request, waiting 1, 2, 4, ... times `backoff` seconds.
    backoff: seconds.
  """

  score_fn: Callable[[Sequence[str], np.ndarray], Sequence[float]] | None = None
  url: str = ''
  name: str = 'host'
  batch: int = 64
  timeout: float = 60.0
  retries: int = 3
  backoff: float = 1.0

  jittable = False

  def __post_init__(self):
    if (self.score_fn is None) == (not self.url):
      raise ConfigError(
        'verifiers.host: give exactly one of score_fn (Python) and url (an http endpoint)'
      )
    if self.url and not self.url.startswith(('http://', 'https://')):
      raise ConfigError(f'verifier.url={self.url!r}: must start with http:// or https://')
    for field, low in (('batch', 1), ('retries', 0), ('timeout', 0), ('backoff', 0)):
      if not getattr(self, field) >= low:
        raise ConfigError(f'verifier.{field}={getattr(self, field)}: must be at least {low}')

  @property
  def names(self):
    return (self.name,)

  def tokenize(self, texts):
    return utf8(texts)

  def score(self, params, vctx, images, **signals):
    images = np.asarray(images)
    b, m = images.shape[:2]
    prompts = [text for text in texts_of(vctx) for _ in range(m)]
    flat = images.reshape(b * m, *images.shape[2:])
    scores = []
    for low in range(0, b * m, self.batch):
      part = prompts[low : low + self.batch]
      shown = flat[low : low + self.batch]
      if self.score_fn is None:
        got = self._post(part, shown)
      else:
        with _ONE:
          got = self.score_fn(part, shown)
      got = np.asarray([np.nan if s is None else s for s in got], np.float32)
      if got.shape != (len(part),):
        raise ValueError(
          f'verifier {self.name}: {len(part)} images were sent and {got.shape} scores came back'
        )
      scores.append(got)
    return {self.name: np.concatenate(scores).reshape(b, m)}

  def _post(self, prompts, images):
    body = json.dumps({'prompts': prompts, 'images': [png(i) for i in images]}).encode()
    request = urllib.request.Request(self.url, body, {'Content-Type': 'application/json'})
    return ask(self, request, lambda answer: answer['scores'])

  def cost(self, op):
    return core.Cost(verify=float(op == 'score'))


def utf8(texts: Sequence[str]) -> dict[str, np.ndarray]:
  """Texts as arrays, for verifiers whose `score` runs on the host; `texts_of` reads them."""
  raw = [np.frombuffer(t.encode('utf-8'), np.uint8) for t in texts]
  width = max((len(r) for r in raw), default=0)
  return {
    'utf8': np.stack([np.pad(r, (0, width - len(r))) for r in raw]),
    'bytes': np.array([len(r) for r in raw], np.int32),
  }


def texts_of(vctx) -> list[str]:
  """What `utf8` was made of."""
  rows, lengths = np.asarray(vctx['utf8']), np.asarray(vctx['bytes'])
  return [row[:length].tobytes().decode('utf-8') for row, length in zip(rows, lengths)]


def png(image: np.ndarray) -> str:
  """A picture `[H, W, 3]` in [0, 1] as base64 of a PNG; NaN is black."""
  from PIL import Image

  pixels = np.clip(np.rint(np.nan_to_num(image) * 255), 0, 255).astype(np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'png')
  return base64.b64encode(buffer.getvalue()).decode()


def ask(ver, request: urllib.request.Request, read: Callable):
  """`read` of the JSON that is answered; asked again after 429, 5xx, no or an odd answer.

  Args:
    ver: the verifier, with its `names`, `url`, `timeout`, `retries` and `backoff`.
    read: what is wanted of the answer; its KeyError is one more failure.

  Raises:
    RuntimeError: refused, or failed every time. It repeats no word of the endpoint's, which has
      seen the request's headers.
  """
  who = f'verifier {", ".join(ver.names)}: {ver.url}'
  for attempt in range(ver.retries + 1):
    if attempt:
      time.sleep(ver.backoff * 2 ** (attempt - 1))
    try:
      with urllib.request.urlopen(request, timeout=ver.timeout) as answer:
        return read(json.load(answer))
    except urllib.error.HTTPError as err:
      err.close()
      said = f'{err.code} {http.client.responses.get(err.code, "")}'.strip()
      if err.code < 500 and err.code != 429:  # asking again would not help
        raise RuntimeError(f'{who} refused: {said}') from None
    except (json.JSONDecodeError, UnicodeDecodeError, http.client.HTTPException) as err:
      said = type(err).__name__
    except (urllib.error.URLError, TimeoutError, ConnectionError, KeyError) as err:
      said = repr(err)
  raise RuntimeError(
    f'{who} failed {ver.retries + 1} times; the last: {said}. '
    'Raise verifier.retries or verifier.timeout, or mend the endpoint'
  )


def build(**given) -> Host:
  return components.build_dataclass(Host, **given)
