"""Stable Diffusion 1.5, 2.1 and XL: pictures from a text by denoising latents with a UNet.

CLIP reads the prompt (in XL OpenCLIP's bigG as well), `models.unet` goes from noise to latents,
`models.autoencoder_kl` decodes them (Rombach et al. 2022, arXiv 2112.10752; Podell et al. 2023,
2307.01952). FK steering, DAS, SVDD and URGE publish on these models. Prompts, sizes, times, steps
and guidance are those of diffusers' `StableDiffusionPipeline` and `StableDiffusionXLPipeline`, held
to them by tests/parity/test_parity_unet_pipeline.py. No weights are gated; the licences are
CreativeML OpenRAIL-M and, of 2.1 and XL, OpenRAIL++-M.

Letters: B prompts, N candidates, C streams, R rows, W = 77 tokens, E width of the text, P of the
pooled text.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from vtts_jax.checkpoints.source import name_pipeline_part, read_pipeline_config
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import guidance, paths, schedules, steppers
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.generators.diffusion.texts import PromptedGenerator, TextModel
from vtts_jax.models.clip import modeling as clip
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.unet import modeling

SAMPLERS = ('euler', 'ddim', 'dpm++2m')
SPACINGS = ('leading', 'trailing')
PREDICTORS = {'epsilon': guidance.NoisePredictor(), 'v_prediction': guidance.AnglePredictor()}
TRAINED = schedules.TrainedLevels()  # of every release
RELEASES = {  # settings of the released models
  'sd15': {
    'weights': 'stable-diffusion-v1-5/stable-diffusion-v1-5', 'height': 512, 'width': 512,
    'sampler': 'ddim', 'steps': 50, 'guidance': 7.5,
  },
  'sd21': {
    'weights': 'stabilityai/stable-diffusion-2-1', 'height': 768, 'width': 768,
    'sampler': 'ddim', 'steps': 50, 'guidance': 7.5,
  },
  'sdxl': {
    'weights': 'stabilityai/stable-diffusion-xl-base-1.0', 'height': 1024, 'width': 1024,
    'sampler': 'euler', 'steps': 50, 'guidance': 5.0,
  },
}  # fmt: skip
# settings that read no file
TINY = {'weights': 'random:tiny', 'height': 8, 'width': 8}
TINY_XL = {
  'weights': 'random:tiny_xl', 'vae_weights': 'random:tiny', 'clip_weights': 'random:tiny',
  'open_clip_weights': 'random:tiny', 'height': 8, 'width': 8,
}  # fmt: skip
# where the text towers are in an original single file
CLIP_OF_SD1, CLIP_OF_XL = 'cond_stage_model.transformer.', 'conditioner.embedders.0.transformer.'
OPEN_CLIP_OF_XL = 'conditioner.embedders.1.model.'


@dataclasses.dataclass(frozen=True)
class StableDiffusion(PromptedGenerator):
  """The family; `RELEASES` has the settings of each model. The UNet says whether it is an XL.

  Attributes:
    weights: a pipeline of diffusers (a repository or a folder), the UNet's own folder, or the
      original single file of 1.5 or XL, which has all models; see `models.pretrained`.
    vae_weights, clip_weights, open_clip_weights: the other models; '' takes those beside the UNet.
    tokenizer: the pipeline whose tokenizers read the prompts; '' for those beside the text models.
      A single file has none.
    guidance: scale >= 0; 1 runs one stream only, -1 is 5 for XL and 7.5 for the others.
    sampler: 'euler' (XL's own, and with eta = 1 Euler ancestral, which is DDPM), 'ddim', which
      differs in its last step and is what the papers on steering take with eta = 1, or 'dpm++2m'
      (DPM-Solver++, with eta = 1 its SDE).
    eta: share of the noise of the reverse process that a step draws, in [0, 1]; see
      `steppers.AncestralStepper`. Particle methods need more than 0.
    spacing: of the steps over the 1000 levels, 'leading' or 'trailing' (XL Turbo); '' as the
      pipeline's `scheduler_config.json` says, and 'leading' without one.
    prediction: what the UNet predicts, 'epsilon' or 'v_prediction' (2.1 at 768 pixels); '' as that
      file says, and 'epsilon' without one.
    height, width: multiples of 8 pixels. 1.5 was made for 512 x 512, 2.1 for 768 x 768, XL for
      1024 x 1024 and for rectangles of that area.
    steps, steps_per_stage, early_at: see `generators.diffusion.base`; at most 1000 steps.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'. There is no 'float16', because XL's
      autoencoder overflows in it.
  """

  steps: int = 50
  weights: str = 'stabilityai/stable-diffusion-xl-base-1.0'
  clip_weights: str = ''
  open_clip_weights: str = ''
  tokenizer: str = ''
  sampler: str = 'euler'
  spacing: str = ''
  prediction: str = ''
  dtype: str = 'bfloat16'

  path = paths.VariancePreservingPath()

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (
      ('sampler', SAMPLERS), ('spacing', ('', *SPACINGS)), ('prediction', ('', *PREDICTORS)),
    ):  # fmt: skip
      if getattr(self, name) not in allowed:
        raise ConfigError(
          f'generator.{name}={getattr(self, name)!r}: must be one of '
          f'{", ".join(map(repr, allowed))}'
        )
    if self.steps > TRAINED.levels - 1:
      raise ConfigError(f'generator.steps={self.steps}: must be in 1 .. {TRAINED.levels - 1}')
    if self._is_single_file and not (self.tokenizer or self.clip_weights):
      raise ConfigError(
        "generator.tokenizer='': must be a pipeline with tokenizers, because a single file has none"
      )
    # these raise on weights that are not given and on an unknown random size
    _ = self.unet, self.vae

  # ------------------------------------------------------------------------------------ the models

  @property
  def unet(self) -> Pretrained:
    return Pretrained('unet', self.weights, self.dtype, setting='generator.weights')

  @property
  def is_xl(self) -> bool:
    """Whether the UNet reads sizes and a pooled text."""
    return self.unet.config.projection_class_embeddings_input_dim > 0

  @property
  def _is_single_file(self):
    return self.weights.partition('@')[0].endswith('.safetensors')

  def model_parts(self):
    parts = {'unet': self.unet, 'vae': self.vae}
    parts['clip'] = self._text_part('clip_weights', '', CLIP_OF_XL if self.is_xl else CLIP_OF_SD1)
    if self.is_xl:
      parts['open_clip'] = self._text_part('open_clip_weights', '_2', OPEN_CLIP_OF_XL)
    return parts

  def _text_part(self, setting, number, prefix):
    if self._is_single_file and not getattr(self, setting):
      place = f'{self.weights}#{prefix}'
      return Pretrained('clip', place, self.dtype, 'text', f'generator.{setting}')
    return self.pipeline_text('clip', setting, number)

  def text_models(self):
    found, parts = {}, self.model_parts()
    for name, folder in (('clip', 'tokenizer'), ('open_clip', 'tokenizer_2')):
      if name in parts:
        place = self.tokenizer and name_pipeline_part(self.tokenizer, folder)
        sizes = parts[name].config
        found[name] = TextModel(parts[name], sizes.length, sizes.vocab, place=place)
    return found

  def check(self):
    """Raises `ConfigError` if the models do not fit each other."""
    unet, size = self.unet.config, self.part_config
    text = size('clip').text.width
    facts = [
      ('weights', 'out_channels', unet.out_channels, unet.in_channels),
      ('clip_weights', 'width', text, unet.cross_attention_dim),
    ]
    if self.is_xl:
      pooled = size('open_clip').projection + 6 * unet.addition_time_embed_dim
      facts[1] = ('open_clip_weights', "width with CLIP L's", text + size('open_clip').text.width,
                  unet.cross_attention_dim)  # fmt: skip
      facts.append(('open_clip_weights', 'pooled text and six sizes', pooled,
                    unet.projection_class_embeddings_input_dim))  # fmt: skip
    for setting, what, have, want in facts:
      if have != want:
        raise ConfigError(f'generator.{setting}: has {what}={have}, the UNet wants {want}')
    super().check()

  # ------------------------------------------------------------------------------------- the facts

  @property
  def published_guidance(self):
    return 5.0 if self.is_xl else 7.5

  @property
  def latent_channels(self):
    return self.unet.config.in_channels

  @property
  def schedule(self) -> 'Schedule':
    """The release's schedule, with what the settings say in its place."""
    given = {name: getattr(self, name) for name in ('spacing', 'prediction')}
    return dataclasses.replace(
      read_schedule(self.weights), **{name: value for name, value in given.items() if value}
    )

  @property
  def predictor(self):
    return PREDICTORS[self.schedule.prediction]

  @property
  def stepper(self):
    return steppers.AncestralStepper(self.eta, 2 if self.sampler == 'dpm++2m' else 1)

  @property
  def step_times(self):
    if self.sampler == 'ddim':
      return self._ddim_times[0]
    spaced = self.steps, self.schedule.spacing, self.schedule.offset
    return schedules.ddpm_times(TRAINED, *spaced, multistep=self.sampler == 'dpm++2m')

  @property
  def landing_times(self):
    return self._ddim_times[1] if self.sampler == 'ddim' else super().landing_times

  @property
  def _ddim_times(self):
    found = self.schedule
    return schedules.ddim_times(
      TRAINED, self.steps, found.spacing, found.offset, found.ends_at_data
    )

  @property
  def noise_scale(self):
    # diffusers' Euler starts at the last level as if there were no data in it
    if self.sampler == 'euler' and self.schedule.spacing == 'trailing':
      return float(np.cos(self.step_times[0] * np.pi / 2))
    return 1.0

  # --------------------------------------------------------------------------- prompts, the network

  def encode(self, params, prompt):
    """{'text': `[B, C, W, E]`}, and in XL 'pooled': `[B, C, P]`."""
    lead = prompt['clip'].shape[:2]
    ids = {name: rows.reshape(-1, rows.shape[2]) for name, rows in prompt.items()}
    towers = {name: self.bind_part(params, name).text for name in ids}
    if not self.is_xl:
      text = towers['clip'].hidden_states(ids['clip'])
      return {'text': text.reshape(*lead, *text.shape[1:])}
    # the states before the last block, without the final norm
    states, pooled = zip(*(towers[name].penultimate_states(ids[name]) for name in towers))
    ctx = {'text': jnp.concatenate(states, -1), 'pooled': pooled[-1]}
    ctx = {name: value.reshape(*lead, *value.shape[1:]) for name, value in ctx.items()}
    # XL was trained with zeros for no text, not with the states of the empty one
    asked = np.array([stream == 'prompt' for stream in self.guidance_streams])
    return {k: v * asked.reshape(-1, *(1,) * (v.ndim - 2)).astype(v.dtype) for k, v in ctx.items()}

  def predict(self, params, ctx, x, t):
    ctx, rows, times = flatten_rows(ctx, x, t)
    conditions = {}
    if self.is_xl:
      # original size, top and left of the crop, target size: a whole picture of the size asked for
      side = (self.height, self.width)
      sizes = jnp.broadcast_to(jnp.array([*side, 0, 0, *side], jnp.float32), (len(rows), 6))
      conditions = {'pooled': ctx['pooled'], 'time_ids': sizes}
    unet = self.bind_part(params, 'unet')
    return unet(rows, TRAINED.timestep_at(times), ctx['text'], **conditions).reshape(x.shape)

  def observe(self, params, ctx, state, stage, names):
    # DDIM ends at its first level and not at the data, and diffusers decodes what is there
    done = self._broadcast_to_data(jnp.asarray(stage) >= self.num_stages)
    state = state._replace(end=jnp.where(done, state.x, state.end))
    return super().observe(params, ctx, state, stage, names)

  def count_flops(self, op):
    if op == 'decode':
      return self.decode_flops
    texts, streams = self.text_models(), len(self.guidance_streams)
    if op == 'encode':
      return streams * sum(clip.count_flops(self.part_config(name), 'text') for name in texts)
    words = texts['clip'].length
    return streams * modeling.count_flops(self.unet.config, *self.latent_sides, words)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What a release says of its noise levels.

  Attributes:
    prediction, spacing: as in `StableDiffusion`.
    offset: added to 'leading' levels.
    ends_at_data: whether DDIM's last step reaches the data.
  """

  prediction: str = 'epsilon'
  spacing: str = 'leading'
  offset: int = 1
  ends_at_data: bool = False


@functools.cache
def read_schedule(weights: str) -> Schedule:
  """The schedule in a pipeline's `scheduler_config.json`; the default where there is none.

  Raises:
    ConfigError: the file says what this generator does not do.
  """
  try:
    options = read_pipeline_config(weights, 'scheduler', 'scheduler_config.json')
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f'generator.weights={weights!r}: {error}') from error
  # every release was trained at these levels; another checkpoint may not have been
  for name, allowed in (
    ('beta_start', (TRAINED.beta_start,)), ('beta_end', (TRAINED.beta_end,)),
    ('beta_schedule', ('scaled_linear',)), ('num_train_timesteps', (TRAINED.levels,)),
    ('trained_betas', (None,)), ('rescale_betas_zero_snr', (False,)),
    ('prediction_type', tuple(PREDICTORS)), ('timestep_spacing', SPACINGS),
  ):  # fmt: skip
    if options.get(name, allowed[0]) not in allowed:
      raise ConfigError(
        f'generator.weights={weights!r}: scheduler_config.json has {name}={options[name]!r}; '
        f'allowed is {" or ".join(map(str, allowed))}'
      )
  known = {
    'prediction': 'prediction_type', 'spacing': 'timestep_spacing', 'offset': 'steps_offset',
    'ends_at_data': 'set_alpha_to_one',
  }  # fmt: skip
  return Schedule(**{ours: options[name] for ours, name in known.items() if name in options})
