"""The generators against diffusers' `SanaPipeline` and `SanaSprintPipeline`: prompts, all steps and
the picture, from one folder of small random models."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_pipeline
from reference import diffusers, torch, transformers

from vtts_jax.errors import ConfigError
from vtts_jax.generators import sana, sana_sprint

HEIGHT, WIDTH, WORDS, CHANNELS, WIDE = 32, 64, 12, 4, 16
# the second prompt is cut
PROMPTS = ('A Red dog ', 'two cats and a very very very small cup left of them and a dog')
INSTRUCTION = ['say what you see:', '- a cat is a small cat', 'prompt: ']
GUIDANCE = {'sana': 3.0, 'sana_sprint': 4.0}


def make_gemma(seed):
  """(text model, tokenizer): words are pieces, and padding comes first, as in the release."""
  from tokenizers import Tokenizer, models, pre_tokenizers, processors

  words = 'a red dog two cats cat and very small cup left of them say what you see is prompt'
  tokens = ['<pad>', '<eos>', '<bos>', '<unk>', ':', '-', *words.split()]
  vocab = {token: i for i, token in enumerate(tokens)}
  inner = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  inner.post_processor = processors.TemplateProcessing('<bos> $A', special_tokens=[('<bos>', 2)])
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token='<bos>', eos_token='<eos>', pad_token='<pad>',
    unk_token='<unk>', padding_side='left',
  )  # fmt: skip
  config = transformers.Gemma2Config(
    vocab_size=len(vocab), hidden_size=24, intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
    sliding_window=5, attn_implementation='eager',
  )  # fmt: skip
  return reference.randomise(transformers.Gemma2Model(config), seed), tokenizer


@pytest.fixture(scope='module', params=GUIDANCE)
def pipeline(request, tmp_path_factory):
  """(theirs, ours), of the same weights; ours reads the folder that theirs wrote."""
  sprint = request.param == 'sana_sprint'
  text, tokenizer = make_gemma(1)
  more = {'guidance_embeds': True, 'qk_norm': 'rms_norm_across_heads'} if sprint else {}
  network = diffusers.SanaTransformer2DModel(
    in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=8,
    num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8,
    cross_attention_dim=WIDE, caption_channels=24, sample_size=8, **more,
  )  # fmt: skip
  blocks = {'block_types': ('ResBlock', 'EfficientViTBlock')}
  vae = diffusers.AutoencoderDC(
    latent_channels=CHANNELS, attention_head_dim=4, scaling_factor=0.7,
    **{f'{side}_{name}': value for side in ('encoder', 'decoder') for name, value in (
      ('block_out_channels', (8, 8)), ('layers_per_block', (1, 1)), ('qkv_multiscales', ((), (5,))),
      *blocks.items(),
    )},
    downsample_block_type='Conv', upsample_block_type='interpolate',
  )  # fmt: skip
  scheduler = diffusers.DPMSolverMultistepScheduler(
    prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0
  )
  kind = diffusers.SanaPipeline
  if sprint:
    scheduler = diffusers.SCMScheduler(prediction_type='trigflow', sigma_data=0.5)
    kind = diffusers.SanaSprintPipeline
  theirs = kind(
    tokenizer, text, reference.randomise(vae, 3), reference.randomise(network, 4), scheduler
  )
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder)
  theirs.set_progress_bar_config(disable=True)
  (folder / 'instruction.txt').write_text('\n'.join(INSTRUCTION), encoding='utf-8')
  ours = (sana_sprint.SanaSprint if sprint else sana.Sana)(
    weights=str(folder), instruction=str(folder / 'instruction.txt'), words=WORDS, height=HEIGHT,
    width=WIDTH, guidance=GUIDANCE[request.param], steps=2 if sprint else 5, dtype='float32',
  )  # fmt: skip
  ours.check()
  return theirs, ours


def test_prompts(pipeline):
  """What the network reads of a text: its states and mask, by stream."""
  theirs, ours = pipeline
  options = {'max_sequence_length': WORDS, 'complex_human_instruction': INSTRUCTION}
  found = theirs.encode_prompt(list(PROMPTS), device='cpu', **options)
  want = [x.detach().numpy() for x in found]
  params = ours.load()
  arrays = jax.tree.map(jnp.asarray, ours.tokenize([{'text': text} for text in PROMPTS]))
  ctx = jax.jit(ours.encode)(params, arrays)
  assert want[1].tolist()[1][-1] == 1 and want[1].tolist()[0][-1] == 0
  for stream, (states, mask) in enumerate(zip(want[::2], want[1::2])):
    np.testing.assert_array_equal(ctx['mask'][:, stream], mask)
    with torch.no_grad():
      caption = theirs.transformer.caption_projection(torch.from_numpy(states))
      caption = theirs.transformer.caption_norm(caption).numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(ctx['caption'][:, stream])[real], caption[real],
                               atol=1e-4)  # fmt: skip


def test_the_whole_loop(pipeline, monkeypatch):
  theirs, ours = pipeline
  rows, cells = HEIGHT // 2, WIDTH // 2
  noise = tiny_pipeline.draw_noise(len(PROMPTS), rows, cells, CHANNELS)
  options = {
    'height': HEIGHT, 'width': WIDTH, 'num_inference_steps': ours.steps,
    'guidance_scale': ours.guidance, 'max_sequence_length': WORDS,
    'complex_human_instruction': INSTRUCTION, 'use_resolution_binning': False,
    'latents': tiny_pipeline.to_torch(noise),
  }  # fmt: skip
  draws = lambda: torch.Generator().manual_seed(7)

  def run(kind):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # theirs to fix
      return theirs(list(PROMPTS), output_type=kind, generator=draws(), **options).images

  want = np.moveaxis(run('latent').numpy(), 1, -1), run('np')
  # Sprint draws noise in each step: ours takes the same
  source = draws()
  fresh = [torch.randn(len(PROMPTS), CHANNELS, rows, cells, generator=source) for _ in range(2)]
  fresh = jnp.stack([np.moveaxis(x.numpy(), 1, -1)[:, None] for x in fresh])
  monkeypatch.setattr(type(ours), '_draw_noise', lambda self, keys: fresh[keys[0, 0]])
  # a key that is the number of its step
  monkeypatch.setattr('vtts_jax.core.fold', lambda keys, step: jnp.full_like(keys, step))
  params = ours.load()
  arrays = jax.tree.map(jnp.asarray, ours.tokenize([{'text': text} for text in PROMPTS]))

  @jax.jit
  def sample(params, arrays, noise):
    ctx, keys = ours.encode(params, arrays), jnp.zeros((len(PROMPTS), 1), jnp.int32)
    state = ours.extend(params, ctx, ours.start_state(noise[:, None]), keys, 0, ours.num_stages)
    return state.end, ours.observe(params, ctx, state, ours.num_stages, ('image',))['image']

  latents, images = sample(params, arrays, noise)
  found = np.asarray(latents[:, 0]), np.asarray(images[:, 0])
  print('largest differences', [np.abs(a - b).max() for a, b in zip(found, want)])
  for have, reference_value in zip(found, want):
    np.testing.assert_allclose(have, reference_value, atol=1e-4)


def test_the_other_network(pipeline):
  """A distilled network in the guided generator, and the other way round."""
  _, ours = pipeline
  kind, message = sana_sprint.SanaSprint, 'reads no guidance scale, .* by generators.sana'
  if isinstance(ours, kind):
    kind, message = sana.Sana, 'is distilled: .* by generators.sana_sprint'
  with pytest.raises(ConfigError, match=message):
    kind(weights=ours.weights, height=HEIGHT, width=WIDTH).check()


@pytest.mark.parametrize('kind', ['SanaPipeline', 'SanaSprintPipeline'])
def test_the_published_settings(kind):
  known = inspect.signature(getattr(diffusers, kind).__call__).parameters
  default = lambda name: known[name].default
  assert sana.read_instruction('published') == '\n'.join(default('complex_human_instruction'))
  sprint = kind == 'SanaSprintPipeline'
  ours = sana_sprint.SanaSprint() if sprint else sana.Sana()
  assert ours.steps == default('num_inference_steps')
  assert ours.guidance_scale == default('guidance_scale')
  assert (ours.height, ours.width) == (default('height'), default('width'))
  assert ours.words == default('max_sequence_length')
  if sprint:
    assert ours.max_timestep == default('max_timesteps')
    assert ours.intermediate_timestep == default('intermediate_timesteps')
