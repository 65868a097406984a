"""ImageReward stage by stage against transformers' BLIP, with the head written in torch here."""

import json
import re

import jax
import make_golden_blip as golden
import numpy as np
import pytest
import reference
from PIL import Image
from reference import torch, transformers
from safetensors.numpy import save_file

from vtts_jax import components, core
from vtts_jax.checkpoints.files import flatten_tree
from vtts_jax.checkpoints.source import Source, source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.blip import convert, modeling
from vtts_jax.models.clip import modeling as clip
from vtts_jax.verifiers import image_reward

CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
R, W = 3, 11
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'red', 'cat', 'dog', 'sit', '##s']


@pytest.fixture(scope='module')
def theirs():
  return golden.randomise(golden.tiny(), 3)


def state(model):
  return {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope='module', params=['image_reward', 'transformers'])
def ours(theirs, request):
  """From the state dict under either family of names."""
  found, options, settings = state(theirs), {}, theirs.config.to_dict()
  if request.param == 'image_reward':
    found, options, settings = golden.renamed(found), golden.OPTIONS, {}
  source = source_of_arrays(found, settings)
  return reference.bind_port(convert, modeling, source, **options)


def test_every_stage(theirs, ours):
  rng = np.random.default_rng(0)
  mask = (np.arange(W) < np.array([[W], [4], [7]])).astype(np.int64)
  images, ids = rng.normal(size=(R, 16, 16, 3)).astype(np.float32), rng.integers(0, 50, (R, W))
  stages = golden.stages(theirs, reference.nchw(images), ids, mask)
  tokens, image = ours.vision.embed_patches(images), ours.vision(images)
  text = ours.encode_text(ids, mask)
  first, states = ours.fuse_image(text, mask, image)
  have = {
    'tokens': tokens, 'blocks': ours.vision.trunk.layer_states(tokens), 'image': image,
    'embedded': ours.embed_tokens(ids), 'text': text, 'states': states, 'first': first,
    'reward': ours.predict_reward(first),
  }  # fmt: skip
  assert set(have) == set(stages)
  for name, want in stages.items():
    print(name, np.abs(have[name] - want).max(), want.std())
    np.testing.assert_allclose(have[name], want, **CLOSE, err_msg=name)


def test_released_names_and_counts():
  """Every tensor of the released file is used or knowingly left, and all of ours are filled."""
  vision = transformers.BlipVisionConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    image_size=224,
  )  # fmt: skip
  text = transformers.BlipTextConfig(
    vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12
  )
  config = transformers.BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
  with torch.device('meta'):
    theirs = golden.Reward(config)
  shapes = golden.renamed({k: tuple(v.shape) for k, v in theirs.state_dict().items()})
  header = {k: (s, 'float32') for k, s in shapes.items()}
  header['blip.text_encoder.embeddings.position_ids'] = ((1, 512), 'int64')
  source = Source('released', header, lambda name: None)
  assert convert.config_of(source) == modeling.SIZES['image_reward']
  _, template = modules.abstract_module(lambda: modeling.build_model(convert.config_of(source)))
  want = flatten_tree(template)
  found, left = set(), set()
  for name in convert.arrange_layers(source).tensor_names():
    rule = next(r for r in convert.RULES if re.fullmatch(r[0], name))
    (found if rule[1] else left).add(re.fullmatch(rule[0], name).expand(rule[1] or name))
  assert found == set(want)
  assert left == {
    'text_encoder.embeddings.position_ids', 'vision_proj.weight', 'vision_proj.bias',
    'text_proj.weight', 'text_proj.bias',
  }  # fmt: skip
  heads = ('vision_proj', 'text_proj', 'itm_head')
  count = sum(p.numel() for n, p in theirs.named_parameters() if not n.startswith(heads))
  assert sum(int(np.prod(v.shape)) for v in want.values()) == count


@pytest.mark.parametrize('shape', [(224, 224), (300, 260), (96, 130), (512, 512)])
def test_preprocessing_is_that_of_torchvision_on_pil(shape):
  """Resize(224, bicubic) and CenterCrop(224) as torchvision does them to a PIL image."""
  pixels = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), np.uint8)
  width, height = (int(224 * n / min(shape)) for n in shape[::-1])
  left, top = (round((n - 224) / 2) for n in (width, height))
  want = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
  want = np.asarray(want.crop((left, top, left + 224, top + 224))) / 255
  have = image_reward.preprocess_pictures(pixels.astype(np.float32) / 255, 224)
  have = have * np.array(clip.STD) + np.array(clip.MEAN)
  np.testing.assert_allclose(have, want, atol=1 / 255 + 1e-5)


def test_verifier_from_files(theirs, tmp_path):
  """Words to rewards: a checkpoint with its config.json, a tokenizer with the two added tokens."""
  save_file(state(theirs), tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(theirs.config.to_dict()))
  (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS))
  bert = transformers.BertTokenizer(str(tmp_path / 'vocab.txt'))
  bert.add_special_tokens({'bos_token': '[DEC]', 'additional_special_tokens': ['[ENC]']})
  bert.save_pretrained(tmp_path / 'words')
  ver = components.load(
    'verifiers.image_reward', weights=str(tmp_path), tokenizer=str(tmp_path / 'words')
  )
  texts = ['A red cat sits', 'a dog']
  told = bert(texts, padding='max_length', truncation=True, max_length=14, return_tensors='np')
  prompt = ver.tokenize(core.as_prompts(texts))
  np.testing.assert_array_equal(prompt['ids'], told['input_ids'])
  np.testing.assert_array_equal(prompt['mask'], told['attention_mask'])
  images = np.random.default_rng(5).random((2, 2, 20, 16, 3), np.float32)
  params = ver.load()
  vctx = ver.encode(params, prompt)
  have = jax.jit(ver.score)(params, vctx, {'image': images})[ver.names[0]]
  flat = reference.nchw(image_reward.preprocess_pictures(images.reshape(4, 20, 16, 3), 16))
  twice = (np.repeat(told[k], 2, 0) for k in ('input_ids', 'attention_mask'))
  want = golden.stages(theirs, flat, *twice)['reward'].reshape(2, 2)
  np.testing.assert_allclose(have, want, **CLOSE)
