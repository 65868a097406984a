"""Trains the detector behind the tokenizers' perceptual loss.

`python -m vtts_jax.scenes.train.detector`; about two minutes on one core. Half of the training
scenes have noise, blur and less contrast, so that the features stay meaningful on the unfinished
pictures that a tokenizer draws.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import world
from vtts_jax.scenes.models import detector
from vtts_jax.scenes.train import build_parser, corruptions
from vtts_jax.train import loop


def damage_images(images, key):
  """Random blur, contrast and noise on half of the rows."""
  a, b, c, d, e = jax.random.split(key, 5)
  r = len(images)
  # clean pictures must stay half of the data: the loss compares with clean pictures
  on = jax.random.bernoulli(a, 0.5, (r,))
  shape = (r, 1, 1, 1)
  # two passes with one amount: the key `b` is used twice
  amount = jax.random.uniform(b, (r,))[:, None, None, None]
  out = corruptions.blur_images(corruptions.blur_images(images, amount), amount)
  out = world.GROUND + (out - world.GROUND) * jax.random.uniform(c, shape, minval=0.6, maxval=1.1)
  out += jax.random.uniform(d, shape, maxval=0.12) * jax.random.normal(e, images.shape)
  return jnp.where(on[:, None, None, None], out, images)


def main():
  args = build_parser(steps=2500, batch=64, rate=2e-3, seed=11).parse_args()
  config = detector.Config()
  graphdef, params = modules.split_module(detector.build_model(config, args.seed))

  def draw_batch(step):
    scenes = world.sample_scenes(args.seed, np.arange(step * args.batch, (step + 1) * args.batch))
    return world.render_scenes(scenes), detector.grid_targets(scenes)

  def loss(params, batch, key, progress):
    images, truth = batch
    logits = modules.bind_graph(graphdef, params)(damage_images(images, key))
    return detector.detection_loss(logits, truth)

  params = loop.round_weights(loop.train_model(
    loss, params, draw_batch, steps=args.steps, rate=args.rate, seed=args.seed,
    folder=f'{args.workdir}/detector'))
  scenes = world.sample_scenes(args.seed, np.arange(1024), 'held')
  read = jax.jit(lambda p, x: modules.bind_graph(graphdef, p)(x))
  out = read(params, world.render_scenes(scenes))
  truth = detector.grid_targets(scenes)
  # shape, colour and size are defined only where an object is
  at = truth['object'] == 1
  metrics = {'object': float(((out['object'] > 0) == at).mean())}
  for name in ('shape', 'colour', 'size'):
    metrics[name] = float((out[name].argmax(-1) == truth[name])[at].mean())
  print('held-out accuracy', metrics)
  loop.export_weights(os.path.join(args.out, 'detector.safetensors'), params, kind='detector',
                      config=dataclasses.asdict(config), metrics=metrics, seed=args.seed)


if __name__ == '__main__':
  main()
