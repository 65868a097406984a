"""SiT: class-conditional pictures by a flow over the latents of Stable Diffusion's VAE.

The ImageNet generator of "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising
Steps" (Ma et al. 2025, arXiv 2501.09732): `models.sit` between noise and latents and
`models.autoencoder_kl` behind. A stage is `steps_per_stage` steps. Samplers and guidance are SiT's
own (2401.08740), held to its code by the golden file of `models.sit`.

Letters: B prompts, N candidates, C streams, R rows, H latent side.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vtts_jax.data import classes
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import guidance, steppers
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.generators.diffusion.latents import LatentGenerator
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.sit import modeling

GUIDED = 3  # of the 4 latent channels: the published code guides no more
LAST_STEP = 0.04  # the time that the SDE leaves to its last step
SAMPLERS = ('euler', 'heun', 'midpoint', 'sde', 'sde_heun')
TINY = dict.fromkeys(('weights', 'vae_weights'), 'random:tiny')  # settings that read no file


@dataclasses.dataclass(frozen=True)
class SiT(LatentGenerator):
  """The SiT family.

  Attributes:
    weights: a safetensors file in the layout of willisma/SiT (the release is a pickle, to be saved
      as safetensors first), a folder or repository of it, or 'random:SIZE'. With `TINY` no file
      is read.
    vae_weights: the VAE, likewise.
    guidance: scale >= 0 on the first three channels; 1 runs one stream only, -1 is the published
      1.5. The paper on search takes 1.
    guidance_from, guidance_until: times between which the scale holds; it is 1 outside.
    sampler: 'euler', 'heun' and 'midpoint' of the ODE, where noise and picture determine each
      other; 'sde' (Euler-Maruyama) and 'sde_heun', which draw noise in every step but the last.
      Heun's and midpoint's steps are two evaluations.
    diffusion: strength of the SDE, one of `steppers.DIFFUSIONS` ('sbdm' has no start at noise).
    last: the SDE's last step, the 'mean' of its step or the predicted 'data'.
    class_names: a text file whose line i names class i; '' if prompts are class numbers.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
    steps, steps_per_stage, eta, early_at: see `generators.diffusion.base`; eta is for 'euler'. The
      paper's 50 evaluations are 25 steps of Heun.
  """

  steps: int = 25
  weights: str = 'SiT-XL-2-256.safetensors'
  vae_weights: str = 'stabilityai/sd-vae-ft-ema'
  guidance_from: float = 0.0
  guidance_until: float = 1.0
  sampler: str = 'heun'
  diffusion: str = 'sigma'
  last: str = 'mean'
  class_names: str = ''

  published_guidance = 1.5

  def __post_init__(self):
    super().__post_init__()
    allowed = {
      'sampler': SAMPLERS,
      'diffusion': tuple(name for name in steppers.DIFFUSIONS if name != 'sbdm'),
      'last': ('mean', 'data'),
    }
    for name, values in allowed.items():
      if getattr(self, name) not in values:
        raise ConfigError(
          f'generator.{name}={getattr(self, name)!r}: must be one of {", ".join(values)}'
        )
    if self.eta and self.sampler != 'euler':
      raise ConfigError(f"generator.eta={self.eta}: must be 0 with sampler={self.sampler!r}")
    if self.sampler.startswith('sde') and self.steps < 2:
      raise ConfigError(f'generator.steps={self.steps}: must be >= 2 with an SDE')
    if not 0 <= self.guidance_from <= self.guidance_until <= 1:
      raise ConfigError(
        f'generator.guidance_from={self.guidance_from}, guidance_until={self.guidance_until}: '
        'must be in order and in [0, 1]'
      )
    self.model_parts()  # raises on an unknown random size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    return {
      'flow': Pretrained('sit', self.weights, self.dtype, setting='generator.weights'),
      'vae': self.vae,
    }

  @property
  def stepper(self):
    sde = (self.diffusion, 1.0, self.last)
    return {
      'euler': steppers.EulerStepper(self.eta),
      # the published Heun evaluates the network at t = 1, too
      'heun': steppers.HeunStepper(euler_at_end=False),
      'midpoint': steppers.MidpointStepper(),
      'sde': steppers.EulerMaruyamaStepper(*sde),
      'sde_heun': steppers.HeunMaruyamaStepper(*sde),
    }[self.sampler]

  @property
  def step_times(self):
    if not self.sampler.startswith('sde'):
      return super().step_times
    return np.append(np.linspace(0, 1 - LAST_STEP, self.steps), 1).astype(np.float32)

  @property
  def guidance_rule(self):
    interval = (float(self.guidance_from), float(self.guidance_until))
    return guidance.ClassifierFreeGuidance(self.guidance_scale, interval, GUIDED)

  @property
  def latent_channels(self):
    return self.part_config('flow').channels

  @property
  def latent_sides(self):
    return (self.part_config('flow').size,) * 2

  # ------------------------------------------------------------------------------ prompts, pictures

  def tokenize(self, prompts):
    """{'labels': `[B]`}; raises `ConfigError` on a prompt that is no class."""
    count = self.part_config('flow').classes
    names = ()
    if self.class_names:
      names = classes.read_class_names(self.class_names, 'generator.class_names')
      if len(names) != count:
        raise ConfigError(
          f'generator.class_names={self.class_names!r}: has {len(names)} names, must have {count}'
        )
    return {'labels': classes.class_labels(prompts, count, 'generator', names)}

  def encode(self, params, prompt):
    """Classes by stream `[B, C]` int32; the null class is the table's last row."""
    labels = prompt['labels']
    inputs = {'prompt': labels, 'null': jnp.full_like(labels, self.part_config('flow').classes)}
    return jnp.stack([inputs[stream] for stream in self.guidance_streams], axis=1)

  def predict(self, params, ctx, x, t):
    labels, rows, times = flatten_rows(ctx, x, t)
    return self.bind_part(params, 'flow')(rows, times, labels).reshape(x.shape)

  def count_flops(self, op):
    return {
      'encode': 0,
      'predict': len(self.guidance_streams) * modeling.count_flops(self.part_config('flow')),
      'decode': self.decode_flops,
    }[op]
