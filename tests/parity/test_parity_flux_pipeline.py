"""The generator against diffusers' `FluxPipeline`: prompts, all steps and the picture, from one
folder of small random models."""

import numpy as np
import pytest
import reference
import tiny_pipeline
from reference import diffusers, torch

from vtts_jax.generators import flux

HEIGHT, WIDTH, WORDS, CHANNELS = 16, 24, 12, 4


@pytest.fixture(scope='module', params=['dev', 'schnell'])
def pipeline(request, tmp_path_factory):
  torch.manual_seed(0)
  dev = request.param == 'dev'
  text, tokenizer = tiny_pipeline.make_clip(1)
  text_2, tokenizer_2 = tiny_pipeline.make_t5(2, width=20)
  network = diffusers.FluxTransformer2DModel(
    in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=20, pooled_projection_dim=tiny_pipeline.CLIP_WIDTH,
    guidance_embeds=dev, axes_dims_rope=(4, 2, 2),
  )  # fmt: skip
  vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
    down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7, shift_factor=0.1,
  )  # fmt: skip
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
  )
  theirs = diffusers.FluxPipeline(
    scheduler, reference.randomise(vae, 3), text, tokenizer, text_2, tokenizer_2,
    reference.randomise(network, 4),
  )  # fmt: skip
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder)
  theirs.set_progress_bar_config(disable=True)
  return theirs, str(folder)


def test_the_whole_loop(pipeline):
  theirs, folder = pipeline
  dev = theirs.transformer.config.guidance_embeds
  gen = flux.Flux(
    weights=folder, steps=4, words=WORDS, height=HEIGHT, width=WIDTH, dtype='float32',
    guidance=2.0 if dev else -1.0,
  )  # fmt: skip
  gen.check()
  noise = tiny_pipeline.draw_noise(len(tiny_pipeline.PROMPTS), HEIGHT // 2, WIDTH // 2, CHANNELS)
  ctx, latents, images = tiny_pipeline.sample(gen, gen.load(), noise)

  prompts = list(tiny_pipeline.PROMPTS)
  text, pooled, _ = theirs.encode_prompt(prompts, None, max_sequence_length=WORDS)
  np.testing.assert_allclose(ctx['text'][:, 0], text.detach().numpy(), atol=1e-4)
  np.testing.assert_allclose(ctx['pooled'][:, 0], pooled.detach().numpy(), atol=1e-4)
  given = tiny_pipeline.to_torch(noise)
  packed = theirs._pack_latents(given, *given.shape)
  options = {
    'height': HEIGHT, 'width': WIDTH, 'num_inference_steps': 4, 'guidance_scale': 2.0,
    'max_sequence_length': WORDS, 'latents': packed,
  }  # fmt: skip
  want = theirs(prompts, output_type='latent', **options).images
  want = theirs._unpack_latents(want, HEIGHT, WIDTH, theirs.vae_scale_factor)
  want = np.moveaxis(want.numpy(), 1, -1)
  np.testing.assert_allclose(latents, want, atol=1e-4)
  want = theirs(prompts, output_type='np', **options).images
  np.testing.assert_allclose(images, want, atol=1e-4)
