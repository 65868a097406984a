"""What the search costs beside its model, and what the KV cache saves.

    python benchmarks/overhead.py [--repeats=5]

1. A fused beam search with the scenes prior, against its bare model calls: the same prompt
   encoding, prior steps, decodes and verifier calls, of the same shapes and as many, in one
   compiled program without any search between them. Medians of interleaved repeats.
2. Cached decoding of 256 tokens against a straightforward decoder that runs the whole prefix again
   for each token, as the public system does: the same prior with random weights, the same rows. The
   prefix is padded to the next multiple of 16, not to 256, so that it is no slower than it must be.
3. The FLOP/s of 1 as a share of this machine's matmul rate, measured in the same run.

Prints a table and, last, one line of JSON.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vtts_jax import components, core
from vtts_jax.engine import fused, step
from vtts_jax.engine.search import bill, prepare_search
from vtts_jax.models import modules
from vtts_jax.scenes import world as scenes
from vtts_jax.scenes.models import prior

SEGMENT = 16


def interleaved(calls, repeats):
  """Median seconds of each call, taken in turn so that a busy machine slows them alike."""
  seconds = [[] for _ in calls]
  for call in calls:
    jax.block_until_ready(call())  # compiles
  for _ in range(repeats):
    for own, call in zip(seconds, calls):
      start = time.perf_counter()
      jax.block_until_ready(call())
      own.append(time.perf_counter() - start)
  return [float(np.median(s)) for s in seconds]


def matmul_rate(repeats, size=1536):
  """FLOP/s of a float32 matrix product on this machine."""
  a = jnp.ones((size, size))
  product = jax.jit(lambda a: a @ a)
  (seconds,) = interleaved([lambda: product(a)], repeats)
  return 2 * size**3 / seconds


def search_against_model(repeats, count):
  """Seconds of the fused search and of its model calls alone, and its analytic FLOPs."""
  algo = components.load('search.beam', width=4, branch=8)
  gen = components.load('scenes.ar')
  ver = components.load('scenes.clip', which='a')
  prompts = scenes.prompts('held', count)
  prepared = prepare_search(algo, gen, ver, prompts, render_chunk=4)  # as configs/scenes.py does
  program, params, arrays = prepared.program, prepared.params, prepared.arrays
  ids, key = jnp.arange(count), jax.random.key(0)

  @jax.jit
  def bare(params, arrays):
    """As many calls of the same shapes; each feeds on the one before, so none can be dropped."""
    contexts = step.encode_prompts(program, params, arrays)
    ctx = contexts.generator
    keys = core.candidate_keys(core.prompt_keys(key, ids), jnp.arange(algo.width))
    state, total = gen.init(params['generator'], ctx, keys), 0.0

    def draw(state, position):
      logits, cache = gen.next_logits(params['generator'], ctx, state, position)
      token = jnp.argmax(logits, -1).astype(jnp.int32)
      here = jnp.arange(gen.num_stages) == position
      tokens = jnp.where(here, token[..., None], state.tokens)
      return state._replace(tokens=tokens, cache=cache), None

    for chunk, begin in algo.chunks(gen):
      state, _ = jax.lax.scan(draw, state, begin + jnp.arange(chunk.size))
      seen = core.repeat(gen.drop_cache(state), chunk.proposed // chunk.beams)
      stages = jnp.full((count, chunk.proposed), begin + chunk.size)

      def score(states, stages):
        seen = gen.observe(params['generator'], ctx, states, stages, ('image',))
        return ver.score(params['verifier'], contexts.verifier, seen)

      scores = step.map_chunks(program.render_chunk, score, seen, stages)
      total = total + sum(s.sum() for s in scores.values())
      state = state._replace(tokens=state.tokens + (total > 1e30).astype(jnp.int32))
    best = jax.tree.map(lambda x: x[:, :1], gen.drop_cache(state))
    return total, gen.observe(params['generator'], ctx, best, gen.num_stages, ('image',))

  def whole():
    return fused.run_fused(program, None, params, arrays, ids, key, prepared.initial)

  found, alone = interleaved([whole, lambda: bare(params, arrays)], repeats)
  flops = count * sum(bill(algo, gen, ver), core.Cost()).flops
  return found, alone, flops


def cached_against_prefix(repeats, tokens=256, prompts=1, rows=16):
  """Seconds to draw `tokens` tokens greedily: with the cache, and running the prefix each time."""
  config = prior.Config(tokens=tokens)
  graphdef, params = modules.split_module(prior.build_model(config))
  text = jnp.asarray(scenes.tokenize_texts(['a photo of a red circle'] * prompts))

  @jax.jit
  def cached(params):
    model = modules.bind_graph(graphdef, params)
    text_kv = model.encode_text(text)

    def token(carry, t):
      last, cache = carry
      logits, cache = model.feed_tokens(text_kv, cache, last, t)
      last = jnp.argmax(logits, -1).astype(jnp.int32)
      return (last, cache), last

    begin = jnp.full((prompts, rows), config.codes)
    carry = (begin, model.init_cache(prompts, rows))
    return jnp.moveaxis(jax.lax.scan(token, carry, jnp.arange(tokens))[1], 0, -1)

  @jax.jit
  def prefix(params):
    drawn = jnp.zeros((prompts * rows, 0), jnp.int32)
    texts = jnp.repeat(text, rows, axis=0)
    for length in range(
      SEGMENT, tokens + 1, SEGMENT
    ):  # shapes are static: SEGMENT tokens share one
      short, _ = modules.abstract_module(
        lambda n=length: prior.build_model(dataclasses.replace(config, tokens=n))
      )
      model = modules.bind_graph(short, params | {'place': params['place'][:length]})

      def token(drawn, t, model=model):
        logits = jax.lax.dynamic_index_in_dim(model(texts, drawn), t, 1, keepdims=False)
        last = jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.lax.dynamic_update_index_in_dim(drawn, last, t, 1), None

      drawn = jnp.pad(drawn, ((0, 0), (0, SEGMENT)))
      drawn = jax.lax.scan(token, drawn, jnp.arange(length - SEGMENT, length))[0]
    return drawn.reshape(prompts, rows, tokens)

  same = float((cached(params) == prefix(params)).mean())
  return *interleaved([lambda: cached(params), lambda: prefix(params)], repeats), same


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=5, help='timed repeats of each (default 5)')
  parser.add_argument('--prompts', type=int, default=24, help='prompts a batch (default 24)')
  args = parser.parse_args()
  rate = matmul_rate(args.repeats)
  found, alone, flops = search_against_model(args.repeats, args.prompts)
  cached, prefix, same = cached_against_prefix(max(2, args.repeats // 2))
  table = Table('what', 'value', box=None)
  table.add_row('float32 matmul rate', f'{rate / 1e9:.1f} GFLOP/s')
  table.add_row(f'fused beam search, {args.prompts} prompts', f'{found:.3f} s')
  table.add_row('its model calls alone', f'{alone:.3f} s')
  table.add_row('its analytic FLOPs', f'{flops / 1e9:.1f} GFLOP')
  table.add_row('floor: FLOPs at the matmul rate', f'{flops / rate:.3f} s')
  table.add_row('256 tokens x 16 rows, KV cache', f'{cached:.3f} s')
  table.add_row('256 tokens x 16 rows, prefix run again', f'{prefix:.3f} s')
  table.add_row('tokens equal', f'{same:.4f}')
  Console(width=100).print(table)
  print(
    json.dumps(
      {
        'fused_over_model': round(found / alone, 3),
        'cached_speedup': round(prefix / cached, 1),
        'matmul_share': round(flops / found / rate, 3),
      }
    )
  )


if __name__ == '__main__':
  main()
