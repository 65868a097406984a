"""DINO (Caron et al. 2021, arXiv 2104.14294) and DINOv2 (Oquab et al. 2023, 2304.07193; registers:
Darcet et al. 2023, 2309.16588): pictures to a class token and patch tokens.

One vision transformer: patches, a class token, learned positions resized to the grid at hand, after
those the registers, pre-norm blocks (DINOv2: layer scale; the giant: SwiGLU), a final norm. The
linear ImageNet head reads the class token and the mean of the patches. Checked against
`transformers` (`ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel` and their classifiers) and,
for the positions of the original code, `torch.nn.functional.interpolate` (tests/parity).

Letters: R pictures · H W their sides · P side of a patch · G side of the grid of the positions ·
N patches · T tokens, the class first, then registers, then patches · D width · C classes.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.media import preprocess as pictures
from vtts_jax.models import vit

SIDE, RESIZED = 224, 256  # of the published evaluation: the shorter side to 256, the middle 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options.

  Attributes:
    hidden: inner width of the feed-forward layer (of SwiGLU: of each half).
    patch: P. grid: G.
    act, eps, layer_scale: of the blocks (`vit.Config`).
    registers: how many.
    antialias: whether positions are resized with antialiasing (the models with registers).
    offset: what the original code adds to the size of the grid before it resizes the positions,
      0.1 (an old guard against rounding, which shifts them a little); transformers adds nothing.
    embed_norm: a norm after the positions, and
    project: the width of a projection of the class token, 0 for none: CLIP's tower as DreamSim
      holds it.
    classes: C of the linear head; 0 without.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  hidden: int = 3072
  patch: int = 16
  grid: int = 14
  act: str = 'gelu'
  eps: float = 1e-6
  layer_scale: bool = False
  registers: int = 0
  antialias: bool = False
  offset: float = 0.0
  embed_norm: bool = False
  project: int = 0
  classes: int = 0

  def __post_init__(self):
    _ = self.trunk  # refuses what the blocks do not know

  @property
  def trunk(self) -> vit.Config:
    return vit.Config(
      self.width, self.layers, self.heads, self.hidden, self.act, self.eps, self.layer_scale
    )


def _small(**options):
  return Config(width=384, layers=12, heads=6, hidden=1536, **options)


def _sizes():
  """The released models by their names on the hub, under facebook/, with - for _."""
  second = {'patch': 14, 'grid': 37, 'layer_scale': True}
  second = {
    'small': _small(**second),
    'base': Config(width=768, layers=12, heads=12, hidden=3072, **second),
    'large': Config(width=1024, layers=24, heads=16, hidden=4096, **second),
    'giant': Config(width=1536, layers=40, heads=24, hidden=4096, act='swiglu', **second),
  }
  found = {f'dinov2_{size}': c for size, c in second.items()} | {
    f'dinov2_with_registers_{size}': dataclasses.replace(c, registers=4, antialias=True)
    for size, c in second.items()
  }
  found |= {
    f'{name}_imagenet1k_1_layer': dataclasses.replace(c, classes=1000) for name, c in found.items()
  }
  return {
    'dino_vits16': _small(patch=16, grid=14, eps=1e-12),
    'dino_vits8': _small(patch=8, grid=28, eps=1e-12),
    'dino_vitb16': Config(patch=16, grid=14, eps=1e-12),
    'dino_vitb8': Config(patch=8, grid=28, eps=1e-12),
    **found,
  }


SIZES = {
  'tiny': Config(width=16, layers=2, heads=2, hidden=32, patch=32, grid=5, classes=10),
  **_sizes(),
}
PARTS = ('encoder',)


def part_of(c: Config, part: str) -> Config:
  """The config of the encoder alone, without the linear head."""
  del part
  return dataclasses.replace(c, classes=0)


# ------------------------------------------------------------------------------------ the positions


def _cubic(x, a):
  x = abs(x)
  if x < 1:
    return ((a + 2) * x - (a + 3)) * x * x + 1
  return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@functools.cache
def resizing(old: int, new: int, offset: float = 0.0, antialias: bool = False) -> np.ndarray:
  """The matrix `[old, new]` by which torch's bicubic `interpolate` resizes one axis.

  Without antialiasing the cubic has a = -0.75 and what is past the border is the border; with it,
  a = -0.5, the filter widens where the axis shrinks, and what is past the border is left out.
  """
  scale, table = old / (new + offset), np.zeros((old, new))
  stretch = max(scale, 1.0) if antialias else 1.0
  for i in range(new):
    centre = (i + 0.5) * scale - 0.5
    for j in range(math.ceil(centre - 2 * stretch), math.floor(centre + 2 * stretch) + 1):
      weight = _cubic((j - centre) / stretch, -0.5 if antialias else -0.75)
      if not antialias or 0 <= j < old:
        table[min(max(j, 0), old - 1), i] += weight
  return (table / table.sum(0)).astype(np.float32)


# ---------------------------------------------------------------------------------------- the model


class Dino(nnx.Module):
  """`__call__(images [R, H, W, 3], normalised)` -> tokens `[R, T, D]` after the last norm."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    table = lambda *shape: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))
    self.patch = nnx.Linear(3 * c.patch**2, c.width, rngs=rngs)
    self.cls, self.positions = table(1, 1, c.width), table(1, 1 + c.grid**2, c.width)
    self.registers = table(1, c.registers, c.width) if c.registers else None
    self.embed_norm = vit.LayerNorm(c.width, c.eps) if c.embed_norm else None
    self.trunk = vit.Trunk(c.trunk, rngs=rngs)
    self.norm = vit.LayerNorm(c.width, c.eps)
    self.project = table(c.width, c.project) if c.project else None
    self.head = nnx.Linear(2 * c.width, c.classes, rngs=rngs) if c.classes else None

  def __call__(self, images):
    return self.norm(self.trunk(self.embed(images)))

  def embed(self, images):
    """Tokens `[R, T, D]` before the first block."""
    c = self.config
    rows, columns = images.shape[1] // c.patch, images.shape[2] // c.patch
    x = self.patch(vit.patches(images.astype(self.cls.dtype), c.patch))
    cls = jnp.broadcast_to(self.cls[...], (len(x), 1, c.width))
    x = jnp.concatenate([cls, x], 1) + self.position(rows, columns).astype(x.dtype)
    if self.embed_norm is not None:
      x = self.embed_norm(x)
    if self.registers is None:
      return x
    registers = jnp.broadcast_to(self.registers[...], (len(x), c.registers, c.width))
    return jnp.concatenate([x[:, :1], registers, x[:, 1:]], 1)

  def position(self, rows, columns):
    """Positions `[1, 1 + rows columns, D]` float32 of a grid."""
    c, known = self.config, self.positions[...].astype(jnp.float32)
    if rows == columns == c.grid:
      return known
    table = known[:, 1:].reshape(c.grid, c.grid, c.width)
    by = [resizing(c.grid, new, c.offset, c.antialias) for new in (rows, columns)]
    table = jnp.einsum('ghd,gr,hc->rcd', table, *by)
    return jnp.concatenate([known[:, :1], table.reshape(1, -1, c.width)], 1)

  def features(self, images):
    """The class token, `[R, D]` or as wide as `project`, float32."""
    x = self.norm(self.trunk(self.embed(images))[:, 0])
    return (x if self.project is None else x @ self.project[...]).astype(jnp.float32)

  def embed_images(self, images):
    """Unit vectors `[R, D]` float32: `features` of length 1."""
    x = self.features(images)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def logits(self, images):
    """Of the linear head, `[R, C]` float32."""
    x = self(images)
    patches = x[:, 1 + self.config.registers :].astype(jnp.float32).mean(1).astype(x.dtype)
    return self.head(jnp.concatenate([x[:, 0], patches], -1)).astype(jnp.float32)


