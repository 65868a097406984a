"""Torch models of DINO and DreamSim, and their weights under the names that files have."""

import re
import tempfile

import numpy as np
from reference import torch, transformers

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_VIT = [  # transformers 5 in memory -> facebookresearch/dino
  (r'^embeddings\.cls_token', 'cls_token'),
  (r'^embeddings\.position_embeddings', 'pos_embed'),
  (r'^embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
  (r'^layers\.(\d+)\.', r'blocks.\1.'),
  (r'attention\.o_proj', 'attn.proj'),
  (r'attention\.([qkv])_proj', r'attn.\1'),
  (r'layernorm_before', 'norm1'),
  (r'layernorm_after', 'norm2'),
  (r'^layernorm\.', 'norm.'),
]
_SAVED = [  # transformers 5 in memory -> in files
  (r'attention\.o_proj', 'attention.output.dense'),
  (r'attention\.q_proj', 'attention.attention.query'),
  (r'attention\.k_proj', 'attention.attention.key'),
  (r'attention\.v_proj', 'attention.attention.value'),
]
_SAVED_V2 = [*_SAVED, (r'mlp\.down_proj', 'mlp.weights_out')]
_SAVED_VIT = [
  *_SAVED,
  (r'^layers\.', 'encoder.layer.'),
  (r'mlp\.fc1', 'intermediate.dense'),
  (r'mlp\.fc2', 'output.dense'),
]
_CLIP = [  # and of its CLIP
  (r'^vision_model\.', ''),
  (r'^embeddings\.class_embedding', 'cls_token'),
  (r'^embeddings\.position_embedding\.weight', 'pos_embed'),
  (r'^embeddings\.patch_embedding', 'patch_embed.proj'),
  (r'^pre_layrnorm', 'pos_drop'),
  (r'^post_layernorm', 'norm'),
  (r'^encoder\.layers\.(\d+)\.', r'blocks.\1.'),
  (r'self_attn\.out_proj', 'attn.proj'),
  (r'self_attn\.([qkv])_proj', r'attn.\1'),
  (r'layer_norm([12])', r'norm\1'),
  (r'^visual_projection\.weight', 'proj'),
]


def on_disk(model):
  """The tensors as `save_pretrained` writes them: the names of the files on the hub."""
  from safetensors.numpy import load_file

  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return load_file(f'{folder}/model.safetensors')


def array(value):
  """A tensor as numpy; one on the meta device as zeros that take no memory."""
  if value.device.type == 'meta':
    return np.broadcast_to(np.float32(0), tuple(value.shape))
  return value.numpy().copy()


def saved(model):
  """`on_disk` without a file, so that it works on the meta device; a test holds the two equal."""
  found = {}
  for name, value in model.state_dict().items():
    for pattern, theirs in _SAVED_V2 if 'dinov2' in model.config.model_type else _SAVED_VIT:
      name = re.sub(pattern, theirs, name)
    found[name] = array(value)
  for name in [n for n in found if '.gate_proj.' in n]:
    parts = [found.pop(name), found.pop(name.replace('gate_proj', 'up_proj'))]
    found[name.replace('gate_proj', 'weights_in')] = np.concatenate(parts)
  return found


def original(model):
  """The tensors of a `ViTModel` or a `CLIPVisionModelWithProjection` in the original layout of
  DINO, which DreamSim keeps CLIP in as well."""
  clip = isinstance(model, transformers.CLIPVisionModelWithProjection)
  found = {}
  for name, value in model.state_dict().items():
    for pattern, ours in _CLIP if clip else _VIT:
      name = re.sub(pattern, ours, name)
    found[name] = array(value)
  for name in [n for n in found if '.attn.q.' in n]:
    parts = [found.pop(name.replace('.attn.q.', f'.attn.{p}.')) for p in 'qkv']
    found[name.replace('.attn.q.', '.attn.qkv.')] = np.concatenate(parts)
  found = {n: v for n, v in found.items() if not n.startswith('pooler.')}
  if clip:
    found['cls_token'] = found['cls_token'][None, None]
    found['pos_embed'], found['proj'] = found['pos_embed'][None], found['proj'].T
    found['patch_embed.proj.bias'] = np.zeros(found['cls_token'].shape[-1], np.float32)
  return found


def original_positions(model):
  """Makes a `ViTModel` or `Dinov2Model` resize positions as the original code does: by a factor of
  the grid plus 0.1, without antialiasing."""
  own, side = model.embeddings, model.embeddings.patch_embeddings.patch_size
  side = side if isinstance(side, int) else side[0]

  def positions(embeddings, height, width):
    known = own.position_embeddings
    grid = round((known.shape[1] - 1) ** 0.5)
    if height == width == grid * side:
      return known
    table = known[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    factor = tuple((n // side + 0.1) / grid for n in (height, width))
    table = torch.nn.functional.interpolate(table, scale_factor=factor, mode='bicubic')
    return torch.cat([known[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)], 1)

  own.interpolate_pos_encoding = positions
  return model


def merge(model, adapters, branch, scale):
  """Adds adapters, named as PEFT names them, to the projections of a torch model."""
  state = model.state_dict()
  for name, a in adapters.items():
    found = re.search(rf'extractor_list\.{branch}\.model\.blocks\.(\d+)\.attn\.qkv\.lora_A', name)
    if not found:
      continue
    delta = scale * adapters[name.replace('lora_A', 'lora_B')] @ a
    trunk = rf'(layers|encoder\.layers)\.{found[1]}\.(attention|self_attn)\.'
    for part, rows in zip('qkv', np.split(delta, 3)):
      key = next(n for n in state if re.search(rf'{trunk}{part}_proj\.weight', n))
      state[key] += torch.from_numpy(rows)
  return model


def embedding(models, images):
  """What the branches add, and DreamSim's embedding, of pictures `[R, H, W, 3]` in [0, 1]."""
  parts = []
  for model in models:
    clip = isinstance(model, transformers.CLIPVisionModelWithProjection)
    mean, std = CLIP if clip else IMAGENET
    x = (images - np.float32(mean)) / np.float32(std)
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if clip:
      parts.append(model(x).image_embeds)
    else:  # before the norm
      seen = []
      hook = model.layernorm.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
      model(x)
      hook.remove()
      parts.append(seen[0][:, 0])
  x = torch.cat(parts, -1)
  x = x - x.mean(-1, keepdim=True)
  return parts, x / x.norm(dim=-1, keepdim=True)


def adapters(rng, branches=3, layers=2, width=12, rank=2):
  """Random ones, under the names of the released file."""
  lead = 'base_model.model.extractor_list'
  make = lambda *shape: (0.3 * rng.normal(size=shape)).astype(np.float32)
  return {
    f'{lead}.{i}.model.blocks.{j}.attn.qkv.lora_{part}.weight': make(*shape)
    for i in range(branches)
    for j in range(layers)
    for part, shape in (('A', (rank, width)), ('B', (3 * width, rank)))
  }


SMALL = {'hidden_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 2,
         'intermediate_size': 20, 'image_size': 16, 'patch_size': 4}  # fmt: skip


def branches(layers=2):
  """Tiny DINO, CLIP and OpenCLIP as DreamSim puts them together."""
  sizes = SMALL | {'num_hidden_layers': layers}
  clip = lambda act: transformers.CLIPVisionModelWithProjection(
    transformers.CLIPVisionConfig(**sizes, hidden_act=act, projection_dim=6)
  )
  dino = transformers.ViTModel(transformers.ViTConfig(**sizes, layer_norm_eps=1e-6))
  return [dino, clip('quick_gelu'), clip('gelu')]
