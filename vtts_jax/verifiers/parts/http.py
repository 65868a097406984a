"""Helpers of verifiers on the host: texts as arrays, pictures as PNG, and requests.

Prompts reach a host verifier as arrays, like every other verifier: `pack_texts` writes them,
`unpack_texts` reads them. `ask_endpoint` repeats a failed request. It is not taken from a library,
because its rules are special: an answer that is not JSON counts as a failure, and no error message
may repeat what the endpoint said.

Letters: B prompts · U bytes of the longest text.
"""

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.media import files


def check_at_least(ver, **lowest: float) -> None:
  """Raises `ConfigError` if a setting of a verifier is below its lowest allowed value."""
  for setting, low in lowest.items():
    # `not >=` refuses NaN too, `<` would not
    if not getattr(ver, setting) >= low:
      raise ConfigError(f'verifier.{setting}={getattr(ver, setting)}: must be at least {low}')


def pack_texts(texts: Sequence[str]) -> dict[str, np.ndarray]:
  """Texts as arrays: `{'utf8': uint8 [B, U], 'bytes': int32 [B]}`."""
  # bytes, because numpy strings cannot be jit arguments
  raw = [np.frombuffer(text.encode('utf-8'), np.uint8) for text in texts]
  width = max(map(len, raw), default=0)
  return {
    'utf8': np.stack([np.pad(row, (0, width - len(row))) for row in raw]),
    'bytes': np.array([len(row) for row in raw], np.int32),
  }


def unpack_texts(vctx) -> list[str]:
  """The texts that `pack_texts` packed."""
  # the lengths tell padding from a text that ends in zero bytes
  rows, lengths = np.asarray(vctx['utf8']), np.asarray(vctx['bytes'])
  return [row[:length].tobytes().decode('utf-8') for row, length in zip(rows, lengths)]


def base64_png(image: np.ndarray) -> str:
  """A picture `[H, W, 3]` in [0, 1] as PNG in base64; NaN becomes black."""
  return base64.b64encode(files.encode_png(image)).decode()


def ask_endpoint(ver, request: urllib.request.Request, read: Callable):
  """Sends a request until its answer can be read; returns `read(decoded JSON)`.

  The request is repeated after status 429 or 5xx, after no answer, and after an answer that is not
  JSON or lacks a key.

  Args:
    ver: a verifier with `names`, `url`, `timeout`, `retries` and `backoff`.
    read: takes the decoded JSON; its KeyError counts as a failed request.

  Raises:
    RuntimeError: the endpoint refused (any other 4xx), or every request failed. The message repeats
      nothing that the endpoint said, because the endpoint has seen the headers with the key.
  """
  endpoint = f'verifier {", ".join(ver.names)}: {ver.url}'
  for attempt in range(ver.retries + 1):
    if attempt:
      time.sleep(ver.backoff * 2 ** (attempt - 1))
    try:
      with urllib.request.urlopen(request, timeout=ver.timeout) as answer:
        return read(json.load(answer))
    except urllib.error.HTTPError as error:
      error.close()
      # the standard phrase of the status code, never the phrase that the endpoint sent
      problem = f'{error.code} {http.client.responses.get(error.code, "")}'.strip()
      # the endpoint would refuse the same request again
      if error.code < 500 and error.code != 429:
        raise RuntimeError(f'{endpoint} refused: {problem}') from None
    except (json.JSONDecodeError, UnicodeDecodeError, http.client.HTTPException) as error:
      problem = type(error).__name__  # the error's text may quote the answer
    except (urllib.error.URLError, TimeoutError, ConnectionError, KeyError) as error:
      problem = repr(error)
  raise RuntimeError(
    f'{endpoint} failed {ver.retries + 1} times; the last: {problem}. '
    'Raise verifier.retries or verifier.timeout, or repair the endpoint'
  )
