"""What the verifiers on the host share: texts as arrays, pictures as PNG, and requests.

A verifier on the host still gets its prompts as arrays, as every other does: `pack_texts` makes
them, `unpack_texts` reads them. `ask_endpoint` repeats a request that failed. No library that this
package depends on does so by the same rule (an answer that is no JSON counts as a failure, and no
error may repeat what the endpoint said), so the loop stands here.

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
  """Raises `ConfigError` where a setting of a verifier is below the lowest value allowed."""
  for setting, low in lowest.items():
    if not getattr(ver, setting) >= low:  # so written, NaN is refused too
      raise ConfigError(f'verifier.{setting}={getattr(ver, setting)}: must be at least {low}')


def pack_texts(texts: Sequence[str]) -> dict[str, np.ndarray]:
  """Texts as arrays: `{'utf8': uint8 [B, U], 'bytes': int32 [B]}`."""
  raw = [np.frombuffer(text.encode('utf-8'), np.uint8) for text in texts]
  width = max(map(len, raw), default=0)
  return {
    'utf8': np.stack([np.pad(row, (0, width - len(row))) for row in raw]),
    'bytes': np.array([len(row) for row in raw], np.int32),
  }


def unpack_texts(vctx) -> list[str]:
  """The texts that `pack_texts` made arrays of."""
  rows, lengths = np.asarray(vctx['utf8']), np.asarray(vctx['bytes'])
  return [row[:length].tobytes().decode('utf-8') for row, length in zip(rows, lengths)]


def base64_png(image: np.ndarray) -> str:
  """A picture `[H, W, 3]` in [0, 1] as a PNG in base64; NaN becomes black."""
  return base64.b64encode(files.encode_png(image)).decode()


def ask_endpoint(ver, request: urllib.request.Request, read: Callable):
  """Sends a request until its answer can be read, and returns what `read` makes of the JSON.

  The request is sent again after 429, 5xx, no answer, and an answer that is no JSON or lacks a key.

  Args:
    ver: the verifier, with its `names`, `url`, `timeout`, `retries` and `backoff`.
    read: takes the decoded JSON; a KeyError that it raises counts as one more failure.

  Raises:
    RuntimeError: the endpoint refused (any other 4xx), or every try failed. The message repeats
      nothing that the endpoint said: it has seen the headers, and a key may be among them.
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
      # the standard's words for the code, never the reason that the endpoint sent
      problem = f'{error.code} {http.client.responses.get(error.code, "")}'.strip()
      if error.code < 500 and error.code != 429:  # the same request would be refused again
        raise RuntimeError(f'{endpoint} refused: {problem}') from None
    except (json.JSONDecodeError, UnicodeDecodeError, http.client.HTTPException) as error:
      problem = type(error).__name__  # its text may quote the answer
    except (urllib.error.URLError, TimeoutError, ConnectionError, KeyError) as error:
      problem = repr(error)
  raise RuntimeError(
    f'{endpoint} failed {ver.retries + 1} times; the last: {problem}. '
    'Raise verifier.retries or verifier.timeout, or mend the endpoint'
  )
