"""Stable Diffusion 3 and 3.5: pictures from a text by a flow over the latents of an autoencoder.

CLIP L, OpenCLIP bigG and T5 XXL read the prompt, `models.sd3` goes from noise to latents,
`models.autoencoder_kl` decodes them (Esser et al. 2024, arXiv 2403.03206). Prompts, times, steps
and guidance are those of diffusers' `StableDiffusion3Pipeline`, held to it by
tests/parity/test_parity_sd3_pipeline.py. The weights are gated, under Stability's community
licence. Skip-layer guidance, which 3.5 medium can have on top, is not offered.

Letters: B prompts, N candidates, C streams, R rows, W tokens of T5, S = 77 + W states, D width of a
CLIP, E width of T5, h w latent cells.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import schedules
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.generators.diffusion.texts import PromptedGenerator, TextModel
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.sd3 import modeling
from vtts_jax.models.t5 import modeling as t5

RELEASES = {  # settings of the released models
  'medium': {
    'weights': 'stabilityai/stable-diffusion-3-medium-diffusers', 'steps': 28, 'guidance': 7.0,
  },
  '3.5_medium': {
    'weights': 'stabilityai/stable-diffusion-3.5-medium', 'steps': 40, 'guidance': 4.5,
  },
  '3.5_large': {
    'weights': 'stabilityai/stable-diffusion-3.5-large', 'steps': 28, 'guidance': 3.5,
  },
  # distilled to one stream
  '3.5_large_turbo': {
    'weights': 'stabilityai/stable-diffusion-3.5-large-turbo', 'steps': 4, 'guidance': 1.0,
  },
}  # fmt: skip
TINY = {  # settings that read no file
  'weights': 'random:tiny', 't5_weights': 'random:tiny_wide', 'height': 16, 'width': 16, 'words': 8,
}  # fmt: skip
LEVELS = 1000  # the network's time is that many times sigma


@dataclasses.dataclass(frozen=True)
class SD3(PromptedGenerator):
  """The SD3 family; `RELEASES` has the settings of each model.

  Attributes:
    weights: a pipeline of diffusers (a repository or a folder), the network's own folder, or
      Stability's single file, which holds the VAE as well; see `models.pretrained`.
    vae_weights, clip_weights, open_clip_weights, t5_weights: the other models; '' takes those of
      the pipeline. With a single file the text models must be given. A tokenizer lies with its
      text model.
    guidance: scale >= 0; 1 runs one stream only (the turbo model is distilled to it). -1 is 7 for
      SD3 and 4.5 for SD3.5.
    shift: how far the steps move towards the noise, > 0; 3 in every release.
    words: W, tokens of T5, with padding; the end of a longer prompt is cut off.
    height, width: multiples of 16 pixels; up to 1440 in SD3.5 medium and about 1 megapixel else.
    steps, steps_per_stage, eta, early_at: see `generators.diffusion.base`.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  steps: int = 40
  weights: str = 'stabilityai/stable-diffusion-3.5-medium'
  clip_weights: str = ''
  open_clip_weights: str = ''
  t5_weights: str = ''
  shift: float = 3.0
  words: int = 256
  dtype: str = 'bfloat16'

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.words, int) or self.words < 2:
      raise ConfigError(f'generator.words={self.words!r}: must be an integer >= 2')
    if not self.shift > 0:
      raise ConfigError(f'generator.shift={self.shift}: must be > 0')
    self.model_parts()  # raises on weights that are not given and on an unknown random size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    return {
      'network': Pretrained('sd3', self.weights, self.dtype, setting='generator.weights'),
      'vae': self.vae,
      'clip': self.pipeline_text('clip', 'clip_weights'),
      'open_clip': self.pipeline_text('clip', 'open_clip_weights', '_2'),
      't5': self.pipeline_text('t5', 't5_weights', '_3'),
    }

  def text_models(self):
    parts, sizes = self.model_parts(), self.part_config
    clips = {
      name: TextModel(parts[name], sizes(name).length, sizes(name).vocab)
      for name in ('clip', 'open_clip')
    }
    words = TextModel(parts['t5'], self.words, sizes('t5').vocab_size, 'generator.words')
    return {**clips, 't5': words}

  @property
  def published_guidance(self):
    # only SD3.5 norms its queries and keys
    return 4.5 if self.part_config('network').qk_norm else 7.0

  @property
  def latent_channels(self):
    return self.part_config('network').in_channels

  @property
  def patch_cells(self):
    return self.part_config('network').patch_size

  @property
  def step_times(self):
    return schedules.sd3_times(self.steps, self.shift)

  def check(self):
    """Raises `ConfigError` if the models do not fit each other, or on a size without positions."""
    network, size = self.part_config('network'), self.part_config
    widths = [size(name).text.width for name in ('clip', 'open_clip')]
    pooled = sum(size(name).projection for name in ('clip', 'open_clip'))
    for setting, what, have, want in (
      ('t5_weights', 'd_model', size('t5').d_model, network.joint_attention_dim),
      ('open_clip_weights', "projection with CLIP L's", pooled, network.pooled_projection_dim),
      ('weights', 'out_channels', network.out_channels, network.in_channels),
    ):
      if have != want:
        raise ConfigError(f'generator.{setting}: has {what}={have}, the network wants {want}')
    if sum(widths) > network.joint_attention_dim:
      raise ConfigError(
        f'generator.open_clip_weights: widths={widths} with CLIP L, the network wants at most '
        f'{network.joint_attention_dim} together'
      )
    super().check()
    largest = network.pos_embed_max_size * self.patch_cells * size('vae').downscale
    for name in ('height', 'width'):
      if getattr(self, name) > largest:
        raise ConfigError(f'generator.{name}={getattr(self, name)}: must be at most {largest}')

  # --------------------------------------------------------------------------- prompts, the network

  def encode(self, params, prompt):
    """{'text': states `[B, C, S, E]`, 'pooled': `[B, C, V]`}: CLIP's states, side by side on
    channels and filled up with zeros, then T5's."""
    lead = prompt['t5'].shape[:2]
    ids = {name: rows.reshape(-1, rows.shape[2]) for name, rows in prompt.items()}
    # the states before the last block, without the final norm, and the projected texts
    states, pooled = zip(*(
      self.bind_part(params, name).text.penultimate_states(ids[name])
      for name in ('clip', 'open_clip')
    ))  # fmt: skip
    # no mask: the network has learned to read the padding
    words = self.bind_part(params, 't5')(ids['t5'])
    # every candidate has a copy of the text: CLIP's float32 would double it
    clips = jnp.concatenate(states, -1).astype(words.dtype)
    clips = jnp.pad(clips, ((0, 0), (0, 0), (0, words.shape[-1] - clips.shape[-1])))
    ctx = {'text': jnp.concatenate([clips, words], 1), 'pooled': jnp.concatenate(pooled, -1)}
    return {name: value.reshape(*lead, *value.shape[1:]) for name, value in ctx.items()}

  def predict(self, params, ctx, x, t):
    ctx, rows, times = flatten_rows(ctx, x, t)
    # its time runs from the data, 0, to the noise, 1000, and its velocity that way, too
    network = self.bind_part(params, 'network')
    velocity = -network(rows, LEVELS * (1 - times), ctx['text'], ctx['pooled'])
    return velocity.reshape(x.shape)

  def count_flops(self, op):
    streams, size = len(self.guidance_streams), self.part_config
    if op == 'encode':
      clips = sum(clip.count_flops(size(name), 'text') for name in ('clip', 'open_clip'))
      return streams * (clips + t5.count_flops(size('t5'), self.words))
    if op == 'decode':
      return self.decode_flops
    states = size('clip').length + self.words
    return streams * modeling.count_flops(size('network'), *self.latent_sides, states)
