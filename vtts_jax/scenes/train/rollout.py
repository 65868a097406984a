"""Distils a small rollout model from a guided prior: `python -m vtts_jax.scenes.train.rollout`.

`--order=1d` or 2d. A rollout finishes a candidate cheaply, so that its picture can be scored (the
fast policy of AlphaGo, Silver et al. 2016). The student is a prior of width 64 with two layers. It
learns the *guided* distributions (Meng et al. 2023, arXiv 2210.03142) on samples of the prior, so
one stream replaces two: a token costs less than a ninth of a guided token.

The loss is KL(guided prior | student), averaged over all tokens. At the end it reports, on held-out
prompts: KL, pass@1 by the oracle, and what a search needs: among the candidates of a prompt, how
well the score after a rollout correlates with the score of the prior's own completion.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import world
from vtts_jax.scenes.models import prior, read_config
from vtts_jax.scenes.train import build_parser
from vtts_jax.scenes.train import completions as data
from vtts_jax.scenes.train.prior import pass_at_1
from vtts_jax.train import loop

CUTS = (4, 8, 16, 24, 31)
SEEDS = {'1d': 81, '2d': 82}  # seeds of the data, added to --seed


def guided_probabilities(root):
  """Stored square roots `[..., V]` uint8 to probabilities."""
  # normalised again, because rounding to 8 bits changes the sum
  p = root.astype(jnp.float32) ** 2
  return p / p.sum(-1, keepdims=True)


def guided_divergence(model, text_ids, tokens, root):
  """KL(guided | model) in nats `[P, N, T]`, of text ids `[P, Tt]` and tokens `[P, N, T]`."""
  p = guided_probabilities(root)
  # the student reads one stream; guidance is inside its targets
  q = jax.nn.log_softmax(model.forced_logits(model.encode_text(text_ids), tokens))
  return (p * (jnp.where(p > 0, jnp.log(jnp.maximum(p, 1e-30)), 0) - q)).sum(-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score_completed(order, graphdef, scale, greedy, params, text_ids, tokens, cut, key):
  """Scores `[P, N]` of candidates that keep their first `cut` tokens and draw the others again."""
  decoder, verifier = data.bind_decoder_and_verifier(order)
  begin = jnp.broadcast_to(cut, tokens.shape[:2])
  model = modules.bind_graph(graphdef, params)
  drawn, _ = data.sample_tokens(model, scale, text_ids, tokens, begin, key, greedy)
  seen = verifier.embed_images(decoder.decode(drawn.reshape(-1, drawn.shape[-1])))
  seen, captions = seen.reshape(*begin.shape, -1), verifier.embed_texts(text_ids)
  return verifier.pair_logits(seen, captions[:, None])


def correlate_within(a, b):
  """Correlation of two arrays `[P, N]` after subtracting the mean of each prompt."""
  # a search compares candidates of one prompt, so differences between prompts do not count
  a, b = (x - x.mean(1, keepdims=True) for x in (np.asarray(a), np.asarray(b)))
  return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum() + 1e-12))


def map_prompts(function, held, number, size=data.TOGETHER):
  """Applies `function(text, first samples, key)` to all prompts, `size` at a time."""
  out = []
  for i in range(0, len(held.text), size):
    key = jax.random.fold_in(jax.random.key(number), i)
    text, tokens = (np.asarray(x[i : i + size], np.int32) for x in (held.text, held.tokens))
    out.append(np.asarray(function(text, tokens[:, : data.FIRST], key)))
  return np.concatenate(out)


def measure_correlations(order, graphdef, params, scale, held, number):
  """{cut: correlation, within prompts, of rollouts with the prior's own completions}."""
  found = {}
  for cut in CUTS:
    score = lambda text, tokens, key, cut=cut: score_completed(
      order, graphdef, scale, False, params, text, tokens, np.int32(cut), key
    )
    rolled = map_prompts(score, held, number)
    found[cut] = round(correlate_within(rolled, held.score[:, : data.FIRST]), 3)
  return found


def measure_rollout(order, graphdef, params, held, prompts):
  """The metrics of the card."""
  divergence = jax.jit(lambda p, *a: guided_divergence(modules.bind_graph(graphdef, p), *a))
  size = data.TOGETHER
  kl = []
  for i in range(0, len(held.text), size):
    text, tokens = (x[i : i + size].astype(np.int32) for x in (held.text, held.tokens))
    kl.append(divergence(params, text, tokens, held.root[i : i + size]))
  config, big = modules.bind_graph(graphdef, params).config, read_config(f'prior_{order}')
  token, guided_token = prior.count_step_flops(config), 2 * prior.count_step_flops(big)
  result = pass_at_1(graphdef, params, f'tokenizer_{order}', world.prompts('held', prompts), 1.0)
  return {
    'kl': round(float(np.concatenate(kl).mean()), 4),
    'pass_at_1': round(result['overall'], 4),
    'flops_per_token': token,
    'share_of_guided_prior': round(token / guided_token, 4),
    'within_prompt': measure_correlations(order, graphdef, params, 1.0, held, 5),
  }


def main():
  args = build_parser(
    steps=4000,
    batch=16,
    rate=3e-3,
    order='1d',
    width=64,
    layers=2,
    expand=1,
    prompts=3840,
    each=4,
    graded=600,
  ).parse_args()
  tokens = read_config(f'tokenizer_{args.order}')
  config = prior.Config(
    codes=tokens.codes,
    tokens=tokens.tokens,
    width=args.width,
    layers=args.layers,
    expand=args.expand,
  )
  seed = args.seed + SEEDS[args.order]
  graphdef, params = modules.split_module(prior.build_model(config, seed))
  print(f'{modules.count_parameters(params):,} parameters', flush=True)
  drawn = data.load_completions(args.order, seed, args.prompts, args.workdir)
  held = data.load_completions(args.order, seed, 240, args.workdir, 'held')

  def draw_batch(step):
    # seeded by the step: a resumed run draws the same batches
    rng = np.random.default_rng((seed, step))
    rows = rng.integers(len(drawn.text), size=args.batch)
    cols = rng.permuted(np.tile(np.arange(drawn.tokens.shape[1]), (args.batch, 1)), axis=1)
    pick = (rows[:, None], cols[:, : args.each])
    return (
      drawn.text[rows].astype(np.int32),
      drawn.tokens[pick].astype(np.int32),
      drawn.root[pick],
    )

  def loss(params, batch, key, progress):
    return guided_divergence(modules.bind_graph(graphdef, params), *batch).mean(), {}

  params = loop.round_weights(
    loop.train_model(
      loss,
      params,
      draw_batch,
      steps=args.steps,
      rate=args.rate,
      seed=seed,
      folder=os.path.join(args.workdir, f'rollout_{args.order}'),
    )
  )
  metrics = measure_rollout(args.order, graphdef, params, held, args.graded)
  print(metrics, flush=True)
  loop.export_weights(
    os.path.join(args.out, f'rollout_{args.order}.safetensors'),
    params,
    kind='prior',
    config=dataclasses.asdict(config),
    metrics=metrics,
    seed=seed,
    steps=args.steps,
    command=f'python -m vtts_jax.scenes.train.rollout --order={args.order}',
  )


if __name__ == '__main__':
  main()
