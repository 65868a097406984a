"""`vtts score` and `vtts serve`, the scorer behind them, and host verifiers scored while the next
batch is generated."""

import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

from vtts_jax import components, core
from vtts_jax.cli import main
from vtts_jax.engine import search as engine
from vtts_jax.engine import sharding
from vtts_jax.engine.scorer import Scorer
from vtts_jax.media import files
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.testing import toys
from vtts_jax.verifiers.host import Host

TINY = ['--verifier=verifiers.clip', '--verifier.weights=random:tiny', '--verifier.output=cosine']


def tiny_clip():
  return components.load('verifiers.clip', weights='random:tiny', output='cosine')


@pytest.fixture
def folder(tmp_path):
  """Six files: pictures of two sizes, the fourth with transparency, the last one broken."""
  rng = np.random.default_rng(0)
  for i, (size, channels) in enumerate([(32, 3), (20, 3), (32, 3), (32, 4), (20, 3)]):
    Image.fromarray(rng.integers(0, 256, (size, size, channels), np.uint8)).save(
      tmp_path / f'{i}.png'
    )
  (tmp_path / '5.png').write_bytes((tmp_path / '0.png').read_bytes()[:60])
  (tmp_path / 'prompts.txt').write_text('a cat\na dog\na cat\na bird\na dog\na fish\n')
  return tmp_path


def test_a_folder_is_scored_and_one_broken_picture_costs_itself_only(folder, capsys):
  out = folder / 'scores' / 'clip.jsonl'
  argv = ['score', *TINY, str(folder), f'--prompts={folder}/prompts.txt', f'--out={out}']
  assert main.run_cli([*argv, '--batch=4']) == 1
  said = capsys.readouterr().out
  assert re.search(r'5\.png: cannot be read as a picture', said) and 'clip_tiny' in said
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r['prompt'] for r in rows] == ['a cat', 'a dog', 'a cat', 'a bird', 'a dog', 'a fish']
  assert 'scores' not in rows[5] and 'error' in rows[5]

  ver = tiny_clip()
  params, score = engine.load_parameters(ver), jax.jit(ver.score)
  contexts = jax.jit(ver.encode)(params, ver.tokenize([{'text': r['prompt']} for r in rows]))
  for i, row in enumerate(rows[:5]):
    vctx = jax.tree.map(lambda x, i=i: x[i : i + 1], contexts)
    image = files.image_floats(files.read_image(row['image']))[None, None]
    for name, value in score(params, vctx, {'image': image}).items():
      assert row['scores'][name] == pytest.approx(float(value[0, 0]), abs=1e-5)
  assert len({tuple(r['scores'].values()) for r in rows[:5]}) == 5


def test_prompts_come_from_a_file_a_list_or_not_at_all(folder, capsys):
  out = folder / 'scores.jsonl'
  plain = ['--verifier=vtts_jax.testing.toys', '--verifier.part=brightness', str(folder)]
  assert main.run_cli(['score', *plain]) == 1  # of the picture alone: no prompt is needed
  assert re.search(r'brightness +5 ', capsys.readouterr().out)

  target = ['score', '--verifier=vtts_jax.testing.toys', '--verifier.part=target']
  target += ['--verifier.rows=32', f'--out={out}']
  given = [str(folder), f'--prompts={folder}/prompts.txt', '--batch=2']
  assert main.run_cli([*target, *given]) == 1
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  score = Scorer(toys.Target(rows=32))
  for row in rows[:5]:  # pictures of one size came in batches of two and a rest
    alone = score({'image': files.read_image(row['image'])[None]}, [{'text': row['prompt']}])
    assert row['scores'] == pytest.approx({'target': float(alone['target'][0])}, abs=1e-5)
  listed = folder / 'list.jsonl'
  listed.write_text(
    ''.join(json.dumps({'image': f'{i}.png', 'prompt': 'a cat'}) + '\n' for i in (2, 0))
  )
  assert main.run_cli([*target, str(listed)]) == 0
  again = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r['scores'] for r in again] == [
    pytest.approx(rows[i]['scores'], abs=1e-5) for i in (2, 0)
  ]


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    (['{d}'], r'--verifier=NAME is missing; allowed: verifiers\.'),
    ([*TINY, '{d}'], r'0\.png: has no prompt'),
    ([*TINY, '{d}', '--prompt= '], r'prompt 0 is empty'),
    ([*TINY, '{d}', '--prompts=promts.txt'], r'no such file.*--prompt=TEXT'),
    ([*TINY, '{d}', '--prompts={d}/prompts.txt', '--prompt=a'], 'give one of the two'),
    ([*TINY, '{d}/prompts.txt'], 'must be a folder of pictures, or a .jsonl'),
    ([*TINY, '{d}', '--prompt=a', '--batch=0'], r'--batch: must be an integer >= 1, got .0'),
    ([*TINY, '{d}', '--promt=a'], 'unknown flag --promt; allowed for vtts score'),
    ([*TINY, '{d}', '{d}'], 'give one folder or .jsonl of pictures'),
    (['--verifier=verifiers.likelihood', '{d}', '--prompt=a'], 'must score pictures alone'),
    ([*TINY[:1], '--verifier.weights=random:huge', '{d}'], 'random'),
    ([*TINY[:1], '--verifier.model=a b', '{d}'], 'unknown setting model='),
  ],
)
def test_bad_input(folder, capsys, argv, said):
  assert main.run_cli(['score', *(a.format(d=folder) for a in argv)]) == 2
  err = capsys.readouterr().err
  assert re.search(said, err) and err.count('\n') == 1, err


