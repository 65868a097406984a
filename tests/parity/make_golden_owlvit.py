"""Writes tests/golden/owlvit.npz, owlv2.npz and yolos.npz, as make_golden.py does its own.

python tests/parity/make_golden_owlvit.py     # in an environment with the parity extra
"""


import make_golden
import numpy as np
from reference import nchw, torch, transformers

transformers.OwlViTModel, transformers.Owlv2Model, transformers.YolosModel  # noqa: B018
TOWER = {'num_hidden_layers': 2, 'num_attention_heads': 2}
OWL = {
  'text_config': {'num_hidden_layers': 1, 'num_attention_heads': 2, 'vocab_size': 30,
                  'hidden_size': 8, 'intermediate_size': 12, 'max_position_embeddings': 6},
  'vision_config': {**TOWER, 'hidden_size': 12, 'intermediate_size': 16, 'image_size': 16,
                    'patch_size': 4},
  'projection_dim': 8,
}  # fmt: skip
YOLOS = {
  **TOWER, 'hidden_size': 16, 'intermediate_size': 24, 'image_size': [12, 20], 'patch_size': 4,
  'num_detection_tokens': 4, 'use_mid_position_embeddings': True,
}  # fmt: skip
IDS = np.array([
  [[28, 3, 4, 29, 0, 0], [28, 7, 5, 1, 2, 29]], [[28, 3, 29, 0, 0, 0], [28, 9, 9, 9, 29, 0]],
])  # fmt: skip


def pictures(seed):
  return np.random.default_rng(seed).normal(size=(2, 16, 16, 3)).astype(np.float32)


def owl(v2):
  kind = 'Owlv2' if v2 else 'OwlViT'
  config = getattr(transformers, f'{kind}Config')(**OWL)
  model = getattr(transformers, f'{kind}ForObjectDetection')(config)
  given = {'images': pictures(3), 'ids': IDS}

  def outputs(model):
    ids = torch.from_numpy(IDS.reshape(4, 6))
    out = model(input_ids=ids, pixel_values=torch.from_numpy(nchw(given['images'])))
    found = {
      'features': out.image_embeds.reshape(2, 16, -1), 'queries': out.text_embeds,
      'logits': out.logits, 'boxes': out.pred_boxes,
    }  # fmt: skip
    return found | ({'objectness': out.objectness_logits} if v2 else {})

  return {'model': 'owlvit', 'params': OWL}, model, given, outputs


def yolos():
  model = transformers.YolosForObjectDetection(transformers.YolosConfig(**YOLOS, num_labels=6))
  given, blocks = {'images': pictures(4)}, {}
  for name, index in (('first', 0), ('last', -1)):
    keep = lambda *call, name=name: blocks.update({name: call[2].clone()})
    model.vit.encoder.layer[index].register_forward_hook(keep)

  def outputs(model):
    out = model(torch.from_numpy(nchw(given['images'])))
    return {**blocks, 'logits': out.logits, 'boxes': out.pred_boxes}

  return {'model': 'yolos', 'params': YOLOS}, model, given, outputs


if __name__ == '__main__':
  torch.manual_seed(0)
  made = {'owlvit.npz': owl(False), 'owlv2.npz': owl(True), 'yolos.npz': yolos()}
  make_golden.add({name: make_golden.write(name, *parts) for name, parts in made.items()})
