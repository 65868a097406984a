"""Trains the detector used as a verifier: `python -m vtts_jax.scenes.train.verifier_detector`.

About two minutes on one core. Half of the pictures are spoiled (blur, noise, fading, unfinished
parts), because a verifier sees what a search has not finished; what is drawn stays the truth.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import oracle as oracle
from vtts_jax.scenes import world as world
from vtts_jax.scenes.models import soft_detector as judge
from vtts_jax.scenes.train import corruptions as spoil
from vtts_jax.train import loop

NAME = 'verifier_detector'


def measure(graphdef, params, count=1536, batch=64):
  """Held-out accuracies; `agreement` is with the rule oracle, on right and wrong captions."""
  scenes = world.sample(21, np.arange(count), 'held')
  images, (kind, colour) = world.render(scenes), judge.targets(scenes)
  read = jax.jit(lambda p, x: modules.merge(graphdef, p)(x))
  got = [read(params, images[i:i + batch]) for i in range(0, count, batch)]
  kinds, inks = (np.concatenate(part) for part in zip(*got))
  there = kind != judge.NOTHING
  metrics = {
    'shape': float((kinds.argmax(-1) == kind)[there].mean()),
    'empty': float((kinds.argmax(-1) == kind)[~there].mean()),
    'colour': float((inks.argmax(-1) == colour)[there].mean()),
  }
  wrong, aspect = world.negatives(scenes, 22, np.arange(count), 'held')
  judged = jax.jit(lambda k, c, t: judge.satisfaction(k[:, None], c[:, None], t)[:, 0])
  score = lambda captions: np.asarray(judged(kinds, inks, judge.parse(world.texts(captions))))
  right, false = score(scenes.captions), score(wrong)
  metrics['pairs'] = float((right > false).mean())
  for k, name in enumerate(world.ASPECTS):
    metrics[f'pairs_{name}'] = float((right > false)[aspect == k].mean())
  truth = [oracle.score(images, world.metadata(c)) for c in (scenes.captions, wrong)]
  metrics['agreement'] = float(np.mean([((s > np.log(0.5)) == t).mean()
                                        for s, t in zip((right, false), truth)]))
  return metrics


def main():
  args = loop.flags(steps=1500, batch=64, rate=2e-3, seed=31).parse_args()
  config = judge.Config()
  graphdef, params = modules.split(judge.build(config, args.seed))

  def batches(step):
    scenes = world.sample(args.seed, np.arange(step * args.batch, (step + 1) * args.batch))
    return world.render(scenes), judge.targets(scenes)

  def loss(params, batch, key, progress):
    images, truth = batch
    k = jax.random.split(key)
    clean = jax.random.bernoulli(k[0], 0.5, (len(images), 1, 1, 1))
    images = jnp.where(clean, images, spoil.mild(images, k[1]))
    return judge.loss(*modules.merge(graphdef, params)(images), truth)

  params = loop.rounded(loop.train(
    loss, params, batches, steps=args.steps, rate=args.rate, seed=args.seed, ema=0.99,
    folder=os.path.join(args.workdir, NAME)))
  metrics = measure(graphdef, params)
  print(metrics)
  loop.export(os.path.join(args.out, f'{NAME}.safetensors'), params, kind='judge',
              config=dataclasses.asdict(config), metrics=metrics, seed=args.seed,
              steps=args.steps, command='python -m vtts_jax.scenes.train.verifier_detector')


if __name__ == '__main__':
  main()
