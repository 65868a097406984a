"""Janus (Wu et al. 2024, arXiv 2410.13848) and Janus-Pro (Chen et al. 2025, 2501.17811): a Llama
that draws pictures and reads them.

To draw, the tokens of LlamaGen's tokenizer (`models.llamagen_vq`) follow a prompt, row by row; they
enter through a small MLP of their own and leave through a head of their own. To read, the patches
of a SigLIP tower (`models.siglip`) stand in the prompt, and the word head answers. The blocks are
those of `models.llamagen`, with rotary positions in one axis. A prompt's keys and values exist
once, and its candidates share them (`models.shared_prefix`). Checked against the PyTorch reference
by the golden files `janus*.npz` (replay.py) and against transformers' class (tests/parity).

Letters: B prompts · N candidates · C streams of guidance (prompt, then null) · W words · T tokens ·
Q queries · S slots of a cache · R rows · P patches · L layers · V codes · D width · h heads ·
d = D / h.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import Preprocessing, normalize_channels
from vtts_jax.models import vit
from vtts_jax.models.llamagen.modeling import Block, RMSNorm
from vtts_jax.models.llamagen_vq import modeling as llamagen_vq
from vtts_jax.models.shared_prefix import attend_shared, read_layer, write_cache
from vtts_jax.models.siglip import modeling as siglip
from vtts_jax.models.stacked import scan_blocks, stack_blocks

# a picture that is not square gets grey margins
PREPROCESSING = Preprocessing(siglip.MEAN, siglip.STD, mode='longest', fill=127 / 255)
_VQ16 = llamagen_vq.SIZES['vq16']
_VISION = vit.Config(width=1024, layers=24, heads=16, hidden=4096, act='gelu', eps=1e-6)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; the defaults are those of Janus-Pro-1B.

  Attributes:
    hidden: inner width of the feed-forward layer.
    vocab: words of the language model.
    tokens: T, of a picture.
    head_width: inner width of the head of codes.
    aligners: layers of the MLP of codes, and of that of patches.
    vq: the tokenizer; V and the width of an entering code are its own.
    vision: the tower that reads pictures; None leaves it, its MLP and the word head out.
    image_size, patch: of the pictures that are read.

  Raises:
    ConfigError: heads do not divide the width into even parts.
  """

  width: int = 2048
  layers: int = 24
  heads: int = 16
  hidden: int = 5632
  vocab: int = 102400
  tokens: int = 576
  head_width: int = 2048
  aligners: int = 2
  rope_base: float = 10000.0
  eps: float = 1e-6
  vq: llamagen_vq.Config = _VQ16
  vision: vit.Config | None = _VISION
  image_size: int = 384
  patch: int = 16

  def __post_init__(self):
    if self.width % (2 * self.heads):
      raise ConfigError(f'width={self.width}: must be a multiple of 2 * heads={2 * self.heads}')

  @property
  def codes(self) -> int:
    """V."""
    return self.vq.codebook_size

  @property
  def patches(self) -> int:
    """P, of a picture that is read."""
    return (self.image_size // self.patch) ** 2


_SMALL, _PRO_7B = Config(), Config(width=4096, layers=30, heads=32, hidden=11008, head_width=4096)
SIZES = {
  'tiny': Config(
    width=16, layers=2, heads=2, hidden=24, vocab=64, tokens=9, head_width=12,
    vq=llamagen_vq.SIZES['tiny'], vision=vit.Config(16, 2, 2, 32, 'gelu', 1e-6), image_size=32,
  ),
  'janus_1.3b': _SMALL,
  'janus_pro_1b': _SMALL,
  'janus_pro_7b': _PRO_7B,
}  # fmt: skip
PARTS = ('drawing',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config of what draws pictures: no tower, no word head."""
  del part
  return dataclasses.replace(c, vision=None)


def null_prompts(ids, mask, pad: int):
  """Prompts of the null stream: every word but the first and the last is `pad`.

  Args:
    ids, mask: `[B, W]`, padded on the right.
    pad: a word, which is attended to.
  """
  place, last = np.arange(ids.shape[-1]), (mask != 0).sum(-1, keepdims=True) - 1
  return np.where((place > 0) & (place < last), pad, ids)


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in 0..1 -> pixels `[R, S, S, 3]` for `Janus.embed_pictures`."""
  x = PREPROCESSING.fit_images(images, c.image_size)
  return normalize_channels(x, PREPROCESSING.mean, PREPROCESSING.std)


class MLP(nnx.Module):
  """Linear layers with GELUs between them."""

  def __init__(self, widths, *, rngs):
    self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:])])

  def __call__(self, x):  # [..., widths[0]] -> [..., widths[-1]]
    for i, layer in enumerate(self.layers):
      x = layer(jax.nn.gelu(x, approximate=False) if i else x)
    return x


