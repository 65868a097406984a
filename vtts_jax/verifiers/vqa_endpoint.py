"""VQAScore by a model behind an OpenAI-compatible endpoint: P(yes) of its next word, in 0 .. 1.

Each picture is one request, to `<url>/chat/completions`. The answer holds the probabilities of the
most likely next tokens; the score is that of "yes" in any spelling over that of "yes" and "no". The
model is part of the score's name. After Lin et al. (2024), arXiv 2404.01291, whose own code reads
P("yes") alone of such models, unnormalised.

Letters: B prompts · M candidates · H W sides of an image.
"""

import dataclasses
import functools
import json
import math
import os
import re
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.verifiers.parts import http
from vtts_jax.verifiers.vqa_score import QUESTION, check_question

TOP_TOKENS = 20  # most that OpenAI's endpoint gives


@dataclasses.dataclass(frozen=True)
class VqaEndpoint(core.Verifier):
  """A chat model that answers; a search with it runs in the stepped driver.

  Attributes:
    url: of the endpoint, up to and with its version: `http://localhost:8000/v1`.
    chat_model: as the endpoint calls it; it must read pictures and give `logprobs`.
    question: what is asked; '{}' is the prompt.
    concurrency: requests under way at once.
    timeout: seconds for one request.
    retries: further tries after a failed request, waiting 1, 2, 4, ... times `backoff` seconds.
    backoff: seconds.
    key_env: name of the environment variable with the key, '' for an endpoint that wants none. The
      key itself is never a setting.
  """

  url: str = 'https://api.openai.com/v1'
  chat_model: str = 'gpt-4o'
  question: str = QUESTION
  concurrency: int = 8
  timeout: float = 60.0
  retries: int = 5
  backoff: float = 1.0
  key_env: str = 'OPENAI_API_KEY'

  jittable = False

  def __post_init__(self):
    place = urllib.parse.urlsplit(self.url)
    if place.username or place.password or place.query:
      raise ConfigError(
        'verifier.url: must have no user, password or query; the key is read from the environment '
        'variable that verifier.key_env names'
      )
    if place.scheme not in ('http', 'https') or not place.hostname:
      raise ConfigError(f'verifier.url={self.url!r}: must start with http:// or https://')
    if not self.chat_model:
      raise ConfigError("verifier.chat_model='': must be a model of the endpoint's")
    check_question(self.question)
    http.check_at_least(self, concurrency=1, retries=0, timeout=0, backoff=0)
    # what is no name may be the key itself, so the message does not repeat it
    if not re.fullmatch(r'([A-Za-z_]\w*)?', self.key_env, re.ASCII):
      raise ConfigError(
        'verifier.key_env: must be the name of an environment variable (letters, digits, _), and '
        'never a key'
      )

  @property
  def names(self):
    short = re.sub(r'\W', '_', self.chat_model.rpartition('/')[2])
    return (f'vqa_score_{short}',)

  def check(self):
    self._headers()

  def tokenize(self, prompts):
    texts = core.texts_of(prompts)
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
      raise ConfigError(f'prompts: prompt {empty[0]} is empty; must have words')
    return http.pack_texts(texts)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`; NaN for a picture that is not finite."""
    headers = self._headers()
    images = np.asarray(observed['image'])
    b, m = images.shape[:2]
    texts = [text for text in http.unpack_texts(vctx) for _ in range(m)]
    ask = functools.partial(self._ask, headers)
    with ThreadPoolExecutor(self.concurrency) as pool:
      scores = list(pool.map(ask, texts, images.reshape(b * m, *images.shape[2:])))
    return {self.names[0]: np.array(scores, np.float32).reshape(b, m)}

  def _headers(self):
    """The only place that reads the key."""
    if not self.key_env:
      return {}
    key = os.environ.get(self.key_env, '').strip()
    problem = '' if key else 'is not set'
    # http.client would quote such a header in its own error
    if not re.fullmatch(r'[!-~]*', key):
      problem = 'has characters that no key has'
    if problem:
      raise ConfigError(
        f'verifier.key_env={self.key_env!r}: that environment variable {problem}; it must hold the '
        "endpoint's key (key_env='' where none is wanted)"
      )
    return {'Authorization': f'Bearer {key}'}

  def _ask(self, headers, prompt, image):
    if not np.isfinite(image).all():
      return math.nan
    picture = {
      'type': 'image_url',
      'image_url': {'url': f'data:image/png;base64,{http.base64_png(image)}'},
    }
    text = {'type': 'text', 'text': self.question.replace('{}', prompt)}
    body = {
      'model': self.chat_model,
      'messages': [{'role': 'user', 'content': [text, picture]}],
      'max_tokens': 1,
      'temperature': 1,  # some servers give the probabilities after dividing by it
      'logprobs': True,
      'top_logprobs': TOP_TOKENS,
    }
    url = self.url.rstrip('/') + '/chat/completions'
    request = urllib.request.Request(
      url, json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    for name, value in headers.items():
      request.add_unredirected_header(name, value)  # a host that is redirected to must not get it
    return http.ask_endpoint(self, request, self._read)

  def _read(self, answer):
    """P(yes) of one answer; a RuntimeError, which is not tried again, where it has none."""
    try:
      top = answer['choices'][0]['logprobs']['content'][0]['top_logprobs']
      pairs = [(each['token'], float(each['logprob'])) for each in top]
    except (KeyError, IndexError, TypeError, ValueError):
      pairs = []
    if not pairs:
      raise RuntimeError(
        f'verifier.chat_model={self.chat_model!r}: {self.url} answers without logprobs '
        '(choices[0].logprobs.content[0].top_logprobs); must be a model and an endpoint that give '
        'them'
      )
    return probability_of_yes(pairs)


def probability_of_yes(pairs) -> float:
  """P(yes) / (P(yes) + P(no)) of pairs (token, log-probability), over all spellings of the two; NaN
  where neither is among them."""
  total = {'yes': 0.0, 'no': 0.0}
  for token, log_prob in pairs:
    word = re.sub(r'[\W_]', '', token).casefold()
    if word in total:
      total[word] += math.exp(log_prob)
  both = sum(total.values())
  return total['yes'] / both if both else math.nan

