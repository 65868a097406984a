"""RandAR: pictures of a class, whose cells are drawn in any order.

Pang et al. 2024, arXiv 2412.01827: `models.randar` and LlamaGen's or MaskGIT's tokenizer. A stage
is a cell of the grid; `randar_parallel` draws several cells a stage. The order is a part of a
candidate. So a search chooses where to draw as well as what: a child that it branches off goes on
in an order of its own. Golden files hold the models to their references.

Letters: B prompts · N candidates · K children · C streams · T tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token.grid import GridGenerator
from vtts_jax.models.llamagen_vq import modeling as llamagen_vq
from vtts_jax.models.maskgit_vq import modeling as maskgit_vq
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.randar import modeling as randar

ORDERS = ('candidate', 'prompt', 'raster')
TOKENIZERS = {'llamagen': ('llamagen_vq', ''), 'maskgit': ('maskgit_vq', 'decoder')}
ORDER = 0x0D3  # folded into a key, so that orders and tokens do not share draws
TINY = dict.fromkeys(('prior_weights', 'tokenizer_weights'), 'random:tiny')  # read no file


@dataclasses.dataclass(frozen=True)
class RandAR(GridGenerator):
  """The RandAR family; tokens are listed in the order in which they are drawn.

  Attributes:
    prior_weights: the released safetensors, a file, a folder, or 'random:SIZE'. With `TINY` no file
      is read.
    tokenizer: 'llamagen' or 'maskgit', the tokenizer that the prior was trained with.
    tokenizer_weights: its weights, saved as safetensors (README.md of the models).
    order: 'candidate': a random order for each candidate; a child or a copy with another key draws
      a new one of the cells that are left. 'prompt': one random order for all candidates of a
      prompt. 'raster': row by row.
    guidance: scale >= 0 at the last token; it grows linearly from 1. 1 runs one stream only, 0
      ignores the class, -1 selects the published 4 (0.7B; of 0.3B it is 3.4).
    class_names, dtype, temperature, top_k, top_p: see `GridGenerator`.
  """

  prior_weights: str = (
    'ziqipang/RandAR/randar_0.7b_llamagen_360k_bs_1024_lr_0.0004.safetensors'
  )
  tokenizer: str = 'llamagen'
  tokenizer_weights: str = 'vq_ds16_c2i.safetensors'
  order: str = 'candidate'

  published_guidance = 4.0

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (('order', ORDERS), ('tokenizer', TOKENIZERS)):
      if getattr(self, name) not in allowed:
        raise ConfigError(
          f'generator.{name}={getattr(self, name)!r}: must be one of {", ".join(allowed)}'
        )
    self.model_parts()  # raises on an unknown size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    family, part = TOKENIZERS[self.tokenizer]
    setting = 'generator.{}_weights'.format
    return {
      'prior': Pretrained('randar', self.prior_weights, self.dtype, '', setting('prior')),
      'tokenizer': Pretrained(
        family, self.tokenizer_weights, self.dtype, part, setting('tokenizer')
      ),
    }

  @property
  def cells(self) -> int:
    """T, the cells of the grid."""
    return self.part_config('prior').tokens

  @property
  def num_stages(self):
    return self.cells

  @property
  def vocab(self):
    return self.part_config('prior').codes

  @property
  def decoded_output(self):
    side = round(self.cells**0.5) * self.part_config('tokenizer').downscale
    return core.Output('image', (side, side, 3))

  def check(self):
    """Raises `ConfigError` if the models do not fit each other."""
    name = {'llamagen': 'codebook_size', 'maskgit': 'num_embeddings'}[self.tokenizer]
    have = getattr(self.part_config('tokenizer'), name)
    if have != self.vocab:
      raise ConfigError(
        f'generator.tokenizer_weights: has {name}={have}, the prior wants {self.vocab}'
      )
    super().check()

  # ----------------------------------------------------------------------------- prompts, orders

  def tokenize(self, prompts):
    """{'labels': `[B]`}; raises `ConfigError` on a prompt that is no class."""
    return self.tokenize_classes(prompts, self.part_config('prior').classes)

  def encode(self, params, prompt):
    """The context of `models.randar`, leaves `[B, C, ...]`."""
    return self.bind_part(params, 'prior').class_context(self.stream_labels(prompt['labels']))

  def init_extra(self, params, ctx, keys):
    """Orders `[B, N, T]` int32: the position of each place."""
    if self.order == 'raster':
      row = jnp.arange(self.cells, dtype=jnp.int32)
      return jnp.broadcast_to(row, (*keys.shape, self.cells))
    owners = keys if self.order == 'candidate' else jnp.broadcast_to(keys[:, :1], keys.shape)
    return jnp.argsort(self._draw_ranks(owners), -1).astype(jnp.int32)

  def extend(self, params, ctx, state, keys, stage, count, *, greedy=False):
    # a copy of a candidate that goes on with another key goes on in another order; greedy
    # extensions know no keys
    state = state if greedy else self._order_rest(state, keys, stage)
    return super().extend(params, ctx, state, keys, stage, count, greedy=greedy)

  def fork(self, params, ctx, state, keys, stage, k, *, replace=True):
    children, owners = super().fork(params, ctx, state, keys, stage, k, replace=replace)
    drawn = jnp.repeat(stage, k, axis=1) + 1 if jnp.ndim(stage) else stage + 1
    return self._order_rest(children, keys.reshape(keys.shape[0], -1), drawn), owners

  def _order_rest(self, state, keys, stage):
    """The state with the places from `stage` on in the order of `keys [B, N]`."""
    if self.order != 'candidate':
      return state
    # by ranks: a candidate that has kept its key keeps its order, and child 0 has its parent's key
    ranks = jnp.take_along_axis(self._draw_ranks(keys), state.extra, -1)
    # the cells that are drawn come first, and stay as they are
    ranks = jnp.where(self._drawn_positions(stage), jnp.arange(self.cells) - self.cells, ranks)
    return state._replace(extra=jnp.take_along_axis(state.extra, jnp.argsort(ranks, -1), -1))

  def _draw_ranks(self, keys):
    """Numbers in 0..1 `[B, N, T]` of all positions; who has the smallest is drawn first."""
    keys = core.fold(keys, ORDER)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (self.cells,)))
    return draw(keys.reshape(-1)).reshape(*keys.shape, self.cells)

  def arrange_cells(self, state, tokens):
    return randar.to_raster(tokens, state.extra)

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    return self.bind_part(params, 'prior').init_cache(ctx, lead[1])

  def next_logits(self, params, ctx, state, stage):
    prior, fed = self.bind_part(params, 'prior'), self.previous_tokens(state, stage)
    hidden, cache = prior.feed_tokens(ctx, state.cache, fed[..., None], state.extra, stage)
    return self._guide_place(prior.token_logits(hidden[:, :, 0]), jnp.asarray(stage)), cache

  def prefill(self, params, ctx, state, stage):
    # fills all places in one pass; entries from `stage` on are overwritten before they are read
    return self.bind_part(params, 'prior').prefill(ctx, state.tokens, state.extra)[1]

  def forced_logits(self, params, ctx, state):
    prior = self.bind_part(params, 'prior')
    logits = prior.token_logits(prior.prefill(ctx, state.tokens, state.extra)[0])
    return self._guide_place(logits, jnp.arange(self.cells))

  def _guide_place(self, logits, place):
    """Logits `[..., C, V]` of tokens at `place`, broadcastable to `[...]` -> guided `[..., V]`."""
    if logits.shape[-2] == 1:
      return logits[..., 0, :]
    scale = randar.guidance_at((1.0, self.guidance_scale), place, self.cells)
    prompt, null = logits[..., 0, :], logits[..., 1, :]
    return null + scale[..., None] * (prompt - null)

  def decode_cells(self, params, tokens):
    images = self.bind_part(params, 'tokenizer').decode(tokens)
    # MaskGIT's are in 0 .. 1 already
    return images if self.tokenizer == 'maskgit' else (images + 1) / 2

  def count_flops(self, op):
    prior, streams = self.part_config('prior'), len(self.guidance_streams)
    if op == 'decode':
      family = maskgit_vq if self.tokenizer == 'maskgit' else llamagen_vq
      return family.count_decode_flops(self.part_config('tokenizer'), round(self.cells**0.5))
    if op == 'encode':
      return streams * randar.count_flops(prior, 'prefix')
    # a token takes two inputs, itself and the instruction of the next one
    step = 2 * randar.count_flops(prior, 'step', 2 * self.cells)
    return {
      'step': streams * (step + randar.count_flops(prior, 'head')),
      'prefill': streams * self.cells * step,
    }[op]
