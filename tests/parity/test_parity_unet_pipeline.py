"""The generator against diffusers' pipelines of Stable Diffusion and of XL: prompts, all steps and
the picture, from one folder of small random models."""

import dataclasses
import warnings

import numpy as np
import pytest
import reference
import tiny_pipeline
from reference import diffusers

from vtts_jax.generators import unet

HEIGHT, WIDTH, CHANNELS, STEPS = 16, 24, 4, 4
PROMPTS = list(tiny_pipeline.PROMPTS)
CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
UNETS = {
  False: {
    'attention_head_dim': 2, 'down_block_types': (CROSS, PLAIN),
    'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'),
  },
  True: {
    'attention_head_dim': [2, 4], 'use_linear_projection': True, 'down_block_types': (PLAIN, CROSS),
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'), 'transformer_layers_per_block': [1, 2],
    'addition_embed_type': 'text_time', 'addition_time_embed_dim': 8,
    'projection_class_embeddings_input_dim': 12 + 6 * 8,
  },
}  # fmt: skip
TRAINED = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear',
           'steps_offset': 1, 'timestep_spacing': 'leading'}  # fmt: skip


@pytest.fixture(scope='module', params=['sd', 'sd_v', 'xl'])
def pipeline(request, tmp_path_factory):
  xl = request.param == 'xl'
  text, tokenizer = tiny_pipeline.make_clip(1)
  network = diffusers.UNet2DConditionModel(
    sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8, 16),
    norm_num_groups=4, layers_per_block=1,
    cross_attention_dim=tiny_pipeline.CLIP_WIDTH * (1 + xl), **UNETS[xl],
  )  # fmt: skip
  vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
    down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
    scaling_factor=0.13025 if xl else 0.18215,
  )  # fmt: skip
  models = {
    'vae': reference.randomise(vae, 3), 'unet': reference.randomise(network, 4),
    'text_encoder': text, 'tokenizer': tokenizer,
  }  # fmt: skip
  if xl:
    second = tiny_pipeline.make_clip(2, projection=12, act='gelu', pad='!')
    models['text_encoder_2'], models['tokenizer_2'] = second
    theirs = diffusers.StableDiffusionXLPipeline(
      scheduler=diffusers.EulerDiscreteScheduler(**TRAINED), **models
    )
  else:
    kind = 'v_prediction' if request.param == 'sd_v' else 'epsilon'
    scheduler = diffusers.DDIMScheduler(
      **TRAINED, clip_sample=False, set_alpha_to_one=False, prediction_type=kind
    )
    theirs = diffusers.StableDiffusionPipeline(
      scheduler=scheduler, safety_checker=None, feature_extractor=None,
      requires_safety_checker=False, **models,
    )  # fmt: skip
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder)
  theirs.set_progress_bar_config(disable=True)
  guidance = 5.0 if xl else 7.5
  gen = unet.StableDiffusion(
    weights=str(folder), steps=STEPS, height=HEIGHT, width=WIDTH, dtype='float32',
    sampler='euler' if xl else 'ddim',
  )  # fmt: skip
  gen.check()
  assert gen.guidance_scale == guidance and gen.schedule.ends_at_data is False
  return theirs, gen


def run_theirs(theirs, gen, noise, kind):
  """Latents or pictures of diffusers, channels last."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of diffusers and numpy 2
    found = theirs(
      PROMPTS, output_type=kind, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
      latents=tiny_pipeline.to_torch(noise), guidance_scale=gen.guidance_scale,
    ).images  # fmt: skip
  return np.moveaxis(found.numpy(), 1, -1) if kind == 'latent' else found


def check_latents(theirs, gen, latents, noise):
  want = run_theirs(theirs, gen, noise, 'latent')
  # random networks do not shrink what they see: numbers reach 100
  size = np.abs(want).max()
  print('latents', np.abs(latents - want).max(), 'of', size)
  np.testing.assert_allclose(latents, want, atol=1e-5 * size)


def draw_noise():
  return tiny_pipeline.draw_noise(len(PROMPTS), HEIGHT // 2, WIDTH // 2, CHANNELS)


def test_the_whole_loop(pipeline):
  theirs, gen = pipeline
  ctx, latents, images = tiny_pipeline.sample(gen, gen.load(), draw_noise())
  # [prompt, null], and in XL the pooled ones
  text = theirs.encode_prompt(
    PROMPTS, device='cpu', num_images_per_prompt=1, do_classifier_free_guidance=True
  )
  text = [value.detach().numpy() for value in text]
  np.testing.assert_allclose(ctx['text'], np.stack(text[:2], 1), atol=1e-4)
  if gen.is_xl:
    np.testing.assert_allclose(ctx['pooled'], np.stack(text[2:], 1), atol=1e-4)
  check_latents(theirs, gen, latents, draw_noise())
  want = run_theirs(theirs, gen, draw_noise(), 'np')
  print('pictures', np.abs(images - want).max(), want.std())
  np.testing.assert_allclose(images, want, atol=1e-4)


@pytest.mark.parametrize(
  ('kind', 'options', 'settings'),
  [
    ('DPMSolverMultistepScheduler', {}, {'sampler': 'dpm++2m'}),
    ('EulerDiscreteScheduler', {'timestep_spacing': 'trailing'},
     {'sampler': 'euler', 'spacing': 'trailing'}),
    ('DDIMScheduler', {'clip_sample': False, 'set_alpha_to_one': False}, {'sampler': 'ddim'}),
  ],
)  # fmt: skip
def test_other_samplers(pipeline, kind, options, settings):
  theirs, gen = pipeline
  given = theirs.scheduler
  gen = dataclasses.replace(gen, **settings)
  _, latents, _ = tiny_pipeline.sample(gen, gen.load(), draw_noise())
  theirs.scheduler = getattr(diffusers, kind)(
    **TRAINED | options, prediction_type=given.config.prediction_type
  )
  check_latents(theirs, gen, latents, draw_noise())
  theirs.scheduler = given
