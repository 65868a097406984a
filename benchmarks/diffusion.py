"""Diffusion: denoising steps against torch, noise search against its model calls, bytes on a TPU.

    python benchmarks/diffusion.py [--parts=abc] [--repeats=5]

a. Denoising steps per second of SiT-B/2 (8 pictures of 256 px) and of the UNet of Stable Diffusion
   1.5 (one picture of 256 px with guidance, so two rows), in float32 on this CPU: `extend` by one
   step, as searches call it, against the class of diffusers with the same sizes on the same rows
   (for SiT that is DiT's). Interleaved repeats in one process; needs torch and diffusers. Also the
   FLOP/s of our step as a share of this machine's matmul rate.
b. Zero-order search on the scene world's flow model as one compiled program, against its bare model
   calls: as many steps, decodes and verifier calls of the same shapes, without a search between
   them.
c. Bytes and FLOPs of one denoising step of SiT-XL/2, SD3.5 medium and FLUX.1 dev in bfloat16 on one
   chip of a v5e, as the TPU compiler plans it (nothing runs; pip install libtpu): bytes over the
   floor, which is the weights once, and the time of the roofline over that of the floor. FLUX is
   split over 4 chips.

Prints a table and, last, one line of JSON: medians with minimum and maximum over the repeats.
"""

import argparse
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vtts_jax import components, core
from vtts_jax.engine import fused, step
from vtts_jax.engine.search import load_parameters, prepare_search
from vtts_jax.models import modules
from vtts_jax.scenes import world
from vtts_jax.testing import hlo

V5E = 819e9, 197e12  # bytes and bfloat16 FLOPs per second of one chip


def interleave_calls(calls, repeats):
  """Seconds `[repeats, calls]`, in turn so that a busy machine slows all alike."""
  for call in calls:
    call()  # compiles
  seconds = np.zeros((repeats, len(calls)))
  for row in seconds:
    for i, call in enumerate(calls):
      begin = time.perf_counter()
      call()
      row[i] = time.perf_counter() - begin
  return seconds


def describe_ratios(above, below):
  """Median, least and largest of the ratios of the repeats."""
  ratios = above / below
  return [round(float(x), 3) for x in (np.median(ratios), ratios.min(), ratios.max())]


# --------------------------------------------------------------------------------- a. against torch


def step_call(gen, prompts, count):
  """A call of one denoising step of `count` candidates of each prompt, and its FLOPs."""
  params, prompts = load_parameters(gen), core.as_prompts(prompts)
  keys = core.candidate_keys(core.prompt_keys(jax.random.key(0), jnp.arange(len(prompts))),
                             jnp.arange(count))  # fmt: skip
  ctx = jax.jit(gen.encode)(params, jax.tree.map(jnp.asarray, gen.tokenize(prompts)))
  state = jax.jit(gen.init)(params, ctx, keys)
  advance = jax.jit(lambda params, ctx, state: gen.extend(params, ctx, state, keys, 0, 1).x)
  flops = len(prompts) * count * gen.cost('extend', 0, 1).flops
  return lambda: jax.block_until_ready(advance(params, ctx, state)), flops


def sit_pair(rows=8):
  import diffusers
  import torch

  gen = components.load(
    'generators.sit', weights='random:b2', vae_weights='random:sd1', guidance=1.0, sampler='euler',
    steps=25,
  )  # fmt: skip
  ours, flops = step_call(gen, [{'label': i} for i in range(rows)], 1)
  theirs = diffusers.DiTTransformer2DModel(
    num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,
    sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
  ).eval()  # fmt: skip
  given = torch.randn(rows, 4, 32, 32), torch.full((rows,), 500), torch.arange(rows)

  def call():
    with torch.inference_mode():
      theirs(given[0], timestep=given[1], class_labels=given[2])

  return ours, call, flops


