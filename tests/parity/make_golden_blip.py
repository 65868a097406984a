"""Writes tests/golden/blip_a.npz: ImageReward's network, tiny and random, from transformers' BLIP.

    python tests/parity/make_golden_blip.py     # in an environment with the parity extra

The class here is what tests/parity/test_parity_blip.py compares with live, the head written out.
"""

import re
import types

import make_golden
import numpy as np
import reference
from reference import torch, transformers

MEAN, STD = 0.16717362830052426, 1.0333394966054072
OPTIONS = {'vision_heads': 4, 'heads': 3}  # which ImageReward's file does not tell
VISION = {
  'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24,
  'image_size': 16, 'patch_size': 4, 'layer_norm_eps': 1e-6,
}  # fmt: skip
TEXT = {
  'vocab_size': 50, 'hidden_size': 12, 'encoder_hidden_size': 16, 'num_hidden_layers': 3,
  'num_attention_heads': 3, 'intermediate_size': 20, 'max_position_embeddings': 14,
}  # fmt: skip
# every tensor costs a file 350 bytes: what is committed has as few as can be
FEW_VISION = VISION | {'hidden_size': 8, 'num_hidden_layers': 1, 'intermediate_size': 12}
FEW_TEXT = TEXT | {
  'vocab_size': 20, 'hidden_size': 6, 'encoder_hidden_size': 8, 'num_hidden_layers': 2,
  'intermediate_size': 10,
}  # fmt: skip
SWITCH = [  # transformers' names -> ImageReward's
  (r'vision_model\.embeddings\.class_embedding', 'blip.visual_encoder.cls_token'),
  (r'vision_model\.embeddings\.position_embedding', 'blip.visual_encoder.pos_embed'),
  (r'vision_model\.embeddings\.patch_embedding', 'blip.visual_encoder.patch_embed.proj'),
  (r'vision_model\.encoder\.layers', 'blip.visual_encoder.blocks'),
  (r'vision_model\.post_layernorm', 'blip.visual_encoder.norm'),
  (r'layer_norm([12])', r'norm\1'),
  (r'self_attn\.qkv', 'attn.qkv'),
  (r'self_attn\.projection', 'attn.proj'),
  (r'^(text_encoder|vision_proj|text_proj)', r'blip.\1'),
]


class Head(torch.nn.Module):
  def __init__(self, width, widths):
    super().__init__()
    a, b, c, d, e = widths
    linear, drop = torch.nn.Linear, torch.nn.Dropout
    self.layers = torch.nn.Sequential(
      linear(width, a), drop(0.2), linear(a, b), drop(0.2), linear(b, c), drop(0.1), linear(c, d),
      linear(d, e),
    )  # fmt: skip


class Reward(transformers.BlipForImageTextRetrieval):
  def __init__(self, config, widths=(1024, 128, 64, 16, 1)):
    super().__init__(config)
    self.mlp = Head(config.text_config.hidden_size, widths)


def tiny(vision=VISION, text=TEXT, head=(10, 8, 6, 4, 1)):
  sizes = {'vision_config': vision, 'text_config': text, 'image_text_hidden_size': 4}
  return Reward(transformers.BlipConfig(**sizes), head)


def randomise(model, seed):
  """Random weights, larger in the head: without activations small ones leave little of a reward."""
  reference.randomise(model, seed)
  reference.randomise(model.mlp, seed, 0.6)
  return model


def renamed(state):
  """A state dict (or a dict of shapes) under ImageReward's names."""

  def switch(name):
    for pattern, new in SWITCH:
      name = re.sub(pattern, new, name)
    return name

  return {switch(k): v for k, v in state.items() if not k.startswith('itm_head')}


def stages(model, images, ids, mask):
  """Every stage, as numpy arrays; pictures `[R, 3, S, S]`."""
  images, ids, mask = (torch.from_numpy(np.asarray(x)) for x in (images, ids, mask))
  with torch.no_grad():
    tokens = model.vision_model.embeddings(images)
    hidden = [tokens]
    for layer in model.vision_model.encoder.layers:
      out = layer(hidden[-1])
      hidden.append(out[0] if isinstance(out, tuple) else out)
    image = model.vision_model(images).last_hidden_state
    text = model.text_encoder
    embedded = text.embeddings(ids)
    bias = -10000.0 * (1 - mask[:, None, None].float())  # as ImageReward's med.py
    first = text.encoder.layer[0].attention(embedded, attention_mask=bias)[0]
    states = [embedded]
    for layer in text.encoder.layer:
      out = layer(states[-1], image, attention_mask=bias)
      states.append(out[0] if isinstance(out, tuple) else out)
    whole = text(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
    reward = (model.mlp.layers(whole[:, 0])[:, 0] - MEAN) / STD
  found = {
    'tokens': tokens, 'blocks': torch.stack(hidden[1:]), 'image': image, 'embedded': embedded,
    'text': first, 'states': torch.stack(states[1:-1]), 'first': whole[:, 0], 'reward': reward,
  }  # fmt: skip
  return {k: v.numpy() for k, v in found.items()}


def blip():
  rng = np.random.default_rng(2)
  mask = (np.arange(9) < np.array([[9], [4]])).astype(np.int64)
  inputs = {
    'images': rng.normal(size=(2, 16, 16, 3)).astype(np.float16).astype(np.float32),
    'ids': rng.integers(0, FEW_TEXT['vocab_size'], (2, 9)),
    'mask': mask,
  }

  def outputs(model):
    found = stages(model, reference.nchw(inputs['images']), inputs['ids'], mask)
    return {k: torch.from_numpy(v) for k, v in found.items() if k not in ('blocks', 'text')}

  model = tiny(FEW_VISION, FEW_TEXT, (8, 6, 6, 4, 1))
  plain = model.state_dict
  model.state_dict = lambda: renamed(plain())  # the names of the released file
  return {'model': 'blip', 'options': OPTIONS}, model, inputs, outputs


if __name__ == '__main__':
  torch.manual_seed(0)
  make_golden.reference = types.SimpleNamespace(randomise=randomise)  # with the larger head
  make_golden.add({'blip_a.npz': make_golden.write('blip_a.npz', *blip())})
