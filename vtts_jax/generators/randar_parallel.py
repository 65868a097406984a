"""RandAR with several cells a stage, drawn at once: 88 network calls for 256 cells.

Pang et al. 2024, arXiv 2412.01827; `generators.randar` draws them one by one. The
cells of a stage do not know of each other, as the tokens of a scale do not (`token.next_scale`).

Letters: B prompts · N candidates · T tokens · n tokens of a stage · C streams.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.generators.randar import TINY as TINY
from vtts_jax.generators.randar import RandAR
from vtts_jax.generators.token.next_scale import NextScaleGenerator
from vtts_jax.models.randar import modeling as randar


@dataclasses.dataclass(frozen=True)
class ParallelRandAR(RandAR, NextScaleGenerator):
  """RandAR with several cells a stage, each drawn without knowledge of the others.

  Attributes:
    steps: stages of a picture, by the published cosine schedule: more cells at a time the more of
      the picture is known. 88 is the published number.
    prior_weights, tokenizer, tokenizer_weights, order, guidance, class_names, dtype, temperature,
      top_k, top_p: see `RandAR`.
  """

  steps: int = 88

  prefixes_are_samples = False

  @property
  def scale_tokens(self):
    try:
      return randar.parallel_counts(self.cells, self.steps)
    except ConfigError as error:
      raise ConfigError(f'generator.{error}') from None

  @property
  def num_stages(self):
    return len(self.scale_tokens)

  def check(self):
    _ = self.scale_tokens  # raises on a number of steps that the grid has not
    super().check()

  def next_logits(self, params, ctx, state, stage):
    prior, place = self.bind_part(params, 'prior'), self.scale_ends[stage]
    # what the stage before drew
    begin = self.scale_ends[stage - 1] if stage else 0
    fed, count = state.tokens[:, :, begin:place], self.scale_tokens[stage]
    hidden, cache = prior.feed_tokens(ctx, state.cache, fed, state.extra, place, count)
    return self._guide_place(prior.token_logits(hidden), jnp.asarray(place)), cache

  def forced_logits(self, params, ctx, state):
    # one pass over all places would show a cell those that are drawn with it
    cache, found = self.init_cache(params, ctx, state.tokens.shape[:2]), []
    for stage in range(self.num_stages):
      logits, cache = self.next_logits(params, ctx, state._replace(cache=cache), stage)
      found.append(logits)
    return jnp.concatenate(found, 2)

  def count_flops(self, op, stage=0):
    if op != 'step':
      return super().count_flops(op)
    prior, count = self.part_config('prior'), self.scale_tokens[stage]
    # the tokens of the stage before, the instructions between them, and those of this stage
    inputs = count + (2 * self.scale_tokens[stage - 1] - 1 if stage else 0)
    step = inputs * randar.count_flops(prior, 'step', 2 * self.cells)
    return len(self.guidance_streams) * (step + count * randar.count_flops(prior, 'head'))
