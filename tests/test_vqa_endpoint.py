"""VQAScore through an endpoint on loopback: what is asked and read, what is tried again, and where
the key is not."""

import base64
import dataclasses
import io
import json
import math
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.testing import laws
from vtts_jax.verifiers.vqa_endpoint import probability_of_yes

KEY = 'sk-Th1s-1s-the-s3cret'


@pytest.fixture
def endpoint(monkeypatch):
  """Sure of "yes" as the picture is bright; `plan` holds the statuses of the first answers, `log`
  what came. It repeats the key in the reason of a failure and in its body."""
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  plan, log = [], []

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      log.append((self.path, dict(self.headers), body))
      status = plan.pop(0) if plan else 200
      content = {'error': KEY}
      if isinstance(status, dict):
        status, content = 200, status
      elif status == 200:
        text, picture = body['messages'][0]['content']
        data = picture['image_url']['url'].removeprefix('data:image/png;base64,')
        bright = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255
        content = answer({'Yes': 0.5 * bright, ' yes': 0.3 * bright, 'No': 0.8 * (1 - bright)})
        assert text['text'].count('"') == 2
      data = json.dumps(content).encode()
      self.send_response(status, KEY)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      pass

  server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  yield f'http://127.0.0.1:{server.server_port}/v1', plan, log
  server.shutdown()
  thread.join()
  server.server_close()


def answer(probabilities):
  top = [{'token': k, 'logprob': math.log(p + 1e-9)} for k, p in probabilities.items()]
  return {'choices': [{'logprobs': {'content': [{'token': 'x', 'top_logprobs': top}]}}]}


def chat_verifier(url, **given):
  settings = {'chat_model': 'org/tiny-vl', 'backoff': 0, **given}
  return components.load('verifiers.vqa_endpoint', url=url, **settings)


def score(ver, texts, images):
  prompts = ver.tokenize(core.as_prompts(texts))
  return ver.score({}, ver.encode({}, prompts), {'image': images})


def bright(*levels):
  return np.array(levels, np.float32)[None, :, None, None, None] * np.ones((1, 1, 4, 6, 3), 'f')


def test_an_endpoint_is_asked_once_a_picture(endpoint):
  url, _, log = endpoint
  ver = chat_verifier(url, concurrency=3)
  images = np.concatenate([bright(0.2, 0.4, 0.6), bright(0.8, np.nan, 1.0)])
  scores = score(ver, ['grüße', 'b'], images)['vqa_score_tiny_vl']
  np.testing.assert_allclose(scores, [[0.2, 0.4, 0.6], [0.8, np.nan, 1.0]], atol=1e-6)
  assert len(log) == 5  # the one that is no picture is not sent
  for path, headers, body in log:
    assert path == '/v1/chat/completions' and headers['Authorization'] == f'Bearer {KEY}'
    assert (body['model'], body['max_tokens'], body['top_logprobs']) == ('org/tiny-vl', 1, 20)
    assert body['logprobs'] is True
  asked = sorted(body['messages'][0]['content'][0]['text'] for _, _, body in log)
  assert asked[-1] == 'Does this figure show "grüße"? Please answer yes or no.'


def test_endpoint_conformance(endpoint):
  images = np.concatenate([bright(0.1, 0.5)] * 2)
  laws.check_verifier(chat_verifier(endpoint[0]), ['a', 'b'], images)


def test_asked_again_when_there_were_too_many(endpoint):
  url, plan, log = endpoint
  plan += [429, 503]
  ver = chat_verifier(url, retries=2)
  scores = score(ver, ['a'], bright(0.6))['vqa_score_tiny_vl']
  np.testing.assert_allclose(scores, [[0.6]], atol=1e-6)
  assert len(log) == 3


