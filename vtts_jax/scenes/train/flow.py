"""Trains a pixel-space flow model: `python -m vtts_jax.scenes.train.flow --size=small` (or large).

Flow matching on the linear path of `scenes/models/flow.py`: the squared error of the predicted
picture, weighted so that it is the error of the velocity. Captions are dropped with probability
0.1. A probe (a linear layer, for training only) has to name the object that covers each cell, and
its colour, from what the network knows before it paints: a picture's expected value is linear in
such probabilities, and cross-entropy teaches them sooner than squared error does. At the end pass@1
by the oracle is reported for guidance scales and numbers of Euler steps.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.generators.diffusion import schedules
from vtts_jax.models import modules
from vtts_jax.scenes import oracle, world
from vtts_jax.scenes.models import flow
from vtts_jax.scenes.train import build_parser
from vtts_jax.train import loop

SIZES = {'small': flow.Config(), 'large': flow.Config(width=96, blocks=6)}
NAMES = {'small': 'flow', 'large': 'flow_large'}
PROBE = 0.1  # weight of the probe
MIDDLE = -0.8  # log t / (1 - t) of the median time: what is where is decided early on the path
SHARPEST = 0.05  # 1 - t from which on the weight of the error grows no more


def label_cells(scenes):
  """What covers each cell, `[2, P, R]` int32: 0 nothing; else shape, size and part of the object
  (1 .. 90), and its colour (1 .. 8)."""
  # an object covers 3 x 3 cells, and the windows of two objects never overlap
  part, ink = _window_parts()[scenes.place], scenes.colour + 1  # [R, O, P], [R, O]
  there = (part >= 0) & (np.arange(world.SLOTS) < scenes.count[:, None])[..., None]
  kind = 1 + 9 * (len(world.RADII) * scenes.shape + scenes.size)[..., None] + part
  labels = [np.where(there, kind, 0).sum(1), np.where(there, ink[..., None], 0).sum(1)]
  return np.stack(labels).transpose(0, 2, 1).astype(np.int32)


@functools.cache
def _window_parts():
  """Which of its 9 parts an object at a place shows in a cell: `[36, P]`, -1 outside."""
  side = world.SIZE // 4
  y, x = np.divmod(np.arange(side**2), side)
  # place (0, 0) of the lattice is the middle of cell (1, 1)
  row, column = np.divmod(np.arange(36)[:, None], 6)
  dy, dx = y - row, x - column
  return np.where((np.minimum(dy, dx) >= 0) & (np.maximum(dy, dx) < 3), 3 * dy + dx, -1)


class Probe(nnx.Module):
  """Names object and colour of each cell from what `Flow.read_cells` knows; for training only."""

  kinds = 1 + 9 * len(world.RADII) * len(world.SHAPES)

  def __init__(self, width, *, rngs):
    self.read = nnx.Linear(width, self.kinds + 1 + len(world.COLOURS), rngs=rngs)

  def __call__(self, hidden, labels):
    """The cross-entropy (a scalar) of hidden `[P, R, D]` to labels `[2, P, R]`."""
    logits = jnp.split(self.read(hidden), [self.kinds], -1)
    # a product with the label's indicator: gathering has a slow gradient on a CPU
    right = lambda x, label: (x * (label[..., None] == np.arange(x.shape[-1]))).sum(-1)
    return sum((jax.nn.logsumexp(x, -1) - right(x, label)).mean()
               for x, label in zip(logits, labels))


@functools.partial(jax.jit, static_argnums=(0, 5))
def sample_images(graphdef, params, text_ids, key, scale, steps=24):
  """Samples with Euler steps: text ids `[R, Tt]` to images `[R, 32, 32, 3]` in [0, 1]."""
  model = modules.bind_graph(graphdef, params)
  R, size = len(text_ids), model.config.image
  # both guidance streams in one batch: prompts first, then null prompts
  emb = model.embed_texts(jnp.concatenate([text_ids, jnp.zeros_like(text_ids)]))
  times = jnp.asarray(schedules.shifted_times(steps, flow.SHIFT))

  def body(x, step):
    t, after = step
    data = model(jnp.concatenate([x, x]), jnp.full(2 * R, t), emb)
    data = data[R:] + scale * (data[:R] - data[R:])
    return x + (data - x) * (after - t) / (1 - t), None

  x = jax.random.normal(key, (R, size, size, 3))
  x = jax.lax.scan(body, x, (times[:-1], times[1:]))[0]
  return model.to_images(x)


def measure_samples(graphdef, params, prompts, scale, steps):
  """The oracle's report on one sample of each prompt."""
  text = world.tokenize_texts([p['text'] for p in prompts])
  images = np.concatenate([
    sample_images(graphdef, params, text[i:i + 60], jax.random.key(i), scale, steps)
    for i in range(0, len(text), 60)])
  return oracle.report_grades(images, prompts)


