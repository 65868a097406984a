"""Writes tests/golden/clip_*.npz and siglip.npz, as make_golden.py does its own.

    python tests/parity/make_golden_clip.py   # with the parity extra, open_clip_torch and ftfy

open_clip needs torchvision for pictures alone; where there is none, empty classes stand in for it.
"""

import importlib.util
import sys
import types

import make_golden
import numpy as np
from reference import nchw, torch, transformers

transformers.CLIPModel, transformers.SiglipModel  # noqa: B018, loaded as they are named
PICTURES = 'Normalize Compose RandomResizedCrop ToTensor Resize CenterCrop ColorJitter Grayscale'
SMALL = {'hidden_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 2,
         'intermediate_size': 16}  # fmt: skip
VISION, TEXT = {'image_size': 12, 'patch_size': 4}, {'vocab_size': 30, 'max_position_embeddings': 8}
IDS = np.array([[28, 3, 4, 29, 0, 0, 0, 0], [28, 7, 5, 1, 2, 29, 29, 29]])


def open_clip():
  """The module `open_clip.model`."""
  if not importlib.util.find_spec('torchvision'):
    layer = lambda name: type(name, (torch.nn.Module,), {})
    modes = types.SimpleNamespace(BICUBIC=1, BILINEAR=2, NEAREST=3)
    contents = {
      'torchvision': {},
      'torchvision.transforms.functional': {},
      'torchvision.transforms': {n: layer(n) for n in PICTURES.split()}
      | {'InterpolationMode': modes, 'functional': None},
      'torchvision.ops': {},
      'torchvision.ops.misc': {'FrozenBatchNorm2d': layer('FrozenBatchNorm2d')},
    }
    for name, has in contents.items():
      sys.modules[name] = types.ModuleType(name)
      vars(sys.modules[name]).update(has)
  return importlib.import_module('open_clip.model')


def inputs(seed):
  pixels = np.random.default_rng(seed).normal(size=(2, 12, 12, 3)).astype(np.float32)
  return {'pixels': pixels, 'ids': IDS}


def stages(model, given):
  """What the replays of clip and siglip return, from a model of transformers."""
  pixels, ids = torch.from_numpy(nchw(given['pixels'])), torch.from_numpy(given['ids'])
  seen, read = model.vision_model, model.text_model
  image, text = (f(x, output_hidden_states=True) for f, x in ((seen, pixels), (read, ids)))
  whole = model(input_ids=ids, pixel_values=pixels)
  return {
    'image_embedded': image.hidden_states[0],
    'image_tokens': image.hidden_states[-1],
    'image_pooled': image.pooler_output,
    'text_tokens': text.last_hidden_state,
    'text_pooled': text.pooler_output,
    'logits': whole.logits_per_image,
  }


def clip_hf():
  config = transformers.CLIPConfig(
    text_config=SMALL | TEXT | {'eos_token_id': 2}, vision_config=SMALL | VISION, projection_dim=12
  )
  model, given = transformers.CLIPModel(config), inputs(2)

  def outputs(model):
    found = stages(model, given)
    return found | {
      'image_features': model.visual_projection(found['image_pooled']),
      'text_features': model.text_projection(found['text_pooled']),
    }

  sides = {k: getattr(config, k).to_dict() for k in ('text_config', 'vision_config')}
  return {'model': 'clip', **sides}, model, given, outputs


def clip_open():
  library = open_clip()
  vision = library.CLIPVisionCfg(
    layers=2, width=16, head_width=8, patch_size=4, image_size=12, mlp_ratio=1.75
  )
  text = library.CLIPTextCfg(context_length=8, vocab_size=30, width=12, heads=3, layers=2)
  model, given = library.CLIP(12, vision, text), inputs(3)

  def outputs(model):
    pixels, ids = torch.from_numpy(nchw(given['pixels'])), torch.from_numpy(given['ids'])
    image, text = model.encode_image(pixels), model.encode_text(ids)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    return {
      'image_features': image,
      'text_features': text,
      'logits': model.logit_scale.exp() * unit(image) @ unit(text).T,
    }

  heads = {'vision_config': {'num_attention_heads': 2}, 'text_config': {'num_attention_heads': 3}}
  return {'model': 'clip', **heads}, model, given, outputs


def siglip():
  config = transformers.SiglipConfig(
    text_config=SMALL | TEXT | {'projection_size': 12, 'bos_token_id': 1, 'eos_token_id': 1},
    vision_config=SMALL | VISION,
  )
  model, given = transformers.SiglipModel(config), inputs(4)
  sides = {k: getattr(config, k).to_dict() for k in ('text_config', 'vision_config')}
  return {'model': 'siglip', **sides}, model, given, lambda model: stages(model, given)


if __name__ == '__main__':
  torch.manual_seed(0)
  files = {'clip_hf.npz': clip_hf, 'clip_open.npz': clip_open, 'siglip.npz': siglip}
  make_golden.add({name: make_golden.write(name, *make()) for name, make in files.items()})
