"""RandAR (Pang et al. 2024, arXiv 2412.01827): LlamaGen over picture tokens in any order.

Before every image token stands an instruction that says which cell of the grid comes next: one
learned vector, turned by the rotary positions of that cell. The hidden state at the instruction
predicts the token. So the sequence of an order o is [class, P(o_0), x(o_0), P(o_1), x(o_1), ..],
and a search may choose where to draw next as well as what. Several instructions in a row draw
several tokens at once. The trunk is `models.llamagen`. Checked against the PyTorch reference by the
golden files `randar*.npz` (replay.py).

A *place* is an index into the order, a *position* is a cell of the grid, row by row.

Letters: B prompts · N candidates · C streams of guidance (class, then null) · T tokens · n tokens
fed · m tokens drawn at once · S slots of a cache · L layers · D width · h heads · d = D / h.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models.llamagen import modeling as llamagen
from vtts_jax.models.llamagen.modeling import Config

_L, _XL = (llamagen.SIZES[f'c2i_{name}'] for name in ('l_256', 'xl_384'))
SIZES = {
  'tiny': llamagen.SIZES['tiny'],
  # released; the names tell parameters and tokenizer
  'randar_0.3b_llamagen': _L,
  'randar_0.7b_llamagen': dataclasses.replace(_XL, tokens=256),
  'randar_0.3b_maskgit': dataclasses.replace(_L, codes=1024),
}


def parallel_counts(tokens: int, steps: int) -> tuple[int, ...]:
  """Returns how many tokens each of `steps` steps draws, by the published cosine schedule.

  It starts with one token and draws more of them the more the picture is known. It may end before
  `steps`, since a step draws at least one token. As many steps as tokens, or -1, draw one each.

  Raises:
    ConfigError: `steps` is not in 2 .. `tokens`, nor -1.
  """
  if steps in (-1, tokens):
    return (1,) * tokens
  if not 1 < steps < tokens:
    raise ConfigError(f'steps={steps}: must be in 2 .. {tokens}, or -1 (one token a step)')
  counts, done = [], 0
  for step in range(steps):
    # in double precision and in this order: the cut to an integer decides
    goal = int((1 - math.cos(math.pi / 2 * (step + 1) / steps)) * tokens + 1)
    count = 1 if step == 0 else max(goal - done, 1)
    counts.append(min(count, tokens - done))
    done += counts[-1]
    if done == tokens:
      break
  return tuple(counts)


def guidance_at(scales: tuple[float, float], drawn, tokens: int):
  """Returns the guidance scale after `drawn` of `tokens` tokens: linear between two scales."""
  return scales[0] + (scales[1] - scales[0]) * drawn / tokens


def to_raster(tokens, order):
  """Tokens `[..., T]` by place -> tokens by position, row by row."""
  return jnp.take_along_axis(tokens, jnp.argsort(order, -1), -1)


class RandAR(llamagen.LlamaGen):
  """Make a context by `class_context`, then call `feed_tokens` or `prefill`, then `token_logits`.

  A cache is {'k', 'v': `[B, N, C, L, 2 T, D]`}: the instruction of place i is in slot 2 i + 1 and
  its token in the slot behind it. Slot 0 is written once and never seen, so that every step writes
  a token and an instruction.
  """

  def __init__(self, config: Config, *, rngs):
    if not config.classes:
      raise ConfigError('classes=0: RandAR draws pictures of classes only')
    super().__init__(config, rngs=rngs)
    self.instruction = nnx.Param(0.02 * nnx.initializers.normal(1.0)(rngs.params(), config.width))

  def embed_instructions(self, positions):
    """Positions `[...]` int -> instructions `[..., D]`."""
    c, vector = self.config, self.instruction[...]
    # the embedding keeps the reference's channels, whose rotated pairs are neighbours; only
    # queries and keys have theirs in halves
    pairs = vector.astype(jnp.float32).reshape(c.heads, -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]  # [h, d / 2]
    cos, sin = jnp.asarray(llamagen.rotation_table(c))[:, :, None]  # [T, 1, d / 2]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], -1)
    # all cells are turned, a few rows, and then looked up
    return turned.reshape(c.tokens, c.width).astype(vector.dtype)[positions]

  def prefill(self, ctx, tokens, order):
    """Feeds whole sequences in parallel (teacher forcing).

    Args:
      ctx: context.
      tokens: `[B, N, T]` int by place.
      order: `[B, N, T]` int, the position of each place.

    Returns:
      hidden: `[B, N, T, C, D]`; the one at place i predicts its token from those of earlier places.
      cache: `[B, N, C, L, 2 T, D]` of all places but the last token.
    """
    x = jnp.stack([self.embed_instructions(order), self.embedding[...][tokens]], 3)
    x = x.reshape(*tokens.shape[:2], -1, x.shape[-1])[:, :, :-1]
    # zeros in slot 0
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))
    positions = jnp.pad(jnp.repeat(order, 2, -1)[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    table = jnp.asarray(llamagen.rotation_table(self.config))[:, positions]
    hidden, cache = self.run_sequence(ctx, x, table, first=1)
    return hidden[:, :, 1::2], cache

  def init_cache(self, ctx, candidates: int):
    """Returns an empty cache for N candidates."""
    return super().init_cache(ctx, candidates, 2 * self.config.tokens)

  def feed_tokens(self, ctx, cache, tokens, order, place, count: int = 1):
    """Feeds the tokens of the n places before `place` and asks for the next ones.

    Args:
      ctx, cache: context and cache.
      tokens: `[B, N, n]` int, drawn last and together; n is 1 where they are drawn one by one. At
        place 0 there is none, n is 0, or one whose value does not matter.
      order: `[B, N, T]` int, the position of each place.
      place: the first place to predict: a scalar, or `[B, N]`.
      count: m, how many places are predicted at once, without knowledge of each other's token.

    Returns:
      hidden: `[B, N, m, C, D]`, which predict the places `place` .. `place` + m - 1.
      cache: with the new keys and values.
    """
    n, place = tokens.shape[2], jnp.asarray(place)
    places = place[..., None] + jnp.arange(-n, count)
    places = jnp.broadcast_to(places, (*tokens.shape[:2], n + count))
    positions = jnp.take_along_axis(order, jnp.maximum(places, 0), -1, mode='clip')
    told = self.embed_instructions(positions)
    # instructions of tokens drawn together stood in a row: they are run again between the tokens,
    # as in training, and over their old keys. The first one stands right already
    known = jnp.stack([told[:, :, :n], self.embedding[...][tokens]], 3)
    known = known.reshape(*tokens.shape[:2], 2 * n, self.config.width)[:, :, 1:]
    x = jnp.concatenate([known, told[:, :, n:]], 2)
    rows = jnp.repeat(positions[:, :, :n], 2, -1)[:, :, 1:]
    rows = jnp.concatenate([rows, positions[:, :, n:]], 2)
    table = jnp.asarray(llamagen.rotation_table(self.config))[:, rows]
    # of one token fed at place 0, the slot is 0; without tokens the first is an instruction's
    slot = 2 * (place - n) + (2 if n else 1)
    hidden, cache = self.run_cached(ctx, cache, x, table, slot, first=1)
    return hidden[:, :, -count:], cache


def build_model(config: Config, seed=0) -> RandAR:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return RandAR(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, keys: int = 0) -> int:
  """Matmul FLOPs for one stream of one candidate.

  Args:
    op: 'prefix', the context of a class; 'step', one token or instruction that sees `keys` others
      (drawing a token takes two); 'head', the logits of one token.
  """
  return llamagen.count_flops(c, op, keys)