@pytest.mark.parametrize(
  ('plan', 'said'),
  [
    ([401], 'refused: 401 Unauthorized'),
    ([400], 'refused: 400 Bad Request'),
    ([500, 500], 'failed 2 times; the last: 500 Internal Server Error'),
    ([{}], "verifier.chat_model='org/tiny-vl': .* answers without logprobs"),
    ([{'choices': [{'logprobs': None}]}], 'answers without logprobs'),
    ([answer({})], 'answers without logprobs'),
  ],
)
def test_failures_are_one_clear_error_without_the_key(endpoint, caplog, capsys, plan, said):
  url, todo, log = endpoint
  todo += plan
  ver = chat_verifier(url, retries=1)
  with pytest.raises(RuntimeError, match=said) as failure:
    score(ver, ['a'], bright(0.5))
  assert len(log) == len(plan) and log[0][1]['Authorization'].endswith(KEY)  # it was there to leak
  shown = ''.join(traceback.format_exception(failure.value))
  settings = json.dumps(dataclasses.asdict(ver))
  for text in (shown, repr(ver), settings, caplog.text, *capsys.readouterr()):
    assert 's3cret' not in text


def test_the_key_is_where_it_should_be_and_nowhere_else(endpoint, monkeypatch):
  url, _, log = endpoint
  ver = chat_verifier(url)
  for value, said in ((None, 'is not set'), (' ', 'is not set'), (KEY + '\nx', 'has characters')):
    monkeypatch.delenv('OPENAI_API_KEY')
    monkeypatch.setenv('OPENAI_API_KEY', value) if value else None
    for call in (ver.check, lambda: score(ver, ['a'], bright(0.5))):
      with pytest.raises(ConfigError, match=f"key_env='OPENAI_API_KEY'.*{said}") as failure:
        call()
      assert 's3cret' not in str(failure.value)
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
  free = chat_verifier(url, key_env='')
  free.check()
  score(free, ['a'], bright(0.5))
  assert len(log) == 1 and 'Authorization' not in log[0][1]
  host = url.removeprefix('http://')
  for given in ({'key_env': KEY}, {'url': f'http://{KEY}@{host}'}, {'url': f'{url}?key={KEY}'}):
    with pytest.raises(ConfigError, match='verifier.(key_env|url): must') as failure:
      chat_verifier(**({'url': url} | given))
    assert 's3cret' not in str(failure.value)


def test_a_redirection_does_not_take_the_key_along(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  seen = []

  class Elsewhere(BaseHTTPRequestHandler):
    def do_POST(self):
      self.rfile.read(int(self.headers['Content-Length']))
      self.send_response(302)
      self.send_header('Location', f'http://127.0.0.1:{self.server.server_port}/other')
      self.send_header('Content-Length', '0')
      self.end_headers()

    def do_GET(self):
      seen.append(dict(self.headers))
      self.send_response(200)
      self.send_header('Content-Length', '2')
      self.end_headers()
      self.wfile.write(b'{}')

    def log_message(self, *args):
      pass

  server = ThreadingHTTPServer(('127.0.0.1', 0), Elsewhere)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  ver = chat_verifier(f'http://127.0.0.1:{server.server_port}/v1', retries=0)
  with pytest.raises(RuntimeError, match='answers without logprobs'):
    score(ver, ['a'], bright(0.5))
  server.shutdown()
  thread.join()
  server.server_close()
  assert len(seen) == 1 and 'Authorization' not in seen[0]


def test_yes_in_all_its_spellings():
  pairs = [('Yes', 0.2), (' yes', 0.1), ('YES.', 0.1), ('▁no', 0.1), ('Not', 0.4), ('"No', 0.0)]
  log = [(token, math.log(p) if p else -9999.0) for token, p in pairs]
  assert probability_of_yes(log) == pytest.approx(0.4 / 0.5)
  assert math.isnan(probability_of_yes([('Maybe', -0.1)]))
  assert probability_of_yes([('yes', -3.0)]) == 1


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'url': 'localhost:8000'}, "verifier.url='localhost:8000': must start with http"),
    ({'chat_model': ''}, "verifier.chat_model=''"),
    ({'question': '{} or {}?'}, "must have '{}' once"),
    ({'concurrency': 0}, 'verifier.concurrency=0: must be at least 1'),
    ({'timeout': -1.0}, 'verifier.timeout=-1.0'),
    ({'key': KEY}, 'unknown setting key'),
  ],
)
def test_bad_endpoint_settings(given, said):
  with pytest.raises(ConfigError, match=said):
    components.load('verifiers.vqa_endpoint', **given)
