"""Trains the detector behind the tokenizers' perceptual loss.

`python -m vtts_jax.scenes.train.detector`; about two minutes on a core. Data: training scenes,
half of them with noise, blur or faded contrast, so that features stay meaningful on the
half-finished pictures a tokenizer draws.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import world
from vtts_jax.scenes.models import detector
from vtts_jax.scenes.train import build_parser
from vtts_jax.train import loop


def blur(images, amount):
  """Binomial 3 x 3 blur mixed in by `amount [R]`."""
  x = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
  x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
  x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
  return images + amount[:, None, None, None] * (x - images)


def damage(images, key):
  """Random noise, blur and contrast, on half of the rows."""
  a, b, c, d, e = jax.random.split(key, 5)
  r = len(images)
  on = jax.random.bernoulli(a, 0.5, (r,))
  shape = (r, 1, 1, 1)
  out = blur(blur(images, jax.random.uniform(b, (r,))), jax.random.uniform(b, (r,)))
  out = world.GROUND + (out - world.GROUND) * jax.random.uniform(c, shape, minval=0.6, maxval=1.1)
  out += jax.random.uniform(d, shape, maxval=0.12) * jax.random.normal(e, images.shape)
  return jnp.where(on[:, None, None, None], out, images)


def main():
  args = build_parser(steps=2500, batch=64, rate=2e-3, seed=11).parse_args()
  config = detector.Config()
  graphdef, params = modules.split_module(detector.build(config, args.seed))

  def batches(step):
    scenes = world.sample_scenes(args.seed, np.arange(step * args.batch, (step + 1) * args.batch))
    return world.render_scenes(scenes), detector.grid_targets(scenes)

  def loss(params, batch, key, progress):
    images, truth = batch
    return detector.detection_loss(modules.bind(graphdef, params)(damage(images, key)), truth)

  params = loop.round_weights(loop.train_model(
    loss, params, batches, steps=args.steps, rate=args.rate, seed=args.seed,
    folder=f'{args.workdir}/detector'))
  scenes = world.sample_scenes(args.seed, np.arange(1024), 'held')
  out = jax.jit(lambda p, x: modules.bind(graphdef, p)(x))(params, world.render_scenes(scenes))
  truth = detector.grid_targets(scenes)
  at = truth['object'] == 1
  metrics = {'object': float(((out['object'] > 0) == at).mean())}
  for name in ('shape', 'colour', 'size'):
    metrics[name] = float((out[name].argmax(-1) == truth[name])[at].mean())
  print('held-out accuracy', metrics)
  loop.export_weights(os.path.join(args.out, 'detector.safetensors'), params, kind='detector',
                      config=dataclasses.asdict(config), metrics=metrics, seed=args.seed)


if __name__ == '__main__':
  main()
