"""`vtts score` and `vtts serve`, and host verifiers scored while the next batch is generated."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from vtts_jax import components, core
from vtts_jax.cli import main
from vtts_jax.engine import scorer as score
from vtts_jax.engine import search as run
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.testing import toys
from vtts_jax.verifiers.host import Host

TINY = ['--verifier=verifiers.clip', '--verifier.random=tiny', '--verifier.scale=cosine']


@pytest.fixture
def folder(tmp_path):
  """Five pictures of two sizes, one of them with transparency, and one that is none."""
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
  assert main.cli([*argv, '--batch=2']) == 1
  said = capsys.readouterr().out
  assert re.search(r'5\.png: cannot be read as a picture', said) and 'clip_tiny' in said
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r['prompt'] for r in rows] == ['a cat', 'a dog', 'a cat', 'a bird', 'a dog', 'a fish']
  assert 'scores' not in rows[5] and 'error' in rows[5]

  ver = components.load('verifiers.clip', random='tiny', scale='cosine')
  params = ver.load()
  for row in rows[:5]:
    vctx = ver.encode(params, ver.tokenize([row['prompt']]))
    want = ver.score(params, vctx, score.read(row['image'])[None, None])
    for name, value in want.items():
      assert row['scores'][name] == pytest.approx(float(value[0, 0]), abs=1e-5)
  assert len({tuple(r['scores'].values()) for r in rows[:5]}) == 5

  plain = ['--verifier=verifiers.aesthetic', '--verifier.random=tiny', str(folder)]
  assert main.cli(['score', *plain]) == 1  # of the picture alone: no prompt is needed
  assert re.search(r'aesthetic_tiny_random +5 ', capsys.readouterr().out)

  listed = folder / 'list.jsonl'
  listed.write_text(
    ''.join(json.dumps({'image': f'{i}.png', 'prompt': 'a cat'}) + '\n' for i in (2, 0))
  )
  assert main.cli(['score', *TINY, str(listed), f'--out={out}']) == 0
  again = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r['scores'] for r in again] == [
    pytest.approx(rows[i]['scores'], abs=1e-5) for i in (2, 0)
  ]


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    (['{d}'], r'--verifier=NAME is missing; allowed: verifiers\.'),
    ([*TINY, '{d}'], r'0\.png: has no prompt'),
    ([*TINY, '{d}', '--prompts= '], r'prompt 0 is empty'),
    ([*TINY, '{d}/prompts.txt'], 'must be a folder of pictures, or a .jsonl'),
    ([*TINY, '{d}', '--prompts=a', '--batch=0'], '--batch=0: must be an integer >= 1'),
    ([*TINY, '{d}', '--prompt=a'], 'unknown flag --prompt; allowed for vtts score'),
    (['--verifier=verifiers.likelihood', '{d}', '--prompts=a'], 'must score pictures alone'),
    ([*TINY[:1], '--verifier.random=huge', '{d}'], 'random'),
  ],
)
def test_bad_input(folder, capsys, argv, said):
  assert main.cli(['score', *(a.format(d=folder) for a in argv)]) == 2
  assert re.search(said, capsys.readouterr().err)


def test_a_verifier_in_its_own_process(folder):
  """Scores through `vtts serve` and `verifiers.host` are those of the verifier itself; the server
  has two devices, which share the batch."""
  flags = os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=2'
  command = [sys.executable, '-m', 'vtts_jax.main', 'serve', *TINY, '--port=0']
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env={**os.environ, 'XLA_FLAGS': flags}
  ) as server:
    try:
      url = server.stdout.readline().split(' at ')[1].strip()
      pictures = np.stack([score.read(folder / f'{i}.png') for i in (0, 2)])
      prompts = ['a cat', 'a bird']
      host = Host(url=url, retries=0)
      have = host.score({}, host.encode({}, host.tokenize(prompts)), pictures[:, None])['host']
      want = score.Scorer(components.load('verifiers.clip', random='tiny', scale='cosine'))(
        pictures, prompts
      )
      np.testing.assert_allclose(have[:, 0], next(iter(want.values())), atol=1e-5)
      with pytest.raises(RuntimeError, match='400'):
        host.score({}, host.encode({}, host.tokenize([' '])), pictures[:1, None])
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
    none = {'generator': {}, 'verifier': {}}
    key = jax.random.key(0)
    found = run.search(
      BestOfN(n=2), toys.Tokens(), host, none, prompts, key, mode='stepped', batch=1
    )
    server.shutdown()
  np.testing.assert_array_equal(found.best.total, [1, 2, 3, 4])
  assert sum(run.bill(BestOfN(n=2), toys.Tokens(), host), core.Cost()).verify == 2
