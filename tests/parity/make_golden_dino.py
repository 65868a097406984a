"""Writes tests/golden/dino*.npz and dreamsim.npz, as make_golden.py does its own.

    python tests/parity/make_golden_dino.py   # with the parity extra

Names are those of the files on the hub (dino_original: of facebookresearch/dino).
"""


import dino_layouts
import make_golden
import numpy as np
from dino_layouts import SMALL
from reference import nchw, torch, transformers

V2 = {k: v for k, v in SMALL.items() if k != 'intermediate_size'} | {'mlp_ratio': 2}
SIZES = {'same': (16, 16), 'other': (12, 24)}


class Named(torch.nn.Module):
  """A model whose weights go into the fixture under the names that `names(model)` gives them."""

  def __init__(self, model, names):
    super().__init__()
    self.model, self.names = model, names

  def state_dict(self):
    return {k: torch.from_numpy(np.array(v)) for k, v in self.names(self.model).items()}


def pixels(seed):
  rng = np.random.default_rng(seed)
  return {
    f'images_{k}': rng.normal(size=(1, *size, 3)).astype(np.float32) for k, size in SIZES.items()
  }


def encoder(model, given, names=dino_layouts.on_disk):
  """The fixture of an encoder or of its classifier."""

  def outputs(named):
    found, whole = {}, named.model
    inner = getattr(whole, whole.base_model_prefix, whole)
    options = {'interpolate_pos_encoding': True} if whole.config.model_type == 'vit' else {}
    for name, images in given.items():
      size, x = name.removeprefix('images_'), torch.from_numpy(nchw(images))
      stages, hooks = [], []
      layers = inner.layers if hasattr(inner, 'layers') else inner.encoder.layer
      hooks = [m.register_forward_hook(lambda *a, s=stages: s.append(a[2]))
               for m in (inner.embeddings, *layers)]  # fmt: skip
      tokens = inner(x, **options).last_hidden_state
      for hook in hooks:
        hook.remove()
      stages = [s[0] if isinstance(s, tuple) else s for s in stages]
      found |= {f'embed_{size}': stages[0], f'tokens_{size}': tokens}
      found |= {f'block{i}_{size}': x for i, x in enumerate(stages[1:])}
      found[f'features_{size}'] = tokens[:, 0]
      if inner is not whole:
        found[f'logits_{size}'] = whole(x).logits
    return found

  return {'model': 'dino', 'params': model.config.to_dict()}, Named(model, names), given, outputs


def dino_vit():
  return encoder(transformers.ViTModel(transformers.ViTConfig(**SMALL)), pixels(1))


def dino_original():
  model = transformers.ViTModel(transformers.ViTConfig(**SMALL, layer_norm_eps=1e-6))
  return encoder(dino_layouts.original_positions(model), pixels(2), dino_layouts.original)


def dinov2():
  config = transformers.Dinov2Config(**V2, num_labels=5)
  return encoder(transformers.Dinov2ForImageClassification(config), pixels(3))


def dinov2_registers():
  config = transformers.Dinov2WithRegistersConfig(**V2, num_labels=5, use_swiglu_ffn=True)
  return encoder(transformers.Dinov2WithRegistersForImageClassification(config), pixels(4))


def dreamsim():
  models, scale = torch.nn.ModuleList(dino_layouts.branches(1)), 0.25
  rng = np.random.default_rng(5)
  given = {'images': rng.random((2, 16, 16, 3)).astype(np.float32)}
  low_rank = dino_layouts.adapters(rng, layers=1)

  def names(models):
    found = {f'{i}.{k}': v for i, m in enumerate(models)
             for k, v in dino_layouts.original(m).items()}  # fmt: skip
    return found | {f'lora.{k}': v for k, v in low_rank.items()}

  def outputs(named):
    before = {k: v.clone() for k, v in named.state_dict_of_models().items()}
    for i, model in enumerate(named.model):
      dino_layouts.merge(model, low_rank, i, scale)
    parts, whole = dino_layouts.embedding(named.model, given['images'])
    named.model.load_state_dict(before)
    return {f'branch{i}': x for i, x in enumerate(parts)} | {'embedding': whole}

  named = Named(models, names)
  named.state_dict_of_models = models.state_dict
  return {'model': 'dreamsim', 'scale': scale, 'heads': 2}, named, given, outputs


if __name__ == '__main__':
  torch.manual_seed(0)
  makers = (dino_vit, dino_original, dinov2, dinov2_registers, dreamsim)
  files = {f'{make.__name__}.npz': make for make in makers}
  make_golden.add({name: make_golden.write(name, *make()) for name, make in files.items()})
