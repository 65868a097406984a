"""VAR: class-conditional pictures, scale by scale (Tian et al. 2024, arXiv 2404.02905).

`models.var` draws the tokens of a scale, `models.var_vq` turns those of a prefix of scales into a
picture, so that a search sees every candidate at every stage. Sampling is the reference's: guidance
grows from scale to scale, then top-k and top-p. Golden files hold the models to it.

Letters: B prompts, N candidates, S scales, T tokens of all scales, V codes, C streams.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import classes
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token.next_scale import NextScaleGenerator
from vtts_jax.models import modules
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.var import modeling
from vtts_jax.models.var_vq import modeling as var_vq
from vtts_jax.models.var_vq import pyramid

TINY = dict.fromkeys(('weights', 'tokenizer_weights'), 'random:tiny')  # settings that read no file


@dataclasses.dataclass(frozen=True)
class VAR(NextScaleGenerator):
  """The VAR family.

  Attributes:
    weights: a safetensors file in the layout of FoundationVision/VAR (the releases are pickles, to
      be saved as safetensors first), or 'random:SIZE'. With `TINY` no file is read.
    tokenizer_weights: the tokenizer, likewise; its scales are those of `weights`.
    class_names: a text file whose line i names class i; '' if prompts are class numbers.
    guidance: the reference's number t, which grows with the scales from 0 to t: (1 + t) class - t
      null. 0 runs one stream only, -1 is the published 1.5.
    temperature, top_k, top_p: see `token_sampling`; the defaults are the published ones.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  top_k: int = 900
  top_p: float = 0.96
  weights: str = 'var_d30.safetensors'
  tokenizer_weights: str = 'vae_ch160v4096z32.safetensors'
  class_names: str = ''
  dtype: str = 'float32'

  published_guidance = 1.5

  def __post_init__(self):
    super().__post_init__()
    self.model_parts()  # raises on an unknown random size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    return {
      'prior': Pretrained('var', self.weights, self.dtype, setting='generator.weights'),
      # a search never encodes pictures
      'tokenizer': Pretrained(
        'var_vq', self.tokenizer_weights, self.dtype, 'decoder', 'generator.tokenizer_weights'
      ),
    }

  def part_config(self, name):
    config = super().part_config(name)
    if name != 'tokenizer':
      return config
    # one tokenizer serves 256 and 512 pixels: its weights know nothing of the scales
    scales = super().part_config('prior').patch_nums
    return dataclasses.replace(config, patch_nums=scales)

  def bind_part(self, params, name):
    if name != 'tokenizer':
      return super().bind_part(params, name)
    return modules.bind_module(var_vq.build_model, self.part_config(name), params[name])

  @property
  def scale_tokens(self):
    return tuple(side * side for side in self.part_config('prior').patch_nums)

  @property
  def vocab(self):
    return self.part_config('prior').codes

  @property
  def guidance_streams(self):
    # not the usual scale: here 0 and not 1 leaves the null stream out
    return ('prompt', 'null') if self.guidance_scale else ('prompt',)

  @property
  def decoded_output(self):
    config = self.part_config('tokenizer')
    side = config.patch_nums[-1] * config.downscale
    return core.Output('image', (side, side, 3))

  def check(self):
    """Raises `ConfigError` if the models do not fit each other."""
    prior, tokenizer = self.part_config('prior'), self.part_config('tokenizer')
    for have, want, what in (
      (tokenizer.codebook_size, prior.codes, 'codebook_size'),
      (tokenizer.z_channels, prior.channels, 'z_channels'),
    ):
      if have != want:
        raise ConfigError(
          f'generator.tokenizer_weights: has {what}={have}, the transformer wants {want}'
        )
    super().check()

  # ------------------------------------------------------------------------------ prompts, pictures

  def tokenize(self, prompts):
    """{'labels': `[B]`}; raises `ConfigError` on a prompt that is no class."""
    count, setting = self.part_config('prior').classes, 'generator.class_names'
    names = classes.read_class_names(self.class_names, setting) if self.class_names else ()
    return {'labels': classes.class_labels(prompts, count, 'generator', names)}

  def encode(self, params, prompt):
    """The context of `models.var`, leaves `[B, C, ...]`."""
    labels = prompt['labels']
    inputs = {'prompt': labels, 'null': jnp.full_like(labels, -1)}
    streams = jnp.stack([inputs[stream] for stream in self.guidance_streams], axis=1)
    return self.bind_part(params, 'prior').class_context(streams)

  def decode(self, params, ctx, state, stage):
    tokenizer = self.bind_part(params, 'tokenizer')
    latents = tokenizer.sum_scales(state.tokens, stage)
    images = tokenizer.decode_latents(latents.reshape(-1, *latents.shape[2:]))
    return jnp.clip(images.reshape(*latents.shape[:2], *images.shape[1:]) * 0.5 + 0.5, 0, 1)

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    # beside keys and values the picture that they have read
    config = self.part_config('tokenizer')
    cache = self.bind_part(params, 'prior').init_cache(ctx, lead[1])
    return {**cache, 'latents': jnp.zeros((*lead, *config.grids[-1], config.z_channels))}

  def next_logits(self, params, ctx, state, stage):
    prior, tokenizer = self.bind_part(params, 'prior'), self.bind_part(params, 'tokenizer')
    cache, latents, ends = dict(state.cache), state.cache['latents'], self.scale_ends
    # the first scale reads the class alone
    inputs = jnp.zeros((*latents.shape[:2], 0, latents.shape[-1]))
    if stage:
      before = state.tokens[..., ends[stage - 1] : ends[stage]]
      latents = latents + tokenizer.expand_scale(before, stage - 1)
      inputs = tokenizer.shrink_latents(latents, stage)
    del cache['latents']
    hidden, cache = prior.feed_scales(ctx, cache, inputs, stage, stage + 1)
    logits = modeling.guide_logits(prior.token_logits(ctx, hidden), self._ramp(stage))
    return logits, {**cache, 'latents': latents}

  def _ramp(self, stage):
    return modeling.guidance_ramp(self.guidance_scale, stage, self.num_stages)

  def _read_scales(self, params, ctx, state, stage):
    """Hidden states and caches after the first `stage` scales in one pass."""
    prior, tokenizer = self.bind_part(params, 'prior'), self.bind_part(params, 'tokenizer')
    inputs, latents = tokenizer.inputs_of_scales(state.tokens, stage)
    cache = prior.init_cache(ctx, state.tokens.shape[1])
    hidden, cache = prior.feed_scales(ctx, cache, inputs, 0, stage)
    return hidden, {**cache, 'latents': latents}

  def prefill(self, params, ctx, state, stage):
    if stage == 0:
      return self.init_cache(params, ctx, state.tokens.shape[:2])
    return self._read_scales(params, ctx, state, stage)[1]

  def forced_logits(self, params, ctx, state):
    hidden, _ = self._read_scales(params, ctx, state, self.num_stages)
    logits = self.bind_part(params, 'prior').token_logits(ctx, hidden)
    ramp = jnp.repeat(
      jnp.array([self._ramp(s) for s in range(self.num_stages)]), jnp.array(self.scale_tokens),
      total_repeat_length=self.scale_ends[-1],
    )  # fmt: skip
    return modeling.guide_logits(logits, ramp[:, None])

  def count_flops(self, op, stage=0):
    prior, tokenizer = self.part_config('prior'), self.part_config('tokenizer')
    streams, ends = len(self.guidance_streams), self.scale_ends
    count = lambda op, tokens=0, keys=0: modeling.count_flops(prior, op, streams, tokens, keys)
    if op == 'encode':
      return count('context')
    if op == 'decode':
      scales = sum(var_vq.count_expand_flops(tokenizer, s) for s in range(self.num_stages))
      return scales + var_vq.count_decode_flops(tokenizer)
    if op == 'step':
      n = self.scale_tokens[stage]
      flops = count('trunk', n, ends[stage + 1]) + count('head', n)
      return flops + (self._count_input_flops(stage) + count('embed', n) if stage else 0)
    read = ends[stage]
    inputs = sum(map(self._count_input_flops, range(1, stage)))
    return count('trunk', read, read) + inputs + (count('embed', read - ends[1]) if stage else 0)

  def _count_input_flops(self, stage):
    config = self.part_config('tokenizer')
    shrunk = pyramid.count_resize_flops(
      config.grids[-1], config.grids[stage], config.z_channels
    )
    return var_vq.count_expand_flops(config, stage - 1) + shrunk
