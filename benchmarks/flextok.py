"""FlexTok AR: what the cache saves, where a beam search spends its time, what a TPU step moves.

    python benchmarks/flextok.py [--parts=abc] [--repeats=3]       # part c: pip install libtpu

a. Tokens per second of five beams of the 113M prior with their caches, against running the prefix
   again for each token with the same weights. Prefixes are padded to the next multiple of 64, so
   that the second is no slower than it must be; the four lengths are timed and averaged.
b. The published beam (5 beams of 10, scored after 1, 2, 4 .. 256 tokens) at 113M with a small
   decoder, a small VAE and CLIP B/32, as one compiled program: seconds of the prior, the decoder,
   the VAE and the verifier alone, of the same shapes and as many calls; the rest is selection.
   FLOP/s of prior and decoder at batch 50, as shares of this machine's matmul rate.
c. Bytes and FLOPs of one step of the 3B prior in bfloat16 on a v5e:2x4, one prompt a chip with
   guidance, as the TPU compiler plans it (nothing runs), over the floor: weights once, keys and
   values once; FLOPs are those of the shapes. For 5 and 50 candidates with caches of their own, and
   for 50 in one pool of as many slots as they fill where each draws half of its tokens alone, which
   is why own caches are what the generator uses.

Prints a table and, last, one line of JSON.
"""

import argparse
import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from timing import fastest

from vtts_jax import components, core
from vtts_jax.engine import fused, step
from vtts_jax.engine.search import load_parameters, prepare_search
from vtts_jax.models import modules
from vtts_jax.models.flexar import modeling as flexar
from vtts_jax.models.flextok import modeling as flextok
from vtts_jax.testing import hlo

BEAMS, CHILDREN, TOKENS, WORDS = 5, 10, 256, 128
# steps that observe 50 candidates: the first of 9 observes the 10 of one root, and at the end the
# best is observed once more
OBSERVED_STEPS = 8 + (CHILDREN + 1) / (BEAMS * CHILDREN)
PROMPTS = [{'text': 'a photo of a bench'}]
STREAMS = 2  # prompt and null
V5E = 819e9  # bytes per second


def matrix_product(size=2048):
  """A call of a float32 matrix product, and its FLOPs."""
  a, times = jnp.ones((size, size)), jax.jit(lambda a: a @ a)
  return lambda: times(a), 2 * size**3


def load_parts():
  """Generator, its parameters and a context of one prompt."""
  gen = components.load(
    'generators.flextok',
    prior_weights='random:flexar_113m',
    tokenizer_weights='random:small',
    vae_weights='random:small',
    text_weights='random:thin_xl',
    decode_steps=1,
  )
  params = load_parameters(gen)
  prompt = jax.tree.map(jnp.asarray, gen.tokenize(PROMPTS))
  return gen, params, jax.jit(gen.encode)(params, prompt)


def cached_against_prefix(gen, params, ctx, repeats):
  """Tokens per second of the beams: with the cache, and running the prefix again."""
  keys = jax.random.split(jax.random.key(0), (1, BEAMS))
  state = jax.jit(gen.init)(params, ctx, keys)
  cached = jax.jit(lambda p, c, s: gen.extend(p, c, s, keys, 0, TOKENS).tokens)

  @functools.partial(jax.jit, static_argnums=2)
  def run_prefix(params, ctx, length):
    model = gen.bind_part(params, 'prior')
    hidden, _ = model.prefill(ctx, jnp.zeros((1, BEAMS, length), jnp.int32))
    logits = model.token_logits(hidden[:, :, -1])
    return jnp.argmax(flexar.guide_logits(logits, gen.guidance_scale), -1)

  calls = [lambda n=n: run_prefix(params, ctx, n) for n in range(64, TOKENS + 1, 64)]
  whole, *each = fastest([lambda: cached(params, ctx, state), *calls], repeats)
  return BEAMS * TOKENS / whole, BEAMS / float(np.mean(each))