def main():
  args = build_parser(16000, batch=64, rate=2e-3, seed=31, drop=0.1, prompts=300,
                      size='small').parse_args()
  world.check_choice('size', args.size, tuple(SIZES))
  config, name = SIZES[args.size], NAMES[args.size]
  graphdef, params = modules.split_module(flow.build_model(config, args.seed))
  probe, probe_params = modules.split_module(Probe(config.width, rngs=nnx.Rngs(args.seed)))
  print(f'{modules.count_parameters(params):,} parameters', flush=True)

  def draw_batch(step):
    scenes = world.sample_scenes(args.seed, np.arange(step * args.batch, (step + 1) * args.batch))
    text_ids = world.tokenize_texts(world.caption_texts(scenes.captions))
    return world.render_scenes(scenes), text_ids, label_cells(scenes)

  def loss(params, batch, key, progress):
    images, text_ids, labels = batch
    model, keys = modules.bind_graph(graphdef, params['model']), jax.random.split(key, 3)
    # dropped captions train the unconditional stream of guidance
    kept = jax.random.bernoulli(keys[0], 1 - args.drop, (len(images), 1))
    t = jax.nn.sigmoid(MIDDLE + jax.random.normal(keys[1], (len(images),)))
    noise, data = jax.random.normal(keys[2], images.shape), 2 * images - 1
    at, text = t[:, None, None, None], model.embed_texts(jnp.where(kept, text_ids, world.PAD))
    hidden = model.read_cells((1 - at) * noise + at * data, t, text)
    error = ((model.paint_cells(hidden) - data) ** 2).mean((1, 2, 3))
    # an error e of the picture is an error e / (1 - t) of the velocity
    flow_loss = (error / jnp.maximum(1 - t, SHARPEST) ** 2).mean()
    probed = modules.bind_graph(probe, params['probe'])(hidden, labels)
    info = {'flow': flow_loss, 'picture': error.mean(), 'probe': probed}
    return flow_loss + PROBE * probed, info

  def evaluate(params, step):
    params, last = loop.round_weights(params['model']), step == args.steps
    prompts = world.prompts('held', args.prompts if last else 120)
    found = {}

    def measure(scale, steps):
      result = measure_samples(graphdef, params, prompts, scale, steps)
      found[f'guidance {scale}, {steps} steps'] = rate = round(result['overall'], 4)
      print(f'guidance {scale}, {steps} steps: pass@1 {rate}',
            {k: round(v, 3) for k, v in result['by_tag'].items()}, flush=True)
      return rate

    # the best scale becomes the stored default
    best = max((1.0, 1.5, 2.0, 3.0) if last else (1.5,), key=lambda scale: measure(scale, 24))
    for steps in (4, 8, 16, 48) if last else ():
      measure(best, steps)
    loop.export_weights(
      os.path.join(args.out, f'{name}.safetensors'), params, kind='flow',
      config=dataclasses.asdict(config), seed=args.seed, step=step, guidance=best, steps=24,
      metrics={'pass_at_1': found[f'guidance {best}, 24 steps'], 'all': found},
      command=f'python -m vtts_jax.scenes.train.flow --size={args.size} --steps={args.steps}')

  loop.train_model(loss, {'model': params, 'probe': probe_params}, draw_batch, steps=args.steps,
                   rate=args.rate, seed=args.seed, folder=f'{args.workdir}/{name}', every=500,
                   log=100, evaluate=evaluate)


if __name__ == '__main__':
  main()
