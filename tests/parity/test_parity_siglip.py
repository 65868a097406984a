"""SigLIP stage by stage against transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from reference import nchw, torch, transformers
from test_parity_clip import header

from vtts_jax.checkpoints.convert import _match_rule
from vtts_jax.checkpoints.files import flatten_tree
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.preprocessing import read_preprocessing
from vtts_jax.models.siglip import convert, modeling

transformers.SiglipModel, transformers.SiglipImageProcessorPil  # noqa: B018, loaded when named
CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
IDS = np.random.default_rng(0).integers(0, 30, (2, 7))


def config(image, text, **sizes):
  names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
  return transformers.SiglipConfig(
    text_config=dict(zip(names, text)) | {
      'vocab_size': sizes['vocab'], 'max_position_embeddings': sizes['length'],
      'projection_size': image[0], 'bos_token_id': 1, 'eos_token_id': 1,
    },
    vision_config=dict(zip(names, image)) | {
      'image_size': sizes['image_size'], 'patch_size': sizes['patch'],
    },
  )  # fmt: skip


@pytest.fixture(scope='module', params=[20, 22], ids=['whole', 'rest'])
def pair(request):
  """One with pictures of whole patches, one as so400m-patch14-384, where a rest is cut off."""
  small = config(
    (24, 3, 2, 40), (20, 2, 4, 36), image_size=request.param, patch=4, vocab=30, length=7
  )
  theirs = reference.randomise(transformers.SiglipModel(small), 1)
  source = reference.source(theirs, small.to_dict())
  return theirs, reference.bind_port(convert, modeling, source)


def data(pair, seed=0):
  size = pair[1].config.image_size
  return np.random.default_rng(seed).normal(size=(3, size, size, 3)).astype(np.float32)


def test_image_tower(pair):
  theirs, ours = pair
  x = data(pair)
  with torch.no_grad():
    out = theirs.vision_model(torch.from_numpy(nchw(x)), output_hidden_states=True)
  embedded = ours.image.embed_patches(x)
  np.testing.assert_allclose(embedded, out.hidden_states[0].numpy(), **CLOSE)
  states = ours.image.trunk.layer_states(embedded)
  assert len(states) == len(out.hidden_states) - 1 == 3
  for ours_state, state in zip(states, out.hidden_states[1:]):
    np.testing.assert_allclose(ours_state, state.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.image.hidden_states(x), out.last_hidden_state.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.image(x), out.pooler_output.numpy(), **CLOSE)


def test_text_tower(pair):
  theirs, ours = pair
  with torch.no_grad():
    out = theirs.text_model(torch.from_numpy(IDS), output_hidden_states=True)
  states = ours.text.trunk.layer_states(ours.text.token(IDS) + ours.text.position[...])
  for ours_state, state in zip(states, out.hidden_states[1:]):
    np.testing.assert_allclose(ours_state, state.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.text.hidden_states(IDS), out.last_hidden_state.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.text(IDS), out.pooler_output.numpy(), **CLOSE)


def test_scores(pair):
  theirs, ours = pair
  x = data(pair, seed=1)
  with torch.no_grad():
    out = theirs(torch.from_numpy(IDS), torch.from_numpy(nchw(x)))
  image, text = ours.embed_images(x), ours.embed_texts(IDS)
  np.testing.assert_allclose(image, out.image_embeds.numpy(), **CLOSE)
  np.testing.assert_allclose(text, out.text_embeds.numpy(), **CLOSE)
  want = out.logits_per_image.numpy()
  np.testing.assert_allclose(ours.pair_logits(image @ text.T), want, **CLOSE)


def test_bfloat16_stays_near(pair):
  theirs, ours = pair
  source = reference.source(theirs, theirs.config.to_dict())
  params = convert.load_weights(source, ours.config, dtype=jnp.bfloat16)
  half = modules.bind_module(modeling.build_model, ours.config, params)
  assert half.bias.dtype == jnp.float32 and half.image.pool.probe.dtype == jnp.bfloat16
  x = data(pair, seed=2)
  cosines = [(m.embed_images(x) @ m.embed_texts(IDS).T) for m in (ours, half)]
  assert np.abs(cosines[0] - cosines[1]).max() < 0.03


@pytest.mark.parametrize('resample', ['bicubic', 'bilinear'])
@pytest.mark.parametrize(('size', 'shape'), [(224, (300, 301)), (256, (512, 380)), (20, (33, 47))])
def test_preprocessing_is_the_processor_s(resample, size, shape, tmp_path):
  """By the file that the processor saves; resample 3 in version 1, 2 in version 2."""
  processor = transformers.SiglipImageProcessorPil(
    size={'height': size, 'width': size}, resample={'bicubic': 3, 'bilinear': 2}[resample],
    image_mean=modeling.MEAN, image_std=modeling.STD,
  )  # fmt: skip
  picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  want = processor(Image.fromarray(picture), return_tensors='np')['pixel_values']
  processor.save_pretrained(tmp_path)
  source = dataclasses.replace(source_of_arrays({}), folder=str(tmp_path))
  how = read_preprocessing(source, modeling.PREPROCESSING, size, 'SiglipImageProcessor')
  assert (how == modeling.PREPROCESSING) == (resample == 'bicubic')
  c = dataclasses.replace(modeling.SIZES['siglip_b16_224'], image_size=size, preprocessing=how)
  have = modeling.preprocess(c, picture[None] / np.float32(255))
  np.testing.assert_allclose(nchw(have), want, atol=2e-5)


@pytest.mark.parametrize('name', [name for name in modeling.SIZES if name != 'siglip_tiny'])
def test_released_sizes_are_theirs(name):
  """On the meta device: the counts, the configs from headers, and every key of the file."""
  c = modeling.SIZES[name]
  trunk = lambda t: (t.width, t.layers, t.heads, t.hidden)
  released = config(
    trunk(c.image), trunk(c.text), image_size=c.image_size, patch=c.patch, vocab=c.vocab,
    length=c.length,
  )  # fmt: skip
  with torch.device('meta'):
    theirs = transformers.SiglipModel(released)
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  assert modules.count_parameters(template) == sum(p.numel() for p in theirs.parameters())
  old = {f'{side}_model.embeddings.position_ids': torch.empty(9) for side in ('text', 'vision')}
  source = header(theirs.state_dict() | old, released.to_dict())
  assert convert.config_of(source) == c
  if c.image_size % c.patch == 0:  # else no file tells without its config.json
    assert convert.config_of(dataclasses.replace(source, config={})) == c
  source = convert.fuse_projections(convert.stack_layers(source, 'layers'))
  targets = [_match_rule(key, convert.RULES)[0] for key in source.tensor_names()]
  assert '' not in targets and {t for t in targets if t} == set(flatten_tree(template))