def time_beam(gen, params, repeats):
  """Seconds of the whole search and of its model calls; FLOP/s at batch 50."""
  algo = components.load('search.beam', width=BEAMS, branch=CHILDREN, roots=1, replace=False)
  ver = components.load('verifiers.clip', weights='random:b32')
  prepared = prepare_search(
    algo, gen, ver, PROMPTS, params={'generator': params}, render_chunk=BEAMS * CHILDREN
  )
  program, params, arrays = prepared.program, prepared.params, prepared.arrays
  ids, key = jnp.arange(1), jax.random.key(0)
  contexts = jax.jit(lambda p, a: step.encode_prompts(program, p, a))(params, arrays)
  ctx, vctx = contexts.generator, contexts.verifier

  def init_states(count):
    keys = core.candidate_keys(core.prompt_keys(key, ids), jnp.arange(count))
    return keys, gen.init(params['generator'], ctx, keys)

  many = BEAMS * CHILDREN
  kept, wide = init_states(BEAMS), init_states(many)

  def draw_tokens(count):
    return jax.jit(lambda p, s, k: gen.extend(p['generator'], ctx, s, k, 0, count).tokens)

  draw, short = draw_tokens(TOKENS), draw_tokens(4)
  observe = jax.jit(lambda p, s: gen.observe(p['generator'], ctx, s, TOKENS, ('image',)))
  latents = jax.jit(lambda p, s: gen.decode_latents(p['generator'], s, TOKENS))
  score = jax.jit(lambda p, seen: ver.score(p['verifier'], vctx, seen))
  uncached = gen.drop_cache(wide[1])
  observed = observe(params, uncached)
  matmul, flops = matrix_product()
  # the very program that `engine.search` runs, compiled before the clock starts
  given = (params, arrays, ids, key, prepared.initial)
  compiled = fused.run_fused.lower(program, None, *given).compile()
  begin = time.perf_counter()
  jax.block_until_ready(compiled(*given))  # long enough to be timed once
  whole = time.perf_counter() - begin
  prior, decoder, picture, verifier, steps, rate = fastest(
    [
      lambda: draw(params, kept[1], kept[0]),
      lambda: latents(params, uncached),
      lambda: observe(params, uncached),
      lambda: score(params, observed),
      lambda: short(params, wide[1], wide[0]),
      matmul,
    ],
    repeats,
  )
  rate = flops / rate
  seconds = {
    'prior': prior,
    'decoder': OBSERVED_STEPS * decoder,
    'vae': OBSERVED_STEPS * max(0, picture - decoder),
    'verifier': OBSERVED_STEPS * verifier,
  }
  seconds['selection'] = whole - sum(seconds.values())  # the rest; below 0 is noise
  shares = {name: s / whole for name, s in seconds.items()}
  prior_rate = many * gen.cost('extend', 0, 4).flops / steps
  passes = gen.decode_steps * (1 if gen.decode_scale == 1 else 2)
  decoded = many * passes * flextok.count_velocity_flops(gen.part_config('tokenizer'))
  return whole, shares, prior_rate, decoded / decoder, rate


