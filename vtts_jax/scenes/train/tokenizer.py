"""Trains a scene tokenizer: `python -m vtts_jax.scenes.train.tokenizer --order=1d` (or 2d).

The loss has three terms: object-weighted L2, L1 and gradient L1; a perceptual term from
`detector.safetensors` (relative L2 of its features, cross-entropy to its reading of the true
picture); and a probe, a linear layer that reads the objects from the decoder's last hidden state.
The probe speeds up the learning of shapes: 1,000 steps with it equal about 4,000 without. Nested
dropout: with probability 0.7 (1D; 0.3 for 2D) the decoder sees only the first k tokens, short
prefixes more often. The perceptual term has little weight there, so that missing content is drawn
blurred and not as a texture that pleases the detector.

After 3 / 8 of the run the 1D encoder also pays for codes that a small causal mixer cannot predict
from earlier codes (after LARP, Wang et al. 2024, arXiv 2410.21264). A scene contains about 50 bits
at most, 32 tokens contain 256. So the encoder can make most of its tokens predictable, which makes
them learnable for a prior.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.models import modules
from vtts_jax.scenes import oracle, world
from vtts_jax.scenes.models import detector, load_model, tokenizer
from vtts_jax.scenes.models.layers import MLP, RMSNorm, learned_array
from vtts_jax.scenes.train import build_parser
from vtts_jax.train import loop

KEPT = (1, 2, 4, 6, 8, 12, 16, 24, 32)


def pixel_loss(out, images):
  """The sum of the three pixel terms per image, `[R]`."""
  # inked pixels weigh 4 times as much: a flat grey picture must not be a good answer
  off = out - images
  inked = jnp.max(jnp.abs(images - world.GROUND), -1, keepdims=True) > 0.05
  weight = 1 + 3 * inked
  edges = (jnp.abs(jnp.diff(off, axis=1)).mean((1, 2, 3))
           + jnp.abs(jnp.diff(off, axis=2)).mean((1, 2, 3)))
  return (10 * (weight * off * off).mean((1, 2, 3)) + 0.5 * jnp.abs(off).mean((1, 2, 3))
          + 0.5 * edges)


def perceptual_loss(net, out, images):
  """Relative feature distance `[R]`, and cross-entropy `[R]` to the reading of the true picture."""
  real, fake = net.feature_maps(images), net.feature_maps(out)
  total = 0.0
  for a, b in zip(real, fake):
    # the true picture is the target: no gradient flows into it
    a = jax.lax.stop_gradient(a)
    total += ((a - b) ** 2).sum((1, 2, 3)) / (a * a).sum((1, 2, 3))
  want, got = net.read_heads(real[-1]), net.read_heads(fake[-1])
  at = jax.lax.stop_gradient((want['object'] > 0).astype(jnp.float32))
  count = jnp.maximum(at.sum((1, 2)), 1)
  sure = jax.nn.softplus(jnp.where(at > 0, -1, 1) * got['object']).mean((1, 2)) * 4
  for name in ('shape', 'colour'):
    target = jax.lax.stop_gradient(jax.nn.softmax(want[name]))
    sure += -((target * jax.nn.log_softmax(got[name])).sum(-1) * at).sum((1, 2)) / count
  return total, sure


class Probe(nnx.Module):
  """Reads the objects from the cells that the decoder is about to paint; for training only."""

  def __init__(self, width, *, rngs):
    self.read = nnx.Linear(width, 16, rngs=rngs)

  def __call__(self, hidden):
    """Cells `[C, R, D]` to logits on the 8 x 8 grid, as in `detector.Detector`."""
    out = self.read(hidden).swapaxes(0, 1).reshape(-1, 8, 8, 16)
    return {'object': out[..., 0], 'shape': out[..., 1:6], 'colour': out[..., 6:14],
            'size': out[..., 14:]}


class NextCode(nnx.Module):
  """Predicts the codes of a token from earlier tokens with two causal mixers; training only."""

  def __init__(self, config, *, rngs):
    k, q, d = config.tokens, len(config.levels), config.width
    self.enter, self.leave = nnx.Linear(q, d, rngs=rngs), nnx.Linear(d, q, rngs=rngs)
    self.place = learned_array(rngs, k, 1, d, scale=0.3)
    self.mix = nnx.List([learned_array(rngs, k, k, scale=k**-0.5) for _ in range(2)])
    self.mlps = nnx.List([MLP(d, 2 * d, d, rngs=rngs) for _ in range(2)])
    self.norms = nnx.List([RMSNorm(d) for _ in range(2)])

  def __call__(self, codes):
    """Codes `[K, R, Q]` to predicted codes `[K, R, Q]`."""
    x = self.enter(codes)
    # shifted by one token: a token must not see itself
    x = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) + self.place[...]
    for mix, mlp, norm in zip(self.mix, self.mlps, self.norms):
      x = x + (jnp.tril(mix[...]) @ x.reshape(len(x), -1)).reshape(x.shape)
      x = x + mlp(norm(x))
    return self.leave(x)


def measure_prefixes(graphdef, params, config, count=256, kept=KEPT):
  """{tokens kept: {'psnr', 'oracle'}} on held-out scenes; the oracle asks the scene's caption."""
  scenes = world.sample_scenes(5, np.arange(count), 'held')
  images, prompts = world.render_scenes(scenes), world.caption_prompts(scenes.captions)
  encode = jax.jit(lambda p, x: modules.bind_graph(graphdef, p).encode(x))
  decode = jax.jit(lambda p, i, k: modules.bind_graph(graphdef, p).decode(i, k))
  out = {}
  ids = np.concatenate([encode(params, images[i:i + 64]) for i in range(0, count, 64)])
  for k in kept:
    drawn = np.concatenate([decode(params, ids[i:i + 64], k) for i in range(0, count, 64)])
    error = ((drawn - images) ** 2).mean((1, 2, 3))
    out[k] = {'psnr': round(float(np.mean(-10 * np.log10(np.maximum(error, 1e-10)))), 2),
              'oracle': round(oracle.report_grades(drawn, prompts)['overall'], 4)}
  entropy = []
  for t in range(config.tokens):
    share = np.bincount(ids[:, t], minlength=config.codes) / len(ids)
    entropy.append(round(float(-(share * np.log(np.maximum(share, 1e-9))).sum()), 2))
  print('unigram entropy (nats)', entropy)
  return out


