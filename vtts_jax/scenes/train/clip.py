"""Trains a CLIP-like verifier: `python -m vtts_jax.scenes.train.clip --which=a` (or b).

The two differ in architecture, initialisation, data seeds and training pictures: half of those of
`a` are corrupted or unfinished, those of `b` are clean. The loss has three terms: a sigmoid loss
over all pairs of pictures and captions of a batch, labelled by what is true of the scenes (a
caption may be true of several); a ranking loss against two hard negatives per picture; and the
detection loss of the tower's heads, which fades out. Each takes about four minutes on one core.
`--steps=0` and a negative seed select the values of the recipe.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import labels, world
from vtts_jax.scenes.models import clip, soft_detector
from vtts_jax.scenes.train import build_parser, corruptions
from vtts_jax.train import loop

RECIPES = {  # config, seed, steps, weight decay
  'a': (clip.Config(), 41, 4000, 0.3),
  'b': (clip.Config(tower='conv', width=64), 53, 4000, 0.3),
}
NEGATIVES, BLOCK = 2, 1024
WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0, 2.0], np.float32)  # of a negative's aspect: rare ones more


@functools.lru_cache(maxsize=1)
def _draw_block(seed, number):
  """Scenes and hard negatives of `BLOCK` rows."""
  # drawing negatives costs nearly the same for 64 rows as for 1024, so batches are cut from a block
  rows = np.arange(number * BLOCK, (number + 1) * BLOCK)
  scenes = world.sample_scenes(seed, rows)
  return scenes, [labels.wrong_captions(scenes, seed + 1 + i, rows) for i in range(NEGATIVES)]


def make_batch(seed, step, size):
  """Pictures `[R, ...]`, ids `[3 R, 12]`, labels `[R, 3 R]`, weights `[2, R]`, place targets."""
  number, start = divmod(step * size, BLOCK)
  part = slice(start, start + size)
  scenes, wrong = _draw_block(seed, number)
  scenes = world.Scenes(scenes.captions.take_rows(part), *(f[part] for f in scenes[1:]))
  said = (scenes.captions, *(c.take_rows(part) for c, _ in wrong))
  said = world.Captions(*map(np.concatenate, zip(*said)))
  ids = world.tokenize_texts(world.caption_texts(said))
  true = labels.true_captions(said, scenes).astype(np.float32)
  weight = WEIGHTS[np.stack([aspect[part] for _, aspect in wrong])]
  return world.render_scenes(scenes), ids, true, weight, soft_detector.place_targets(scenes)


def contrastive_loss(model, images, ids, labels, weight, targets, progress):
  """The loss of a batch and its terms: (scalar, {name: scalar})."""
  embedded, kind, colour = model.embed_and_detect(images)
  logits = model.all_pair_logits(embedded, model.embed_texts(ids))  # [R, 3 R]
  # true and false pairs are averaged apart: there are many more false ones
  mean = lambda x, w: (x * w).sum() / jnp.maximum(w.sum(), 1)
  true = mean(jax.nn.softplus(-logits), labels)
  false = mean(jax.nn.softplus(logits), 1 - labels)
  # the logits of each picture with its own caption, then with its own negatives
  own = jnp.stack(jnp.split(logits, 1 + NEGATIVES, -1))  # [3, R, R]
  own = jnp.diagonal(own, axis1=1, axis2=2)  # [3, R]
  rank = (weight * jax.nn.softplus(own[1:] - own[:1])).mean()
  detect, _ = soft_detector.detection_loss(kind, colour, targets)
  # detections give the towers a start; later they must not limit the embedding
  total = true + false + 2 * rank + (1.5 * (1 - progress) + 0.1) * detect
  return total, {'loss': total, 'true': true, 'false': false, 'rank': rank, 'detect': detect,
                 'pairs': (own[1:] < own[:1]).mean()}


def measure_pairs(graphdef, params, count=9216, chunk=64, change=None):
  """Accuracy on held-out hard negatives, total and by aspect; `change(images)` corrupts first."""
  scenes = world.sample_scenes(61, np.arange(count), 'held')
  wrong, aspect = labels.wrong_captions(scenes, 62, np.arange(count), 'held')
  images = world.render_scenes(scenes)
  images = images if change is None else np.asarray(change(images))
  ids = [world.tokenize_texts(world.caption_texts(c)) for c in (scenes.captions, wrong)]

  @jax.jit
  def score(params, images, right, false):
    model = modules.bind_graph(graphdef, params)
    x, right, false = model.embed_images(images), model.embed_texts(right), model.embed_texts(false)
    return model.pair_logits(x, right), model.pair_logits(x, false)

  parts = [score(params, *(v[i:i + chunk] for v in (images, *ids)))
           for i in range(0, count, chunk)]
  right, false = (np.concatenate(part) for part in zip(*parts))
  # searches compare, so the order of two captions counts, not the sign of a logit
  better = right > false
  out = {'pairs': float(better.mean())}
  for k, name in enumerate(labels.ASPECTS):
    out[f'pairs_{name}'] = float(better[aspect == k].mean())
  out['true_above_half'] = float((right > 0).mean())
  out['false_below_half'] = float((false < 0).mean())
  return out


def main():
  args = build_parser(steps=0, batch=64, rate=2e-3, seed=-1, which='a').parse_args()
  if args.which not in RECIPES:
    raise SystemExit(f'--which={args.which}: allowed are {", ".join(RECIPES)}')
  if BLOCK % args.batch:
    raise SystemExit(f'--batch={args.batch}: must divide {BLOCK}')
  config, seed, steps, decay = RECIPES[args.which]
  steps, seed = args.steps or steps, seed if args.seed < 0 else args.seed
  name = f'clip_{args.which}'
  graphdef, params = modules.split_module(clip.build_model(config, seed))
  ways = {  # by their names in the card
    'mild': corruptions.degrade_mildly,
    'smear': corruptions.smear_images,
    'unfinished': corruptions.leave_unfinished,
    'holes': corruptions.cut_holes,
  }

  def objective(params, data, key, progress):
    images, *rest = data
    if args.which == 'a':
      # the other half stays clean, so that `a` does not lose accuracy on finished pictures
      half = len(images) // 2
      corrupted = corruptions.corrupt_rows(images[:half], key, ways.values())
      images = jnp.concatenate([corrupted, images[half:]])
    return contrastive_loss(modules.bind_graph(graphdef, params), images, *rest, progress)

  params = loop.round_weights(loop.train_model(
    objective, params, lambda step: make_batch(seed, step, args.batch),
    steps=steps, rate=args.rate, seed=seed, ema=0.99, decay=decay,
    folder=os.path.join(args.workdir, name)))
  metrics = measure_pairs(graphdef, params)
  for label, way in ways.items():
    corrupted = jax.jit(lambda x, way=way: way(x, jax.random.key(63)))
    metrics[f'pairs_{label}'] = measure_pairs(graphdef, params, change=corrupted)['pairs']
  print(metrics)
  loop.export_weights(os.path.join(args.out, f'{name}.safetensors'), params, kind='clip',
                      config=dataclasses.asdict(config), metrics=metrics, seed=seed, steps=steps,
                      command=f'python -m vtts_jax.scenes.train.clip --which={args.which}')


if __name__ == '__main__':
  main()