class CountedTarget(toys.Target):
  """Counts what it tokenizes and encodes."""

  tokenized, traced = [], []

  def tokenize(self, prompts):
    self.tokenized.append([p['text'] for p in prompts])
    return super().tokenize(prompts)

  def score(self, params, vctx, observed):
    self.traced.append(observed['image'].shape)
    return super().score(params, vctx, observed)


def test_prompts_are_read_once_and_pictures_padded():
  """Scores and features are those of the verifier itself, on one device and on a mesh."""
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (7, 6, 2, 3), np.uint8)
  prompts = [{'text': f'prompt {i % 3}'} for i in range(7)]
  ver = toys.Target()
  vctx = ver.encode({}, ver.tokenize(prompts))
  floats = files.image_floats(images)
  want = np.asarray(ver.score({}, vctx, {'image': floats[:, None]})['target'])[:, 0]
  for mesh in (None, sharding.make_mesh()):
    scorer = Scorer(ver, mesh)
    np.testing.assert_allclose(scorer({'image': images}, prompts)['target'], want, atol=1e-5)
    np.testing.assert_allclose(scorer.embed_images(images), floats.mean((2, 3)), atol=1e-6)

  CountedTarget.tokenized.clear()
  scorer = Scorer(CountedTarget())
  scorer.tokenize_prompts(prompts)
  for count in (5, 7, 6):  # all are padded to 8
    got = scorer({'image': floats[:count]}, prompts[:count])['target']
    np.testing.assert_allclose(got, want[:count], atol=1e-5)
  assert CountedTarget.tokenized == [['prompt 0', 'prompt 1', 'prompt 2']]
  assert CountedTarget.traced == [(8, 1, 6, 2, 3)]
  with pytest.raises(ValueError, match='picture 1 has values in'):
    scorer({'image': floats[:2] + [[[[0]]], [[[1.0]]]]}, prompts[:2])


def test_a_verifier_in_its_own_process(folder):
  """Scores through `vtts serve` and `verifiers.host` are those of the verifier itself; the server
  has two devices, which share the batch."""
  flags = os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=2'
  toy = ['--verifier=vtts_jax.testing.toys', '--verifier.part=target', '--verifier.rows=32']
  command = [sys.executable, '-m', 'vtts_jax.cli.main', 'serve', *toy, '--port=0']
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env={**os.environ, 'XLA_FLAGS': flags}
  ) as server:
    try:
      url = server.stdout.readline().split(' at ')[1].strip()
      images = np.stack([files.read_image(folder / f'{i}.png') for i in (0, 2)])
      prompts = [{'text': 'a cat'}, {'text': 'a bird'}]
      host = Host(url=url, retries=0)

      def ask(prompts, images):
        vctx = host.encode({}, host.tokenize(prompts))
        return host.score({}, vctx, {'image': files.image_floats(images)[:, None]})['host'][:, 0]

      want = Scorer(toys.Target(rows=32))({'image': images}, prompts)['target']
      np.testing.assert_allclose(ask(prompts, images), want, atol=1e-5)
      # a request that cannot be read is answered, and the server goes on
      picture = base64.b64encode((folder / '0.png').read_bytes()).decode()
      for prompts_sent, images_sent, message in (
        (['a'], [], '1 prompts and 0 images'),
        ([{'tag': 'x'}], [picture], "prompt 0 has no 'text'"),
        (['a'], ['bm8gcGljdHVyZQ=='], 'cannot be read as a picture'),
        (['a'], ['no base64'], 'base64'),
      ):
        body = json.dumps({'prompts': prompts_sent, 'images': images_sent}).encode()
        with pytest.raises(urllib.error.HTTPError, match='400') as answer:
          urllib.request.urlopen(url, body, timeout=60)
        with answer.value as response:
          assert message in json.loads(response.read())['error']
      np.testing.assert_allclose(ask(prompts[:1], images[:1]), want[:1], atol=1e-5)
    finally:
      server.kill()


def test_the_next_batch_is_generated_while_one_is_scored():
  """Two batches wait for the endpoint at the same time, and the results are in order."""
  meet = threading.Barrier(2, timeout=60)  # a request goes on only when there are two

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      meet.wait()
      data = json.dumps({'scores': [float(len(p)) for p in body['prompts']]}).encode()
      self.send_response(200)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = Host(url=f'http://127.0.0.1:{server.server_port}', retries=0)
    prompts = ['p' * n for n in (1, 2, 3, 4)]
    found = engine.search(BestOfN(n=2), toys.Tokens(), host, prompts, mode='stepped', batch=1)
    server.shutdown()
  np.testing.assert_array_equal(found.best.total, [1, 2, 3, 4])
  assert sum(engine.bill(BestOfN(n=2), toys.Tokens(), host), core.Cost()).verify == 2