class Janus(nnx.Module):
  """To draw: `prompt_context`, then `prefill` or `feed_tokens`, then `token_logits`; and
  `decode`. To read: `embed_pictures`, then `answer_logits`.

  A context is {'hidden': `[B, C, D]`, which predicts the first token, 'length': `[B]` words,
  'k', 'v': `[B, C, L, W, D]` of the prompt}. A cache is {'k', 'v': `[B, N, C, L, T, D]`} of the
  picture's tokens.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.words = vit.random_table(rngs, c.vocab, c.width)
    self.blocks = stack_blocks(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
    self.norm = RMSNorm(c.width, c.eps)
    self.code_table = vit.random_table(rngs, c.codes, c.vq.codebook_embed_dim)
    self.code_mlp = MLP((c.vq.codebook_embed_dim, *[c.width] * c.aligners), rngs=rngs)
    self.head_in = nnx.Linear(c.width, c.head_width, rngs=rngs)
    self.head_out = nnx.Linear(c.head_width, c.codes, rngs=rngs)
    self.vq = llamagen_vq.Tokenizer(c.vq, rngs=rngs)
    self.vision = self.patch_mlp = self.word_head = None
    if c.vision is not None:
      self.vision = nnx.data(siglip.PatchTower(c.vision, c.patch, c.patches, rngs=rngs))
      self.patch_mlp = nnx.data(MLP((c.vision.width, *[c.width] * c.aligners), rngs=rngs))
      self.word_head = nnx.data(nnx.Linear(c.width, c.vocab, use_bias=False, rngs=rngs))

  # ---------------------------------------------------------------------------------------- prompts

  def run_prompts(self, x, mask):
    """Runs embedded prompts through all layers.

    Args:
      x: `[B, C, W, D]`.
      mask: `[B, W]`, padded on the right.

    Returns:
      hidden: `[B, C, W, D]`, normed.
      (k, v): each `[B, C, L, W, D]`.
    """
    W = x.shape[2]
    table = self._rotations(jnp.arange(W))[:, None, None, :, None]  # [2, 1, 1, W, 1, d / 2]
    visible = (jnp.tri(W, dtype=bool) & (mask != 0)[:, None])[:, None]  # [B, 1, W, W]
    x = x.swapaxes(1, 2)[:, None]  # [B, 1, W, C, D]

    def run_layer(block, x, _):
      q, k, v = block.attn.project_rotated(block.norm_attn(x), table)
      k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)  # [B, 1, C, W, D]
      x = x + block.attn.out(attend_shared(q, (k, v), visible))
      return block.finish_layer(x), (k[:, 0], v[:, 0])

    x, kept = scan_blocks(self.blocks, run_layer, x)
    return self.norm(x[:, 0]).swapaxes(1, 2), tuple(jnp.moveaxis(y, 0, 2) for y in kept)

  def prompt_context(self, ids, mask):
    """Prompts `[B, C, W]` int of all streams with mask `[B, W]`, padded on the right -> context.

    The last word of a prompt begins the picture.
    """
    hidden, (k, v) = self.run_prompts(self.words[...][ids], mask)
    length = (mask != 0).sum(-1)
    # prompts are padded on the right, so that the last word has another place in each
    last = _take_last(hidden, length[:, None])
    return {'hidden': last, 'length': length, 'k': k, 'v': v}

  # ---------------------------------------------------------------------------------------- drawing

  def embed_tokens(self, tokens):
    """Tokens `[...]` int -> `[..., D]`."""
    return self.code_mlp(self.code_table[...][tokens])

  def run_tokens(self, ctx, tokens):
    """Runs whole sequences `[B, N, T]` int behind their prompts.

    Returns:
      hidden: `[B, N, T, C, D]`, after each token.
      cache: `[B, N, C, L, T, D]`.
    """
    T, C = tokens.shape[2], ctx['hidden'].shape[1]
    table = self._rotations(ctx['length'][:, None] + jnp.arange(T))[:, :, None, :, None]
    # the streams of guidance read the same tokens
    x = jnp.repeat(self.embed_tokens(tokens)[:, :, :, None], C, 3)
    visible, seen = jnp.tri(T, dtype=bool), self._visible_words(ctx)

    def run_layer(block, x, prompt):
      q, k, v = block.attn.project_rotated(block.norm_attn(x), table)
      k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
      x = x + block.attn.out(attend_shared(q, (k, v), visible, prompt, seen))
      return block.finish_layer(x), {'k': k, 'v': v}

    x, cache = scan_blocks(self.blocks, run_layer, x, _prompt_layers(ctx))
    return self.norm(x), {name: jnp.moveaxis(y, 0, 3) for name, y in cache.items()}

  def prefill(self, ctx, tokens):
    """Feeds whole sequences in parallel (teacher forcing).

    Args:
      ctx: context.
      tokens: `[B, N, T]` int.

    Returns:
      hidden: `[B, N, T, C, D]`; the one at t predicts token t from those before it.
      cache: `[B, N, C, L, T, D]` of all tokens.
    """
    x, cache = self.run_tokens(ctx, tokens)
    first = jnp.broadcast_to(ctx['hidden'][:, None, None], (*x.shape[:2], 1, *x.shape[3:]))
    return jnp.concatenate([first, x[:, :, :-1]], 2), cache

  def init_cache(self, ctx, candidates: int):
    """Returns an empty cache for N candidates."""
    B, C, L, _, D = ctx['k'].shape
    shape = B, candidates, C, L, self.config.tokens, D
    return {name: jnp.zeros(shape, ctx['k'].dtype) for name in 'kv'}

  def feed_tokens(self, ctx, cache, tokens, position):
    """Feeds one token for each candidate.

    Args:
      ctx, cache: context and cache.
      tokens: `[B, N]` int, the tokens at `position` - 1; at position 0 they do not matter.
      position: t, the token to predict: a scalar, or `[B, N]`.

    Returns:
      hidden: `[B, N, C, D]`, which predicts token t.
      cache: with the new keys and values.
    """
    # at position 0 slot 0 gets a token that does not count: position 1 writes it again
    position = jnp.asarray(position)
    slot = jnp.maximum(position - 1, 0)
    # [2, B, N or 1, 1, 1, d / 2]: prompts have their own lengths
    table = self._rotations(ctx['length'][:, None] + slot)[:, :, :, None, None]
    C = ctx['hidden'].shape[1]
    x = jnp.repeat(self.embed_tokens(tokens)[:, :, None, None], C, 3)
    visible = (jnp.arange(cache['k'].shape[4]) <= slot[..., None])[..., None, :]
    seen = self._visible_words(ctx)

    def run_layer(block, carry, inputs):
      (x, cache), (prompt, layer) = carry, inputs
      q, k, v = block.attn.project_rotated(block.norm_attn(x), table)
      cache = {name: write_cache(cache[name], new, layer, slot) for name, new in zip('kv', (k, v))}
      own = tuple(read_layer(cache[name], layer) for name in 'kv')
      x = x + block.attn.out(attend_shared(q, own, visible, prompt, seen))
      return (block.finish_layer(x), cache), None

    # the cache is carried, not stacked anew: a call writes one slot and not the whole cache
    layers = _prompt_layers(ctx), jnp.arange(self.config.layers)
    (x, cache), _ = scan_blocks(self.blocks, run_layer, (x, cache), layers)
    first = (position == 0)[..., None, None]
    return jnp.where(first, ctx['hidden'][:, None], self.norm(x[:, :, 0])), cache

  def token_logits(self, hidden):
    """Hidden `[..., D]` -> logits of codes `[..., V]` float32."""
    x = jax.nn.gelu(self.head_in(hidden), approximate=False)
    # float32 out of bfloat16 factors: sampling compares logits that lie close together
    y = jnp.matmul(x, self.head_out.kernel[...], preferred_element_type=jnp.float32)
    return y + self.head_out.bias[...]

  def decode(self, tokens):
    """Tokens `[R, T]` -> pictures `[R, H, W, 3]` float32 in about 0..1."""
    return (self.vq.decode(tokens) + 1) / 2

  # ---------------------------------------------------------------------------------------- reading

  def embed_pictures(self, pixels):
    """Pixels `[R, S, S, 3]` of `preprocess` -> `[R, P, D]`, to stand in a prompt."""
    return self.patch_mlp(self.vision.hidden_states(pixels))

  def answer_logits(self, ids, mask, pictures, placeholder: int):
    """Logits `[R, vocab]` float32 of the word after a prompt that holds a picture.

    Args:
      ids, mask: `[R, W]`, padded on the right; P of the words are `placeholder`.
      pictures: `[R, P, D]` of `embed_pictures`; they take the places of the placeholders.
    """
    # the n-th placeholder is the n-th patch
    here = ids == placeholder
    at = jnp.maximum(jnp.cumsum(here, -1) - 1, 0)[..., None]
    seen = jnp.take_along_axis(pictures, at, 1, mode='clip').astype(self.words.dtype)
    x = jnp.where(here[..., None], seen, self.words[...][ids])
    hidden = self.run_prompts(x[:, None], mask)[0][:, 0]
    last = _take_last(hidden, (mask != 0).sum(-1))
    return jnp.matmul(last, self.word_head.kernel[...], preferred_element_type=jnp.float32)

  # ---------------------------------------------------------------------------------------- helpers

  def _rotations(self, positions):
    """Cosines and sines `[2, ..., d / 2]` of positions `[...]`."""
    half = self.config.width // self.config.heads // 2
    # made here for any position: a table would need to know the longest prompt
    rates = 1.0 / self.config.rope_base ** (np.arange(half, dtype=np.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * rates
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])

  def _visible_words(self, ctx):
    # [B, 1, W]: padding behind a prompt is no word
    return (jnp.arange(ctx['k'].shape[3]) < ctx['length'][:, None])[:, None]


def _take_last(x, length):
  """Rows `[..., W, D]` -> the last of the first `length [...]` of them, `[..., D]`."""
  at = jnp.broadcast_to(length, x.shape[:-2])[..., None, None] - 1
  return jnp.take_along_axis(x, at, -2)[..., 0, :]


def _prompt_layers(ctx):
  """Keys and values of the prompts, layers leading."""
  return tuple(jnp.moveaxis(ctx[name], 2, 0) for name in 'kv')


def build_model(config: Config, seed=0) -> Janus:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return Janus(config, rngs=nnx.Rngs(seed))


def count_flops(c: Config, op: str, words: int, keys: int = 0) -> int:
  """Matmul FLOPs for one stream of one candidate, or one row.

  Args:
    op: 'prompt', the context of `words`; 'step', the hidden state of one token that sees `keys` of
      them and the prompt; 'head', the logits of one token; 'answer', `embed_pictures` and
      `answer_logits` of a prompt of `words`.
  """
  D, H = c.width, c.head_width
  matrices = 8 * D**2 + 6 * D * c.hidden
  if op == 'head':
    return 2 * H * (D + c.codes)
  if op == 'step':
    mlp = 2 * D * (c.vq.codebook_embed_dim + (c.aligners - 1) * D)
    return c.layers * (matrices + 4 * (keys + words) * D) + mlp
  trunk = words * c.layers * (matrices + 4 * words * D)
  if op == 'prompt':
    return trunk
  v = c.vision
  tower = vit.count_flops(v, c.patches) + c.patches * 2 * (
    3 * c.patch**2 * v.width + v.width * D + (c.aligners - 1) * D**2
  )
  return tower + trunk + 2 * D * c.vocab
