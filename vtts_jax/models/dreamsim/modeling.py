"""DreamSim (Fu, Tamir et al. 2023, arXiv 2306.09344): how different people find two pictures.

The distance is one minus the cosine of two embeddings. An embedding joins the outputs of several
vision transformers, each tuned by low rank adapters: DINO's class token as the last block leaves it
(before the norm), and the projected class tokens of CLIP and OpenCLIP. Its mean over the dimensions
is subtracted, and it is scaled to length 1. Written from dreamsim 0.2.1
(github.com/ssundaram21/dreamsim); the branches are checked against `transformers` (tests/parity).

Letters: R pictures · D width of a branch · E width of the embedding.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vtts_jax.media.preprocess import Preprocessing, normalize_channels
from vtts_jax.models.dino import modeling as dino

SIDE = 224
# no normalisation: each branch has its own
PREPROCESSING = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), mode='squash')
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_CLIP = {'eps': 1e-5, 'embed_norm': True, 'project': 512}
# named as in the original code, whose position offset they all have
BRANCHES = {
  'dino_vitb16': dino.Config(offset=0.1),
  'dinov2_vitb14': dino.Config(patch=14, grid=37, layer_scale=True, offset=0.1),
  'clip_vitb16': dino.Config(**_CLIP, act='quick_gelu', offset=0.1),
  'clip_vitb32': dino.Config(**_CLIP, patch=32, grid=7, act='quick_gelu', offset=0.1),
  'open_clip_vitb16': dino.Config(**_CLIP, offset=0.1),
  'open_clip_vitb32': dino.Config(**_CLIP, patch=32, grid=7, offset=0.1),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The branches, a `dino.Config` each, in the order of the embedding."""

  branches: tuple[dino.Config, ...]

  @property
  def width(self) -> int:
    """E: the branches' features lie one after the other."""
    return sum(c.project or c.width for c in self.branches)


ENSEMBLE = ('dino_vitb16', 'clip_vitb16', 'open_clip_vitb16')
SINGLES = ('dino_vitb16', 'dinov2_vitb14', 'clip_vitb32', 'open_clip_vitb32')
MEMBERS = {'ensemble': ENSEMBLE, **{name: (name,) for name in SINGLES}}
_TINY = dino.Config(width=8, layers=2, heads=2, hidden=16, patch=32, grid=5, eps=1e-5)
_TINY_CLIP = dataclasses.replace(_TINY, embed_norm=True, project=6)
SIZES = {
  'tiny': Config((_TINY, dataclasses.replace(_TINY_CLIP, act='quick_gelu'), _TINY_CLIP)),
  **{name: Config(tuple(BRANCHES[m] for m in members)) for name, members in MEMBERS.items()},
}
# a part is one of the released models
PARTS = tuple(MEMBERS)


def part_of(c: Config, part: str) -> Config:
  """Returns the config as it is: a random size says itself which branches it has."""
  del part
  return c


class DreamSim(nnx.Module):
  """`embed_images(images [R, 224, 224, 3] in [0, 1])` -> unit embeddings `[R, E]` float32."""

  def __init__(self, config: Config, *, rngs):
    self.config = config
    self.branches = nnx.List([dino.Dino(c, rngs=rngs) for c in config.branches])

  def embed_images(self, images):
    x = jnp.concatenate([branch_features(branch, images) for branch in self.branches], -1)
    # over all branches at once, as published
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def branch_features(branch, images):
  """Returns a branch's part of the embedding, float32 `[R, D]`; with CLIP D is the projection's."""
  # each branch was trained under its own mean and deviation
  if branch.project is not None:
    return branch.image_features(normalize_channels(images, CLIP_MEAN, CLIP_STD))
  # DINO's last norm is left out, as published
  tokens = branch.trunk(branch.embed_patches(normalize_channels(images, dino.MEAN, dino.STD)))
  return tokens[:, 0].astype(jnp.float32)


def build_model(config: Config, seed=0) -> DreamSim:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return DreamSim(config, rngs=nnx.Rngs(seed))


def fitting_of(c: Config) -> tuple[Preprocessing, int]:
  """Returns how pictures are resized, and the side of the square that is left."""
  del c
  return PREPROCESSING, SIDE


def preprocess(c: Config, images, fitted: bool = False):
  """Pictures `[..., H, W, 3]` -> `[..., 224, 224, 3]` by PIL's bicubic; proportions are lost.

  Pictures that are `fitted` have that size already.
  """
  del c
  return images if fitted else PREPROCESSING.fit_images(images, SIDE)


def count_flops(c: Config, op: str = 'image') -> int:
  """Matmul FLOPs of the embedding of one picture."""
  return sum(dino.count_flops(branch, op, SIDE) for branch in c.branches)
