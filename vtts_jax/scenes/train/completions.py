"""Training data for value heads and rollout models: completions that a prior draws with its stored
guidance, their scores by `clip_a`, and the guided distribution of each token.

FIRST samples are drawn for each training prompt. The best two are then cut at a random stage and
completed twice more each. So good prefixes, which a search keeps, are more frequent in the data
than in samples of the prior. Such a completion is a biased sample for prefixes shorter than its
cut, because the prefix was chosen by how it went on; `begin` records the cut.

Letters: P prompts · N = FIRST + MORE completions of a prompt · T tokens · V codes · D embedding.
"""

import functools
import hashlib
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.scenes import world
from vtts_jax.scenes.models import ASSETS, load_model, read_card

FIRST, MORE = 8, 4
VERIFIER = 'clip_a'
TOGETHER = 12  # prompts of one call: 96 pictures, the fastest number on a CPU
PART = 240  # prompts of one file


class Completions(NamedTuple):
  """Data of P prompts.

  Attributes:
    text: word ids `[P, Tt]` uint8. tokens: `[P, N, T]` uint8.
    begin: `[P, N]` uint8; shorter prefixes must not learn from this completion.
    score: `[P, N]` float32, the score that a search with `clip_a` maximises.
    embedding: unit image embeddings `[P, N, D]` float16; the score is linear in them.
    root: guided distributions `[P, N, T, V]` as uint8, 255 times the square root of a probability.
  """

  text: np.ndarray
  tokens: np.ndarray
  begin: np.ndarray
  score: np.ndarray
  embedding: np.ndarray
  root: np.ndarray


def sample_tokens(model, scale, text_ids, given, begin, key, greedy=False):
  """Guided sampling: tokens `[P, N, T]` and logits `[P, N, T, V]`.

  The first `begin [P, N]` tokens are those of `given [P, N, T]`, the others are drawn; text ids
  are `[P, Tt]`.
  """
  p = len(text_ids)
  # at scale 1 the unconditional stream cancels and is not run
  one = scale == 1
  double = lambda rows, null: rows if one else jnp.concatenate([rows, null])
  text = model.encode_text(double(text_ids, jnp.zeros_like(text_ids)))

  def body(carry, t):
    cache, last = carry
    logits, cache = model.feed_tokens(text, cache, double(last, last), t)
    logits = logits if one else logits[p:] + scale * (logits[:p] - logits[p:])
    # argmax of logits plus Gumbel noise is a sample
    noise = 0 if greedy else jax.random.gumbel(jax.random.fold_in(key, t), logits.shape)
    drawn = jnp.argmax(logits + noise, -1).astype(jnp.int32)
    token = jnp.where(t < begin, given[:, :, t], drawn)
    return (cache, token), (token, logits)

  start = jnp.full(begin.shape, model.config.codes, jnp.int32)
  start = (model.init_cache(p if one else 2 * p, begin.shape[1]), start)
  _, (tokens, logits) = jax.lax.scan(body, start, jnp.arange(model.config.tokens))
  return jnp.moveaxis(tokens, 0, 2), jnp.moveaxis(logits, 0, 2)


@functools.partial(jax.jit, static_argnums=0)
def draw_completions(order, params, text_ids, key):
  """`Completions` of a few prompts with text ids `[P, Tt]`."""
  models = (modules.bind_graph(load_model(name)[0], params[name]) for name in data_models(order))
  prior, decoder, verifier = models
  scale = read_card(f'prior_{order}')['guidance']
  keys = jax.random.split(key, 3)
  p, length = len(text_ids), prior.config.tokens

  def complete_and_score(given, begin, key):
    tokens, logits = sample_tokens(prior, scale, text_ids, given, begin, key)
    seen = verifier.embed_images(decoder.decode(tokens.reshape(-1, length)))
    seen = seen.reshape(*begin.shape, -1)
    score = verifier.pair_logits(seen, verifier.embed_texts(text_ids)[:, None])
    # square roots in 8 bits keep small probabilities better than probabilities would
    root = jnp.round(255 * jnp.sqrt(jax.nn.softmax(logits)))
    return Completions(text_ids, tokens, begin, score, seen, root.astype(jnp.uint8))

  none = jnp.zeros((p, FIRST), jnp.int32)
  a = complete_and_score(jnp.zeros((p, FIRST, length), jnp.int32), none, keys[0])
  good = jax.lax.top_k(a.score, 2)[1].repeat(MORE // 2, 1)  # [P, MORE]
  given = jnp.take_along_axis(a.tokens, good[..., None], 1)
  # the cut leaves at least two tokens before it and two after it
  cut = jax.random.randint(keys[1], (p, 2), 2, length - 1).repeat(MORE // 2, 1)
  b = complete_and_score(given, cut, keys[2])
  # the text is the same for both draws and has no axis N
  both = (jnp.concatenate([x, y], 1) for x, y in zip(a[1:], b[1:]))
  return Completions(text_ids, *both)


def data_models(order):
  """Names of the models that make the data of `order`: prior, tokenizer, verifier."""
  return f'prior_{order}', f'tokenizer_{order}', VERIFIER


def bind_decoder_and_verifier(order):
  """The tokenizer and the verifier of `order`, with their shipped weights."""
  return [modules.bind_graph(*load_model(name)) for name in data_models(order)[1:]]


def load_completions(order, seed, prompts, folder, split='train'):
  """`Completions` of prompts 0 .. `prompts` - 1 of the endless list (seed, split).

  They are drawn once and stored below `folder`, under a hash of the weights. Existing files are
  read, so a run that was killed continues.

  Raises:
    ValueError: `prompts` is not a positive multiple of 240.
  """
  if prompts < 1 or prompts % PART:
    raise ValueError(f'prompts={prompts}: must be a positive multiple of {PART}')
  content = b''.join((ASSETS / f'{name}.safetensors').read_bytes() for name in data_models(order))
  tag = hashlib.sha256(content).hexdigest()[:12]
  folder = os.path.join(folder, f'completions_{order}_{split}_{seed}_{tag}')
  os.makedirs(folder, exist_ok=True)
  params = {name: load_model(name)[1] for name in data_models(order)}
  found = []
  for number in range(prompts // PART):
    path = os.path.join(folder, f'{number:03d}.npz')
    if not os.path.exists(path):
      rows = np.arange(number * PART, (number + 1) * PART)
      text = world.tokenize_texts(world.caption_texts(world.draw_captions(seed, rows, split)))
      drawn = []
      for i in range(0, PART, TOGETHER):
        key = jax.random.fold_in(jax.random.key(seed), rows[i])
        some = draw_completions(order, params, text[i : i + TOGETHER], key)
        drawn.append(jax.tree.map(np.asarray, some))
      whole = Completions(*map(np.concatenate, zip(*drawn)))
      kinds = Completions(np.uint8, np.uint8, np.uint8, np.float32, np.float16, np.uint8)
      arrays = {k: x.astype(t) for k, x, t in zip(whole._fields, whole, kinds)}
      # written under another name first: a file with the final name is complete
      np.savez(path + '.tmp.npz', **arrays)
      os.replace(path + '.tmp.npz', path)
      print(f'drew {path}', flush=True)
    with np.load(path) as file:
      found.append(Completions(**{k: file[k] for k in Completions._fields}))
  return Completions(*map(np.concatenate, zip(*found)))