def main():
  parser = build_parser(steps=8000, batch=32, rate=2e-3, order='1d')
  args = parser.parse_args()
  config = tokenizer.Config(order=args.order)
  seed = args.seed + (1 if args.order == '1d' else 2)
  graphdef, params = modules.split_module(tokenizer.build_model(config, seed))
  probe, probe_params = modules.split_module(Probe(config.near, rngs=nnx.Rngs(seed)))
  next_code, next_code_params = modules.split_module(NextCode(config, rngs=nnx.Rngs(seed)))
  perceptual, perceptual_params = load_model('detector')
  # 2D tokens have no order of importance, so dropping them teaches less
  chance = 0.7 if args.order == '1d' else 0.3

  def draw_batch(step):
    scenes = world.sample_scenes(seed, np.arange(step * args.batch, (step + 1) * args.batch))
    return world.render_scenes(scenes), detector.grid_targets(scenes)

  def loss(params, batch, key, progress):
    images, truth = batch
    model = modules.bind_graph(graphdef, params['model'])
    net = modules.bind_graph(perceptual, perceptual_params)
    a, b = jax.random.split(key)
    r = len(images)
    short = jax.random.bernoulli(a, chance, (r,))
    # the power makes short prefixes more frequent
    some = jnp.ceil(config.tokens * jax.random.uniform(b, (r,)) ** 1.5)
    keep = jnp.where(short, jnp.maximum(some, 1), config.tokens)
    codes = model.round_codes(model.bounded_codes(images))
    hidden = model.decode_cells(codes, keep)
    out = model.paint_cells(hidden)
    pixel = pixel_loss(out, images)
    feature, sure = perceptual_loss(net, out, images)
    # what is missing should be drawn blurred, so short prefixes have little perceptual loss
    share = (keep / config.tokens) ** 2
    # the probe reads all prefixes, so early tokens learn to tell what is where
    probed, _ = detector.detection_loss(modules.bind_graph(probe, params['probe'])(hidden), truth)
    total = (pixel + share * (0.3 * feature + 0.3 * sure)).mean() + 0.3 * probed
    mean = lambda x: (share * x).sum() / share.sum()
    info = {'pixel': mean(pixel), 'feature': mean(feature), 'sure': mean(sure), 'probe': probed}
    if args.order == '1d':
      scaled = codes * (2 / (np.array(config.levels, np.float32) - 1)) - 1
      guess = modules.bind_graph(next_code, params['next_code'])(scaled)
      info['predicted'] = jnp.mean((guess - scaled) ** 2)
      total += 0.2 * jnp.clip((progress - 0.375) / 0.125, 0, 1) * info['predicted']
    return total, info

  name = f'tokenizer_{args.order}'
  path = os.path.join(args.out, f'{name}.safetensors')
  command = f'python -m vtts_jax.scenes.train.tokenizer --order={args.order} --steps={args.steps}'

  def evaluate(params, step):
    params = loop.round_weights(params['model'])
    last = step == args.steps
    metrics = measure_prefixes(graphdef, params, config, 1200 if last else 256)
    for k, row in metrics.items():
      print(f'kept {k}: {row}', flush=True)
    loop.export_weights(path, params, kind='tokenizer', config=dataclasses.asdict(config),
                        metrics=metrics, command=command, seed=seed, step=step)

  start = {'model': params, 'probe': probe_params}
  if args.order == '1d':
    start['next_code'] = next_code_params
  loop.train_model(loss, start, draw_batch, steps=args.steps, rate=args.rate, seed=seed,
                   folder=f'{args.workdir}/{name}', every=1000, evaluate=evaluate)


if __name__ == '__main__':
  main()
