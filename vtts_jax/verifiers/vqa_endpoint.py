"""VQAScore by a model behind an OpenAI-compatible endpoint: P(yes) of its next word, in 0 .. 1.

Each picture is one request to `<url>/chat/completions`. The answer contains the probabilities of
the most likely next tokens; the score is P(yes) / (P(yes) + P(no)), over all spellings. The model
is part of the score's name. After Lin et al. (2024), arXiv 2404.01291; for such models their code
uses P("yes") alone, unnormalised.

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

TOP_TOKENS = 20  # the largest number that OpenAI's endpoint allows


@dataclasses.dataclass(frozen=True)
class VqaEndpoint(core.Verifier):
  """A chat model that answers a question about the picture; a search with it runs in the stepped
  driver.

  Attributes:
    url: base address of the endpoint, including its version: `http://localhost:8000/v1`.
    chat_model: name of the model at the endpoint; it must read pictures and return `logprobs`.
    question: the question; '{}' stands for the prompt.
    concurrency: largest number of simultaneous requests.
    timeout: seconds that one request may take.
    retries: how often a failed request is repeated, after 1, 2, 4, ... times `backoff` seconds.
    backoff: seconds before the first repetition.
    key_env: name of the environment variable that holds the key; '' for an endpoint without one.
      The key itself is never a setting, so it is never written to a result.
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
    # a url is written to results and error messages, so it must not carry secrets
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
    # a value that is not a name may be the key itself, so the message does not repeat it
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
    self._request_headers()

  def tokenize(self, prompts):
    texts = core.texts_of(prompts)
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
      raise ConfigError(f'prompts: prompt {empty[0]} is empty; must have words')
    return http.pack_texts(texts)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`; NaN for a picture that is not finite."""
    headers = self._request_headers()
    images = np.asarray(observed['image'])
    b, m = images.shape[:2]
    # one text for each image: candidates of a prompt lie next to each other
    texts = [text for text in http.unpack_texts(vctx) for _ in range(m)]
    ask = functools.partial(self._request_score, headers)
    # requests wait for the network, so threads overlap them in spite of the GIL
    with ThreadPoolExecutor(self.concurrency) as pool:
      scores = list(pool.map(ask, texts, images.reshape(b * m, *images.shape[2:])))
    return {self.names[0]: np.array(scores, np.float32).reshape(b, m)}

  def _request_headers(self):
    """HTTP headers; the only place that reads the key.

    Raises:
      ConfigError: the environment variable is not set or contains impossible characters.
    """
    if not self.key_env:
      return {}
    key = os.environ.get(self.key_env, '').strip()
    problem = '' if key else 'is not set'
    # with other characters http.client would raise an error that quotes the header
    if not re.fullmatch(r'[!-~]*', key):
      problem = 'has characters that no key has'
    if problem:
      raise ConfigError(
        f'verifier.key_env={self.key_env!r}: that environment variable {problem}; it must hold the '
        "endpoint's key (key_env='' where none is wanted)"
      )
    return {'Authorization': f'Bearer {key}'}

  def _request_score(self, headers, prompt, image):
    """P(yes) for one picture `[H, W, 3]`; NaN for a picture that is not finite."""
    # PNG cannot hold NaN; the request would score a black pixel instead
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
      # only the distribution of the first word is read
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
      # a host that the endpoint redirects to must not receive the key
      request.add_unredirected_header(name, value)
    return http.ask_endpoint(self, request, self._read_probability)

  def _read_probability(self, answer):
    """P(yes) of one answer.

    Raises:
      RuntimeError: the answer has no log-probabilities; the request is not repeated.
    """
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
  """P(yes) / (P(yes) + P(no)) of pairs (token, log-probability), summed over all spellings; NaN if
  neither word occurs."""
  total = {'yes': 0.0, 'no': 0.0}
  for token, log_prob in pairs:
    # ' Yes', 'yes.' and '_YES' are the same word
    word = re.sub(r'[\W_]', '', token).casefold()
    if word in total:
      total[word] += math.exp(log_prob)
  both = sum(total.values())
  return total['yes'] / both if both else math.nan

