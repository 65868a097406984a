"""Ensembles, likelihood and host verifiers: against plain numpy and a real HTTP server on
loopback."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vtts_jax import components, core
from vtts_jax.engine import search as engine
from vtts_jax.errors import ConfigError
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.testing import laws, toys
from vtts_jax.verifiers.ensemble import Ensemble
from vtts_jax.verifiers.host import Host
from vtts_jax.verifiers.likelihood import Likelihood

PROMPTS = ['a', 'bb', 'ccc']
TOKENS, TARGET, BRIGHT = toys.Tokens(), toys.Target(), toys.Brightness()
MEMBERS = {'t': TARGET, 'b': BRIGHT, 'p': Likelihood()}


def search(algo, ver, gen=TOKENS, **options):
  return engine.search(algo, gen, ver, PROMPTS, seed=2, **options)


@pytest.mark.parametrize('mode', ['rank', 'minmax'])
def test_ensembles_combine_as_written(mode):
  ver = Ensemble(MEMBERS, weights={'p': 0.0, 't': 2.0, 'b': 1.0}, mode=mode)
  found = search(BestOfN(n=8), ver)
  step = found.steps[0]
  assert set(step.scores) == {'t', 'b', 'p'}
  for row in range(3):
    t, b = (np.asarray(step.scores[k][row], np.float64) for k in 'tb')
    if mode == 'rank':
      want = (2 * (stats.rankdata(t) - 1) + (stats.rankdata(b) - 1)) / 3
    else:
      want = (2 * (t - t.min()) / np.ptp(t) + (b - b.min()) / np.ptp(b)) / 3
    np.testing.assert_allclose(step.totals[row], want, rtol=1e-5, atol=1e-5)
    assert found.best.scores['t'][row] == step.scores['t'][row, want.argmax()]


def test_a_member_of_weight_zero_is_measured_and_not_searched_on():
  both = Ensemble(MEMBERS, weights={'t': 1, 'b': 0, 'p': 0}, mode='minmax')
  a, b = (search(Beam(width=2, branch=3), ver) for ver in (both, TARGET))
  laws.assert_same(a.best.state, b.best.state, 'weight zero')
  np.testing.assert_allclose(a.best.scores['b'], a.images.mean((1, 2, 3)), rtol=1e-5)


def test_the_best_so_far_is_ranked_along():
  """Two rounds by rank: the winner is the better of the winner of round one and round two,
  jointly."""
  ver = Ensemble({'t': TARGET, 'b': BRIGHT}, mode='rank')
  found = search(BestOfN(n=8, round=4), ver)
  first, second = found.steps
  for row in range(3):
    best = int(first.totals[row].argmax())
    pool = {k: np.append(second.scores[k][row], first.scores[k][row, best]) for k in 'tb'}
    totals = sum(stats.rankdata(v) - 1 for v in pool.values()) / 2
    winner = 4 if totals[4] >= totals.max() else int(totals[:4].argmax())
    assert found.best.scores['t'][row] == pool['t'][winner]


def test_ensembles_need_and_give_what_their_members_do():
  ver = Ensemble(MEMBERS, weights={'t': 1, 'b': 1, 'p': 0}, mode='minmax')
  assert ver.needs == {'image', 'log_prob', 'length'} and ver.gives == {'features', 'gradient'}
  assert ver.features_of == 't' and components.load('verifiers.ensemble', members=MEMBERS).jittable
  assert Ensemble({'b': BRIGHT, 't': TARGET}).gives == {'features'}  # ranks have no gradient
  assert Ensemble({'b': BRIGHT}, mode='minmax').gives == {'gradient'}
  assert Ensemble({'t': TARGET, 'p': Likelihood()}, mode='minmax').gives == {'features'}
  images = np.random.default_rng(0).random((3, 2, 6, 8, 3), np.float32)
  np.testing.assert_array_equal(
    ver.embed_images(ver.load(), images), TARGET.embed_images({}, images)
  )
  with pytest.raises(ConfigError, match="Ensemble: does not give 'features'"):
    Ensemble({'b': BRIGHT}).embed_images({'b': {}}, images)
  log_prob = {'log_prob': -np.ones((3, 2), np.float32), 'length': np.full((3, 2), 6.0)}
  laws.check_verifier(ver, PROMPTS, {'image': images, **log_prob})


def test_likelihood_is_the_mean_log_probability():
  ver = Likelihood()
  found = search(BestOfN(n=4), ver, collect=('states',))
  step = found.steps[0]
  np.testing.assert_allclose(step.totals, step.states.log_prob / 6, rtol=1e-6)
  cost = sum(core.step_costs(BestOfN(n=4), TOKENS, ver), core.Cost())
  assert cost.observe == 0 and cost.verify == 4
  with pytest.raises(ConfigError, match='needs length, log_prob, which Flow does not show'):
    search(BestOfN(n=4), ver, toys.Flow())


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'members': {}}, 'names must be given'),
    ({'members': MEMBERS, 'weights': {'t': 1.0}}, 'must name each member once'),
    ({'members': MEMBERS, 'weights': {'t': -1, 'b': 1, 'p': 1}}, 'must be >= 0'),
    ({'members': MEMBERS, 'mode': 'mean'}, "verifier.mode='mean'"),
    ({'members': {'x': {'which': 'a'}}}, 'verifier.members.x: needs a name'),
    ({'members': {'x': {'name': 'verifiers.nothing'}}}, "unknown component 'verifiers.nothing'"),
  ],
)
def test_ensembles_refuse(given, message):
  with pytest.raises(ConfigError, match=message):
    components.load('verifiers.ensemble', **given)


def test_a_failing_member_fails_the_search():
  def broken(prompts, images):
    raise RuntimeError('the judge is ill')

  ver = Ensemble({'t': TARGET, 'h': Host(score_fn=broken)})
  with pytest.raises(RuntimeError, match='the judge is ill'):
    search(BestOfN(n=2), ver, mode='stepped')


def test_ensembles_mix_compiled_and_host_members():
  host = Host(score_fn=lambda prompts, images: images.mean((1, 2, 3)))
  ver = Ensemble({'t': TARGET, 'h': host}, mode='minmax')
  twin = Ensemble({'t': TARGET, 'h': BRIGHT}, mode='minmax')
  assert not ver.jittable
  a = search(Beam(width=2, branch=3), ver, mode='stepped')
  b = search(Beam(width=2, branch=3), twin)
  laws.assert_same(a.best.state, b.best.state, 'host member')


@pytest.fixture
def endpoint():
  """A scorer of mean brightness that fails with 503 once, and says null to black pictures."""
  log = []

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      log.append(body['prompts'])
      if len(log) == 1:
        self.send_error(503)
        return
      pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in body['images']]
      scores = [None if not p.any() else float(p.mean()) for p in pictures]
      answer = json.dumps({'scores': scores}).encode()
      self.send_response(200)
      self.send_header('Content-Length', str(len(answer)))
      self.end_headers()
      self.wfile.write(answer)

    def log_message(self, *args):
      pass

  server = HTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield f'http://127.0.0.1:{server.server_port}', log
  server.shutdown()
  thread.join()
  server.server_close()


def test_an_endpoint_is_asked_in_batches_and_again_after_a_failure(endpoint):
  url, log = endpoint
  ver = Host(url=url, batch=4, backoff=0.01)
  images = np.linspace(0, 1, 6, dtype=np.float32)[None, :, None, None, None] * np.ones(
    (1, 1, 4, 4, 3)
  )
  vctx = ver.tokenize([{'text': 'grüße'}])
  scores = ver.score({}, vctx, {'image': images})['host']
  assert np.isnan(scores[0, 0])
  np.testing.assert_allclose(scores[0, 1:], np.rint(np.linspace(0, 1, 6)[1:] * 255), atol=1)
  assert [len(p) for p in log] == [4, 4, 2] and log[0][0] == 'grüße'


def test_a_dead_endpoint_is_one_clear_error():
  ver = Host(url='http://127.0.0.1:9', retries=1, backoff=0.0, timeout=1.0)
  with pytest.raises(RuntimeError, match=r'127.0.0.1:9 failed 2 times.*Raise verifier.retries'):
    ver.score({}, ver.tokenize([{'text': 'a'}]), {'image': np.zeros((1, 2, 4, 4, 3))})
