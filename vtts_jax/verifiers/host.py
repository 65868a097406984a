"""Scores computed outside XLA: by a Python function, or by an HTTP endpoint that takes batches.

The endpoint receives one POST for each batch, with the JSON
`{"prompts": [...], "images": [<base64 PNG>, ...]}`, and answers `{"scores": [...]}`: for each image
a finite number, or null if it could not be scored (such a candidate is never selected). `vtts
serve` runs such an endpoint.

Letters: B prompts · M candidates · R = B M · H W sides of an image.
"""

import dataclasses
import json
import threading
import urllib.request
from collections.abc import Callable, Sequence

import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.verifiers.parts import http

# The engine may score two batches at the same time, and `score_fn` may not be thread-safe.
_SCORE_FN_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Host(core.Verifier):
  """A scorer on the host; a search with it runs in the stepped driver.

  Attributes:
    score_fn: `(texts of R prompts, images [R, H, W, 3] float32 in [0, 1]) -> R scores`, larger is
      better. Only one call runs at a time, whatever the thread.
    url: the endpoint, instead of `score_fn`.
    score_name: name of the score.
    batch: images of one call.
    timeout: seconds that one request may take.
    retries: how often a failed request is repeated, after 1, 2, 4, ... times `backoff` seconds.
    backoff: seconds before the first repetition.
  """

  score_fn: Callable[[Sequence[str], np.ndarray], Sequence[float | None]] | None = None
  url: str = ''
  score_name: str = 'host'
  batch: int = 64
  timeout: float = 60.0
  retries: int = 3
  backoff: float = 1.0

  jittable = False

  def __post_init__(self):
    # with both it would be unclear who scores, with none nobody does
    if (self.score_fn is None) == (not self.url):
      raise ConfigError(
        'verifiers.host: give exactly one of score_fn (Python) and url (an http endpoint)'
      )
    if self.url and not self.url.startswith(('http://', 'https://')):
      raise ConfigError(f'verifier.url={self.url!r}: must start with http:// or https://')
    http.check_at_least(self, batch=1, retries=0, timeout=0, backoff=0)

  @property
  def names(self):
    return (self.score_name,)

  def tokenize(self, prompts):
    return http.pack_texts(core.texts_of(prompts))

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images = np.asarray(observed['image'])
    b, m = images.shape[:2]
    # one text for each image: candidates of a prompt lie next to each other
    texts = [text for text in http.unpack_texts(vctx) for _ in range(m)]
    images = images.reshape(b * m, *images.shape[2:])
    scores = [
      self._score_batch(texts[low : low + self.batch], images[low : low + self.batch])
      for low in range(0, b * m, self.batch)
    ]
    return {self.score_name: np.concatenate(scores).reshape(b, m)}

  def _score_batch(self, texts, images):
    """Scores `[R]` float32 of R images; NaN where the scorer gave None.

    Raises:
      ValueError: the scorer returned another number of scores.
    """
    if self.score_fn is None:
      given = self._request_scores(texts, images)
    else:
      with _SCORE_FN_LOCK:
        given = self.score_fn(texts, images)
    # NaN marks a candidate that the search must not select
    scores = np.asarray([np.nan if score is None else score for score in given], np.float32)
    if scores.shape != (len(texts),):
      raise ValueError(
        f'verifier {self.score_name}: {len(texts)} images were sent and {scores.shape} scores came '
        'back'
      )
    return scores

  def _request_scores(self, texts, images):
    """The scores that the endpoint gives to R images, floats or None."""
    body = {'prompts': texts, 'images': [http.base64_png(image) for image in images]}
    request = urllib.request.Request(
      self.url, json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    return http.ask_endpoint(self, request, lambda answer: answer['scores'])
