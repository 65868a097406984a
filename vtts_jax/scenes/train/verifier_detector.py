"""Trains the detector used as a verifier: `python -m vtts_jax.scenes.train.verifier_detector`.

It takes about two minutes on one core. Half of the pictures are corrupted (blur, noise, less
contrast), because a verifier sees unfinished pictures during a search; the targets stay those of
the clean scene.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import labels, oracle, world
from vtts_jax.scenes.models import soft_detector
from vtts_jax.scenes.train import build_parser, corruptions
from vtts_jax.train import loop

NAME = 'verifier_detector'


def measure_detector(graphdef, params, count=1536, batch=64):
  """Accuracies on held-out scenes. `agreement` compares verdicts with those of the rule oracle."""
  scenes = world.sample_scenes(21, np.arange(count), 'held')
  images, (kind, colour) = world.render_scenes(scenes), soft_detector.place_targets(scenes)
  read = jax.jit(lambda p, x: modules.bind_graph(graphdef, p)(x))
  got = [read(params, images[i:i + batch]) for i in range(0, count, batch)]
  kinds, inks = (np.concatenate(part) for part in zip(*got))
  # most places are empty: accuracy on them alone would look good
  there = kind != soft_detector.NOTHING
  metrics = {
    'shape': float((kinds.argmax(-1) == kind)[there].mean()),
    'empty': float((kinds.argmax(-1) == kind)[~there].mean()),
    'colour': float((inks.argmax(-1) == colour)[there].mean()),
  }
  wrong, aspect = labels.wrong_captions(scenes, 22, np.arange(count), 'held')
  satisfaction = jax.jit(soft_detector.satisfaction_log_prob)

  def score_captions(captions):
    targets = soft_detector.parse_captions(world.caption_texts(captions))
    return np.asarray(satisfaction(kinds[:, None], inks[:, None], targets))[:, 0]

  right, false = score_captions(scenes.captions), score_captions(wrong)
  metrics['pairs'] = float((right > false).mean())
  for k, name in enumerate(labels.ASPECTS):
    metrics[f'pairs_{name}'] = float((right > false)[aspect == k].mean())
  truth = [oracle.grade(images, world.caption_prompts(c)) for c in (scenes.captions, wrong)]
  # a caption counts as satisfied from probability 0.5 on
  metrics['agreement'] = float(np.mean([((s > np.log(0.5)) == t).mean()
                                        for s, t in zip((right, false), truth)]))
  return metrics


def main():
  args = build_parser(steps=1500, batch=64, rate=2e-3, seed=31).parse_args()
  config = soft_detector.Config()
  graphdef, params = modules.split_module(soft_detector.build_model(config, args.seed))

  def draw_batch(step):
    scenes = world.sample_scenes(args.seed, np.arange(step * args.batch, (step + 1) * args.batch))
    return world.render_scenes(scenes), soft_detector.place_targets(scenes)

  def loss(params, batch, key, progress):
    images, truth = batch
    k = jax.random.split(key)
    clean = jax.random.bernoulli(k[0], 0.5, (len(images), 1, 1, 1))
    images = jnp.where(clean, images, corruptions.degrade_mildly(images, k[1]))
    return soft_detector.detection_loss(*modules.bind_graph(graphdef, params)(images), truth)

  params = loop.round_weights(loop.train_model(
    loss, params, draw_batch, steps=args.steps, rate=args.rate, seed=args.seed, ema=0.99,
    folder=os.path.join(args.workdir, NAME)))
  metrics = measure_detector(graphdef, params)
  print(metrics)
  loop.export_weights(os.path.join(args.out, f'{NAME}.safetensors'), params, kind='soft_detector',
                      config=dataclasses.asdict(config), metrics=metrics, seed=args.seed,
                      steps=args.steps, command='python -m vtts_jax.scenes.train.verifier_detector')


if __name__ == '__main__':
  main()
