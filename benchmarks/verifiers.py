"""Pictures per second of the verifiers at their released sizes, against the torch classes.

    python benchmarks/verifiers.py [--only=clip_b32,yolos_tiny] [--batch=32] [--repeats=2]

Needs the parity extra (torch, transformers). Random weights: speed does not depend on them. Ours is
the whole `score` of one prompt's candidates, 8 bit rounding and normalisation included, at the side
that the model reads; torch is the class of transformers on pixels that are ready, in inference mode
and with its own attention kernels. float32, all cores; both take turns and the fastest counts. The
matmul rate is measured in between. H/14 (PickScore, HPS) takes minutes.

Prints a table and, last, one line of JSON: for each, pictures per second over torch's.
"""

import argparse
import json
import sys
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vtts_jax import components

warnings.simplefilter('ignore')  # torch's, about itself
import torch  # noqa: E402
import transformers  # noqa: E402


class Row(NamedTuple):
  """A verifier, its size, the side of its pictures, and what makes the torch module to call."""

  verifier: str
  size: str
  side: int
  theirs: object


def _clip(width, layers, heads, patch, act, project):
  vision = transformers.CLIPVisionConfig(
    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, patch_size=patch,
    num_attention_heads=heads, hidden_act=act, projection_dim=project,
  )  # fmt: skip
  return lambda: transformers.CLIPVisionModelWithProjection(vision)


def _siglip():
  return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(patch_size=16))


def _dinov2():
  # positions of 518 / 14, as released; at 224 they are resized
  config = transformers.Dinov2Config(image_size=518, patch_size=14, num_labels=1000)
  return transformers.Dinov2ForImageClassification(config)


def _dino():
  return transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)


def _blip():
  vision = transformers.BlipVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=224, patch_size=16,
  )  # fmt: skip
  text = transformers.BlipTextConfig(encoder_hidden_size=1024, vocab_size=30524)
  config = transformers.BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
  model = transformers.BlipForImageTextRetrieval(config)

  class Reward(torch.nn.Module):
    """Both towers, as ImageReward uses them; its head does not count."""

    def forward(self, pixels):
      seen = model.vision_model(pixels).last_hidden_state
      ids = torch.full((len(pixels), 35), 5)
      return model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state[:, 0]

  model.eval()
  return Reward()


def _owl():
  model = transformers.OwlViTForObjectDetection(transformers.OwlViTConfig())

  class Detect(torch.nn.Module):
    """Boxes and classes for two queries a picture."""

    def forward(self, pixels):
      ids = torch.full((2 * len(pixels), 16), 5)
      mask = torch.ones_like(ids)
      return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits

  model.eval()
  return Detect()


def _yolos():
  config = transformers.YolosConfig(
    hidden_size=192, intermediate_size=768, num_attention_heads=3, image_size=[800, 1333],
    num_labels=91, use_mid_position_embeddings=False,
  )  # fmt: skip
  return transformers.YolosForObjectDetection(config)


ROWS = {
  'clip_b32': Row('clip', 'b32', 224, _clip(768, 12, 12, 32, 'quick_gelu', 512)),
  'clip_b16': Row('clip', 'b16', 224, _clip(768, 12, 12, 16, 'quick_gelu', 512)),
  'siglip_b16': Row('clip', 'siglip_b16_224', 224, _siglip),
  'dino_b16': Row('self_consistency', 'dino_vitb16', 224, _dino),
  'dinov2_b': Row('dino_logit', 'dinov2_base_imagenet1k_1_layer', 224, _dinov2),
  'aesthetic_l14': Row('aesthetic', 'l14', 224, _clip(1024, 24, 16, 14, 'quick_gelu', 768)),
  'image_reward': Row('image_reward', 'image_reward', 224, _blip),
  'owlvit_b32': Row('geneval', 'owlvit_b32', 768, _owl),
  'yolos_tiny': Row('geneval', 'yolos_tiny', 512, _yolos),
  'pickscore_h14': Row('pickscore', 'h14', 224, _clip(1280, 32, 16, 14, 'gelu', 1024)),
}


def once(call) -> float:
  """Seconds of one call."""
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def measure(row: Row, batch: int, repeats: int):
  """(seconds of ours, of theirs, FLOP/s of ours, matmul rate)."""
  verifier = components.load(f'verifiers.{row.verifier}', weights=f'random:{row.size}')
  params = verifier.load()
  prompt = {'text': 'a photo of a dog and a bench', 'label': 7}
  vctx = jax.jit(verifier.encode)(params, jax.tree.map(jnp.asarray, verifier.tokenize([prompt])))
  pixels = np.random.default_rng(0).random((batch, row.side, row.side, 3), np.float32)
  images = jnp.asarray(pixels)[None]
  observed = {'image': images}
  if 'early_image' in verifier.needs:  # a score is two embeddings: half the pictures, two each
    images = images[:, : batch // 2]
    observed = {'image': images, 'early_image': observed['image'][:, batch // 2 :]}
  score = jax.jit(verifier.score)
  ours = lambda: jax.block_until_ready(score(params, vctx, observed))
  module = row.theirs().eval()
  ready = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
  a, product = jnp.ones((2048, 2048)), jax.jit(lambda a: a @ a)
  matmul = lambda: product(a).block_until_ready()
  with torch.inference_mode():
    calls = [ours, lambda: module(ready), matmul]
    best = [min(pair) for pair in zip(*([once(c) for c in calls] for _ in range(repeats + 1)))]
  flops = images.shape[1] * verifier.cost('score').flops
  return best[0], best[1], flops / best[0], 2 * 2048**3 / best[2]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default=','.join(ROWS), help=f'some of {",".join(ROWS)}')
  parser.add_argument('--batch', type=int, default=32, help='pictures at a time (default 32)')
  parser.add_argument('--repeats', type=int, default=2, help='timed repeats of each (default 2)')
  args = parser.parse_args()
  names = args.only.split(',')
  unknown = [name for name in names if name not in ROWS]
  if unknown or args.batch < 2 or args.repeats < 1:
    parser.error(f'--only={args.only} --batch={args.batch} --repeats={args.repeats}: must be some '
                 f'of {", ".join(ROWS)}; at least 2; at least 1')  # fmt: skip
  titles = ('model', 'verifier', 'side', 'pictures/s', 'torch', 'ratio', 'GFLOP/s', 'of matmul')
  table, found = Table(*titles, box=None), {}
  for name in names:
    row = ROWS[name]
    ours, theirs, rate, matmul = measure(row, args.batch, args.repeats)
    found[name] = round(theirs / ours, 3)
    numbers = (args.batch / ours, args.batch / theirs, theirs / ours, rate / 1e9, rate / matmul)
    table.add_row(name, row.verifier, str(row.side), *(f'{n:.2f}' for n in numbers))
    print(f'{name}: {theirs / ours:.2f}', file=sys.stderr, flush=True)
    jax.clear_caches()
  Console(width=110).print(table)
  print(json.dumps(found))


if __name__ == '__main__':
  main()
