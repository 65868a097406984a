"""Janus against transformers, whose layout of the files this also reads: drawing and reading."""

import numpy as np
import pytest
import reference
from reference import nchw, nhwc, torch, transformers

from vtts_jax.models.janus import convert, modeling

transformers.JanusForConditionalGeneration, transformers.JanusImageProcessorPil  # noqa: B018
CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
PLACEHOLDER, TOKENS = 63, 4
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def pair():
  config = transformers.JanusConfig(
    text_config={
      'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 48, 'intermediate_size': 80,
      'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 4,
      'rms_norm_eps': 1e-6, 'max_position_embeddings': 64, 'tie_word_embeddings': False,
    },
    vision_config={
      'hidden_size': 24, 'num_hidden_layers': 3, 'num_attention_heads': 3, 'image_size': 32,
      'patch_size': 16, 'projection_dim': 48, 'depth': 2, 'num_image_tokens': TOKENS,
    },
    vq_config={
      'embed_dim': 8, 'num_embeddings': 40, 'latent_channels': 16, 'base_channels': 32,
      'channel_multiplier': [1, 2], 'num_res_blocks': 1, 'num_patches': 2, 'projection_dim': 48,
      'image_token_embed_dim': 48,
    },
    image_token_id=PLACEHOLDER, tie_word_embeddings=False,
  )  # fmt: skip
  theirs = reference.randomise(transformers.JanusForConditionalGeneration(config), 1)
  source = reference.source(theirs, config.to_dict())
  return theirs, reference.bind_port(convert, modeling, source)


def test_config(pair):
  found = pair[1].config
  assert (found.heads, found.vision.heads, found.aligners, found.image_size) == (4, 3, 2, 32)
  assert (found.tokens, found.codes, found.head_width) == (TOKENS, 40, 48)


def test_drawing(pair):
  """Logits of every token behind a prompt, and the decoded picture."""
  theirs, ours = pair
  ids, tokens = RNG.integers(3, 60, (2, 5)), RNG.integers(0, 40, (2, TOKENS))
  with torch.no_grad():
    words = theirs.get_input_embeddings()(torch.from_numpy(ids))
    codes = theirs.prepare_embeddings_for_image_generation(torch.from_numpy(tokens))
    out = theirs.model.language_model(inputs_embeds=torch.cat([words, codes], 1))
    want = theirs.model.generation_head(out.last_hidden_state[:, 4:-1]).numpy()
    picture = theirs.decode_image_tokens(torch.from_numpy(tokens)).numpy()
  ctx = ours.prompt_context(ids[:, None], np.ones_like(ids))
  hidden, _ = ours.prefill(ctx, tokens[:, None])
  np.testing.assert_allclose(ours.token_logits(hidden)[:, 0, :, 0], want, **CLOSE)
  np.testing.assert_allclose(2 * ours.decode(tokens) - 1, picture, **CLOSE)


def test_reading(pair):
  """Patches of a picture, and the word after a prompt that holds them; padded in another way."""
  theirs, ours = pair
  pixels = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
  ids = np.array([[1] + [PLACEHOLDER] * 4 + [5, 9, 4], [1, 7] + [PLACEHOLDER] * 4 + [6, 3]])
  with torch.no_grad():
    tower = theirs.model.vision_model(torch.from_numpy(nchw(pixels))).last_hidden_state
    seen = theirs.model.aligner(tower).numpy()
    want = theirs(
      input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(nchw(pixels)),
      attention_mask=torch.ones(ids.shape, dtype=torch.long),
    ).logits[:, -1].numpy()  # fmt: skip
  np.testing.assert_allclose(ours.vision.hidden_states(pixels), tower.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.embed_pictures(pixels), seen, **CLOSE)
  padded = np.pad(ids, ((0, 0), (0, 3)))
  mask = np.pad(np.ones_like(ids), ((0, 0), (0, 3)))
  found = ours.answer_logits(padded, mask, ours.embed_pictures(pixels), PLACEHOLDER)
  np.testing.assert_allclose(found, want, **CLOSE)


@pytest.mark.parametrize('shape', [(48, 48), (48, 30), (40, 64)])
def test_pixels(pair, shape):
  """As their processor makes them, margins included; its resize works on bytes."""
  from PIL import Image

  half = [0.5] * 3  # the released preprocessor_config.json
  processor = transformers.JanusImageProcessorPil(
    size={'height': 32, 'width': 32}, image_mean=half, image_std=half
  )
  image = RNG.integers(0, 256, (*shape, 3)).astype(np.uint8)
  want = np.asarray(processor(Image.fromarray(image), return_tensors='np')['pixel_values'])
  found = modeling.preprocess(pair[1].config, image[None] / np.float32(255))
  np.testing.assert_allclose(found, nhwc(want), atol=2.5 / 127.5)