def unet_pair(side=256):
  import diffusers
  import torch

  gen = components.load(
    'generators.unet', weights='random:sd15', vae_weights='random:sd1', clip_weights='random:l14',
    dtype='float32', height=side, width=side,
  )  # fmt: skip
  ours, flops = step_call(gen, ['a photo of a bench'], 1)
  theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768).eval()
  given = torch.randn(2, 4, side // 8, side // 8), 500, torch.randn(2, 77, 768)

  def call():
    with torch.inference_mode():
      theirs(*given)

  return ours, call, flops


def matmul_call(size=2048):
  """A call of a float32 matrix product, and its FLOPs."""
  a, product = jnp.ones((size, size)), jax.jit(lambda a: a @ a)
  return lambda: jax.block_until_ready(product(a)), 2 * size**3


# ----------------------------------------------------------------------------- b. search over calls


def search_calls(count=6):
  """Calls of a zero-order search of `count` prompts, and of its model calls alone."""
  algo = components.load('search.zero_order', neighbours=4, rounds=8)
  gen, ver = components.load('scenes.flow'), components.load('scenes.clip', which='a')
  prepared = prepare_search(algo, gen, ver, world.prompts('held', count), render_chunk=4)
  program, params, arrays = prepared.program, prepared.params, prepared.arrays
  ids, key = jnp.arange(count), jax.random.key(0)

  @jax.jit
  def run_bare(params, arrays):
    contexts = step.encode_prompts(program, params, arrays)
    keys = core.candidate_keys(core.prompt_keys(key, ids), jnp.arange(algo.neighbours))
    begin = gen.init(params['generator'], contexts.generator, keys)

    def run_round(carry, _):
      state, _ = carry
      done = gen.extend(params['generator'], contexts.generator, state, keys, 0, gen.num_stages)
      stages = jnp.full(keys.shape, gen.num_stages)

      def score(states, stages):
        seen = gen.observe(params['generator'], contexts.generator, states, stages, ('image',))
        return ver.score(params['verifier'], contexts.verifier, seen)

      scores = step.map_chunks(program.render_chunk, score, gen.drop_cache(done), stages)
      total = sum(scores.values())
      # each round feeds on the one before, so none can be dropped
      noise = state.noise + 1e-3 * total[..., None, None, None]
      return (gen.start_state(noise), done), total

    (_, done), totals = jax.lax.scan(run_round, (begin, begin), length=algo.rounds)
    best = jax.tree.map(lambda x: x[:, :1], done)
    shown = gen.observe(params['generator'], contexts.generator, best, gen.num_stages, ('image',))
    return totals, shown

  def run_search():
    # the very program that `engine.search` runs
    return fused.run_fused(program, None, params, arrays, ids, key, prepared.initial)

  return (
    lambda: jax.block_until_ready(run_search()),
    lambda: jax.block_until_ready(run_bare(params, arrays)),
  )


# ------------------------------------------------------------------------------------- c. on a TPU

TEXTS = {'clip_weights': 'random:l14', 't5_weights': 'random:t5_v1_1_xxl'}
TPU_STEPS = {  # name -> (generator, settings, prompt, chips)
  'SiT-XL/2': (
    'generators.sit',
    {'weights': 'random:xl2', 'vae_weights': 'random:sd1', 'dtype': 'bfloat16', 'guidance': 1.5},
    {'label': 1}, 1,
  ),
  'SD3.5 medium': (
    'generators.sd3',
    {**TEXTS, 'weights': 'random:sd3_5_medium', 'vae_weights': 'random:sd3',
     'open_clip_weights': 'random:bigg14', 'height': 1024, 'width': 1024},
    'a bench', 1,
  ),
  'FLUX.1 dev': (
    'generators.flux',
    {**TEXTS, 'weights': 'random:dev', 'vae_weights': 'random:flux', 'height': 1024, 'width': 1024},
    'a bench', 4,
  ),
}  # fmt: skip


def compile_tpu_step(module, settings, prompt, chips):
  """(bytes, floor of bytes, FLOPs, GiB) of one step of one candidate, on one of `chips` chips."""
  from jax.experimental import topologies
  from jax.experimental.layout import Format, Layout
  from jax.sharding import NamedSharding, PartitionSpec

  gen = components.load(module, **settings)
  topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4')
  devices = np.array(topology.devices[:chips]).reshape(1, chips)
  mesh = jax.sharding.Mesh(devices, ('data', 'model'))
  whole = NamedSharding(mesh, PartitionSpec())
  params = {}
  for name, part in gen.model_parts().items():
    _, shapes = modules.structure_of(part.modeling.build_model, part.config)
    params[name] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, gen.dtype), shapes)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, 1)))
  ctx = jax.eval_shape(gen.encode, params, gen.tokenize(core.as_prompts([prompt])))
  state = jax.eval_shape(gen.init, params, ctx, keys)
  # the network alone is read by a step; it is the first part of each family
  network = next(iter(params))
  params = {network: params[network]}
  places = {network: gen.shardings(mesh)[network]}

  def extend_once(params, ctx, state, keys):
    return gen.extend(params, ctx, state, keys, 0, 1)

  # prompts are split over 'data' and weights over 'model', as in the drivers
  split = (fused.WHOLE, fused.DATA, fused.DATA, fused.DATA)
  advance = fused.over_prompts(extend_once, mesh, split)
  auto = jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), places)
  compiled = (
    jax.jit(advance, in_shardings=(auto, whole, whole, whole), donate_argnums=2)
    .lower(params, ctx, state, keys)
    .compile()
  )
  memory = compiled.memory_analysis()
  most = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  own = sum(
    np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places))
  )
  return hlo.traffic(compiled.as_text()), own, gen.cost('extend', 0, 1).flops / chips, most


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--parts', default='abc', help='which of a, b, c (default abc)')
  parser.add_argument('--repeats', type=int, default=5, help='timed repeats of each (default 5)')
  args = parser.parse_args()
  if not args.parts or set(args.parts) - set('abc'):
    parser.error(f'--parts={args.parts}: must be some of a, b, c')
  table, found = Table('what', 'value', box=None), {}
  if 'a' in args.parts:
    matmul, product = matmul_call()
    for name, pair in (('SiT-B/2', sit_pair), ('SD1.5 UNet', unet_pair)):
      ours, theirs, flops = pair()
      seconds = interleave_calls([ours, theirs, matmul], args.repeats)
      own, torch_own, square = np.median(seconds, 0)
      table.add_row(f'a. {name}, a step', f'{own:.2f} s, torch {torch_own:.2f} s')
      table.add_row(f'a. {name}, rate', f'{flops / own / 1e9:.0f} GFLOP/s of '
                                        f'{product / square / 1e9:.0f}')  # fmt: skip
      key = name.replace(' ', '_')
      found[f'{key}_over_torch'] = describe_ratios(seconds[:, 1], seconds[:, 0])
      found[f'{key}_matmul_share'] = describe_ratios(
        flops * seconds[:, 2], product * seconds[:, 0]
      )
  if 'b' in args.parts:
    seconds = interleave_calls(search_calls(), args.repeats)
    whole, bare = np.median(seconds, 0)
    table.add_row('b. zero-order search', f'{whole:.2f} s, its model calls {bare:.2f} s')
    found['search_over_model'] = describe_ratios(seconds[:, 0], seconds[:, 1])
  if 'c' in args.parts:
    for name, (module, settings, prompt, chips) in TPU_STEPS.items():
      moved, floor, flops, most = compile_tpu_step(module, settings, prompt, chips)
      table.add_row(
        f'c. {name}, a step on {chips} chip(s)',
        f'{moved / 1e9:.2f} GB, floor {floor / 1e9:.2f}, {flops / 1e12:.2f} TFLOP, '
        f'{max(moved / V5E[0], flops / V5E[1]) * 1e3:.1f} ms, {most / 2**30:.2f} GiB',
      )
      key = name.replace(' ', '_')
      time_of = lambda bytes_moved, flops=flops: max(bytes_moved / V5E[0], flops / V5E[1])
      found[f'{key}_bytes_over_floor'] = round(float(moved / floor), 3)
      found[f'{key}_time_over_floor'] = round(float(time_of(moved) / time_of(floor)), 3)
  Console(width=110).print(table)
  print(json.dumps(found))


if __name__ == '__main__':
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no TPU to ask
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  main()
