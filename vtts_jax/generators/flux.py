"""FLUX.1 [dev] and [schnell]: pictures from a text by a flow over the latents of an autoencoder.

The generator of "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps" (Ma et
al. 2025, arXiv 2501.09732) for texts. CLIP L and T5 XXL read the prompt, `models.flux` goes from
noise to latents, `models.autoencoder_kl` decodes them. Prompts, times and steps are those of
diffusers' `FluxPipeline`, held to it by tests/parity/test_parity_flux_pipeline.py. The weights of
[dev] are under a non-commercial licence and gated; those of [schnell] are Apache-2.0.

Letters: B prompts, N candidates, C = 1 stream, R rows, W tokens of T5, h w latent cells.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import schedules
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.generators.diffusion.texts import PromptedGenerator, TextModel
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.flux import modeling
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.t5 import modeling as t5

RELEASES = {  # settings of the released models
  'dev': {'weights': 'black-forest-labs/FLUX.1-dev', 'steps': 28, 'words': 512},
  'schnell': {'weights': 'black-forest-labs/FLUX.1-schnell', 'steps': 4, 'words': 256},
}
# settings that read no file
TINY = {'weights': 'random:tiny', 'height': 16, 'width': 16, 'words': 8}


@dataclasses.dataclass(frozen=True)
class Flux(PromptedGenerator):
  """The FLUX.1 family; `RELEASES` has the settings of each model.

  Attributes:
    weights: a pipeline of diffusers (a repository or a folder), the network's own folder, or the
      original single file (`flux1-dev.safetensors`); see `models.pretrained`.
    vae_weights, clip_weights, t5_weights: the other models; '' takes those of the pipeline. With
      a single file they must be given (the VAE is the original's `ae.safetensors`). A tokenizer
      lies with its text model.
    guidance: the scale >= 0 that [dev] reads as an input; -1 is the published 3.5. [schnell] is
      distilled without one and takes -1 only. Neither has a second stream.
    words: W, tokens of T5, with padding; the end of a longer prompt is cut off.
    height, width: multiples of 16 pixels, from about 0.1 to 2 megapixels.
    steps, steps_per_stage, eta, early_at: see `generators.diffusion.base`. [dev] was published with
      50 steps, diffusers takes 28 and the paper on search 30.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  steps: int = 28
  weights: str = 'black-forest-labs/FLUX.1-dev'
  clip_weights: str = ''
  t5_weights: str = ''
  words: int = 512
  dtype: str = 'bfloat16'

  published_guidance = 3.5
  patch_cells = modeling.PATCH

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.words, int) or self.words < 2:
      raise ConfigError(f'generator.words={self.words!r}: must be an integer >= 2')
    self.model_parts()  # raises on weights that are not given and on an unknown random size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    return {
      'network': Pretrained('flux', self.weights, self.dtype, setting='generator.weights'),
      'vae': self.vae,
      'clip': self.pipeline_text('clip', 'clip_weights'),
      't5': self.pipeline_text('t5', 't5_weights', '_2'),
    }

  def text_models(self):
    parts, sizes = self.model_parts(), self.part_config
    return {
      'clip': TextModel(parts['clip'], sizes('clip').length, sizes('clip').vocab),
      't5': TextModel(parts['t5'], self.words, sizes('t5').vocab_size, 'generator.words'),
    }

  @property
  def latent_channels(self):
    return self.part_config('network').channels

  @property
  def guidance_streams(self):
    return ('prompt',)  # the scale is an input

  @property
  def step_times(self):
    # [dev] steps more slowly near the noise, the larger the picture is
    if not self.part_config('network').has_guidance:
      return schedules.shifted_times(self.steps)
    rows, columns = (side // modeling.PATCH for side in self.latent_sides)
    return schedules.flux_times(self.steps, rows * columns)

  def check(self):
    """Raises `ConfigError` if the models do not fit each other, or a guidance the model has not."""
    network = self.part_config('network')
    if not network.has_guidance and self.guidance != -1:
      raise ConfigError(
        f'generator.guidance={self.guidance}: must be -1, because weights={self.weights!r} are '
        'distilled without guidance and read no scale'
      )
    for name, what, have, want in (
      ('clip', 'width', self.part_config('clip').text.width, network.pooled_width),
      ('t5', 'd_model', self.part_config('t5').d_model, network.text_width),
      ('', 'out_channels', network.out_channels, network.channels),
    ):
      if have != want:
        setting = f'{name}_weights'.removeprefix('_')
        raise ConfigError(f'generator.{setting}: has {what}={have}, the network wants {want}')
    super().check()

  # --------------------------------------------------------------------------- prompts, the network

  def encode(self, params, prompt):
    """{'text': T5's states `[B, 1, W, E]`, 'pooled': CLIP's `[B, 1, V]`}."""
    ids = prompt['clip'][:, 0]
    text = self.bind_part(params, 'clip').text
    # the text before its projection, which FLUX's tower does not even have
    pooled = text.pool_tokens(text.hidden_states(ids), ids)
    # no mask: the network has learned to read T5's padding
    states = self.bind_part(params, 't5')(prompt['t5'][:, 0])
    return {'text': states[:, None], 'pooled': pooled[:, None]}

  def predict(self, params, ctx, x, t):
    ctx, rows, times = flatten_rows(ctx, x, t)
    scale = None
    if self.part_config('network').has_guidance:
      scale = jnp.full(times.shape, self.guidance_scale, jnp.float32)
    # its time runs from the data, 0, to the noise, 1, and so does its velocity
    network = self.bind_part(params, 'network')
    velocity = -network(rows, 1 - times, ctx['text'], ctx['pooled'], scale)
    return velocity.reshape(x.shape)

  def count_flops(self, op):
    if op == 'encode':
      return clip.count_flops(self.part_config('clip'), 'text') + t5.count_flops(
        self.part_config('t5'), self.words
      )
    if op == 'decode':
      return self.decode_flops
    return modeling.count_flops(self.part_config('network'), *self.latent_sides, self.words)
