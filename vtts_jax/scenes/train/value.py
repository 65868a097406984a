"""Trains a value head for a scenes prior: `python -m vtts_jax.scenes.train.value --order=1d`.

The head predicts the `clip_a` score of the finished picture from the tokens drawn so far. It is
trained by regression on the scores of completions that the prior drew (Monte-Carlo returns, as the
value network of AlphaGo, Silver et al. 2016), at every prefix. `completions.py` makes the data,
`scenes/models/value.py` defines the head. The trunk starts from the rollout model of the same order
(train `rollout.py` first), which already knows the words and codes.

The loss has three terms: the squared error of the score in standard deviations; the same after
subtracting the mean over a prompt's completions, because a search compares candidates of one
prompt; and the squared error of the picture's embedding. At the end it reports, on held-out
prompts, how well several estimates correlate with the prior's own outcome: the value, the picture
of the prefix, and pictures completed greedily, by the small model, and by the prior.
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
FROZEN = ('captions', 'scale', 'bias')  # copied from the verifier, not trained


def start_from_rollout(order, config, seed):
  """(graphdef, parameters to train, frozen parameters): the trunk of the rollout model and the
  captions' encoder of `clip_a`."""
  graphdef, params = modules.split_module(value.build_model(config, seed))
  known = load_model(f'rollout_{order}')[1]
  for name in params.keys() & known.keys() - {'head', 'place'}:
    fits = jax.tree.map(jnp.shape, params[name]) == jax.tree.map(jnp.shape, known[name])
    params[name] = known[name] if fits else params[name]
  # the trunk has one position more than the rollout model
  if params['place'].shape[1:] == known['place'].shape[1:]:
    params['place'] = params['place'].at[: len(known['place'])].set(known['place'])
  # a mean of unit embeddings is short: start from 0, not from random directions
  params['head'] = jax.tree.map(jnp.zeros_like, params['head'])
  verifier = load_model(data.VERIFIER)[1]
  params |= {
    'captions': verifier['words'],
    'scale': verifier['scale'],
    'bias': verifier['bias'],
  }
  frozen = {name: params.pop(name) for name in FROZEN}
  return graphdef, params, frozen


def value_loss(model, std, text, tokens, begin, score, embedding):
  """The loss of P prompts with n completions each, and its terms: (scalar, {name: scalar})."""
  context = model.encode_context(text)
  seen = model.completion_embeddings(context, tokens)  # [P, n, T + 1, E]
  # in standard deviations, so that the three terms weigh alike
  off = (model.embedding_scores(context, seen) - score[..., None]) / std
  # prefixes before the cut are biased, see `completions`
  mask = (jnp.arange(seen.shape[2]) >= begin[..., None]).astype(jnp.float32)
  mean = lambda x: (mask * x).sum() / mask.sum()
  # the mean over the completions that may teach this prefix
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
  decoder, verifier = data.bind_decoder_and_verifier(order)
  seen = verifier.embed_images(decoder.decode(tokens.reshape(-1, tokens.shape[-1]), cut))
  seen, captions = seen.reshape(*tokens.shape[:2], -1), verifier.embed_texts(text)
  return verifier.pair_logits(seen, captions[:, None])


def summarize_fit(guess, truth):
  """R^2, correlation, and correlation within prompts, rounded for the card."""
  left = ((guess - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
  whole = np.corrcoef(guess.ravel(), truth.ravel())[0, 1]
  out = {'r2': 1 - left, 'correlation': whole, 'within_prompt': correlate_within(guess, truth)}
  return {k: round(float(v), 3) for k, v in out.items()}


def measure_value(order, graphdef, params, held):
  """{stage: {estimate: {measure: number}}} on held-out prompts."""
  # estimates that complete the candidate are expensive: they see half of the prompts only
  truth, half = held.score[:, : data.FIRST], data.Completions(*(x[: len(x) // 2] for x in held))

  @jax.jit
  def predict_value(params, text, tokens, stage):
    model = modules.bind_graph(graphdef, params)
    return model.predict_value(model.encode_context(text), tokens, stage)

  big, small = load_model(f'prior_{order}'), load_model(f'rollout_{order}')
  scale, out = read_card(f'prior_{order}')['guidance'], {}
  for cut in STAGES:
    at = np.int32(cut)

    def complete_with(model, scale, greedy=False, at=at):
      graph, weights = model
      return lambda text, tokens, key: score_completed(
        order, graph, scale, greedy, weights, text, tokens, at, key
      )

    ways = {
      'value': lambda text, tokens, key, at=at: predict_value(params, text, tokens, at),
      'picture': lambda text, tokens, key, at=at: score_prefix(order, text, tokens, at),
      'greedy': complete_with(big, scale, True),
      'rollout': complete_with(small, 1.0),
      'prior': complete_with(big, scale),
    }
    out[cut] = {}
    for name, way in ways.items():
      guess = map_prompts(way, held if name in ('value', 'picture') else half, 7)
      out[cut][name] = summarize_fit(guess, truth[: len(guess)])
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
  graphdef, params, frozen = start_from_rollout(args.order, config, seed)
  drawn = data.load_completions(args.order, seed, args.prompts, args.workdir)
  held = data.load_completions(args.order, seed, 240, args.workdir, 'held')
  std = float(drawn.score.std())

  def draw_batch(step):
    rng = np.random.default_rng((seed, 1, step))
    rows = rng.integers(len(drawn.text), size=args.batch)
    # other completions of a prompt in each epoch, none of them twice in a batch
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
    return value_loss(modules.bind_graph(graphdef, params | frozen), std, *batch)

  params = loop.round_weights(
    loop.train_model(
      objective,
      params,
      draw_batch,
      steps=args.steps,
      rate=args.rate,
      seed=seed,
      decay=args.decay,
      every=400,
      folder=os.path.join(args.workdir, f'value_{args.order}'),
    )
    | frozen
  )
  found = measure_value(args.order, graphdef, params, held)
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
      'value': value.count_value_flops(config),
      'rollout_token': prior.count_step_flops(read_config(f'rollout_{args.order}')),
    },
    command=f'python -m vtts_jax.scenes.train.value --order={args.order}',
  )


if __name__ == '__main__':
  main()
