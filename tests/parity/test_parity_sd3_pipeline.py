"""The generator against diffusers' `StableDiffusion3Pipeline`: prompts, guidance, all steps and the
picture, from one folder of small random models."""

import numpy as np
import pytest
import reference
import tiny_pipeline
from reference import diffusers, torch

from vtts_jax.generators import sd3

HEIGHT, WIDTH, WORDS, CHANNELS, E = 16, 24, 12, 4, 40


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  torch.manual_seed(0)
  text, tokenizer = tiny_pipeline.make_clip(1, projection=6)
  # bigG: another activation, and another padding
  text_2, tokenizer_2 = tiny_pipeline.make_clip(2, projection=10, act='gelu', pad='!')
  text_3, tokenizer_3 = tiny_pipeline.make_t5(3, width=E)
  network = diffusers.SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=3,
    num_attention_heads=3, attention_head_dim=8, joint_attention_dim=E, caption_projection_dim=24,
    pooled_projection_dim=16, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm='rms_norm',
  )  # fmt: skip
  vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
    down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7, shift_factor=0.1,
  )  # fmt: skip
  theirs = diffusers.StableDiffusion3Pipeline(
    reference.randomise(network, 4), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    reference.randomise(vae, 5), text, tokenizer, text_2, tokenizer_2, text_3, tokenizer_3,
  )  # fmt: skip
  folder = tmp_path_factory.mktemp('sd3')
  theirs.save_pretrained(folder)
  theirs.set_progress_bar_config(disable=True)
  return theirs, str(folder)


@pytest.mark.parametrize('guidance', [1.0, 3.0])
def test_the_whole_loop(pipeline, guidance):
  theirs, folder = pipeline
  gen = sd3.SD3(
    weights=folder, steps=4, words=WORDS, height=HEIGHT, width=WIDTH, dtype='float32',
    guidance=guidance,
  )  # fmt: skip
  gen.check()
  noise = tiny_pipeline.draw_noise(len(tiny_pipeline.PROMPTS), HEIGHT // 2, WIDTH // 2, CHANNELS)
  ctx, latents, images = tiny_pipeline.sample(gen, gen.load(), noise)

  prompts = list(tiny_pipeline.PROMPTS)
  with torch.no_grad():
    text, null, pooled, null_pooled = theirs.encode_prompt(
      prompts, None, None, max_sequence_length=WORDS
    )
  for stream, states, vector in ((0, text, pooled), (1, null, null_pooled))[: len(ctx['text'][0])]:
    np.testing.assert_allclose(ctx['text'][:, stream], states.numpy(), atol=1e-4)
    np.testing.assert_allclose(ctx['pooled'][:, stream], vector.numpy(), atol=1e-4)
  options = {
    'height': HEIGHT, 'width': WIDTH, 'num_inference_steps': 4, 'guidance_scale': guidance,
    'max_sequence_length': WORDS, 'latents': tiny_pipeline.to_torch(noise),
  }  # fmt: skip
  want = theirs(prompts, output_type='latent', **options).images
  np.testing.assert_allclose(latents, np.moveaxis(want.numpy(), 1, -1), atol=1e-4)
  want = theirs(prompts, output_type='np', **options).images
  np.testing.assert_allclose(images, want, atol=1e-4)
