"""Trains the AR prior on a tokenizer's tokens: `python -m vtts_jax.scenes.train.prior --order=1d`.

Scenes are tokenized once and stored beside the checkpoints, under a hash of the tokenizer. Captions
are dropped with probability 0.1, for guidance. At the end it reports nats per token on held-out
captions, and pass@1 by the oracle for several guidance scales; the best scale becomes the stored
default.
"""

import dataclasses
import functools
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import oracle, world
from vtts_jax.scenes.models import ASSETS, load_model, prior, read_config
from vtts_jax.scenes.train import build_parser
from vtts_jax.train import loop


def tokenize_scenes(name, seed, count, split, folder, chunk=256):
  """(text ids `[count, Tt]` uint8, image ids `[count, K]` uint16) of a data set; cached on disk."""
  # the hash in the name makes a new tokenizer miss the cache
  tag = hashlib.sha256((ASSETS / f'{name}.safetensors').read_bytes()).hexdigest()[:12]
  path = os.path.join(folder, f'tokens_{name}_{split}_{seed}_{count}_{tag}.npz')
  if os.path.exists(path):
    with np.load(path) as file:
      return file['text'], file['image']
  graphdef, params = load_model(name)
  encode = jax.jit(lambda p, x: modules.bind_graph(graphdef, p).encode(x))
  text, image = [], []
  for start in range(0, count, chunk):
    scenes = world.sample_scenes(seed, np.arange(start, start + chunk), split)
    text.append(world.tokenize_texts(world.caption_texts(scenes.captions)).astype(np.uint8))
    image.append(np.asarray(encode(params, world.render_scenes(scenes))).astype(np.uint16))
  text, image = np.concatenate(text)[:count], np.concatenate(image)[:count]
  os.makedirs(folder, exist_ok=True)
  np.savez(path, text=text, image=image)
  return text, image


@functools.partial(jax.jit, static_argnums=0)
def sample_tokens(graphdef, params, text_ids, key, scale, temperature):
  """Text ids `[B, Tt]` to tokens `[B, T]`, one guided sample per prompt."""
  model = modules.bind_graph(graphdef, params)
  B = len(text_ids)
  # both guidance streams in one batch: prompts first, then null prompts
  text = model.encode_text(jnp.concatenate([text_ids, jnp.zeros_like(text_ids)]))
  def body(carry, position):
    cache, last = carry
    logits, cache = model.feed_tokens(text, cache, jnp.concatenate([last, last]), position)
    logits = logits[B:] + scale * (logits[:B] - logits[B:])
    token = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
    return (cache, token.astype(jnp.int32)), token[:, 0]
  start = (model.init_cache(2 * B, 1), jnp.full((B, 1), model.config.codes, jnp.int32))
  return jax.lax.scan(body, start, jnp.arange(model.config.tokens))[1].T


def pass_at_1(graphdef, params, name, prompts, scale, temperature=1.0, seed=0):
  """Grades one sample per prompt; returns `oracle.report_grades`."""
  text = world.tokenize_texts([p['text'] for p in prompts])
  graph, decoder = load_model(name)
  decode = jax.jit(lambda p, ids: modules.bind_graph(graph, p).decode(ids))
  images = []
  for start in range(0, len(text), 120):
    ids = sample_tokens(graphdef, params, text[start:start + 120], jax.random.key(seed + start),
                        scale, temperature)
    images.append(decode(decoder, ids))
  return oracle.report_grades(np.concatenate(images), prompts)


def main():
  args = build_parser(8000, batch=64, rate=2e-3, order='1d', width=96, layers=4, scenes=131072,
                      drop=0.1, tokenizer='', prompts=600).parse_args()
  name = args.tokenizer or f'tokenizer_{args.order}'
  tokens = read_config(name)
  config = prior.Config(codes=tokens.codes, tokens=tokens.tokens, width=args.width,
                        layers=args.layers)
  seed = args.seed + (21 if args.order == '1d' else 22)
  graphdef, params = modules.split_module(prior.build_model(config, seed))
  print(f'{modules.count_parameters(params):,} parameters', flush=True)
  text, image = tokenize_scenes(name, seed, args.scenes, 'train', args.workdir)
  val_text, val_image = tokenize_scenes(name, seed, 1024, 'held', args.workdir)

  def draw_batch(step):
    # seeded by the step: a resumed run draws the same batches
    rows = np.random.default_rng((seed, step)).integers(len(text), size=args.batch)
    return text[rows].astype(np.int32), image[rows].astype(np.int32)

  def token_nats(params, text_ids, ids):
    logits = modules.bind_graph(graphdef, params)(text_ids, ids)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]

  def loss(params, batch, key, progress):
    text_ids, ids = batch
    # dropped captions train the unconditional stream of guidance
    kept = jax.random.bernoulli(key, 1 - args.drop, (len(ids), 1))
    value = token_nats(params, jnp.where(kept, text_ids, world.PAD), ids).mean()
    return value, {}

  validate = jax.jit(token_nats)

  def evaluate(params, step):
    params, last = loop.round_weights(params), step == args.steps
    # by position: the first tokens of 1D pictures carry most of the information
    each = np.concatenate([validate(params, val_text[i:i + 128].astype(np.int32),
                                    val_image[i:i + 128].astype(np.int32))
                           for i in range(0, 1024, 128)]).mean(0)
    print(f'val nats/token {each.mean():.4f} by token', each.round(2).tolist(), flush=True)
    prompts = world.prompts('held', args.prompts if last else 120)
    found = {}
    for scale in (1.0, 1.5, 2.0, 3.0) if last else (1.0, 2.0):
      result = pass_at_1(graphdef, params, name, prompts, scale)
      found[scale] = round(result['overall'], 4)
      print(f'guidance {scale}: pass@1 {found[scale]}',
            {k: round(v, 3) for k, v in result['by_tag'].items()}, flush=True)
    best = max(found, key=found.get)
    loop.export_weights(
      os.path.join(args.out, f'prior_{args.order}.safetensors'), params, kind='prior',
      config=dataclasses.asdict(config), tokenizer=name, seed=seed, step=step,
      guidance=best,
      metrics={'nats_per_token': round(float(each.mean()), 4), 'pass_at_1': found[best],
               'by_guidance': found},
      command=f'python -m vtts_jax.scenes.train.prior --order={args.order} --steps={args.steps} '
              f'--width={args.width} --layers={args.layers}')

  loop.train_model(loss, params, draw_batch, steps=args.steps, rate=args.rate, seed=seed,
                   folder=f'{args.workdir}/prior_{args.order}', every=1000, evaluate=evaluate)


if __name__ == '__main__':
  main()
