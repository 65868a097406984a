"""Flow matching in the scene world's pixels: a stage is one or more steps from noise to picture.

Settings, path (x_t = (1 - t) noise + t data) and steps come from `generators.diffusion`, the
network from scenes/models/flow.py. There is no latent: data are pixels in -1 .. 1, so decoding a
picture runs no network. The steps are shorter near the noise, as in training: what is where is
decided there.
Letters: B prompts, N candidates, C streams, H W image.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.generators.diffusion import DiffusionGenerator, guidance, schedules
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.scenes import world
from vtts_jax.scenes.models import SceneModel, flow, read_card

MODEL = SceneModel('flow')


@dataclasses.dataclass(frozen=True)
class ScenesFlow(DiffusionGenerator):
  """The flow model of the scene world.

  Attributes:
    guidance: classifier-free guidance scale >= 0. 1 runs one stream only, 0 ignores the prompt, -1
      selects the scale stored with the weights.
    steps, steps_per_stage, eta, early_at: see `generators.diffusion.base`.
  """

  predictor = guidance.DataPredictor()

  @property
  def data_shape(self):
    return (world.SIZE, world.SIZE, 3)

  @property
  def decoded_output(self):
    return core.Output('image', self.data_shape)

  @property
  def published_guidance(self):
    return read_card(MODEL.name)['guidance']

  @property
  def step_times(self):
    return schedules.shifted_times(self.steps, flow.SHIFT)

  def model_parts(self):
    return {'flow': MODEL}

  def tokenize(self, prompts):
    return {'text': world.tokenize_texts(core.texts_of(prompts))}

  def encode(self, params, prompt):
    """Embeddings `[B, C, E]` of the streams; the null text is all padding."""
    text, model = prompt['text'], self.bind_part(params, 'flow')
    # training dropped captions by replacing them with padding, so padding is the null prompt
    inputs = {'prompt': text, 'null': jnp.zeros_like(text)}
    embeddings = [model.embed_texts(inputs[stream]) for stream in self.guidance_streams]
    return jnp.stack(embeddings, axis=1)

  def predict(self, params, ctx, x, t):
    # streams and candidates become rows of one batch
    texts, rows, times = flatten_rows(ctx, x, t)
    return self.bind_part(params, 'flow')(rows, times, texts).reshape(x.shape)

  def decode(self, params, x):
    return self.bind_part(params, 'flow').to_images(x)

  def count_flops(self, op):
    streams, config = len(self.guidance_streams), self.part_config('flow')
    return {
      'encode': streams * flow.count_text_flops(config),
      'predict': streams * flow.count_picture_flops(config),
      'decode': 0,
    }[op]
