"""Trains the quality scorer: `python -m vtts_jax.scenes.train.quality`.

It takes about two minutes on one core. A third of the pictures are clean. Each of the others has
one corruption: mild degradation, heavy blur, an unfinished part, holes, or a second scene mixed in.
The target is exp(-4 d), where d is the root mean square difference to the clean picture over the
inked pixels of both: 1 for a clean picture, about 0.5 for a blur of one pixel.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import world
from vtts_jax.scenes.models import quality
from vtts_jax.scenes.train import build_parser, corruptions
from vtts_jax.train import loop

NAME = 'quality'
WAYS = {  # by their names in the card
  'mild': corruptions.degrade_mildly,
  'smear': corruptions.smear_images,
  'unfinished': corruptions.leave_unfinished,
  'holes': corruptions.cut_holes,
  'mixture': corruptions.mix_neighbours,
}


def clean_target(images, clean):
  """The target exp(-4 d) in (0, 1], `[R]`."""
  # only inked pixels count: a missing object weighs the same in a picture of one or of four
  inked = lambda x: jnp.abs(x - world.GROUND).max(-1) > 0.05
  at = jnp.maximum((inked(images) | inked(clean)).sum((1, 2)), 1)
  gap = ((images - clean) ** 2).mean(-1).sum((1, 2)) / at
  return jnp.exp(-4 * jnp.sqrt(gap + 1e-12))


def measure_scorer(graphdef, params, count=1024, chunk=64):
  """On held-out scenes: accuracy of clean > corrupted by corruption, correlation with target."""
  clean = world.render_scenes(world.sample_scenes(71, np.arange(count), 'held'))
  score = jax.jit(lambda p, x: jax.nn.sigmoid(modules.bind_graph(graphdef, p)(x)))
  run = lambda x: np.concatenate([score(params, x[i:i + chunk]) for i in range(0, count, chunk)])
  good = run(clean)
  metrics, scores, targets = {'clean': float(good.mean())}, [good], [np.ones(count)]
  for i, (label, way) in enumerate(WAYS.items()):
    images = jax.jit(way)(clean, jax.random.key(72 + i))
    scores.append(run(images))
    targets.append(np.asarray(clean_target(images, clean)))
    # some rectangles miss every object and leave the picture nearly clean
    worse = targets[-1] < 0.8
    metrics[f'pairs_{label}'] = float((good > scores[-1])[worse].mean())
  metrics['correlation'] = float(np.corrcoef(np.concatenate(scores), np.concatenate(targets))[0, 1])
  return metrics


def main():
  args = build_parser(steps=2500, batch=64, rate=2e-3, seed=71).parse_args()
  config = quality.Config()
  graphdef, params = modules.split_module(quality.build_model(config, args.seed))

  def loss(params, clean, key, progress):
    k = jax.random.split(key)
    # a third stays clean, so that the target 1 is common
    keep = jax.random.bernoulli(k[0], 1 / 3, (len(clean), 1, 1, 1))
    images = jnp.where(keep, clean, corruptions.corrupt_rows(clean, k[1], WAYS.values()))
    target = clean_target(images, clean)
    logit = modules.bind_graph(graphdef, params)(images)
    # binary cross-entropy with a soft target
    value = (jax.nn.softplus(logit) - target * logit).mean()
    return value, {'loss': value, 'error': jnp.abs(jax.nn.sigmoid(logit) - target).mean()}

  def draw_batch(step):
    rows = np.arange(step * args.batch, (step + 1) * args.batch)
    return world.render_scenes(world.sample_scenes(args.seed, rows))

  params = loop.round_weights(loop.train_model(
    loss, params, draw_batch, steps=args.steps, rate=args.rate, seed=args.seed, ema=0.99,
    folder=os.path.join(args.workdir, NAME)))
  metrics = measure_scorer(graphdef, params)
  print(metrics)
  loop.export_weights(os.path.join(args.out, f'{NAME}.safetensors'), params, kind='quality',
                      config=dataclasses.asdict(config), metrics=metrics, seed=args.seed,
                      steps=args.steps, command='python -m vtts_jax.scenes.train.quality')


if __name__ == '__main__':
  main()
