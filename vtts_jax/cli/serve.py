"""Serve a verifier in a process of its own, for verifiers.host.

A POST carries one batch as JSON: {"prompts": [...], "images": [<base64 picture>, ...]}, where a
prompt is a text or a prompt row. The answer is {"scores": [...]}, with null for a score that is not
finite. A request that cannot be read is answered with status 400 and {"error": ...}.
"""

import argparse
import base64
import binascii
import io
import json

import numpy as np

from vtts_jax.cli import arguments

FLAGS = ('--port', '--host')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the verifier and the address."""
  arguments.add_verifier_flag(parser)
  parser.add_argument('--host', default='127.0.0.1', help='the address to listen at')
  parser.add_argument(
    '--port', type=arguments.integer_at_least(0), default=8500, help='0 for any that is free'
  )


def run_command(args: argparse.Namespace, rest: list[str]) -> int:
  """Serves until the process is interrupted; returns the exit code."""
  verifier = arguments.build_verifier(args.verifier, rest, 'serve', FLAGS)
  server = make_server(verifier, args.host, args.port)
  # who started the process reads the port from this line, so it must not wait in a buffer
  print(f'{verifier.names[0]} at http://{args.host}:{server.server_port}', flush=True)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    return 0
  finally:
    server.server_close()


def make_server(verifier, host: str, port: int):
  """An HTTP server that scores with the verifier; port 0 takes one that is free."""
  from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

  scorer = arguments.build_scorer(verifier)

  class ScoreHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    def do_POST(self):
      """Scores a batch."""
      # a bad request is the client's error: it gets the message, and the server goes on
      try:
        body = json.loads(self.rfile.read(int(self.headers.get('Content-Length', 0))))
        status, answer = 200, {'scores': score_request(scorer, body['prompts'], body['images'])}
      except (ValueError, KeyError, TypeError, binascii.Error) as error:
        status, answer = 400, {'error': str(error)}
      data = json.dumps(answer).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      """Prints nothing: a study sends thousands of requests."""

  return ThreadingHTTPServer((host, port), ScoreHandler)


def score_request(scorer, prompts, encoded) -> list[float | None]:
  """The first score of each picture; None where it is not finite.

  Args:
    scorer: an `engine.scorer.Scorer`.
    prompts: a text or a prompt row for each picture.
    encoded: files of pictures in base64.

  Raises:
    ValueError: more or fewer prompts than pictures, or one that cannot be read.
  """
  from vtts_jax.core import as_prompts
  from vtts_jax.media.files import read_image

  prompts = as_prompts(prompts)
  pictures = [read_image(io.BytesIO(base64.b64decode(e, validate=True))) for e in encoded]
  if len(pictures) != len(prompts):
    raise ValueError(f'{len(prompts)} prompts and {len(pictures)} images; must be as many')
  name = scorer.verifier.names[0]
  # pictures of one size are scored together; each answer goes back to its picture's place
  scores: list[float | None] = [None] * len(prompts)
  for shape in dict.fromkeys(p.shape for p in pictures):
    places = [i for i, p in enumerate(pictures) if p.shape == shape]
    images = np.stack([pictures[i] for i in places])
    values = scorer({'image': images}, [prompts[i] for i in places])[name]
    for place, value in zip(places, values):
      scores[place] = float(value) if np.isfinite(value) else None
  return scores