def build(config: Config, seed=0) -> Dino:
  """A random encoder; under `modules.abstract_module` no memory is used."""
  return Dino(config, rngs=nnx.Rngs(seed))


def picture_sides(c: Config) -> tuple[int, int]:
  """(side of the square that is cut out, what the shorter side is resized to before)."""
  del c
  return SIDE, RESIZED


def preprocess(c: Config, images, fitted: bool = False):
  """Pictures `[..., H, W, 3]` in [0, 1] as the published evaluations of both families make them,
  `[..., 224, 224, 3]` normalised: PIL's bicubic to 256 and the middle 224, for every size;
  `fitted` ones are 224 x 224 already."""
  del c
  if not fitted:
    images = pictures.center_crop(pictures.resize_shortest(images, RESIZED), SIDE)
  return pictures.normalize(images, MEAN, STD)


def flops(c: Config, op: str = 'image', side: int = SIDE) -> int:
  """Matmul FLOPs of the encoder, with projection or head, for one picture of so many pixels."""
  del op  # there is nothing else to do than 'image'
  patches = (side // c.patch) ** 2
  own = 2 * patches * 3 * c.patch**2 * c.width + 2 * c.width * c.project
  return own + vit.flops(c.trunk, 1 + c.registers + patches) + 4 * c.width * c.classes
