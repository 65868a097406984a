"""Trains a value head for a scenes prior: `python -m vtts_jax.scenes.train.value --order=1d`.

What `clip_a` will say of the finished picture, from the tokens so far: regression to the score of
the completions that the prior drew (Monte-Carlo returns, the value network of AlphaGo, Silver et
al. 2016), at every prefix; `completions.py` makes the data, `scenes/models/value.py` the head. The
trunk starts from the rollout model of the same order (`rollout.py`, so train that first), whose
text tower and codes know the prior's language.

Loss: squared error of the score in standard deviations, the same again after the mean over a
prompt's completions is taken off (a search compares candidates of one prompt), and squared error of
the picture's embedding. At the end, on held-out prompts: how value, the picture of the prefix, and
finished ones (greedily, by the small model, by the prior) correlate with the prior's own outcome.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes.models import load_model, prior, read_card, read_config, value
from vtts_jax.scenes.train import build_parser
from vtts_jax.scenes.train import completions as data
from vtts_jax.scenes.train.rollout import SEEDS, correlate_within, map_prompts, score_completed
from vtts_jax.train import loop

STAGES = (0, 4, 8, 16, 24, 31)
FROZEN = ('captions', 'scale', 'bias')  # the verifier's, not trained


def start(order, config, seed):
  """(graphdef, trained parameters, frozen ones): trunk of the rollout model, `clip_a`'s
  captions."""
  graphdef, params = modules.split_module(value.build(config, seed))
  known = load_model(f'rollout_{order}')[1]
  for name in params.keys() & known.keys() - {'head', 'place'}:
    fits = jax.tree.map(jnp.shape, params[name]) == jax.tree.map(jnp.shape, known[name])
    params[name] = known[name] if fits else params[name]
  if params['place'].shape[1:] == known['place'].shape[1:]:
    params['place'] = params['place'].at[: len(known['place'])].set(known['place'])
  params['head'] = jax.tree.map(jnp.zeros_like, params['head'])  # embeddings are of length 1
  verifier = load_model(data.VERIFIER)[1]
  params |= {
    'captions': verifier['words'],
    'scale': verifier['scale'],
    'bias': verifier['bias'],
  }
  frozen = {name: params.pop(name) for name in FROZEN}
  return graphdef, params, frozen


def loss(model, std, text, tokens, begin, score, embedding):
  """(scalar, {name: scalar}) of P prompts with n completions each."""
  context = model.context(text)
  seen = model.embeddings(context, tokens)  # [P, n, T + 1, E]
  off = (model.scores(context, seen) - score[..., None]) / std
  mask = (jnp.arange(seen.shape[2]) >= begin[..., None]).astype(jnp.float32)
  mean = lambda x: (mask * x).sum() / mask.sum()
  middle = (mask * off).sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1)
  parts = {
    'score': mean(off**2),
    'within': mean((off - middle) ** 2),
    'embedding': mean(((seen - embedding[:, :, None]) ** 2).sum(-1)),
  }
  return sum(parts.values()), parts


@functools.partial(jax.jit, static_argnums=0)
def score_prefix(order, text, tokens, cut):
  """Scores `[P, N]` of the pictures of the first `cut` tokens."""
  decoder, verifier = (modules.bind(*load_model(name)) for name in data.data_models(order)[1:])
  seen = verifier.image(decoder.decode(tokens.reshape(-1, tokens.shape[-1]), cut))
  return verifier.logits(seen.reshape(*tokens.shape[:2], -1), verifier.text(text)[:, None])


def fit(guess, truth):
  """R^2, correlation, and correlation within prompts."""
  left = ((guess - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
  whole = np.corrcoef(guess.ravel(), truth.ravel())[0, 1]
  out = {'r2': 1 - left, 'correlation': whole, 'within_prompt': correlate_within(guess, truth)}
  return {k: round(float(v), 3) for k, v in out.items()}


def measure(order, graphdef, params, held):
  """{stage: {what: {measure: number}}} on completions of held-out prompts; completions are
  expensive: half of the prompts only."""
  truth, half = held.score[:, : data.FIRST], data.Completions(*(x[: len(x) // 2] for x in held))
  ask = jax.jit(
    lambda *a: (lambda m: m.value(m.context(a[1]), *a[2:]))(modules.bind(graphdef, a[0]))
  )
  big, small = load_model(f'prior_{order}'), load_model(f'rollout_{order}')
  scale, out = read_card(f'prior_{order}')['guidance'], {}
  for cut in STAGES:
    at = np.int32(cut)
    go = lambda model, scale, greedy=False, at=at: (
      lambda text, tokens, key: score_completed(
        order, model[0], scale, greedy, model[1], text, tokens, at, key
      )
    )
    ways = {
      'value': lambda text, tokens, key, at=at: ask(params, text, tokens, at),
      'picture': lambda text, tokens, key, at=at: score_prefix(order, text, tokens, at),
      'greedy': go(big, scale, True),
      'rollout': go(small, 1.0),
      'prior': go(big, scale),
    }
    out[cut] = {}
    for name, way in ways.items():
      guess = map_prompts(way, held if name in ('value', 'picture') else half, 7)
      out[cut][name] = fit(guess, truth[: len(guess)])
    print(cut, {k: tuple(v.values()) for k, v in out[cut].items()}, flush=True)
  return out


def main():
  args = build_parser(
    steps=4000,
    batch=16,
    rate=2e-3,
    order='1d',
    width=64,
    layers=2,
    expand=1,
    prompts=3840,
    each=4,
    decay=0.1,
  ).parse_args()
  tokens = read_config(f'tokenizer_{args.order}')
  config = value.Config(
    codes=tokens.codes,
    tokens=tokens.tokens + 1,
    width=args.width,
    layers=args.layers,
    expand=args.expand,
  )
  seed = args.seed + SEEDS[args.order]
  graphdef, params, frozen = start(args.order, config, seed)
  drawn = data.load_completions(args.order, seed, args.prompts, args.workdir)
  held = data.load_completions(args.order, seed, 240, args.workdir, 'held')
  std = float(drawn.score.std())

  def batches(step):
    rng = np.random.default_rng((seed, 1, step))
    rows = rng.integers(len(drawn.text), size=args.batch)
    cols = rng.permuted(np.tile(np.arange(drawn.tokens.shape[1]), (args.batch, 1)), axis=1)
    pick = (rows[:, None], cols[:, : args.each])
    return (
      drawn.text[rows].astype(np.int32),
      drawn.tokens[pick].astype(np.int32),
      drawn.begin[pick],
      drawn.score[pick],
      drawn.embedding[pick].astype(np.float32),
    )

  def objective(params, batch, key, progress):
    return loss(modules.bind(graphdef, params | frozen), std, *batch)

  params = loop.round_weights(
    loop.train_model(
      objective,
      params,
      batches,
      steps=args.steps,
      rate=args.rate,
      seed=seed,
      decay=args.decay,
      every=400,
      folder=os.path.join(args.workdir, f'value_{args.order}'),
    )
    | frozen
  )
  found = measure(args.order, graphdef, params, held)
  loop.export_weights(
    os.path.join(args.out, f'value_{args.order}.safetensors'),
    params,
    kind='value',
    config=dataclasses.asdict(config),
    metrics=found,
    seed=seed,
    steps=args.steps,
    verifier='scenes_clip_a',
    score={'mean': float(drawn.score.mean()), 'std': std},
    flops={
      'value': value.flops_value(config),
      'rollout_token': prior.flops_step(read_config(f'rollout_{args.order}')),
    },
    command=f'python -m vtts_jax.scenes.train.value --order={args.order}',
  )


if __name__ == '__main__':
  main()