def compile_tpu_step(rows, pool):
  """(bytes, FLOPs, floor of bytes, GiB at most) of one step on one chip of a v5e:2x4.

  Args:
    rows: candidates of the chip's prompt.
    pool: slots of one pool shared by all of them; 0 for a cache of 256 each.
  """
  from jax.experimental import topologies
  from jax.experimental.layout import Format, Layout
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4')
  mesh = Mesh(np.array(topology.devices), ('data',))
  whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ('data',)))
  c, B = flexar.SIZES['flexar_3b'], len(topology.devices)
  graphdef, params = modules.abstract_module(lambda: flexar.FlexAR(c, rngs=nnx.Rngs(0)))
  half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  params = jax.tree.map(lambda x: half(*x.shape), params)
  words = half(B, STREAMS, c.layers, WORDS, c.width)
  bias = jax.ShapeDtypeStruct((B, STREAMS, WORDS), jnp.float32)
  ctx = {'start': half(B, STREAMS, c.width), 'k': words, 'v': words, 'bias': bias}
  pools, each, slots = (1, rows, pool) if pool else (rows, 1, TOKENS)
  cache = {n: half(B, pools, STREAMS, c.layers, slots, c.width) for n in 'kv'}
  tokens = jax.ShapeDtypeStruct((B, pools, each), jnp.int32)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  seen = jax.ShapeDtypeStruct((B, 1, rows, slots), jnp.bool) if pool else None

  def draw_next(params, ctx, cache, tokens, t, slot, seen):
    model = modules.bind_graph(graphdef, params)
    hidden, cache = model.feed_tokens(ctx, cache, tokens, t, slot if pool else None, seen)
    logits = flexar.guide_logits(model.token_logits(hidden), 3.0)
    return jnp.argmax(logits, -1).astype(jnp.int32), cache

  auto = lambda tree, sharding: jax.tree.map(lambda _: Format(Layout.AUTO, sharding), tree)
  given = (auto(params, whole), auto(ctx, split), auto(cache, split), split, whole, whole, split)
  compiled = (
    jax.jit(
      draw_next,
      in_shardings=given,
      out_shardings=(split, auto(cache, split)),
      donate_argnums=2,
    )
    .lower(params, ctx, cache, tokens, number, number, seen)
    .compile()
  )
  memory = compiled.memory_analysis()
  most = memory.argument_size_in_bytes + memory.output_size_in_bytes
  most += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  flops = rows * STREAMS * (flexar.count_trunk_flops(c, slots, WORDS) + flexar.count_head_flops(c))
  # read once: what the trunk multiplies by (text keys and values are made once a prompt), the head,
  # the text, and every slot
  layers = c.layers * (6 * c.width**2 + 3 * c.width * c.hidden)
  kept = STREAMS * c.layers * (pools * slots + WORDS) * c.width * 2
  floor = 2 * (layers + c.width * c.codes + kept)
  return hlo.traffic(compiled.as_text()), flops, floor, most


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--parts', default='abc', help='which of a, b, c (default abc)')
  parser.add_argument('--repeats', type=int, default=3, help='timed repeats of each (default 3)')
  args = parser.parse_args()
  if not args.parts or set(args.parts) - set('abc'):
    parser.error(f'--parts={args.parts}: must be some of a, b, c')
  table, found = Table('what', 'value', box=None), {}
  if set(args.parts) & set('ab'):
    gen, params, ctx = load_parts()
  if 'a' in args.parts:
    cached, again = cached_against_prefix(gen, params, ctx, args.repeats)
    table.add_row('a. tokens per second, cache', f'{cached:.2f}')
    table.add_row('a. tokens per second, prefix run again', f'{again:.2f}')
    found['cached_speedup'] = round(cached / again, 1)
  if 'b' in args.parts:
    whole, shares, prior, decoder, rate = time_beam(gen, params, args.repeats)
    table.add_row('b. float32 matmul rate', f'{rate / 1e9:.1f} GFLOP/s')
    table.add_row('b. one beam search, 5 x 10 to 256', f'{whole:.1f} s')
    for name, share in shares.items():
      table.add_row(f'b. share of the {name}', f'{100 * share:.1f} %')
      found[f'{name}_share'] = round(share, 3)
    for name, own in (('prior', prior), ('decoder', decoder)):
      table.add_row(f'b. {name} at batch 50', f'{own / 1e9:.1f} GFLOP/s')
      found[f'{name}_matmul_share'] = round(own / rate, 3)
  if 'c' in args.parts:
    filled = 1 + BEAMS * CHILDREN * TOKENS // 2 + BEAMS * TOKENS // 2
    filled = -(-filled // 128) * 128
    for rows, pool in ((BEAMS, 0), (BEAMS * CHILDREN, 0), (BEAMS * CHILDREN, filled)):
      moved, flops, floor, most = compile_tpu_step(rows, pool)
      where = f'a pool of {pool} slots' if pool else 'own caches'
      table.add_row(
        f'c. {rows} candidates, {where}',
        f'{moved / 1e9:.2f} GB, floor {floor / 1e9:.2f} ({moved / V5E * 1e3:.1f} ms), '
        f'{flops / 1e12:.2f} TFLOP, {most / 2**30:.1f} GiB',
      )
      if not pool:
        found[f'bytes_over_floor_{rows}'] = round(moved / floor, 3)
  Console(width=110).print(table)
  print(json.dumps(found))


if __name__ == '__main__':
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no TPU to ask
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  main()
