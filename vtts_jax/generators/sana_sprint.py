"""SANA-Sprint: SANA in one to four steps, by a distilled network that reads its guidance scale.

Chen et al. 2025 (arXiv 2503.09641). Each step predicts the picture and adds fresh noise for the
next one (consistency sampling on TrigFlow's path), as diffusers' `SanaSprintPipeline` does
(tests/parity). Models and prompts are those of `generators.sana`.

Letters: B prompts, N candidates, C streams, R rows.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from vtts_jax.errors import ConfigError
from vtts_jax.generators import sana
from vtts_jax.generators.diffusion import guidance, paths, schedules, steppers
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.models.sana.modeling import predict_trigflow

RELEASES = {  # settings of the released models
  '600m': {'weights': 'Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers'},
  '1600m': {'weights': 'Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers'},
}
TINY = {  # settings that read no file
  **sana.TINY, **dict.fromkeys(('vae_weights', 'text_weights'), 'random:tiny'),
  'weights': 'random:sprint_tiny',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SanaSprint(sana.SanaGenerator):
  """SANA-Sprint; `RELEASES` has the settings of each model.

  Attributes:
    guidance: the scale that the network reads as an input, >= 0; -1 is the published 4.5. There is
      one stream whatever the scale: the distilled network is not guided by a second one.
    eta: share of the noise that a step draws fresh; 1 is the published sampler, 0 draws none.
    max_timestep: angle in radians at which the first step starts, in (0, pi / 2].
    intermediate_timestep: angle of the second one, where there are two steps; any other number of
      steps is spaced evenly.
    steps, steps_per_stage, early_at: see `generators.diffusion.base`.
    height, width: see `generators.sana.Sana`.
    weights, vae_weights, text_weights, instruction, words, dtype: see
      `generators.sana.SanaGenerator`.
  """

  steps: int = 2
  eta: float = 1.0
  weights: str = RELEASES['1600m']['weights']
  max_timestep: float = schedules.SPRINT[0]
  intermediate_timestep: float = schedules.SPRINT[1]

  is_distilled = True
  path = paths.VariancePreservingPath()
  predictor = guidance.AnglePredictor()

  def __post_init__(self):
    super().__post_init__()
    # the published pi / 2 is rounded up
    if not 0 < self.max_timestep <= math.pi / 2 + 1e-5:
      raise ConfigError(f'generator.max_timestep={self.max_timestep}: must be in (0, pi / 2]')
    if self.steps == 2 and not 0 < self.intermediate_timestep < self.max_timestep:
      raise ConfigError(
        f'generator.intermediate_timestep={self.intermediate_timestep}: must be above 0 and below '
        f'max_timestep={self.max_timestep}'
      )

  @property
  def guidance_streams(self):
    return ('prompt',)

  @property
  def stepper(self):
    return steppers.EulerStepper(self.eta)

  @property
  def step_times(self):
    angles = np.linspace(self.max_timestep, 0, self.steps + 1)[:-1]
    if self.steps == 2:
      angles[1] = self.intermediate_timestep
    return schedules.sprint_times(angles)

  def predict(self, params, ctx, x, t):
    ctx, rows, times = flatten_rows(ctx, x, t)
    network = self.bind_part(params, 'network')
    scale = jnp.full(len(rows), self.guidance_scale, jnp.float32)

    def predict_velocity(x, time):
      return network(x, time, ctx['caption'], ctx['mask'], scale)

    # latents are kept at variance 1 here; the reference keeps them, and its data, at half of that
    angles = (1 - times) * jnp.pi / 2
    return predict_trigflow(predict_velocity, rows, angle=angles, sigma_data=1.0).reshape(x.shape)
